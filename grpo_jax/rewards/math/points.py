"""The points at which expressions are compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from random import Random

from grpo_jax.rewards.math.evaluation import MOST_GAMMA_DIGITS, WORK, TooLargeError, digits_needed, size_bounds
from grpo_jax.rewards.math.expression import Node, operations, variables

POINTS = 24
SECRET = os.urandom(32)
"""Of this process: nobody can write an expression that vanishes at points that depend on it."""
TINY, SMALL, LARGE = 2.0, 4.0, 7.0
"""Magnitudes of the variables at tiny, small and large points, in bits; tiny where small ones are too large."""
MOST_DIGITS = 8000
"""At points other than small ones, for algebraic expressions; for others, as many as take as long."""


def points_for(names: frozenset[str], *expressions: Node) -> list[tuple[dict[str, Fraction], bool, int]]:
    """The points of a comparison, whether they are integers, and the digits that a comparison there takes.

    Signs, orders and sizes are the same in every process, so that honest answers are judged alike everywhere; only the
    digits are secret. A third are integers, the others small or large fractions; of factorials and binomials all but
    three are integers from 0 on. Where a root, an absolute value or
    the like may take another branch, there are four more beyond every constant of the expressions, as far as the values
    are not too large; where something is rounded, eight more that are closer to an integer or a simple fraction than
    any constant.
    """
    small = _fitting(expressions, (SMALL,)) or _fitting(expressions, (TINY,))
    if small is None:
        raise TooLargeError("the values are too large")
    large = _fitting(expressions, (LARGE,)) or small
    found = []
    counts = any({"factorial", "binom"} & operations(each) for each in expressions)
    for number in range(POINTS):
        is_integer = number % 8 != 0 if counts else number % 3 == 1
        bits, digits = large if number % 6 == 5 else small
        public, secret = Random(number), Random(SECRET + bytes([number]))
        sizes = {name: public.uniform(-1, 1) for name in sorted(names)}
        if is_integer:
            sizes = {name: abs(size) for name, size in sizes.items()} if counts else sizes
            at = {name: Fraction(round((2 ** int(bits) - 1) * size)) for name, size in sizes.items()}
        else:
            at = {name: _near(size, bits, secret) for name, size in sizes.items()}
        found.append((at, is_integer, digits))
    constants = max(map(_largest_constant, expressions))
    largest = _fitting(expressions, (2 * constants + 20, 40.0, 20.0, 14.0, 10.0)) or small
    for number in range(4 if any(map(_has_branch, expressions)) else 0):
        secret = Random(SECRET + bytes([POINTS + number]))
        signs = [(-1.0) ** (number >> (place % 2)) for place, _ in enumerate(names)]
        at = {name: _near(sign, largest[0], secret) for name, sign in zip(sorted(names), signs, strict=True)}
        found.append((at, False, largest[1]))
    rounds = any({"floor", "ceil"} & operations(each) for each in expressions)
    close = _fitting(expressions, (constants + 30,)) or small
    for number in range(8 if rounds else 0):
        secret = Random(SECRET + bytes([POINTS + 4 + number]))
        places = {name: Fraction(secret.randint(-40, 40), (1, 2, 3, 12)[number // 2]) for name in sorted(names)}
        distance = Fraction((-1) ** number, 2 ** int(constants + 20))
        found.append(({name: place + distance for name, place in places.items()}, False, close[1]))
    return found


def sample_point(names: frozenset[str]) -> dict[str, Fraction]:
    """One small point, whose digits are secret too."""
    public, secret = Random(POINTS), Random(SECRET + bytes([255]))
    return {name: _near(public.uniform(0.5, 1), SMALL, secret) for name in sorted(names)}


def _largest_constant(node: Node) -> float:
    """A bound of log2 of the magnitudes, and their inverses, of the parts of an expression without variables."""
    if not variables(node):
        return size_bounds(node, 0.0)[1]
    return max((_largest_constant(each) for each in node[1:] if isinstance(each, tuple)), default=0.0)


def _near(size: float, bits: float, secret: Random) -> Fraction:
    """A fraction of a secret denominator, up to a tenth closer to zero than ``size * 2 ** bits``."""
    denominator = secret.getrandbits(36) | 1 << 36
    return Fraction(round(Fraction(size * (0.9 + 0.1 * secret.random())) * 2 ** int(bits) * denominator), denominator)


def _fitting(expressions: Sequence[Node], choices: Sequence[float]) -> tuple[float, int] | None:
    """The first magnitude of the variables whose values are not too large, and the digits that these take."""
    functions = sum(_functions(each) for each in expressions)
    most = 60 * (WORK / (80 * (functions + 1))) ** 0.625 if functions else MOST_DIGITS
    if any({"factorial", "binom"} & operations(each) for each in expressions):
        most = MOST_GAMMA_DIGITS // 2
    for bits in choices:
        with suppress(TooLargeError):
            digits = sum(digits_needed(each, bits) for each in expressions)
            if digits <= most or bits <= SMALL:
                return bits, digits
    return None


def _functions(node: Node) -> int:
    """How many functions an expression has whose evaluation takes longer than arithmetic."""
    inner = sum(_functions(each) for each in node[1:] if isinstance(each, tuple))
    is_fast = node[0] in ("number", "variable", "add", "mul", "div", "abs", "floor", "ceil", "min", "max")
    return inner + (0 if is_fast or (node[0] == "pow" and not variables(node[2])) else 1)


def _has_branch(node: Node) -> bool:
    """Whether there is more than one branch of an expression on the real line: it is not analytic."""
    if node[0] in ("abs", "floor", "ceil", "min", "max"):
        return True
    is_power = node[0] == "pow" and variables(node[1]) and not variables(node[2])
    if is_power and (node[2][0] != "number" or node[2][1].denominator != 1):
        return True
    return any(_has_branch(each) for each in node[1:] if isinstance(each, tuple))
