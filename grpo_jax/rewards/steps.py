"""Process supervision without a model: the steps of a thought that are sums, each right or wrong."""

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
ARITHMETIC = frozenset("0123456789.,()+-*/ \t" + TIMES + DIVIDED)
AS_PYTHON = str.maketrans({TIMES: "*", DIVIDED: "/", ",": None})
LONGEST = 200
LARGEST = 10**30
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
}


@per_sample(columns=())
def equation_steps_reward(prompts: list[str], completions: list[str], **_columns: list[Any]) -> list[RewardOutput]:
    """The share of a thought's equations that hold, and of each step that has one whether all of its equations do.

    A step ends with a line or with a semicolon; ``3+8=11;`` is one, ``So 48/2 = 24 clips.`` another. Looked at are
    equations between numbers, worked out exactly; a step with variables, or without an equation, has no reward. What
    stands outside of ``<think>...</think>`` is no step, where there are such tags.

    A policy is paid for equations that hold, whether they are of use or not: pay for the outcome too.

    Args:
        prompts: not looked at.
        completions: the texts.

    Returns:
        For each completion the share (0 where no step could be judged) with ``steps`` of 1.0 and 0.0.
    """
    return [_judge(completion) for completion in completions]


def _judge(completion: str) -> RewardOutput:
    begin = completion.find("<think>") + len("<think>") if "<think>" in completion else 0
    end = completion.find("</think>", begin)
    steps = []
    for step in STEP.finditer(completion, begin, len(completion) if end < 0 else end):
        verdict = _holds(step.group())
        if verdict is not None:
            steps.append((step.end(), float(verdict)))
    share = sum(reward for _, reward in steps) / len(steps) if steps else 0.0
    return RewardOutput(share, {"judged": float(len(steps))}, steps=tuple(steps))


def _holds(step: str) -> bool | None:
    """Whether all equations between numbers hold; None where there is none."""
    sides = step.rstrip(";\n").split("=")
    if len(sides) < 2:
        return None
    values = [(_value(_end_of(left)), _value(_start_of(right))) for left, right in pairwise(sides)]
    judged = [left == right for left, right in values if left is not None and right is not None]
    return all(judged) if judged else None


def _end_of(text: str) -> str:
    """The arithmetic that a text ends with; nothing where it goes on to the left, as in ``2x + 3``."""
    start = len(text)
    while start and text[start - 1] in ARITHMETIC:
        start -= 1
    found = text[start:]
    goes_on = _belongs(text[start - 1 : start]) and not found[:1].isspace()
    return "" if goes_on or found.lstrip()[:1] in ("+", "*", "/", TIMES, DIVIDED) else found


def _start_of(text: str) -> str:
    """The arithmetic that a text begins with; nothing where it goes on to the right, as in ``5x``."""
    end = 0
    while end < len(text) and text[end] in ARITHMETIC:
        end += 1
    found = text[:end]
    if _belongs(text[end : end + 1]) and not found[-1:].isspace():
        return ""
    return found.rstrip(" \t.,")


def _belongs(character: str) -> bool:
    """Whether what stands beside a number makes something else of it: a name, a unit, a power."""
    return character.isalnum() or character in {*"_^%\\]}{["}


def _value(text: str) -> Fraction | None:
    if not text.strip() or len(text) > LONGEST:
        return None
    try:
        return _evaluated(ast.parse(text.translate(AS_PYTHON).strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            value = Fraction(str(node.value))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = -_evaluated(inner)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATIONS:
            value = OPERATIONS[type(operator)](_evaluated(left), _evaluated(right))
        case _:
            raise ValueError("no arithmetic")
    if abs(value.numerator) > LARGEST or value.denominator > LARGEST:
        raise ValueError("too large to be worked out")
    return value
