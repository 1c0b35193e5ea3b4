"""Evaluation of expressions, exact or multiprecision, within a fixed amount of work."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property, reduce
from typing import Any

from grpo_jax.rewards.math.expression import INVERSE_TRIGONOMETRIC, Node, variables

GUARD_DIGITS = 20
"""Digits of the working precision beyond the requested ones, for rounding errors."""
MAX_BITS = 20_000
"""Largest magnitude of log2 of a value."""
WORK_LIMIT = 60_000.0
"""Units of work for parsing or comparing one answer, about 10 microseconds each: less than a second."""
MAX_GAMMA_DIGITS = 500
MAX_EXACT_FACTORIAL = 3000
"""Largest argument whose factorials and binomials are computed exactly."""


class TooLargeError(ArithmeticError):
    """The evaluation exceeds the work or digits allowed for one answer."""


class _Local(threading.local):
    remaining = WORK_LIMIT

    @cached_property
    def mp(self) -> Any:
        """A context of this thread: mpmath's global one holds one precision for all threads."""
        from mpmath.ctx_mp import MPContext

        return MPContext()


_local = _Local()


@contextmanager
def work_limit() -> Iterator[None]:
    """Limit the evaluations inside, in this thread, to ``WORK_LIMIT`` in total; more raises ``TooLargeError``.

    Work is counted, not timed: the same answers are refused on any machine under any load.
    """
    before, _local.remaining = _local.remaining, WORK_LIMIT
    try:
        yield
    finally:
        _local.remaining = before


def _spend(units: float) -> None:
    _local.remaining -= units
    if _local.remaining < 0:
        raise TooLargeError(f"the evaluation takes more than {WORK_LIMIT:.0f} units of work")


def evaluate(node: Node, point: Mapping[str, Fraction], digits: int, base: int | None = 10) -> Any | None:
    """The value of an expression at a point; None where it is undefined.

    Args:
        node: expression.
        point: value of each variable.
        digits: decimal digits of the working precision; ``digits_needed`` bounds those of intermediate values.
        base: base of ``log`` without an explicit base; None for e.

    Returns:
        A Fraction if every step is exact, else an mpmath number.

    Raises:
        TooLargeError: the work limit is exceeded.
    """
    _local.mp.dps = digits + GUARD_DIGITS
    try:
        return _Evaluation(point, digits, base).value(node)
    except TooLargeError:
        raise
    except (ArithmeticError, ValueError):
        return None


def is_zero(value: Any, digits: int) -> bool:
    """Whether a value is zero up to rounding, ``10 ** -(digits - 10)``; exactly for a Fraction.

    Args:
        value: Fraction or mpmath number.
        digits: decimal digits to which the value was computed.
    """
    return value == 0 if isinstance(value, Fraction) else abs(value) < _local.mp.mpf(10) ** -(digits - 10)


def quotient(x: Any, y: Any) -> Any:
    """``x / y``, exact if both are Fractions.

    Args:
        x, y: Fractions or mpmath numbers.
    """
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x / y
    return _inexact(x) / _inexact(y)


def real_part(value: Any, places: int) -> Any | None:
    """The real part of a value whose imaginary part is at most ``10 ** -places`` of its magnitude; else None.

    Args:
        value: Fraction, mpmath number or None, which is returned.
        places: decimal places.
    """
    if value is None or isinstance(value, Fraction):
        return value
    return value.real if abs(value.imag) <= abs(value) * _local.mp.mpf(10) ** -places else None


def close(x: Any, y: Any, places: int, digits: int) -> bool:
    """Whether two values agree: ``|x - y| <= 10 ** -places * max(|x|, |y|)``; Fractions must be equal.

    Two values that are both zero up to rounding, ``10 ** -(digits - 10)``, agree too: none of their digits is
    significant. False if one of them is None.

    Args:
        x: Fraction, mpmath number or None.
        y: as ``x``.
        places: decimal places that must agree.
        digits: decimal digits to which the values were computed.
    """
    if x is None or y is None:
        return False
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    mp = _local.mp
    mp.dps = digits + GUARD_DIGITS
    x, y = _inexact(x), _inexact(y)
    largest = max(abs(x), abs(y))
    return largest < mp.mpf(10) ** -(digits - 10) or abs(x - y) <= mp.mpf(10) ** -places * largest


def digits_needed(node: Node, bits: float) -> int:
    """Decimal digits needed to evaluate an expression at variables of magnitudes up to ``2 ** bits``.

    Args:
        node: expression.
        bits: upper bound of ``|log2 |x||`` of every variable.

    Raises:
        TooLargeError: a bound exceeds ``MAX_BITS``.
    """
    return int(2 * size_bounds(node, bits)[1] * math.log10(2)) + 10


