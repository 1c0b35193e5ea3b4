"""Sample points for the comparison of expressions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from random import Random

from grpo_jax.rewards.math.evaluation import MAX_GAMMA_DIGITS, WORK_LIMIT, TooLargeError, digits_needed, size_bounds
from grpo_jax.rewards.math.expression import Node, operations, variables

NUM_POINTS = 24
SECRET = os.urandom(32)
"""Secret of this process, so that no policy can learn an expression that vanishes at the points."""
TINY_BITS, SMALL_BITS, LARGE_BITS = 2.0, 4.0, 7.0
"""``log2`` of the variables' magnitudes; tiny points replace small ones where values would be too large."""
MAX_DIGITS = 8000
"""Digits at points larger than small ones, for algebraic expressions; fewer for others, which take as long."""


def points_for(names: frozenset[str], *expressions: Node) -> list[tuple[dict[str, Fraction], bool, int]]:
    """``(point, is_integer, digits)`` of every sample point at which expressions are compared.

    Signs, orders and sizes are the same in every process, so that honest answers get the same score everywhere; only
    the digits are secret. There are ``NUM_POINTS`` points: a third are integers, the others small or large fractions.
    For factorials and binomials all but three are non-negative integers. Expressions with branches (roots, absolute
    values) get four more points beyond all their constants, as far as values stay small enough; expressions with
    ``floor`` or ``ceil`` get eight more that are closer to an integer or simple fraction than any constant.

    Args:
        names: names of all variables.
        expressions: the expressions to compare.

    Returns:
        For each point the value of every variable, whether these are integers, and the decimal digits that evaluating
        all expressions there needs.

    Raises:
        TooLargeError: the values are too large even at tiny points.
    """
    small = _first_feasible(expressions, (SMALL_BITS,)) or _first_feasible(expressions, (TINY_BITS,))
    if small is None:
        raise TooLargeError("the values are too large at small points")
    large = _first_feasible(expressions, (LARGE_BITS,)) or small
    points = []
    has_factorial = any({"factorial", "binom"} & operations(node) for node in expressions)
    for number in range(NUM_POINTS):
        is_integer = number % 8 != 0 if has_factorial else number % 3 == 1
        bits, digits = large if number % 6 == 5 else small
        public, secret = Random(number), Random(SECRET + bytes([number]))
        sizes = {name: public.uniform(-1, 1) for name in sorted(names)}
        if is_integer:
            sizes = {name: abs(size) for name, size in sizes.items()} if has_factorial else sizes
            point = {name: Fraction(round((2 ** int(bits) - 1) * size)) for name, size in sizes.items()}
        else:
            point = {name: _fraction_near(size, bits, secret) for name, size in sizes.items()}
        points.append((point, is_integer, digits))
    constants = max(map(_largest_constant, expressions))
    largest = _first_feasible(expressions, (2 * constants + 20, 40.0, 20.0, 14.0, 10.0)) or small
    for number in range(4 if any(map(_has_branch, expressions)) else 0):
        secret = Random(SECRET + bytes([NUM_POINTS + number]))
        signs = {name: (-1.0) ** (number >> (index % 2)) for index, name in enumerate(sorted(names))}
        point = {name: _fraction_near(sign, largest[0], secret) for name, sign in signs.items()}
        points.append((point, False, largest[1]))
    has_rounding = any({"floor", "ceil"} & operations(node) for node in expressions)
    near = _first_feasible(expressions, (constants + 30,)) or small
    for number in range(8 if has_rounding else 0):
        secret = Random(SECRET + bytes([NUM_POINTS + 4 + number]))
        steps = {name: Fraction(secret.randint(-40, 40), (1, 2, 3, 12)[number // 2]) for name in sorted(names)}
        distance = Fraction((-1) ** number, 2 ** int(constants + 20))
        points.append(({name: step + distance for name, step in steps.items()}, False, near[1]))
    return points


def sample_point(names: frozenset[str]) -> dict[str, Fraction]:
    """One small point with secret digits."""
    public, secret = Random(NUM_POINTS), Random(SECRET + bytes([255]))
    return {name: _fraction_near(public.uniform(0.5, 1), SMALL_BITS, secret) for name in sorted(names)}


def _largest_constant(node: Node) -> float:
    """Upper bound of ``|log2 |value||`` over the constant subexpressions."""
    if not variables(node):
        return size_bounds(node, 0.0)[1]
    return max((_largest_constant(part) for part in node[1:] if isinstance(part, tuple)), default=0.0)


def _fraction_near(size: float, bits: float, secret: Random) -> Fraction:
    """A fraction with a secret denominator, up to a tenth closer to zero than ``size * 2 ** bits``."""
    denominator = secret.getrandbits(36) | 1 << 36
    return Fraction(round(Fraction(size * (0.9 + 0.1 * secret.random())) * 2 ** int(bits) * denominator), denominator)


def _first_feasible(expressions: Sequence[Node], choices: Sequence[float]) -> tuple[float, int] | None:
    """The first magnitude in ``choices`` at which no value is too large, and the digits needed there; else None."""
    functions = sum(map(_count_functions, expressions))
    max_digits = 60 * (WORK_LIMIT / (80 * (functions + 1))) ** 0.625 if functions else MAX_DIGITS
    if any({"factorial", "binom"} & operations(node) for node in expressions):
        max_digits = MAX_GAMMA_DIGITS // 2
    for bits in choices:
        with suppress(TooLargeError):
            digits = sum(digits_needed(node, bits) for node in expressions)
            if digits <= max_digits or bits <= SMALL_BITS:
                return bits, digits
    return None


def _count_functions(node: Node) -> int:
    """The number of functions in an expression that are slower than arithmetic."""
    inner = sum(_count_functions(part) for part in node[1:] if isinstance(part, tuple))
    is_fast = node[0] in ("number", "variable", "add", "mul", "div", "abs", "floor", "ceil", "min", "max")
    return inner + (0 if is_fast or (node[0] == "pow" and not variables(node[2])) else 1)


def _has_branch(node: Node) -> bool:
    """Whether an expression has several branches on the real line, as roots and absolute values have."""
    if node[0] in ("abs", "floor", "ceil", "min", "max"):
        return True
    is_power = node[0] == "pow" and variables(node[1]) and not variables(node[2])
    if is_power and (node[2][0] != "number" or node[2][1].denominator != 1):
        return True
    return any(_has_branch(part) for part in node[1:] if isinstance(part, tuple))
