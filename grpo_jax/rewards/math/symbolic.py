"""Equality of expressions by their values."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from grpo_jax.rewards.math.evaluation import TooLargeError, close, digits_needed, evaluate, is_zero, quotient, real_part
from grpo_jax.rewards.math.expression import Node, operations, variables
from grpo_jax.rewards.math.points import SMALL, points_for, sample_point

AGREEMENT = 150
"""Decimal places to which constants must agree: more than any text of an answer's length can be made to."""
PLACES = 40
"""Decimal places to which functions must agree at each point."""
BASES = (10, None)
"""What the base of a logarithm without one may be; None is e."""


def is_evaluable(node: Node) -> bool:
    """Whether an expression has a value, at some of the points for its variables, within the work allowed."""
    try:
        if not variables(node):
            return evaluate(node, {}, digits_needed(node, SMALL) + PLACES) is not None
        points = points_for(variables(node), node)[:2]
        return any(evaluate(node, at, digits + PLACES) is not None for at, _, digits in points)
    except TooLargeError:
        return False


def real_value(node: Node) -> Any | None:
    """The value of an expression without variables, where it is real: a Fraction or to 50 digits; else None.

    Raises:
        TooLargeError: the evaluation takes more work than the limit.
    """
    return real_part(evaluate(node, {}, digits_needed(node, SMALL) + PLACES), PLACES)


def agree(a: Node, b: Node) -> bool:
    """Whether two expressions of the same variables have the same value wherever both are defined.

    Constants are compared exactly where they are rational, else to 150 decimal places. Functions are compared to 40
    places at ``POINTS`` points: integers, small and large fractions of all signs and orders, whose digits come from a
    secret of the process. ``a`` may be undefined at some of them; ``b`` must be defined where ``a`` is, except at
    integers. A logarithm without a base has base 10 or e, the same in both.

    Raises:
        TooLargeError: the comparison takes more work than the limit.
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
    """The value of an expression at one point; kept, because many answers to one problem are compared with each other.

    None where it has none, or takes too much work.
    """
    try:
        return evaluate(node, sample_point(names), digits_needed(node, SMALL) + 2 * PLACES)
    except TooLargeError:
        return None


def _agree(a: Node, b: Node, base: int | None) -> bool:
    names = variables(a) | variables(b)
    if not names:
        size = digits_needed(a, SMALL) + digits_needed(b, SMALL)
        digits = size + AGREEMENT
        return close(evaluate(a, {}, digits, base), evaluate(b, {}, digits, base), size // 2 + AGREEMENT, digits)
    compared = 0
    points = points_for(names, a, b)
    for at, is_integer, size in points:
        digits = size + PLACES
        x = evaluate(a, at, digits, base)
        y = None if x is None else evaluate(b, at, digits, base)
        if x is None or (y is None and is_integer):
            continue
        if not close(x, y, size // 2 + PLACES, digits):
            return False
        compared += 1
    return 2 * compared >= len(points)


def constant_ratio(a: Node, b: Node) -> Any | None:
    """The ratio of two expressions of the same variables, where it is one real number; None where it is not.

    Raises:
        TooLargeError: the comparison takes more work than the limit.
    """
    if variables(a) != variables(b):
        return None
    first, first_size, compared = None, 0, 0
    points = points_for(variables(a), a, b)
    for at, _, size in points:
        digits = size + PLACES
        x, y = evaluate(a, at, digits, 10), evaluate(b, at, digits, 10)
        if x is None or y is None or (is_zero(x, digits) and is_zero(y, digits)):
            continue
        if is_zero(y, digits):
            return None
        ratio = quotient(x, y)
        known = min(first_size, size)  # the first ratio has no more places than its own point gave it
        if first is not None and not close(first, ratio, known // 2 + PLACES, known + PLACES):
            return None
        if first is None:
            first, first_size = ratio, size
        compared += 1
    if 2 * compared < len(points) or first is None:
        return None
    return real_part(first, PLACES - 5)


def is_constant(node: Node) -> bool:
    """Whether an expression has one value for all values of its variables, or none.

    Raises:
        TooLargeError: the comparison takes more work than the limit.
    """
    values = [(evaluate(node, at, size + PLACES, 10), size) for at, _, size in points_for(variables(node), node, node)]
    defined = [(value, size) for value, size in values if value is not None]
    return all(close(defined[0][0], value, PLACES, size + PLACES) for value, size in defined[1:])
