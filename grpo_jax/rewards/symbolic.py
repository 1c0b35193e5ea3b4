"""Equality of expressions by their values, within a fixed amount of work."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from random import Random
from typing import Any

from grpo_jax.rewards.expression import INVERSE, Node, operations, variables

AGREEMENT = 150
"""Decimal places to which constants must agree: more than any text of an answer's length can be made to."""
PLACES = 40
"""Decimal places to which functions must agree at each point."""
POINTS = 24
LARGEST_BITS = 20_000
WORK = 80_000.0
"""Units of work for reading or comparing one answer, each about 10 microseconds: less than a second."""
SECRET = os.urandom(32)
"""Of this process: nobody can write an expression that vanishes at points that depend on it."""
TINY, SMALL, LARGE = 2.0, 4.0, 7.0
"""Magnitudes of the variables at tiny, small and large points, in bits; tiny where small ones are too large."""
MOST_DIGITS = 1600
"""At points other than small ones, for algebraic expressions; of others, a quarter, which takes as long."""
BASES = (10, None)
"""What the base of a logarithm without one may be; None is e."""


class TooLargeError(ArithmeticError):
    """Evaluation would take more work or digits than one answer is allowed."""


class _Local(threading.local):
    left = WORK

    def __init__(self) -> None:
        from mpmath.ctx_mp import MPContext

        self.mp = MPContext()  # mpmath's global context holds one precision for all threads


_local = _Local()


@contextmanager
def work_limit() -> Iterator[None]:
    """Allow the evaluations inside ``WORK``; beyond it they raise ``TooLargeError``, in any thread.

    Work is counted, not timed: what is refused does not depend on the machine or its load.
    """
    before, _local.left = _local.left, WORK
    try:
        yield
    finally:
        _local.left = before


def _spend(units: float) -> None:
    _local.left -= units
    if _local.left < 0:
        raise TooLargeError("the evaluation takes too much work")


def is_evaluable(node: Node) -> bool:
    """Whether an expression has a value, at some of the points for its variables, within the work allowed."""
    try:
        if not variables(node):
            return _value(node, {}, _digits(node, SMALL) + PLACES) is not None
        points = _points(variables(node), node)[:2]
        return any(_value(node, at, digits + PLACES) is not None for at, _, digits in points)
    except TooLargeError:
        return False


def real_value(node: Node) -> Any | None:
    """The value of an expression without variables, where it is real: a Fraction or to 50 digits; else None.

    Raises:
        TooLargeError: the evaluation takes more work than the limit.
    """
    value = _value(node, {}, _digits(node, SMALL) + PLACES)
    if value is None or isinstance(value, Fraction):
        return value
    return value.real if abs(value.imag) <= abs(value) * _local.mp.mpf(10) ** -PLACES else None


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
    return any(_agree(a, b, base) for base in bases)


