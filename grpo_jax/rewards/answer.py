"""Right or wrong by the final answer alone: small and strict, so that a wrong answer never scores."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calling import per_sample

GSM8K_MARK = "####"
LONGEST_NUMBER = 100

ANSWER_TAG = re.compile(r"</?answer>")
BRACE = re.compile(r"(\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
SENTENCE = re.compile(r"\banswer(?: is|:|=| =)[ \t]*:?[ \t]*(.+?)(?=\n|\.(?:\s|$)|$)", re.IGNORECASE)
STATED = re.compile(rf"\\boxed|{GSM8K_MARK}")
MATH = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
WRAPPERS = (*MATH, (r"\boxed{", "}"), *MATH)

UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(
    rf"""
    (?P<sign>[+\-\u2212]?)
    (?:\\?\$\ ?)?
    (?P<inner_sign>[+\-\u2212]?)
    (?:
        (?P<decimal>(?:{UNSIGNED}(?:\.[0-9]+)?|\.[0-9]+))
        (?:[eE](?P<exponent>[+\-]?[0-9]{{1,3}}))?
        (?P<percent>\ ?\\?%)?
      | (?P<top>{UNSIGNED})\ ?/\ ?(?P<bottom>{UNSIGNED})
      | \\[dt]?frac\{{(?P<latex_top>[0-9]+)\}}\{{(?P<latex_bottom>[0-9]+)\}}
    )
    (?:\ dollars?)?
    """,
    re.VERBOSE,
)


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion or of a worked solution; None if it states none.

    What stands before the last ``</think>`` is thought, not answer, and is not looked at. Of the rest it is the inside
    of the last ``<answer>...</answer>`` without a tag of its own kind inside. Or else it is what stands last of: an
    outermost ``\boxed{...}``, braces balanced; what follows ``####`` on its line, where nothing is boxed; the rest of a
    sentence after "the answer is" or "answer:". Inside ``<answer>`` a single one of these is the answer, and two that
    differ are none. Surrounding blanks are stripped.
    """
    text = text.rpartition("</think>")[2]
    tagged = _last_tagged(text)
    if tagged is None:
        statements = _statements(text)
        return max(statements)[1] if statements else None
    stated = {answer for _, answer in _statements(tagged)}
    return tagged.strip() if not stated else stated.pop() if len(stated) == 1 else None


def numeric_value(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number and nothing else; None for anything else.

    A number is made of ASCII digits: an integer, with or without commas between thousands; a decimal, with or without
    an exponent of up to three digits, so that neither 1e-400 nor 1e400 is rounded; ``a/b`` or ``\frac{a}{b}``. It may
    have a sign; ``$`` before it or the word dollars after it; a percent sign, which divides by 100; a closing period;
    and around it ``$...$``, ``\(...\)``, ``\[...\]`` or ``\boxed{...}``. A division by zero, a list, an equation, any
    other unit (5 m is not 5 cm) and a text of more than 100 characters have no value.
    """
    text = _unwrap(text)
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    magnitude = _magnitude(match)
    is_negative = (match["sign"] or match["inner_sign"]) in ("-", "\u2212")
    return -magnitude if is_negative and magnitude is not None else magnitude


def canonical_answer(text: str) -> Fraction | str:
    """What two answers have in common if and only if they are taken to be equal.

    The value, for a number; for another text the text itself, runs of blanks made one space, without mathematics
    delimiters around it and a period after it. Case counts.
    """
    value = numeric_value(text)
    return _unwrap(text) if value is None else value


@per_sample(columns=("answer",))
def answer_reward(
    prompts: list[str], completions: list[str], *, answer: list[str | None], **_columns: list[Any]
) -> list[float | None]:
    """1.0 where a completion's final answer equals the gold answer, else 0.0; None where the gold is blank or None.

    Args:
        prompts: not looked at.
        completions: the final answer is what ``extract_answer`` finds; without one the score is 0.0.
        answer: the gold answers, bare or as a solution from which ``extract_answer`` takes it. Equal means the same
            ``canonical_answer``: numbers by exact value (a gold 50 is not answered by 50%), other texts as texts.
    """
    return [_score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def _score(completion: str, gold: str | None) -> float | None:
    if gold is None:
        return None
    final_gold = extract_answer(gold)
    expected = canonical_answer(gold if final_gold is None else final_gold)
    if expected == "":
        return None
    final = extract_answer(completion)
    return float(final is not None and canonical_answer(final) == expected)


def _last_tagged(text: str) -> str | None:
    last = None
    opened = None
    for tag in ANSWER_TAG.finditer(text):
        if tag[0] == "<answer>":
            opened = tag.end()
        elif opened is not None:
            last = text[opened : tag.start()]
            opened = None
    return last


def _statements(text: str) -> list[tuple[int, str]]:
    """Where each statement of an answer begins, and what it says."""
    sentences = [(match.start(), match[1]) for match in SENTENCE.finditer(text) if not STATED.search(match[1])]
    before, mark, rest = text.rpartition(GSM8K_MARK)
    marked = [(len(before), rest.partition("\n")[0])] if mark else []
    return [(start, answer.strip()) for start, answer in sentences + (_boxes(text) or marked)]


def _boxes(text: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    opened: list[int | None] = []
    for brace in BRACE.finditer(text):
        if brace[1]:
            opened.append(brace.end())
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = [each for each in found if each[0] < start]  # those within
                found.append((start, text[start : brace.start()]))
    return found


def _unwrap(text: str) -> str:
    text = " ".join(text.split()).removesuffix(".").rstrip()
    for opening, closing in WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def _magnitude(match: re.Match[str]) -> Fraction | None:
    if match["decimal"] is None:
        top, bottom = match["top"] or match["latex_top"], match["bottom"] or match["latex_bottom"]
        top, bottom = int(top.replace(",", "")), int(bottom.replace(",", ""))
        return Fraction(top, bottom) if bottom else None
    whole, _, decimals = match["decimal"].replace(",", "").partition(".")
    exponent = int(match["exponent"] or 0) - len(decimals) - (2 if match["percent"] else 0)
    return int(whole + decimals) * Fraction(10) ** exponent
