"""Answers in words: letters of multiple choice, names, yes and no, dates."""

from __future__ import annotations

import re

from grpo_jax.rewards.math.final_answer import Answer
from grpo_jax.rewards.math.units import singular

# Possessive, here and in LABEL: what ends in "nd" could be divided in exponentially many ways.
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
    """A letter of choice, initials, or words; None for what is not prose.

    One capital, also in brackets, is a letter of choice or a name. Several capitals are initials or points.
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
    known = _date(plain) or SYNONYMS.get(plain.lower())
    if known or re.fullmatch(r"[A-Z]{2,}", plain):
        return Answer("text", known or plain)
    if SEVERAL_NAMES.fullmatch(plain):
        return None  # a list
    if not WORD.fullmatch(plain) or not (r"\text" in text or plain.lower() in SHORT_WORDS or _is_prose(plain)):
        return None
    words = re.sub(r"^(?:a|an|the) (?=\w)", "", plain.replace(".", "").replace(",", ""), flags=re.IGNORECASE)
    return Answer("text", SYNONYMS.get(words.lower(), words))


def read_choice(text: str) -> tuple[str, str] | None:
    r"""The letter and the rest of ``(B) 12``, ``\textbf{(B)}\ 12`` or ``B. 12``; None for anything else."""
    match = CHOICE.fullmatch(text)
    if match is None:
        return None
    letter = next(group for group in (*match.groups()[:4], match[6]) if group)
    return letter, match["rest"] or match["words"]


def same_text(gold: str, given: str) -> bool:
    """Whether two texts are the same: single letters and initials by case, words without."""
    if gold == given:
        return True
    is_word = len(gold) > 2 and (not gold.isupper() or gold.lower() not in ("abc",))
    if " " in gold and [*map(singular, gold.lower().split())] == [*map(singular, given.lower().split())]:
        return True
    has_small = any(each.islower() for each in gold + given)
    return gold.lower() == given.lower() and (gold.lower() in SHORT_WORDS or (is_word and has_small))


def _is_prose(plain: str) -> bool:
    words = re.split(r"[ '\-]", plain)
    return not set(words) & NEVER_PROSE and any(len(word) > 2 and word.isalpha() for word in words)


def _date(words: str) -> str | None:
    """``March 5, 2020`` and ``5th March 2020`` in one spelling."""
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
