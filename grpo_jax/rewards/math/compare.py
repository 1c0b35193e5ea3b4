"""Equality of final answers as mathematics."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.conversions import to_common_kind
from grpo_jax.rewards.math.evaluation import TooLargeError, work_limit
from grpo_jax.rewards.math.expression import TRIGONOMETRIC, Node, operations, variables
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.forms import has_form
from grpo_jax.rewards.math.intervals import Interval
from grpo_jax.rewards.math.parameters import differ_in_domain, rename_parameter
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.rewards.math.symbolic import agree, constant_ratio
from grpo_jax.rewards.math.units import is_cents
from grpo_jax.rewards.math.words import same_words

LOGGER = logging.getLogger(__name__)
UNEVALUATED = {name: name for name in ("min", "max", "gcd", "lcm", "floor", "ceil", "abs")}
UNEVALUATED |= {"binom": "factorial", "factorial": "factorial"} | dict.fromkeys(TRIGONOMETRIC, "trigonometric")
"""Operations that an answer must have evaluated, by kind, unless the gold has one of that kind too."""


def same_answer(gold: str, answer: str, *, form: str | None = None) -> bool:
    r"""Whether an answer equals the gold answer as mathematics.

    - Numbers: by exact value. 0.5, 1/2, 50% and ``\frac12`` are equal; 0.333 and 1/3 are not, nor are 50% and 50. If
      the gold is a number, the answer must be one: 2+3 does not equal 5.
    - Units: equal after conversion (5 m is 500 cm); counted nouns must be the same. If only one side has a unit, the
      numbers decide, but an answer in cents does not equal a gold without a unit. Percent, dozens and millions are
      numbers, not units.
    - Expressions: the same variables and equal values (``symbolic.agree``). A sine, binomial, factorial or floor in the
      answer must be evaluated unless the gold has one. ``y = x+1`` equals ``x+1`` and ``x = 5`` equals 5; if both
      sides have a name, it must be the same.
    - Sets: without order and repeats; lists: without order; tuples and vectors: in order. Unions of intervals and
      inequalities in one variable: as sets of numbers. Equations, inequalities and ratios: up to a constant factor.
      Matrices: by entry. Times of day: modulo 12 hours if only one side has a.m. or p.m.
    - Words: without case. Multiple-choice letters and initials: with case; if both sides have a text beside the letter,
      that too. Numerals with a base: the same digits and base.

    Args:
        gold: gold answer, LaTeX or plain text.
        answer: answer to compare; False if it cannot be read or the comparison exceeds the work limit.
        form: form that both must have (``forms.has_form``).

    Raises:
        ValueError: the gold cannot be read or does not have the form.
    """
    parsed_gold = read_answer(gold)
    if parsed_gold is None:
        raise ValueError(f"the gold answer cannot be read: {gold!r:.200}")
    if form is not None and not has_form(gold, gold, form):
        raise ValueError(f"the gold answer is not {form}: {gold!r:.200}")
    parsed_answer = read_answer(answer)
    if parsed_answer is None or (form is not None and not has_form(answer, gold, form)):
        return False
    try:
        with work_limit():
            return _same(parsed_gold, parsed_answer)
    except TooLargeError:
        LOGGER.info("not equal: comparison with the gold answer %.100r takes too much work: %.200r", gold, answer)
        return False


def same_answers(answer: str, other: str) -> bool:
    """Whether ``same_answer`` holds with either answer as the gold; False if one cannot be read.

    For majority votes. ``same_answer`` is stricter with the answer than with the gold.

    Args:
        answer, other: final answers, LaTeX or plain text.
    """
    for pair in ((answer, other), (other, answer)):
        with suppress(ValueError):
            if same_answer(*pair):
                return True
    return False


def _same(gold: Answer, answer: Answer) -> bool:
    if gold.letter or answer.letter:
        return _same_choice(gold, answer)
    if None not in (gold.name, answer.name) and gold.name != answer.name and not _is_labelled_point(gold, answer):
        return False
    renamed = rename_parameter(gold, answer)
    if renamed is None or differ_in_domain(gold, answer):
        return False
    gold, answer = to_common_kind(gold, renamed)
    if {gold.kind, answer.kind} == {"number", "expression"}:
        # The answer to a gold number must be a number; the answer to a gold expression may be its value.
        return gold.kind == "expression" and _same_scalar(gold, answer)
    if gold.kind != answer.kind:
        return False
    return COMPARE[gold.kind](gold, answer)


def _is_labelled_point(gold: Answer, answer: Answer) -> bool:
    """Whether one is a labelled point, ``P(4, 0)``, and the other names the coordinates, ``(x, y) = (4, 0)``."""
    return gold.kind == answer.kind == "tuple" and ("," in str(gold.name)) != ("," in str(answer.name))


def _same_part(gold: Answer, answer: Answer) -> bool:
    """Whether two parts of answers are equal; a set with one element does not equal that element here."""
    return (gold.kind == "set") == (answer.kind == "set") and _same(gold, answer)


def _same_choice(gold: Answer, answer: Answer) -> bool:
    contents = [replace(side, letter=None) for side in (gold, answer)]
    if gold.letter and answer.letter:
        return gold.letter == answer.letter and _same(*contents)
    letter = gold.letter or answer.letter
    other = answer if gold.letter else gold
    if other.kind == "text" and len(other.value) == 1:
        return other.value == letter
    return _same(*contents)


def _scales(gold: Answer, answer: Answer) -> tuple[Fraction, Fraction] | None:
    """Factors of the two values to common units; None if the units measure different things."""
    if gold.unit is None or answer.unit is None:
        return None if gold.unit is None and is_cents(answer.unit) else (Fraction(1), Fraction(1))
    return (gold.unit[0], answer.unit[0]) if gold.unit[1] == answer.unit[1] else None


def _same_scalar(gold: Answer, answer: Answer) -> bool:
    """Whether two numbers or expressions have the same variables and the same value."""
    scales = _scales(gold, answer)
    if scales is None:
        return False
    if gold.kind == answer.kind == "number":
        return gold.value * scales[0] == answer.value * scales[1]
    nodes = as_node(gold), as_node(answer)
    if variables(nodes[0]) != variables(nodes[1]):
        return False
    if answer.kind == "expression" and _unevaluated(nodes[1]) - _unevaluated(nodes[0]):
        return False  # sin 60 is not evaluated
    if scales[0] != scales[1]:
        nodes = ("mul", ("number", scales[0]), nodes[0]), ("mul", ("number", scales[1]), nodes[1])
    return agree(*nodes)


def _unevaluated(node: Node) -> frozenset[str]:
    """Kinds of unevaluated operations; binomials and factorials of variables are closed forms, which do not count."""
    kinds = frozenset(UNEVALUATED[name] for name in operations(node) & UNEVALUATED.keys())
    return kinds - {"factorial"} if variables(node) else kinds


def _same_parts(gold: Answer, answer: Answer) -> bool:
    return len(gold.value) == len(answer.value) and all(map(_same_part, gold.value, answer.value))


def _same_set(gold: Answer, answer: Answer) -> bool:
    forward = all(any(_same_part(a, b) for b in answer.value) for a in gold.value)
    return forward and all(any(_same_part(a, b) for a in gold.value) for b in answer.value)


def _same_list(gold: Answer, answer: Answer) -> bool:
    """Whether two lists are equal up to order, repeats counted; rankings must have the same order."""
    if len(gold.value) != len(answer.value):
        return False
    if _is_ranking(gold):
        return _same_parts(gold, answer)
    unmatched = list(answer.value)
    for a in gold.value:
        index = next((index for index, b in enumerate(unmatched) if _same_part(a, b)), None)
        if index is None:
            return False
        unmatched.pop(index)
    return True


def _is_ranking(answer: Answer) -> bool:
    """Whether a list consists of three or more letters that are not in alphabetical order."""
    letters = [item.value for item in answer.value if item.kind == "text" and len(item.value) == 1]
    return len(letters) == len(answer.value) > 2 and letters != sorted(letters)


def _same_intervals(gold: Answer, answer: Answer) -> bool:
    def is_same(a: Interval, b: Interval) -> bool:
        ends = (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
        return ends and _same(a.low, b.low) and _same(a.high, b.high)

    return len(gold.value) == len(answer.value) and all(map(is_same, gold.value, answer.value))


def _same_matrix(gold: Answer, answer: Answer) -> bool:
    shapes = [(len(matrix.value), len(matrix.value[0])) for matrix in (gold, answer)]
    if shapes[0] != shapes[1]:
        return False
    return all(_same(a, b) for x, y in zip(gold.value, answer.value, strict=True) for a, b in zip(x, y, strict=True))


def _same_equation(gold: Answer, answer: Answer) -> bool:
    (left, name, right), (other_left, other_name, other_right) = gold.value, answer.value
    if left is None or other_left is None:
        # y may be the name of a function: y = x + 1 equals f(x) = x + 1.
        has_same_name = name == other_name or ("y" in (name, other_name) and (left is None) != (other_left is None))
        return has_same_name and right is not None and other_right is not None and _same(right, other_right)
    return constant_ratio(left, other_left) not in (None, 0)


def _same_inequality(gold: Answer, answer: Answer) -> bool:
    ratio = constant_ratio(gold.value[0], answer.value[0])
    return gold.value[1] == answer.value[1] and ratio is not None and ratio > 0


def _same_time(gold: Answer, answer: Answer) -> bool:
    """Whether two times are equal, modulo 12 hours if only one of them has "a.m." or "p.m."."""
    (hour, minute, has_half), (other_hour, other_minute, other_has_half) = gold.value, answer.value
    ambiguous = [h for h, has in ((hour, has_half), (other_hour, other_has_half)) if not has]
    period = 12 if len(ambiguous) == 1 and 1 <= ambiguous[0] <= 12 else 24
    return minute == other_minute and (hour - other_hour) % period == 0


COMPARE: dict[str, Callable[[Answer, Answer], bool]] = {
    "number": _same_scalar,
    "expression": _same_scalar,
    "text": lambda a, b: same_words(a.value, b.value),
    "infinity": lambda a, b: a.value == b.value,
    "congruence": lambda a, b: a.value == b.value and (None in (a.name, b.name) or a.name == b.name),
    "time": _same_time,
    "ratio": _same_parts,
    "cases": _same_list,
    "set": _same_set,
    "list": _same_list,
    "tuple": _same_parts,
    "interval": _same_intervals,
    "matrix": _same_matrix,
    "equation": _same_equation,
    "inequality": _same_inequality,
}
