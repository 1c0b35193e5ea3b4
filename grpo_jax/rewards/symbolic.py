"""Expressions and their values: the one place that knows sympy and math-verify's parser."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import Any

from grpo_jax.rewards.latex import LETTERS

DIGITS = 200
AGREEMENT = 150
"""Decimal places to which irrational values must agree: more than any text of an answer's length can be made to."""
POINTS = 24
IDENTIFIER = re.compile(r"\\[a-zA-Z]+|[A-Za-z](?:_(?:\w|\{\w+\}))?|\d+")
CONSTANTS = {"e", "i", r"\pi"}
UNREAD = re.compile(
    r"!\s*!|\)\s*!|\d ?[eE] ?[+\-]?\d|'|\"|&|;|\?|@|#|:|`|\*\*|\\text|\\circ|\\binom.*\d{4}"
    r"|(?<![A-Za-z\\])[fghFGH] ?\(|\\frac ?\{ ?d ?\w? ?\} ?\{ ?d ?\w|\d ?_"
)
"""What the parser would make something else of, or work out at once however large: names before brackets that are
functions, derivatives and numerals with a base among it."""
LARGEST_BITS = 20_000


def variables(text: str) -> frozenset[str]:
    """The variables of an expression, by letter and case, which the parser does not tell apart."""
    found = IDENTIFIER.findall(re.sub(r"\\(?:begin|end|mathbb|overline) ?\{\w*\}", "", text))
    names = [name.replace("{", "").replace("}", "") for name in found if not name[0].isdigit()]
    return frozenset(name for name in names if (name[0] != "\\" or name in LETTERS) and name not in CONSTANTS)


def mentions(text: str, name: str) -> bool:
    """Whether a variable is one of an expression's."""
    return name.strip().replace("{", "").replace("}", "") in variables(text)


@lru_cache(maxsize=4096)
def parsed_expression(text: str) -> Any | None:
    """The expression as sympy has it; None for what is none, or could take for ever to work out."""
    import sympy
    from latex2sympy2_extended import latex2sympy
    from sympy.core.function import AppliedUndef

    if UNREAD.search(text) or re.search(r"[A-Za-z]{4}", re.sub(r"\\[a-zA-Z]+", "", text)):
        return None
    text = re.sub(r"(\d+)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    try:
        parsed: Any = latex2sympy(IDENTIFIER.sub(_renamed, text), is_real=None, convert_degrees=False)
        parsed = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})
    except Exception:
        return None
    allowed = isinstance(parsed, sympy.Expr) and not parsed.has(sympy.Float, sympy.oo, sympy.zoo, sympy.nan)
    if not allowed or parsed.has(sympy.Derivative, sympy.Integral, sympy.Sum, AppliedUndef) or _bits(parsed) is None:
        return None
    return parsed


def _renamed(match: re.Match[str]) -> str:
    """A variable under a number of its own: the parser makes a small letter of a large one."""
    name = match[0].replace("{", "").replace("}", "")
    is_variable = name in LETTERS or (name[0].isalpha() and name not in CONSTANTS)
    return f"x_{{{int.from_bytes(name.encode())}}}" if is_variable else match[0]


def _bits(node: Any, of_symbols: float = 3.0) -> float | None:
    """A bound for the binary digits before the point of anything worked out on the way; None where it is too large."""
    import sympy

    if node.is_Rational:
        return math.log2(max(abs(node.p), node.q, 1)) + 1
    if node.is_Symbol or not node.args:
        return of_symbols if node.is_Symbol else 3.0
    bounds = [_bits(each, of_symbols) for each in node.args]
    inner = [each for each in bounds if each is not None]
    if len(inner) < len(bounds):
        return None
    if isinstance(node, sympy.Pow):
        bound = inner[0] * 2 ** min(inner[1], 64)
    elif isinstance(node, (sympy.exp, sympy.cosh, sympy.sinh)):
        bound = 2 * 2 ** min(inner[0], 64)
    elif isinstance(node, (sympy.factorial, sympy.binomial, sympy.gamma)):
        bound = inner[0] * 2 ** min(inner[0], 64)
    else:
        bound = sum(inner) + len(inner)
    return bound if bound <= LARGEST_BITS else None