def _agree(a: Node, b: Node, base: int | None) -> bool:
    names = variables(a) | variables(b)
    if not names:
        size = _digits(a, SMALL) + _digits(b, SMALL)
        digits = size + AGREEMENT
        return _close(_value(a, {}, digits, base), _value(b, {}, digits, base), size // 2 + AGREEMENT, digits)
    compared = 0
    for at, is_integer, size in _points(names, a, b):
        digits = size + PLACES
        x = _value(a, at, digits, base)
        y = None if x is None else _value(b, at, digits, base)
        if x is None or (y is None and is_integer):
            continue
        if not _close(x, y, size // 2 + PLACES, digits):
            return False
        compared += 1
    return 2 * compared >= POINTS


def constant_ratio(a: Node, b: Node) -> Any | None:
    """The ratio of two expressions of the same variables, where it is one real number; None where it is not.

    Raises:
        TooLargeError: the comparison takes more work than the limit.
    """
    if variables(a) != variables(b):
        return None
    first, compared = None, 0
    for at, _, size in _points(variables(a), a, b):
        digits = size + PLACES
        x, y = _value(a, at, digits, 10), _value(b, at, digits, 10)
        if x is None or y is None or (_is_zero(x, digits) and _is_zero(y, digits)):
            continue
        if _is_zero(y, digits):
            return None
        ratio = _divide(x, y)
        if first is not None and not _close(first, ratio, size // 2 + PLACES, digits):
            return None
        first = ratio if first is None else first
        compared += 1
    if 2 * compared < POINTS or first is None:
        return None
    if isinstance(first, Fraction):
        return first
    return first.real if abs(first.imag) < 1e-35 * abs(first) else None


def is_constant(node: Node) -> bool:
    """Whether an expression has one value for all values of its variables, or none.

    Raises:
        TooLargeError: the comparison takes more work than the limit.
    """
    values = [(_value(node, at, size + PLACES, 10), size) for at, _, size in _points(variables(node), node, node)]
    defined = [(value, size) for value, size in values if value is not None]
    return all(_close(defined[0][0], value, PLACES, size + PLACES) for value, size in defined[1:])


def _points(names: frozenset[str], *expressions: Node) -> list[tuple[dict[str, Fraction], bool, int]]:
    """The points of a comparison, whether they are integers, and the digits that a comparison there takes.

    Signs, orders and sizes are the same in every process, so that honest answers are judged alike everywhere; only the
    digits are secret. Some fractions are small, some large, and some larger than any constant in the expressions, which
    may hide another branch behind it; the latter two only where their values are not too large.
    """
    constants = max(_size(each, 0.0)[1] for each in expressions)
    kinds = []
    most = MOST_DIGITS if all(map(_is_algebraic, expressions)) else MOST_DIGITS // 4
    try:
        kinds = [(SMALL, sum(_digits(each, SMALL) for each in expressions))]
    except TooLargeError:
        kinds = [(TINY, sum(_digits(each, TINY) for each in expressions))]
    for bits in (LARGE, 2 * constants + 20):
        with suppress(TooLargeError):
            digits = sum(_digits(each, bits) for each in expressions)
            kinds += [(bits, digits)] if digits <= most else []
    found = []
    for number in range(POINTS):
        public, secret = Random(number), Random(SECRET + bytes([number]))
        is_integer = number % 3 == 1
        bits, digits = kinds[0] if number % 3 < 2 else kinds[(number // 3) % len(kinds)]
        at = {}
        for name in sorted(names):
            size = public.uniform(-1, 1)
            if is_integer:
                at[name] = Fraction(round((2 ** int(bits) - 1) * size))
                continue
            denominator = secret.getrandbits(36) | 1 << 36
            size = Fraction(size * (0.9 + 0.1 * secret.random())) * 2 ** int(bits)
            at[name] = Fraction(round(size * denominator), denominator)
        found.append((at, is_integer, digits))
    return found


def _is_algebraic(node: Node) -> bool:
    if node[0] == "pow" and variables(node[2]):
        return False
    is_known = node[0] in ("number", "variable", "constant", "add", "mul", "div", "pow", "abs", "floor", "ceil")
    return is_known and all(_is_algebraic(each) for each in node[1:] if isinstance(each, tuple))


def _value(node: Node, at: Mapping[str, Fraction], digits: int, base: int | None = 10) -> Any | None:
    try:
        return _evaluate(node, at, digits, base)
    except TooLargeError:
        raise
    except (ArithmeticError, ValueError):
        return None


def _is_zero(value: Any, digits: int) -> bool:
    return value == 0 if isinstance(value, Fraction) else abs(value) < _local.mp.mpf(10) ** -(digits - 10)


def _divide(x: Any, y: Any) -> Any:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x / y
    return _inexact(x) / _inexact(y)


def _close(x: Any, y: Any, places: int, digits: int) -> bool:
    """Agreement to so many places; what is zero comes out as rounding, of which no place means anything."""
    if x is None or y is None:
        return False
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    mp = _local.mp
    mp.dps = digits + 20
    x, y = _inexact(x), _inexact(y)
    largest = max(abs(x), abs(y))
    return largest < mp.mpf(10) ** -(digits - 10) or abs(x - y) <= mp.mpf(10) ** -places * largest


def _digits(node: Node, bits: float) -> int:
    """Decimal digits that evaluation takes where variables have magnitudes of up to ``2 ** bits``."""
    return int(2 * _size(node, bits)[1] * math.log10(2)) + 10


def _size(node: Node, bits: float) -> tuple[float, float]:
    """Bounds of log2 of an expression's magnitude, and of the magnitudes and their inverses of all its parts.

    Differences are taken to be no smaller than their terms: the digits allow for twice the bound.
    """
    name, parts = node[0], node[1:]
    if name == "number":
        top, bottom = math.log2(max(abs(parts[0].numerator), 1)), math.log2(parts[0].denominator)
        return top - bottom, max(top, bottom)
    if name in ("variable", "constant"):
        return (bits, bits) if name == "variable" else (1.7, 1.7)
    tops, spans = zip(*(_size(each, bits) for each in parts), strict=True)
    if name == "add":
        top = max(tops) + math.log2(len(parts))
        span = max(spans) + math.log2(len(parts))
    elif name == "mul":
        top, span = sum(tops), sum(spans)
    elif name == "div":
        top = tops[0] + (-tops[1] if parts[1][0] == "number" else spans[1])
        span = sum(spans)
    elif name == "pow":
        top = span = spans[0] * 2.0 ** min(tops[1], 64.0)
    elif name == "factorial":
        top = span = 2 ** min(max(tops[0], 1.0), 64.0) * max(tops[0], 1.0) + 2
    elif name == "binom":
        top = span = 2 ** min(max(tops[0], 0.0), 64.0) + 1
    elif name in ("sinh", "cosh", "tanh", "coth"):
        top = span = 1.5 * 2 ** min(max(tops[0], 0.0), 64.0) + 1
    elif name in ("ln", "log"):
        top, span = math.log2(spans[0] + 4), 2.0
    elif name in ("sin", "cos", *INVERSE):
        top, span = 1.0, 2.0
    else:
        top = span = max(*tops, *spans)
    span = max(span, *spans, abs(top))
    if span > LARGEST_BITS:
        raise TooLargeError("the values are too large")
    return top, span


def _evaluate(node: Node, at: Mapping[str, Fraction], digits: int, base: int | None = 10) -> Any:
    """The value at a point: a Fraction where it is worked out exactly, else a complex number to so many digits."""
    _local.mp.dps = digits + 20
    return _Evaluation(at, digits, base).value(node)


class _Evaluation:
    def __init__(self, at: Mapping[str, Fraction], digits: int, base: int | None) -> None:
        self.at, self.digits, self.base, self.mp = at, digits, base, _local.mp

    def value(self, node: Node) -> Any:
        name, parts = node[0], node[1:]
        if name == "number":
            return parts[0]
        if name == "variable":
            return self.at[parts[0]]
        if name == "constant":
            return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[parts[0]]
        values = [self.value(each) for each in parts]
        _spend(_cost(name, values, self.digits))
        if name == "pow":
            return self.power(*values, is_constant=not variables(parts[1]))
        if name in ("add", "mul", "div"):
            return self.arithmetic(name, values)
        if name in ("factorial", "binom", "gcd", "lcm"):
            return self.combinatorial(name, values)
        if name in ("abs", "floor", "ceil", "min", "max"):
            return self.real(name, values)
        return self.function(name, self.mp.mpmathify(_inexact(values[0])))

    def arithmetic(self, name: str, values: list[Any]) -> Any:
        if not all(isinstance(each, Fraction) for each in values):
            values = [_inexact(each) for each in values]
        if name == "div":
            if self.is_zero(values[1]):
                raise ZeroDivisionError
            return values[0] / values[1]
        result = values[0]
        for each in values[1:]:
            result = result + each if name == "add" else result * each
        return result

    def is_zero(self, value: Any) -> bool:
        return _is_zero(value, self.digits + 10)

    def power(self, x: Any, y: Any, *, is_constant: bool) -> Any:
        if self.is_zero(x):
            if not isinstance(y, Fraction) or y <= 0:
                raise ZeroDivisionError
            return Fraction(0)
        if not isinstance(y, Fraction):
            return self.mp.power(_inexact(x), _inexact(y))
        if y.denominator == 1:
            if isinstance(x, Fraction) and abs(y) * max(x.numerator.bit_length(), x.denominator.bit_length()) < 4e4:
                return x**y.numerator
            return _inexact(x) ** y.numerator
        x = _inexact(x)
        if y == Fraction(1, 2):
            return self.mp.sqrt(x)
        if is_constant and y.denominator % 2 and x.imag == 0 and x.real < 0:
            return (-1) ** y.numerator * self.mp.power(-x, _inexact(y))  # the real root, as of -8
        return self.mp.power(x, _inexact(y))

    def combinatorial(self, name: str, values: list[Any]) -> Any:
        integers = [self.integer(each) for each in values]
        if name in ("gcd", "lcm"):
            if None in integers:
                raise ValueError(f"{name} of other than integers")
            return Fraction(getattr(math, name)(*integers))
        counts = [each for each in integers if each is not None and 0 <= each <= 3000]
        if len(counts) == len(integers):
            return Fraction(math.factorial(*counts) if name == "factorial" else math.comb(*counts))
        if self.digits > 400:
            raise TooLargeError("a gamma function to many digits")
        gamma, n = self.mp.gamma, _inexact(values[0])
        if name == "factorial":
            return gamma(n + 1)
        return gamma(n + 1) / (gamma(_inexact(values[1]) + 1) * gamma(n - _inexact(values[1]) + 1))

    def integer(self, value: Any) -> int | None:
        """The integer that a value is, exactly or but for rounding."""
        if isinstance(value, Fraction):
            return value.numerator if value.denominator == 1 else None
        nearest = int(self.mp.nint(value.real))
        return nearest if self.is_zero((value - nearest) / (abs(nearest) + 1)) else None

    def real(self, name: str, values: list[Any]) -> Any:
        if name == "abs":
            return abs(values[0])
        if any(not isinstance(each, Fraction) and not self.is_zero(self.mp.mpf(each.imag)) for each in values):
            raise ValueError(f"{name} of a complex number")
        values = [each if isinstance(each, Fraction) else each.real for each in values]
        if name in ("min", "max"):
            return (min if name == "min" else max)(values, key=_inexact)
        integer = self.integer(values[0])
        return Fraction(getattr(math, name)(values[0]) if integer is None else integer)

    def function(self, name: str, x: Any) -> Any:
        mp = self.mp
        if name in ("ln", "log"):
            if self.is_zero(x):
                raise ZeroDivisionError
            return mp.ln(x) / (mp.ln(self.base) if name == "log" and self.base else 1)
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name)
        return getattr(mp, name)(x)


def _inexact(value: Any) -> Any:
    mp = _local.mp
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _cost(name: str, values: list[Any], digits: int) -> float:
    """Units of work, of about 10 microseconds where Python is slow: measured, and rounded up."""
    if all(isinstance(each, Fraction) for each in values):
        bits = sum(each.numerator.bit_length() + each.denominator.bit_length() for each in values)
        if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max"):
            return 0.5 + (bits / 5000) ** 2
        if name == "pow" and values[1].denominator == 1:
            return 1 + (min(bits * abs(values[1]), digits * 8) / 5000) ** 1.6
    arithmetic, function = 1 + 4 * (digits / 1000) ** 1.6, 2.5 * (1 + (digits / 60) ** 1.6)
    if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max", "gcd", "lcm"):
        return arithmetic * len(values)
    if name == "pow" and isinstance(values[1], Fraction):
        return arithmetic * (10 + 2 * values[1].numerator.bit_length()) if values[1].denominator <= 2 else function
    return 40 * function if name in ("factorial", "binom") else 2 * function if name in ("tan", "cot") else function
