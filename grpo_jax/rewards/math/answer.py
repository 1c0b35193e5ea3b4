"""Extraction of final answers from completions and solutions, and the exact-match reward."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.boxes import HEDGING, Statement, final_box, is_hedged, is_list_separator, single_box
from grpo_jax.rewards.math.markup import strip_markup
from grpo_jax.rewards.math.numbers import numeric_value, strip_delimiters
from grpo_jax.rewards.math.sentences import is_value, stated_answers
from grpo_jax.rewards.thought import after_thought

GSM8K_MARK = "####"

ANSWER_TAG = re.compile(r"<(/?)(?:final_)?answer[ \t]?>", re.IGNORECASE)
PROMPT_OPENING = re.compile(r"(<(?:final_)?answer>|\\boxed\{)\s*\Z", re.IGNORECASE)
MARKED_LINE = re.compile(rf"(?<!#){GSM8K_MARK}#{{0,2}}(?!#)([^\n]*)")
ENUMERATED = re.compile(r"\d{1,3}[.):]\s+\S")
EMPHASIZED_LINE = re.compile(r"(\*\*|__|`)(?P<inside>[^*`\n]{1,60})\1[.]?")


def extract_answer(text: str, prompt: str = "") -> str | None:
    r"""The final answer of a completion or of a worked solution; None if it states none.

    Only the text after the thought is read (``after_thought``); an unfinished thought has no answer. The answer is the
    content of the last innermost ``<answer>...</answer>``. Without such a tag, it is the first of these that the text
    has:

    1. the last outermost ``\boxed{...}`` (``final_box``), unless a later sentence states another value;
    2. the later of: the last sentence such as "The answer is 42." (``stated_answers``), and the text after the last
       ``####`` on its line, if that text is a value or the line is the last one;
    3. a last line that consists of a number in bold or backticks.

    Inside ``<answer>`` the same statements are recognised; two that differ are not an answer. Neither is a number
    beside another ("5 or 6"). Markdown and spaces around the answer are removed.

    Args:
        text: completion or solution.
        prompt: text that the completion continues; it may have opened the thought, ``<answer>`` or ``\boxed{``.
    """
    rest = after_thought(prompt, text)
    if rest is None:
        return None
    opening = PROMPT_OPENING.search(prompt[-200:]) if rest == text else None
    rest = rest if opening is None else opening[1] + rest
    tagged = _last_tagged(rest)
    if tagged is not None and is_hedged(rest, tagged[1], tagged[2] or ""):
        return None
    return _untagged_answer(rest) if tagged is None else tagged[2]


@lru_cache(1024)  # a gold answer is read for each completion of its group, in the reward and in the metrics
def gold_answer(gold: str) -> str:
    """The final answer of a gold column: ``extract_answer`` of a solution, else the whole text without markdown.

    Empty if there is none, as in an unfinished thought.
    """
    if after_thought("", gold) is None:
        return ""
    final = extract_answer(gold)
    return strip_markup(gold) if final is None else final


def worked_answer(text: str) -> str | None:
    r"""The answer of a worked solution that ends in ``\boxed{...}`` or ``#### ...``; None for any other text."""
    rest = after_thought("", text)
    if rest is None or _last_tagged(rest) is not None:
        return None
    box, marked = final_box(rest), _marked_lines(rest)
    return box.answer if box is not None else marked[-1].answer if marked else None


@lru_cache(1024)
def canonical_answer(text: str) -> Fraction | str:
    """A key that is equal for two answers if and only if ``answer_reward`` counts them as equal.

    The exact value of a number (``numeric_value``). For another text, the text itself with single spaces, without
    mathematics delimiters around it and without a final period. Case-sensitive.
    """
    value = numeric_value(text)
    return strip_delimiters(text) if value is None else value


def same_text(answer: str, other: str) -> bool:
    """Whether two answers have the same ``canonical_answer``: the comparison of ``answer_reward``.

    Args:
        answer, other: final answers.
    """
    return canonical_answer(answer) == canonical_answer(other)


@per_sample(columns=("answer",))
def answer_reward(
    prompts: list[str], completions: list[str], *, answer: list[str | None], **_columns: list[Any]
) -> list[float | None]:
    """1.0 if the completion's final answer has the ``canonical_answer`` of the gold answer, else 0.0.

    Numbers are compared by exact value (50% is not 50), other texts as texts. None if the gold answer is blank or None.

    Args:
        prompts: ``[B]`` prompts, or an empty list. A prompt that ends in an open thought affects the extraction.
        completions: ``[B]`` completions; the final answer is ``extract_answer(completion, prompt)``. A completion
            without one scores 0.0.
        answer: ``[B]`` gold answers, bare or as solutions (``gold_answer``).
    """
    prompts = prompts or [""] * len(completions)
    return [_score(*row) for row in zip(prompts, completions, answer, strict=True)]


def _untagged_answer(text: str) -> str | None:
    """The final answer of a text without ``<answer>``."""
    stated = stated_answers(text)
    box = final_box(text)
    if box is not None:
        stated = [box, *(later for later in stated if later.start >= box.end and is_value(later.answer))]
    else:
        stated = sorted(stated + _marked_lines(text))
    if not stated:
        return _emphasized_number(text)
    last = stated[-1]
    return None if is_hedged(text, last.end, last.answer) or _ends_in_list(text, stated) else last.answer


def _ends_in_list(text: str, stated: list[Statement]) -> bool:
    """Whether the last two statements differ and are separated by no more than "or" and the like."""
    if len(stated) < 2:
        return False
    first, last = stated[-2:]
    hedging = HEDGING.search(text, first.end, last.start)
    is_list = hedging is not None and is_list_separator(text, first.end, last.start)
    return is_list and canonical_answer(first.answer) != canonical_answer(last.answer)


def _tag_content(text: str, tag: tuple[int, int, int, int]) -> str | None:
    content = text[tag[1] : tag[2]]
    if "\\boxed" in content and final_box(content) is not None:
        box = single_box(content)
        return None if box is None or is_hedged(content, box.end, box.answer) else box.answer
    stated = {statement.answer for statement in stated_answers(content) + _marked_lines(content)}
    return strip_markup(content) if not stated else stated.pop() if len(stated) == 1 else None


def _marked_lines(text: str) -> list[Statement]:
    """The answers after ``####``; headings of sections are left out."""
    end = len(text.rstrip())
    statements = []
    for mark in MARKED_LINE.finditer(text):
        content = strip_markup(mark[1])
        is_answer = is_value(content) and ENUMERATED.match(content) is None
        if is_answer or mark.end() >= end:
            statements.append(Statement(*mark.span(), content))
    return statements


def _emphasized_number(text: str) -> str | None:
    line = EMPHASIZED_LINE.fullmatch(text.rstrip().rpartition("\n")[2].strip())
    return line["inside"].strip() if line is not None and numeric_value(line["inside"]) is not None else None


def _score(prompt: str, completion: str, gold: str | None) -> float | None:
    if gold is None:
        return None
    expected = canonical_answer(gold_answer(gold))
    if expected == "":
        return None
    final = extract_answer(completion, prompt)
    return float(final is not None and canonical_answer(final) == expected)


def _last_tagged(text: str) -> tuple[int, int, str | None] | None:
    """Start, end and answer of the last ``<answer>...</answer>``.

    The answer is None if the tag holds several, or if the tag is part of a list ("<answer>5</answer> or ...").
    """
    tags: list[tuple[int, int, int, int]] = []
    opening = None
    for tag in ANSWER_TAG.finditer(text):
        if not tag[1]:
            opening = tag
        elif opening is not None:
            tags.append((*opening.span(), *tag.span()))
            opening = None
    if not tags:
        return None
    (start, _, _, end), answer = tags[-1], _tag_content(text, tags[-1])
    if answer is not None and len(tags) > 1:
        previous = Statement(tags[-2][0], tags[-2][3], _tag_content(text, tags[-2]) or "")
        answer = None if _ends_in_list(text, [previous, Statement(start, end, answer)]) else answer
    return start, end, answer
