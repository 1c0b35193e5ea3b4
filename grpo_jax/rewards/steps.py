"""Process supervision by rule: steps of a thought that contain arithmetic equations are checked."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from operator import add, mul, sub, truediv
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.compose import RewardOutput

STEP = re.compile(r"[^;\n]+[;\n]?")
TIMES, DIVIDED = "\u00d7", "\u00f7"
ARITHMETIC = "0123456789.,()+-*/ \t" + TIMES + DIVIDED
AS_PYTHON = str.maketrans({TIMES: "*", DIVIDED: "/", ",": None})
MAX_LENGTH = 200
MAX_NUMBER = 10**30
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}


@per_sample(columns=())
def equation_steps_reward(prompts: list[str], completions: list[str], **_columns: list[Any]) -> list[RewardOutput]:
    """The share of steps with equations in which all equations hold, and 1.0 or 0.0 for each of these steps.

    A step ends with a line break or a semicolon, as ``3+8=11;`` or ``So 48/2 = 24 clips.`` Only equations between
    numbers are checked, in exact arithmetic; a step with variables or without an equation has no reward. If there are
    ``<think>...</think>`` tags, only the text between them is read.

    The reward does not depend on whether an equation is useful, so combine it with a reward for the outcome.

    Args:
        prompts: ignored.
        completions: the texts.

    Returns:
        For each completion the share (0 without a checked step), with ``steps`` of 1.0 and 0.0 and the number of
        checked steps as ``details["checked"]``.
    """
    return [_check(completion) for completion in completions]


def _check(completion: str) -> RewardOutput:
    begin = completion.find("<think>") + len("<think>") if "<think>" in completion else 0
    end = completion.find("</think>", begin)
    steps = []
    for step in STEP.finditer(completion, begin, len(completion) if end < 0 else end):
        holds = _holds(step.group())
        if holds is not None:
            steps.append((step.end(), float(holds)))
    share = sum(reward for _, reward in steps) / len(steps) if steps else 0.0
    return RewardOutput(share, {"checked": float(len(steps))}, steps=tuple(steps))


def _holds(step: str) -> bool | None:
    """Whether all equations between numbers hold; None if there are none."""
    sides = step.rstrip(";\n").split("=")
    if len(sides) < 2:
        return None
    values = [(_value(_end_of(left)), _value(_start_of(right))) for left, right in pairwise(sides)]
    equal = [left == right for left, right in values if left is not None and right is not None]
    return all(equal) if equal else None


def _end_of(text: str) -> str:
    """The arithmetic at the end of a text; "" if it is part of a longer expression, as in ``2x + 3``."""
    start = len(text.rstrip(ARITHMETIC))
    arithmetic = text[start:]
    is_part = _changes_number(text[start - 1 : start]) and not arithmetic[:1].isspace()
    return "" if is_part or arithmetic.lstrip()[:1] in ("+", "*", "/", TIMES, DIVIDED) else arithmetic


def _start_of(text: str) -> str:
    """The arithmetic at the start of a text; "" if it is part of a longer expression, as in ``5x``."""
    end = len(text) - len(text.lstrip(ARITHMETIC))
    arithmetic = text[:end]
    if _changes_number(text[end : end + 1]) and not arithmetic[-1:].isspace():
        return ""
    return arithmetic.rstrip(" \t.,")


def _changes_number(character: str) -> bool:
    """Whether a character next to a number makes it part of something else, such as a name, a unit or a power."""
    return character.isalnum() or character in {*"_^%\\]}{["}


def _value(text: str) -> Fraction | None:
    if not text.strip() or len(text) > MAX_LENGTH:
        return None
    try:
        return _evaluate(ast.parse(text.translate(AS_PYTHON).strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            value = Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = -_evaluate(inner)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATIONS:
            value = OPERATIONS[type(operator)](_evaluate(left), _evaluate(right))
        case _:
            raise ValueError("not arithmetic")
    if abs(value.numerator) > MAX_NUMBER or value.denominator > MAX_NUMBER:
        raise ValueError("too large")
    return value