def agree(a: Any, b: Any) -> bool:
    """Equality of two expressions: exactly where both are rational, else by their values."""
    import sympy

    if a is None or b is None:
        return False
    a, b = (sympy.Rational(*each.as_integer_ratio()) if isinstance(each, Fraction) else each for each in (a, b))
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    size = int(((_bits(a) or 0) + (_bits(b) or 0)) * math.log10(2))
    if not symbols:
        difference = (a - b).doit()
        if difference.is_Rational:
            return bool(difference == 0)
        digits = size + DIGITS
        return _close(_value(a, {}, digits), _value(b, {}, digits), size + AGREEMENT, digits)
    agreed = 0
    points = _points(symbols, a, b)
    for at in points:
        x, y = _value(a, at, size + 60), _value(b, at, size + 60)
        if x is None or y is None:
            continue
        if not _close(x, y, size + 40, size + 60):
            return False
        agreed += 1
    return agreed >= len(points) // 2


def constant_ratio(left: str, right: str) -> Any | None:
    """What the first expression is of the second wherever both are defined, if that is one real number."""
    import mpmath

    a, b = parsed_expression(left), parsed_expression(right)
    if a is None or b is None or variables(left) != variables(right):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    size = int(((_bits(a) or 0) + (_bits(b) or 0)) * math.log10(2))
    ratios = []
    points = _points(symbols, a, b)
    for at in points:
        x, y = _value(a, at, size + 60), _value(b, at, size + 60)
        if x is None or y is None or (abs(x) < 1e-30 and abs(y) < 1e-30):
            continue
        if abs(y) < 1e-30:
            return None
        with mpmath.workdps(size + 60):
            ratios.append(x / y)
    if len(ratios) < len(points) // 2 or not all(_close(ratio, ratios[0], size + 40, size + 60) for ratio in ratios):
        return None
    return ratios[0].real if abs(ratios[0].imag) < 1e-40 else None


def _points(symbols: list[Any], *expressions: Any) -> list[dict[Any, Any]]:
    """Where expressions are compared: so many places that no case of an absolute value or a floor is passed over.

    Small fractions, integers of both parities and, unless that takes too long, large fractions; of both signs and in
    every order.
    """
    import sympy

    can_be_large = all(_bits(each, of_symbols=7.0) is not None for each in expressions)
    points = []
    for number in range(POINTS):
        random = Random(number)
        kind = number % 3
        if kind == 1:
            values = [sympy.Integer(random.randint(-15, 15)) for _ in symbols]
        else:
            bound = 120 if kind == 2 and can_be_large else 3
            values = [sympy.Rational(random.randint(-2311 * bound, 2311 * bound), 2311) for _ in symbols]
        points.append(dict(zip(symbols, values, strict=True)))
    return points


def _value(expression: Any, at: dict[Any, Any], digits: int) -> Any | None:
    """The complex value with so many digits; None where it is not defined or not worked out."""
    import mpmath

    try:
        value = expression.subs(at).evalf(digits, maxn=2 * digits)
        real, imaginary = value.as_real_imag()
        with mpmath.workdps(digits):
            found = mpmath.mpc(mpmath.mpf(real), mpmath.mpf(imaginary))
    except Exception:
        return None
    return found if mpmath.isfinite(found) else None


def _close(x: Any, y: Any, places: int, digits: int) -> bool:
    import mpmath

    if x is None or y is None:
        return False
    with mpmath.workdps(digits):
        largest = max(abs(x), abs(y))
        # What is zero comes out as rounding, of which no place means anything.
        return largest < mpmath.mpf(10) ** -(places + 5) or abs(x - y) <= mpmath.mpf(10) ** -places * largest
