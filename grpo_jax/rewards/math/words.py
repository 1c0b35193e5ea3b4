"""Answers in words: multiple-choice letters, names, yes and no, dates."""

from __future__ import annotations

import re

from grpo_jax.rewards.math.final_answer import Answer
from grpo_jax.rewards.math.units import singular

# Possessive quantifiers, also in LABEL: with others, a text that ends in "nd" has exponentially many matches.
WORD = re.compile(r"[A-Za-z]++\.?(?: (?:[A-Za-z]++|\d{1,4}+(?:st|nd|rd|th)?)\.?|['\-][A-Za-z]++)*+")
SEVERAL_NAMES = re.compile(r"\w+(?: \w+)?(?:, \w+(?: \w+)?)*+,? (?:and|or) \w+(?: \w+)?")
SHORT_WORDS = {"no", "yes", "up", "none", "even", "odd", "true", "false", "all"}
NEVER_PROSE = {"or", "and"}
CHOICE = re.compile(
    r"(?:\\text ?\{ ?\(?([A-J])\)?[.:)]? ?\}|\(([A-J])\)(?= |\\text)|([A-J])\)|([A-J])[.:](?= )) ?[:.]? ?(?P<rest>.+)|"
    r"\\text ?\{ ?\(([A-J])\) (?P<words>[^{}]+)\}"
)
LABEL = (
    r"(?:(?:\\(?:angle|triangle|overline|parallel|perp|cong|sim) ?\{? ?)++(?:[A-Z] ?)++\}? ?|(?:[A-Z] ?){2,}+(?=\\))++"
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTH_NAMES = "january february march april may june july august september october november december"
MONTHS = MONTH_NAMES.split()
SYNONYMS = {
    "dne": "does not exist",
    "all real number": "all real numbers",
    "the set of all real numbers": "all real numbers",
    "no real solution": "no real solutions",
}


def read_words(text: str) -> Answer | None:
    """A multiple-choice letter, initials or words; None for a text that is not prose.

    A single capital, also in brackets, is a multiple-choice letter or a name. Several capitals are initials or points.

    Args:
        text: normalized LaTeX.
    """
    plain = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).strip(" .").split())
    if match := re.fullmatch(r"\( ?([A-Z]) ?\)|([A-Z])", plain):
        return Answer("text", match[1] or match[2])
    if re.fullmatch(LABEL, text):
        return Answer("text", re.sub(r"\\overline\{([A-Z]+)\}", r"\1", text.replace(" ", "")))
    if match := re.fullmatch(r"(?:option|choice|answer) \(?([A-J])\)?", plain, re.IGNORECASE):
        return Answer("text", match[1])
    plain = re.sub(r"^there (?:is|are) (?=no )", "", plain, flags=re.IGNORECASE)
    if plain.lower() in ("no solution", "no solutions", "empty set", "the empty set"):
        return Answer("set", ())
    canonical = _date(plain) or SYNONYMS.get(plain.lower())
    if canonical or re.fullmatch(r"[A-Z]{2,}", plain):
        return Answer("text", canonical or plain)
    if SEVERAL_NAMES.fullmatch(plain):
        return None  # a list
    if not WORD.fullmatch(plain) or not (r"\text" in text or plain.lower() in SHORT_WORDS or _is_prose(plain)):
        return None
    words = re.sub(r"^(?:a|an|the) (?=\w)", "", plain.replace(".", "").replace(",", ""), flags=re.IGNORECASE)
    return Answer("text", SYNONYMS.get(words.lower(), words))


def read_choice(text: str) -> tuple[str, str] | None:
    r"""The letter and the content of ``(B) 12``, ``\textbf{(B)}\ 12`` or ``B. 12``; None for any other text."""
    match = CHOICE.fullmatch(text)
    if match is None:
        return None
    letter = next(group for group in (*match.groups()[:4], match[6]) if group)
    return letter, match["rest"] or match["words"]


def same_words(gold: str, answer: str) -> bool:
    """Whether two texts are equal: single letters and initials case-sensitively, words without case or number.

    Args:
        gold: gold text; its length and case decide whether it is a word.
        answer: text to compare.
    """
    if gold == answer:
        return True
    is_word = len(gold) > 2 and (not gold.isupper() or gold.lower() not in ("abc",))
    if " " in gold and [*map(singular, gold.lower().split())] == [*map(singular, answer.lower().split())]:
        return True
    has_lower = any(letter.islower() for letter in gold + answer)
    return gold.lower() == answer.lower() and (gold.lower() in SHORT_WORDS or (is_word and has_lower))


def _is_prose(plain: str) -> bool:
    words = re.split(r"[ '\-]", plain)
    return not set(words) & NEVER_PROSE and any(len(word) > 2 and word.isalpha() for word in words)


def _date(words: str) -> str | None:
    """Canonical spelling of a date, the same for ``March 5, 2020`` and ``5th March 2020``; None for other words."""
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)(?![a-z])|[.,]", "", words.lower())
    parts = [part for part in words.split() if part != "of"]
    days = [part for part in parts if part in WEEKDAYS]
    parts = [part for part in parts if part not in WEEKDAYS]
    months = [part for part in parts if part in MONTHS or part in {month[:3] for month in MONTHS}]
    numbers = [part for part in parts if part.isdigit()]
    if len(months) != 1 or len(months) + len(numbers) != len(parts) or not 1 <= len(numbers) <= 2:
        return None
    month = next(month for month in MONTHS if month.startswith(months[0]))
    return " ".join([*days, month, *sorted(numbers, key=lambda number: (len(number) > 2, number))])
