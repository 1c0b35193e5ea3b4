"""Evaluation of expressions, exactly or to a number of digits, within a fixed amount of work."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.math.expression import INVERSE, Node, variables

GUARD = 20
"""Digits beyond those asked for, which rounding may spoil."""
LARGEST_BITS = 20_000
WORK = 60_000.0
"""Units of work for reading or comparing one answer, each about 10 microseconds: less than a second."""
MOST_GAMMA_DIGITS = 500
MOST_COUNTED = 3000
"""Up to which factorials and binomials are worked out exactly."""


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


def evaluate(node: Node, at: Mapping[str, Fraction], digits: int, base: int | None = 10) -> Any | None:
    """The value of an expression at a point; None where it is not defined.

    Args:
        node: the expression.
        at: the values of its variables.
        digits: of the working precision; ``digits_needed`` says how many the values on the way take.
        base: of logarithms without one; None for e.

    Returns:
        A Fraction where the value is worked out exactly, else a number of mpmath.

    Raises:
        TooLargeError: the work limit is reached.
    """
    _local.mp.dps = digits + GUARD
    try:
        return _Evaluation(at, digits, base).value(node)
    except TooLargeError:
        raise
    except (ArithmeticError, ValueError):
        return None


def is_zero(value: Any, digits: int) -> bool:
    """Whether a value is zero, exactly or but for rounding."""
    return value == 0 if isinstance(value, Fraction) else abs(value) < _local.mp.mpf(10) ** -(digits - 10)


def quotient(x: Any, y: Any) -> Any:
    """``x / y``, exact where both are."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x / y
    return _inexact(x) / _inexact(y)


def real_part(value: Any, places: int) -> Any | None:
    """The real part of a value that is real to so many places; None for another."""
    if value is None or isinstance(value, Fraction):
        return value
    return value.real if abs(value.imag) <= abs(value) * _local.mp.mpf(10) ** -places else None


def close(x: Any, y: Any, places: int, digits: int) -> bool:
    """Agreement to so many places; what is zero comes out as rounding, of which no place means anything."""
    if x is None or y is None:
        return False
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    mp = _local.mp
    mp.dps = digits + GUARD
    x, y = _inexact(x), _inexact(y)
    largest = max(abs(x), abs(y))
    return largest < mp.mpf(10) ** -(digits - 10) or abs(x - y) <= mp.mpf(10) ** -places * largest


def digits_needed(node: Node, bits: float) -> int:
    """Decimal digits that evaluation takes where variables have magnitudes of up to ``2 ** bits``."""
    return int(2 * size_bounds(node, bits)[1] * math.log10(2)) + 10


def size_bounds(node: Node, bits: float) -> tuple[float, float]:
    """Bounds of log2 of an expression's magnitude, and of the magnitudes and their inverses of all its parts.

    Differences are taken to be no smaller than their terms: the digits allow for twice the bound.
    """
    name, parts = node[0], node[1:]
    if name == "number":
        top, bottom = math.log2(max(abs(parts[0].numerator), 1)), math.log2(parts[0].denominator)
        return top - bottom, max(top, bottom)
    if name in ("variable", "constant"):
        return (bits, bits) if name == "variable" else (1.7, 1.7)
    tops, spans = zip(*(size_bounds(each, bits) for each in parts), strict=True)
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
        for value in values:
            _check_magnitude(value)
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
        return is_zero(value, self.digits + 10)

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
        counts = [each for each in integers if each is not None and 0 <= each <= MOST_COUNTED]
        if len(counts) == len(integers):
            return Fraction(math.factorial(*counts) if name == "factorial" else math.comb(*counts))
        if self.digits > MOST_GAMMA_DIGITS:
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


def _check_magnitude(value: Any) -> None:
    """Refuse numbers far from 1: mpmath adds a huge and a tiny one digit by digit, which takes hours and gigabytes."""
    for part in () if isinstance(value, Fraction) else (value.real, value.imag):
        _, mantissa, exponent, bits = part._mpf_
        if mantissa and abs(exponent + bits) > 10 * LARGEST_BITS:
            raise TooLargeError("a value is too large or too close to 0")


def _inexact(value: Any) -> Any:
    mp = _local.mp
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _cost(name: str, values: list[Any], digits: int) -> float:
    """Units of work, of about 10 microseconds where Python is slow: measured, and rounded up."""
    if all(isinstance(each, Fraction) for each in values):
        bits = sum(each.numerator.bit_length() + each.denominator.bit_length() for each in values)
        if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max"):
            return 0.5 + (bits / 5000) ** 2
        counts = all(each.denominator == 1 and 0 <= each <= MOST_COUNTED for each in values)
        if name in ("factorial", "binom") and counts:
            return 1 + (int(values[0]) / 300) ** 1.6
        if name == "pow" and values[1].denominator == 1:
            return 1 + (min(bits * abs(values[1]), digits * 8) / 5000) ** 1.6
    arithmetic, function = 1 + 4 * (digits / 1000) ** 1.6, 2.5 * (1 + (digits / 60) ** 1.6)
    if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max", "gcd", "lcm"):
        return arithmetic * len(values)
    if name == "pow" and isinstance(values[1], Fraction):
        return arithmetic * (10 + 2 * values[1].numerator.bit_length()) if values[1].denominator <= 2 else function
    return 40 * function if name in ("factorial", "binom") else 2 * function if name in ("tan", "cot") else function
