"""Right or wrong by the final answer alone: small and strict, so that a wrong answer never scores."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.boxes import HEDGING, Statement, are_listed, box_of, final_box, is_hedged
from grpo_jax.rewards.math.markup import plain
from grpo_jax.rewards.math.numbers import numeric_value, unwrap
from grpo_jax.rewards.math.sentences import is_value, sentences
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
    if tagged is not None and is_hedged(rest, tagged[1], tagged[2] or ""):
        return None
    return _final(rest) if tagged is None else tagged[2]


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
    rest = after_thought("", text)
    if rest is None or _last_tagged(rest) is not None:
        return None
    box, marks = final_box(rest), _marks(rest)
    return box[2] if box is not None else marks[-1][2] if marks else None


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
        later = [each for each in stated if each[0] >= box[1] and is_value(each[2])]
        stated = [box, *later]
    else:
        stated = sorted(stated + _marks(text))
    if not stated:
        return _set_off(text)
    _, end, answer = stated[-1]
    return None if is_hedged(text, end, answer) or _is_listed(text, stated) else answer


def _is_listed(text: str, stated: list[Statement]) -> bool:
    """Whether the last two statements differ and have only "or" and the like between them."""
    if len(stated) < 2:
        return False
    (_, end, before), (start, _, last) = stated[-2:]
    is_list = HEDGING.search(text, end, start) is not None and are_listed(text, end, start)
    return is_list and canonical_answer(before) != canonical_answer(last)


def _in_tag(tagged: str) -> str | None:
    if "\\boxed" in tagged and final_box(tagged) is not None:
        box = box_of(tagged)
        return None if box is None or is_hedged(tagged, box[1], box[2]) else box[2]
    stated = {answer for _, _, answer in sentences(tagged) + _marks(tagged)}
    return plain(tagged) if not stated else stated.pop() if len(stated) == 1 else None


def _marks(text: str) -> list[Statement]:
    """What follows ``####`` on its line, for each that is an answer and not the heading of a section."""
    end = len(text.rstrip())
    found = []
    for mark in MARK.finditer(text):
        content = plain(mark[1])
        is_answer = is_value(content) and ENUMERATED.match(content) is None
        if is_answer or mark.end() >= end:
            found.append((mark.start(), mark.end(), content))
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


def _last_tagged(text: str) -> tuple[int, int, str | None] | None:
    """The last ``<answer>...</answer>`` and its answer: None where it has several, or is one of a list of others."""
    found: list[tuple[int, int, int, int]] = []
    opened = None
    for tag in ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            found.append((opened.start(), opened.end(), tag.start(), tag.end()))
            opened = None
    if not found:
        return None
    start, first, last, end = found[-1]
    answer = _in_tag(text[first:last])
    if answer is not None and len(found) > 1:
        before = (found[-2][0], found[-2][3], _in_tag(text[found[-2][1] : found[-2][2]]) or "")
        answer = None if _is_listed(text, [before, (start, end, answer)]) else answer
    return start, end, answer
