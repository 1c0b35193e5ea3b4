"""Equality of expressions by numerical evaluation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from grpo_jax.rewards.math.evaluation import TooLargeError, close, digits_needed, evaluate, is_zero, quotient, real_part
from grpo_jax.rewards.math.expression import Node, operations, variables
from grpo_jax.rewards.math.points import SMALL_BITS, points_for, sample_point

AGREEMENT = 150
"""Decimal places to which constants must agree: two different ones of an answer's length cannot be made to."""
PLACES = 40
"""Decimal places to which functions must agree at every point."""
BASES = (10, None)
"""Possible bases of a logarithm without an explicit base; None is e."""


def is_evaluable(node: Node) -> bool:
    """Whether an expression has a value, at one of two points if it has variables, within the work limit."""
    try:
        if not variables(node):
            return evaluate(node, {}, digits_needed(node, SMALL_BITS) + PLACES) is not None
        points = points_for(variables(node), node)[:2]
        return any(evaluate(node, point, digits + PLACES) is not None for point, _, digits in points)
    except TooLargeError:
        return False


def real_value(node: Node) -> Any | None:
    """The real value of an expression without variables, a Fraction or an mpmath number; None if it is not real.

    Raises:
        TooLargeError: the evaluation exceeds the work limit.
    """
    return real_part(evaluate(node, {}, digits_needed(node, SMALL_BITS) + PLACES), PLACES)


def agree(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value wherever both are defined.

    Rational constants are compared exactly, others to ``AGREEMENT`` decimal places. Functions are compared to
    ``PLACES`` places at ``points_for``, whose digits are secret. At least half of the points must be defined for both.

    Args:
        a: the reference; it may be undefined at some points.
        b: expression of the same variables; it must be defined where ``a`` is, except at integers. Logarithms without
            a base have base 10 or e, the same in both expressions.

    Raises:
        TooLargeError: the comparison exceeds the work limit.
    """
    if a == b:
        return True
    bases = BASES if "log" in operations(a) | operations(b) else BASES[:1]
    if len(bases) == 1:
        x, y = (_sample(node, variables(a) | variables(b)) for node in (a, b))
        if x is not None and y is not None and not close(x, y, PLACES // 2, PLACES):
            return False
    return any(_agree(a, b, base) for base in bases)


@lru_cache(maxsize=4096)
def _sample(node: Node, names: frozenset[str]) -> Any | None:
    """The value of an expression at one point; None if it is undefined or takes too much work.

    Cached, because many answers to one problem are compared with each other.
    """
    try:
        return evaluate(node, sample_point(names), digits_needed(node, SMALL_BITS) + 2 * PLACES)
    except TooLargeError:
        return None


def _agree(a: Node, b: Node, base: int | None) -> bool:
    names = variables(a) | variables(b)
    if not names:
        size = digits_needed(a, SMALL_BITS) + digits_needed(b, SMALL_BITS)
        digits = size + AGREEMENT
        return close(evaluate(a, {}, digits, base), evaluate(b, {}, digits, base), size // 2 + AGREEMENT, digits)
    compared = 0
    points = points_for(names, a, b)
    for point, is_integer, size in points:
        digits = size + PLACES
        x = evaluate(a, point, digits, base)
        y = None if x is None else evaluate(b, point, digits, base)
        if x is None or (y is None and is_integer):
            continue
        if not close(x, y, size // 2 + PLACES, digits):
            return False
        compared += 1
    return 2 * compared >= len(points)


def constant_ratio(a: Node, b: Node) -> Any | None:
    """The real number ``a / b``; None if the ratio is not constant, not real or ``b`` is zero.

    Args:
        a: expression.
        b: expression; None is returned if its variables are not those of ``a``.

    Raises:
        TooLargeError: the comparison exceeds the work limit.
    """
    if variables(a) != variables(b):
        return None
    first, first_size, compared = None, 0, 0
    points = points_for(variables(a), a, b)
    for point, _, size in points:
        digits = size + PLACES
        x, y = evaluate(a, point, digits, 10), evaluate(b, point, digits, 10)
        if x is None or y is None or (is_zero(x, digits) and is_zero(y, digits)):
            continue
        if is_zero(y, digits):
            return None
        ratio = quotient(x, y)
        common = min(first_size, size)  # each ratio is known to the digits of its own point
        if first is not None and not close(first, ratio, common // 2 + PLACES, common + PLACES):
            return None
        if first is None:
            first, first_size = ratio, size
        compared += 1
    if 2 * compared < len(points) or first is None:
        return None
    return real_part(first, PLACES - 5)


def is_constant(node: Node) -> bool:
    """Whether an expression has the same value wherever it is defined; True if it is defined nowhere.

    Raises:
        TooLargeError: the evaluation exceeds the work limit.
    """
    points = points_for(variables(node), node, node)
    values = [(evaluate(node, point, size + PLACES, 10), size) for point, _, size in points]
    defined = [(value, size) for value, size in values if value is not None]
    return all(close(defined[0][0], value, PLACES, size + PLACES) for value, size in defined[1:])
