"""Answers of two kinds that can denote one thing, brought to one kind."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.evaluation import digits_needed, evaluate
from grpo_jax.rewards.math.expression import Node, constants, operations, substitute, variables
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.latex import UNIT_VECTORS
from grpo_jax.rewards.math.points import SMALL
from grpo_jax.rewards.math.reader import as_interval
from grpo_jax.rewards.math.symbolic import agree, real_value
from grpo_jax.rewards.math.units import read_unit

DEGREES, RADIANS = read_unit("degrees"), read_unit("radians")


def _of_one_kind(gold: Answer, given: Answer) -> tuple[Answer, Answer]:
    """Both answers, where they are of two kinds that can denote one thing, in the gold's kind."""
    kinds = gold.kind, given.kind
    if kinds == ("interval", "tuple"):
        return gold, as_interval(given) or given
    if kinds == ("tuple", "interval") and len(given.value) == 1:
        return as_interval(gold) or gold, given
    if kinds == ("tuple", "matrix") or kinds == ("matrix", "tuple"):
        return _as_tuple(gold), _as_tuple(given)
    if set(kinds) == {"tuple", "expression"}:
        return _as_unit_vectors(gold), _as_unit_vectors(given)
    if set(kinds) == {"equation", "expression"}:
        return _solution(gold, given), _solution(given, gold)
    if kinds == ("number", "equation") and re.fullmatch(r"[a-w](?:\+[a-w])+", given.value[1] or ""):
        return gold, given.value[2]  # m+n = 11
    if "congruence" in kinds:
        return _as_congruence(gold), _as_congruence(given)
    if kinds == ("text", "list") or kinds == ("list", "text"):
        return _as_letters(gold), _as_letters(given)
    if set(kinds) == {"ratio", "expression"}:
        return _as_fraction(gold), _as_fraction(given)
    if set(kinds) == {"set", "number"} or set(kinds) == {"set", "expression"}:
        return _as_element(gold), _as_element(given)
    if kinds == ("ratio", "time"):
        return gold, _as_ratio(given)
    if set(kinds) == {"ratio", "number"}:
        return _as_fraction(gold), _as_fraction(given)
    if set(kinds) == {"set", "list"}:
        return replace(gold, kind="set"), replace(given, kind="set")
    if set(kinds) <= {"number", "expression"} and DEGREES in (gold.unit, given.unit) and gold.unit != given.unit:
        return _in_degrees(gold), _in_degrees(given)
    if kinds == ("number", "expression") and gold.unit is not None:
        return gold, _with_letter_as_unit(given)
    return gold, given


def _as_tuple(answer: Answer) -> Answer:
    """A column as a tuple."""
    if answer.kind == "matrix" and len(answer.value) > 1 and all(len(row) == 1 for row in answer.value):
        return Answer("tuple", tuple(row[0] for row in answer.value), name=answer.name)
    return answer


def _as_unit_vectors(answer: Answer) -> Answer:
    scalars = ("number", "expression")
    if answer.kind != "tuple" or len(answer.value) not in (2, 3) or any(e.kind not in scalars for e in answer.value):
        return answer
    parts = [("mul", as_node(part), ("variable", name)) for part, name in zip(answer.value, UNIT_VECTORS, strict=False)]
    written = [part for part in parts if part[1] != ("number", 0)]  # a component of zero is not
    return Answer("expression", ("add", *written)) if written else answer


def _solution(answer: Answer, other: Answer) -> Answer:
    """``x+1``, of ``y = x+1``."""
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
    digits = digits_needed(value.value, SMALL)
    at_zero, at_one = (evaluate(value.value, {name: Fraction(place)}, digits) for place in (0, 1))
    if not isinstance(at_zero, Fraction) or not isinstance(at_one, Fraction) or at_zero == at_one:
        return answer
    step = at_one - at_zero
    line = ("add", ("number", at_zero), ("mul", ("number", step), ("variable", name)))
    if at_zero.denominator * step.denominator != 1 or not agree(value.value, line):
        return answer
    variable = answer.value[1] if answer.kind == "equation" else None
    return Answer("congruence", (int(at_zero % abs(step)), int(abs(step))), name=variable)


def _as_letters(answer: Answer) -> Answer:
    """Several letters of choice, ``B, D``, as one text."""
    if answer.kind != "list" or any(each.kind != "text" or len(each.value) != 1 for each in answer.value):
        return answer
    return Answer("text", "".join(each.value for each in answer.value))


def _as_element(answer: Answer) -> Answer:
    """The only element of a set."""
    return answer.value[0] if answer.kind == "set" and len(answer.value) == 1 else answer


def _as_ratio(answer: Answer) -> Answer:
    """``10:14``, which looks like a time of day."""
    if answer.kind != "time" or answer.value[2] or 0 in answer.value[:2]:
        return answer
    total = sum(answer.value[:2])
    return Answer("ratio", tuple(Answer("number", Fraction(each, total)) for each in answer.value[:2]))


def _as_fraction(answer: Answer) -> Answer:
    if answer.kind == "ratio" and len(answer.value) == 1:
        return answer.value[0]
    if answer.kind != "ratio" or len(answer.value) != 2 or any(each.kind != "number" for each in answer.value):
        return answer
    return Answer("number", answer.value[0].value / answer.value[1].value)


def _with_letter_as_unit(answer: Answer) -> Answer:
    """``5 N`` or ``9.8 m/s^2`` as a number with its unit, where a unit is expected."""
    number, letters = _coefficient(answer.value)
    unit = read_unit(letters) if number is not None and letters else None
    return answer if unit is None else Answer("number", number, unit)


def _in_degrees(answer: Answer) -> Answer:
    r"""``\frac{2\pi}{3}``, which has radians as unit or a pi and no unit, in degrees.

    Only a rational number of up to 360 of them, for a multiple of pi: others are hardly angles.
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


def _coefficient(node: Node) -> tuple[Fraction | None, str]:
    """The number in front of a product of powers of letters, and these as the text of a unit."""
    name, parts = node[0], node[1:]
    if name == "number":
        return parts[0], ""
    if name == "variable":
        return Fraction(1), parts[0]
    if name == "pow" and parts[0][0] == "variable" and parts[1][0] == "number":
        return Fraction(1), f"{parts[0][1]}^{{{parts[1][1]}}}"
    if name not in ("mul", "div"):
        return None, ""
    pairs = [_coefficient(each) for each in parts]
    if any(number is None for number, _ in pairs) or (name == "div" and pairs[1][0] != 1):
        return None, ""
    coefficient = Fraction(1)
    for number, _ in pairs:
        coefficient *= number or 0
    return coefficient, ("/" if name == "div" else " ").join(letters for _, letters in pairs if letters)
