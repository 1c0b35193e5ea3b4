"""The type of a final answer that has been read."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.math.expression import Node, variables
from grpo_jax.rewards.math.units import Dimension


@dataclass(frozen=True)
class Answer:
    """A final answer as mathematics.

    Attributes:
        kind: ``number``, ``expression``, ``text``, ``set``, ``list``, ``tuple``, ``matrix``, ``interval``, ``ratio``,
            ``time``, ``infinity``, ``equation`` or ``inequality``; ``nothing`` for what is recognised but invalid.
        value: a Fraction for a number; a node of ``expression.parse`` for an expression; a string for a text; parts for
            the rest.
        unit: of a number or an expression, where it has one: the unit in base units, and these.
        name: the variable or quantity that is said to be it, as in ``x = 5``.
        letter: of a multiple-choice answer that is given with its letter, as in ``(B) 12``.
        parameter: a letter that the answer holds for all values of: an integer, or the argument of a function.
        domain: where the parameter's values are from, such as ``Z``, if that is said.
    """

    kind: str
    value: Any
    unit: tuple[Fraction, Dimension] | None = None
    name: str | None = None
    letter: str | None = None
    parameter: str | None = None
    domain: str | None = None


NOTHING = Answer("nothing", None)


def is_scalar(answer: Answer | None) -> bool:
    """Whether an answer is a number or an expression, without a unit."""
    return answer is not None and answer.kind in ("number", "expression") and answer.unit is None


def is_constant_scalar(answer: Answer | None) -> bool:
    """Whether an answer is a number, a constant expression or an infinity, without a unit."""
    if answer is None or answer.unit is not None:
        return False
    return answer.kind in ("number", "infinity") or (answer.kind == "expression" and not variables(answer.value))


def as_node(answer: Answer) -> Node:
    """The expression that a number or an expression is."""
    return ("number", answer.value) if answer.kind == "number" else answer.value
