"""Conversion of answers between kinds that can denote the same thing, such as a column and a tuple."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.evaluation import digits_needed, evaluate
from grpo_jax.rewards.math.expression import Node, constants, operations, substitute, variables
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.latex import UNIT_VECTORS
from grpo_jax.rewards.math.points import SMALL_BITS
from grpo_jax.rewards.math.reader import as_interval
from grpo_jax.rewards.math.symbolic import agree, real_value
from grpo_jax.rewards.math.units import read_unit

DEGREES, RADIANS = read_unit("degrees"), read_unit("radians")


def to_common_kind(gold: Answer, answer: Answer) -> tuple[Answer, Answer]:
    """Both answers converted to one kind, if their kinds can denote the same thing; otherwise unchanged.

    Args:
        gold: gold answer; where a conversion is possible both ways, its kind wins.
        answer: answer to compare with it.
    """
    kinds = gold.kind, answer.kind
    if kinds == ("interval", "tuple"):
        return gold, as_interval(answer) or answer
    if kinds == ("tuple", "interval") and len(answer.value) == 1:
        return as_interval(gold) or gold, answer
    if convert := CONVERSIONS.get(frozenset(kinds)):
        return convert(gold), convert(answer)
    if set(kinds) == {"equation", "expression"}:
        return _right_side(gold, answer), _right_side(answer, gold)
    if kinds == ("number", "equation") and re.fullmatch(r"[a-w](?:\+[a-w])+", answer.value[1] or ""):
        return gold, answer.value[2]  # m+n = 11
    if "congruence" in kinds:
        return _as_congruence(gold), _as_congruence(answer)
    if kinds == ("ratio", "time"):
        return gold, _as_ratio(answer)
    if set(kinds) <= {"number", "expression"} and DEGREES in (gold.unit, answer.unit) and gold.unit != answer.unit:
        return _in_degrees(gold), _in_degrees(answer)
    if kinds == ("number", "expression") and gold.unit is not None:
        return gold, _with_letter_as_unit(answer)
    return gold, answer


def _as_tuple(answer: Answer) -> Answer:
    """A column vector as a tuple."""
    if answer.kind == "matrix" and len(answer.value) > 1 and all(len(row) == 1 for row in answer.value):
        return Answer("tuple", tuple(row[0] for row in answer.value), name=answer.name)
    return answer


def _as_unit_vectors(answer: Answer) -> Answer:
    """A vector in two or three dimensions as a sum of multiples of i, j and k."""
    if answer.kind != "tuple" or len(answer.value) not in (2, 3):
        return answer
    if any(part.kind not in ("number", "expression") for part in answer.value):
        return answer
    parts = [("mul", as_node(part), ("variable", name)) for part, name in zip(answer.value, UNIT_VECTORS, strict=False)]
    terms = [part for part in parts if part[1] != ("number", 0)]  # zero components are not written
    return Answer("expression", ("add", *terms)) if terms else answer


def _right_side(answer: Answer, other: Answer) -> Answer:
    """``x+1`` of ``y = x+1``, unless the other answer has the variable y."""
    if answer.kind != "equation" or answer.value[2] is None or answer.value[1] in variables(other.value):
        return answer
    return answer.value[2]


def _as_congruence(answer: Answer) -> Answer:
    r"""``x = 7k+3, k \in \mathbb{Z}`` as the class of 3 modulo 7."""
    if answer.kind not in ("equation", "expression"):
        return answer
    value = answer.value[2] if answer.kind == "equation" else answer
    if value is None or value.kind != "expression" or answer.domain != "Z" or answer.parameter is None:
        return answer
    name = answer.parameter
    if variables(value.value) != {name}:
        return answer
    digits = digits_needed(value.value, SMALL_BITS)
    at_zero, at_one = (evaluate(value.value, {name: Fraction(x)}, digits) for x in (0, 1))
    if not isinstance(at_zero, Fraction) or not isinstance(at_one, Fraction) or at_zero == at_one:
        return answer
    step = at_one - at_zero
    line = ("add", ("number", at_zero), ("mul", ("number", step), ("variable", name)))
    if at_zero.denominator * step.denominator != 1 or not agree(value.value, line):
        return answer
    variable = answer.value[1] if answer.kind == "equation" else None
    return Answer("congruence", (int(at_zero % abs(step)), int(abs(step))), name=variable)


def _as_letters(answer: Answer) -> Answer:
    """Several multiple-choice letters, ``B, D``, as one text."""
    if answer.kind != "list" or any(item.kind != "text" or len(item.value) != 1 for item in answer.value):
        return answer
    return Answer("text", "".join(item.value for item in answer.value))


def _as_element(answer: Answer) -> Answer:
    """The element of a set that has only one."""
    return answer.value[0] if answer.kind == "set" and len(answer.value) == 1 else answer


def _as_ratio(answer: Answer) -> Answer:
    """A ratio such as ``10:14`` that was read as a time of day."""
    if answer.kind != "time" or answer.value[2] or 0 in answer.value[:2]:
        return answer
    total = sum(answer.value[:2])
    return Answer("ratio", tuple(Answer("number", Fraction(term, total)) for term in answer.value[:2]))


def _as_fraction(answer: Answer) -> Answer:
    """The quotient of a ratio of two numbers, or of a ratio relative to its last term."""
    if answer.kind == "ratio" and len(answer.value) == 1:
        return answer.value[0]
    if answer.kind != "ratio" or len(answer.value) != 2 or any(term.kind != "number" for term in answer.value):
        return answer
    return Answer("number", answer.value[0].value / answer.value[1].value)


def _with_letter_as_unit(answer: Answer) -> Answer:
    """``5 N`` or ``9.8 m/s^2``, read as a product of variables, as a number with a unit."""
    number, letters = _monomial_unit(answer.value)
    unit = read_unit(letters) if number is not None and letters else None
    return answer if unit is None else Answer("number", number, unit)


def _in_degrees(answer: Answer) -> Answer:
    r"""An angle such as ``\frac{2\pi}{3}``, in radians or without a unit, in degrees.

    Only for rational multiples of pi up to 360 degrees: other values are hardly angles.
    """
    if answer.kind != "expression" or answer.unit not in (None, RADIANS) or "pi" not in constants(answer.value):
        return answer
    if variables(answer.value) or "add" in operations(answer.value):
        return answer
    value = real_value(substitute(answer.value, ("constant", "pi"), ("number", Fraction(180))))
    is_multiple = (
        isinstance(value, Fraction)
        and abs(value) <= 360
        and agree(answer.value, ("mul", ("number", value / 180), ("constant", "pi")))
    )
    return Answer("number", value, DEGREES) if is_multiple else answer


def _monomial_unit(node: Node) -> tuple[Fraction | None, str]:
    """The coefficient of a product of powers of letters, and the letters as the text of a unit; else ``(None, "")``."""
    name, parts = node[0], node[1:]
    if name == "number":
        return parts[0], ""
    if name == "variable":
        return Fraction(1), parts[0]
    if name == "pow" and parts[0][0] == "variable" and parts[1][0] == "number":
        return Fraction(1), f"{parts[0][1]}^{{{parts[1][1]}}}"
    if name not in ("mul", "div"):
        return None, ""
    pairs = [_monomial_unit(part) for part in parts]
    if any(number is None for number, _ in pairs) or (name == "div" and pairs[1][0] != 1):
        return None, ""
    coefficient = Fraction(math.prod(number or 0 for number, _ in pairs))
    return coefficient, ("/" if name == "div" else " ").join(letters for _, letters in pairs if letters)


CONVERSIONS: dict[frozenset[str], Callable[[Answer], Answer]] = {
    frozenset(("tuple", "matrix")): _as_tuple,
    frozenset(("tuple", "expression")): _as_unit_vectors,
    frozenset(("text", "list")): _as_letters,
    frozenset(("set", "number")): _as_element,
    frozenset(("set", "expression")): _as_element,
    frozenset(("set", "list")): lambda answer: replace(answer, kind="set"),
    frozenset(("ratio", "number")): _as_fraction,
    frozenset(("ratio", "expression")): _as_fraction,
}
"""Conversions of both answers, by the two kinds in either order."""
