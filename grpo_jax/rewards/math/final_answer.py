"""``Answer``: a parsed final answer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.math.expression import Node, variables
from grpo_jax.rewards.math.units import Dimension


@dataclass(frozen=True)
class Answer:
    """A parsed final answer.

    Attributes:
        kind: ``number``, ``expression``, ``text``, ``set``, ``list``, ``tuple``, ``matrix``, ``interval``, ``ratio``,
            ``time``, ``infinity``, ``equation``, ``inequality``, ``congruence`` or ``cases``; ``invalid`` for a
            recognised form with invalid content.
        value: a Fraction (``number``), a node of ``expression.parse`` (``expression``), a string (``text``), -1 or 1
            (``infinity``), or a tuple of parts.
        unit: of a number or an expression: the size in base units, and the base units.
        name: the variable or quantity whose value this is, as in ``x = 5``.
        letter: the letter of a multiple-choice answer, as in ``(B) 12``.
        parameter: a variable for all of whose values the answer holds: an integer, or the argument of a function.
        domain: the stated domain of the parameter, such as ``Z``.
    """

    kind: str
    value: Any
    unit: tuple[Fraction, Dimension] | None = None
    name: str | None = None
    letter: str | None = None
    parameter: str | None = None
    domain: str | None = None


INVALID = Answer("invalid", None)


def is_scalar(answer: Answer | None) -> bool:
    """Whether the answer is a number or an expression without a unit."""
    return answer is not None and answer.kind in ("number", "expression") and answer.unit is None


def is_constant_scalar(answer: Answer | None) -> bool:
    """Whether the answer is a number, a constant expression or an infinity, without a unit."""
    if answer is None or answer.unit is not None:
        return False
    return answer.kind in ("number", "infinity") or (answer.kind == "expression" and not variables(answer.value))


def as_node(answer: Answer) -> Node:
    """The expression of an answer of kind ``number`` or ``expression``."""
    return ("number", answer.value) if answer.kind == "number" else answer.value