def size_bounds(node: Node, bits: float) -> tuple[float, float]:
    """Upper bounds of ``log2 |value|`` of an expression, and of ``|log2 |value||`` over all its subexpressions.

    Cancellation in sums is ignored: ``digits_needed`` allows for it by twice the bound.

    Args:
        node: expression.
        bits: upper bound of ``|log2 |x||`` of every variable.

    Raises:
        TooLargeError: a bound exceeds ``MAX_BITS``.
    """
    name, parts = node[0], node[1:]
    if name == "number":
        top, bottom = math.log2(max(abs(parts[0].numerator), 1)), math.log2(parts[0].denominator)
        return top - bottom, max(top, bottom)
    if name in ("variable", "constant"):
        return (bits, bits) if name == "variable" else (1.7, 1.7)
    tops, spans = zip(*(size_bounds(part, bits) for part in parts), strict=True)
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
    elif name in ("sin", "cos", *INVERSE_TRIGONOMETRIC):
        top, span = 1.0, 2.0
    else:
        top = span = max(*tops, *spans)
    span = max(span, *spans, abs(top))
    if span > MAX_BITS:
        raise TooLargeError(f"a value may have more than {MAX_BITS} bits")
    return top, span


class _Evaluation:
    def __init__(self, point: Mapping[str, Fraction], digits: int, base: int | None) -> None:
        self.point, self.digits, self.base, self.mp = point, digits, base, _local.mp

    def value(self, node: Node) -> Any:
        name, parts = node[0], node[1:]
        if name == "number":
            return parts[0]
        if name == "variable":
            return self.point[parts[0]]
        if name == "constant":
            return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[parts[0]]
        values = [self.value(part) for part in parts]
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
        if not all(isinstance(value, Fraction) for value in values):
            values = [_inexact(value) for value in values]
        if name == "div":
            if self.is_zero(values[1]):
                raise ZeroDivisionError
            return values[0] / values[1]
        return reduce(operator.add if name == "add" else operator.mul, values)

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
            return (-1) ** y.numerator * self.mp.power(-x, _inexact(y))  # the real root: (-8)^(1/3) is -2
        return self.mp.power(x, _inexact(y))

    def combinatorial(self, name: str, values: list[Any]) -> Any:
        integers = [self.integer(value) for value in values]
        if name in ("gcd", "lcm"):
            if None in integers:
                raise ValueError(f"{name} is defined for integers only")
            return Fraction(getattr(math, name)(*integers))
        counts = [count for count in integers if count is not None and 0 <= count <= MAX_EXACT_FACTORIAL]
        if len(counts) == len(integers):
            return Fraction(math.factorial(*counts) if name == "factorial" else math.comb(*counts))
        if self.digits > MAX_GAMMA_DIGITS:
            raise TooLargeError(f"a gamma function to {self.digits} digits, more than {MAX_GAMMA_DIGITS}")
        gamma, n = self.mp.gamma, _inexact(values[0])
        if name == "factorial":
            return gamma(n + 1)
        return gamma(n + 1) / (gamma(_inexact(values[1]) + 1) * gamma(n - _inexact(values[1]) + 1))

    def integer(self, value: Any) -> int | None:
        """The value as an integer, up to rounding; None if it is not one."""
        if isinstance(value, Fraction):
            return value.numerator if value.denominator == 1 else None
        nearest = int(self.mp.nint(value.real))
        return nearest if self.is_zero((value - nearest) / (abs(nearest) + 1)) else None

    def real(self, name: str, values: list[Any]) -> Any:
        if name == "abs":
            return abs(values[0])
        if any(not isinstance(value, Fraction) and not self.is_zero(self.mp.mpf(value.imag)) for value in values):
            raise ValueError(f"{name} is defined for real numbers only")
        values = [value if isinstance(value, Fraction) else value.real for value in values]
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
    """Refuse values of extreme magnitude: mpmath expands the sum of a huge and a tiny one, in hours and gigabytes."""
    for part in () if isinstance(value, Fraction) else (value.real, value.imag):
        _, mantissa, exponent, bits = part._mpf_
        if mantissa and abs(exponent + bits) > 10 * MAX_BITS:
            raise TooLargeError(f"a value is beyond 2 ** {10 * MAX_BITS} or its inverse")


def _inexact(value: Any) -> Any:
    mp = _local.mp
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _cost(name: str, values: list[Any], digits: int) -> float:
    """Units of work of an operation: measured on a slow machine and rounded up."""
    if all(isinstance(value, Fraction) for value in values):
        bits = sum(value.numerator.bit_length() + value.denominator.bit_length() for value in values)
        if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max"):
            return 0.5 + (bits / 5000) ** 2
        is_exact = all(value.denominator == 1 and 0 <= value <= MAX_EXACT_FACTORIAL for value in values)
        if name in ("factorial", "binom") and is_exact:
            return 1 + (int(values[0]) / 300) ** 1.6
        if name == "pow" and values[1].denominator == 1:
            return 1 + (min(bits * abs(values[1]), digits * 8) / 5000) ** 1.6
    arithmetic, function = 1 + 4 * (digits / 1000) ** 1.6, 2.5 * (1 + (digits / 60) ** 1.6)
    if name in ("add", "mul", "div", "abs", "floor", "ceil", "min", "max", "gcd", "lcm"):
        return arithmetic * len(values)
    if name == "pow" and isinstance(values[1], Fraction):
        return arithmetic * (10 + 2 * values[1].numerator.bit_length()) if values[1].denominator <= 2 else function
    return 40 * function if name in ("factorial", "binom") else 2 * function if name in ("tan", "cot") else function
