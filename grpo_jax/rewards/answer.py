"""Right or wrong by the final answer alone: small and strict, so that a wrong answer never scores."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.boxes import box_of, final_box
from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.markup import plain
from grpo_jax.rewards.numbers import numeric_value, unwrap
from grpo_jax.rewards.sentences import Statement, is_value, sentences
from grpo_jax.rewards.thought import after_thought

GSM8K_MARK = "####"

ANSWER_TAG = re.compile(r"<(/?)(?:final_)?answer[ \t]?>", re.IGNORECASE)
OPENED = re.compile(r"(<(?:final_)?answer>|\\boxed\{)\s*\Z", re.IGNORECASE)
MARK = re.compile(rf"(?<!#){GSM8K_MARK}#{{0,2}}(?!#)([^\n]*)")
ENUMERATED = re.compile(r"\d{1,3}[.):]\s+\S")
SET_OFF = re.compile(r"(\*\*|__|`)(?P<inside>[^*`\n]{1,60})\1[.]?")


def extract_answer(text: str, prompt: str = "") -> str | None:
    r"""The final answer of a completion or of a worked solution; None if it states none.

    A thought is not an answer: only what follows it is read (``after_thought``), and where the thought is not finished
    there is no answer. Of the rest the answer is the inside of the last ``<answer>...</answer>`` without a tag of its
    own kind inside. Where there is none, it is the first of these that the text has:

    1. the last outermost ``\boxed{...}`` (``final_box``), unless a later sentence states another value;
    2. the last of: a sentence such as "The answer is 42." (``sentences``), and what follows ``####`` on its line, where
       that is a value or the line is the last one;
    3. a last line that is nothing but a number in bold or backticks.

    Inside ``<answer>`` a single one of these is the answer, and two that differ are none. Markdown around an answer is
    left out, and so are blanks.

    Args:
        text: a completion or a solution.
        prompt: what a completion continues: it may have opened the thought, ``<answer>`` or ``\boxed{``.
    """
    rest = after_thought(prompt, text)
    if rest is None:
        return None
    opened = OPENED.search(prompt[-200:]) if rest == text else None
    rest = rest if opened is None else opened[1] + rest
    tagged = _last_tagged(rest)
    return _final(rest) if tagged is None else _in_tag(tagged)


def gold_answer(gold: str) -> str:
    """The answer of a gold: what ``extract_answer`` finds where it is a solution, else all of it without markdown.

    Blank where there is none, as in an unfinished thought.
    """
    if after_thought("", gold) is None:
        return ""
    final = extract_answer(gold)
    return plain(gold) if final is None else final


def worked_answer(text: str) -> str | None:
    r"""The answer of a worked solution that ends in ``\boxed{...}`` or ``#### ...``; None for any other text."""
    box = final_box(text)
    marks = _marks(text)
    return box[2] if box is not None else marks[-1][1] if marks else None


def canonical_answer(text: str) -> Fraction | str:
    """What two answers have in common if and only if they are taken to be equal.

    The value, for a number; for another text the text itself, runs of blanks made one space, without mathematics
    delimiters around it and a period after it. Case counts.
    """
    value = numeric_value(text)
    return unwrap(text) if value is None else value


def same_text(answer: str, other: str) -> bool:
    """Whether two answers have the same ``canonical_answer``, as ``answer_reward`` compares them."""
    return canonical_answer(answer) == canonical_answer(other)


@per_sample(columns=("answer",))
def answer_reward(
    prompts: list[str], completions: list[str], *, answer: list[str | None], **_columns: list[Any]
) -> list[float | None]:
    """1.0 where a completion's final answer equals the gold answer, else 0.0; None where the gold is blank or None.

    Args:
        prompts: the texts that the completions continue, which may have opened the thought; or an empty list.
        completions: the final answer is what ``extract_answer`` finds; without one the score is 0.0.
        answer: the gold answers, bare or as a solution that ``gold_answer`` reads. Equal means the same
            ``canonical_answer``: numbers by exact value (a gold 50 is not answered by 50%), other texts as texts.
    """
    prompts = prompts or [""] * len(completions)
    return [_score(*row) for row in zip(prompts, completions, answer, strict=True)]


def _final(text: str) -> str | None:
    """The final answer of a text without ``<answer>``."""
    stated = sentences(text)
    box = final_box(text)
    if box is not None:
        later = [answer for place, answer in stated if place >= box[1] and is_value(answer)]
        return later[-1] if later else box[2]
    stated = stated + _marks(text)
    return max(stated)[1] if stated else _set_off(text)


def _in_tag(tagged: str) -> str | None:
    if "\\boxed" in tagged and final_box(tagged) is not None:
        box = box_of(tagged)
        return None if box is None else box[2]
    stated = {answer for _, answer in sentences(tagged) + _marks(tagged)}
    return plain(tagged) if not stated else stated.pop() if len(stated) == 1 else None


def _marks(text: str) -> list[Statement]:
    """What follows ``####`` on its line, for each that is an answer and not the heading of a section."""
    end = len(text.rstrip())
    found = []
    for mark in MARK.finditer(text):
        content = plain(mark[1])
        is_answer = is_value(content) and ENUMERATED.match(content) is None
        if is_answer or mark.end() >= end:
            found.append((mark.start(), content))
    return found


def _set_off(text: str) -> str | None:
    line = text.rstrip().rpartition("\n")[2].strip()
    found = SET_OFF.fullmatch(line)
    return found["inside"].strip() if found is not None and numeric_value(found["inside"]) is not None else None


def _score(prompt: str, completion: str, gold: str | None) -> float | None:
    if gold is None:
        return None
    expected = canonical_answer(gold_answer(gold))
    if expected == "":
        return None
    final = extract_answer(completion, prompt)
    return float(final is not None and canonical_answer(final) == expected)


def _last_tagged(text: str) -> str | None:
    last = None
    opened = None
    for tag in ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            last = text[opened : tag.start()]
            opened = None
    return last
