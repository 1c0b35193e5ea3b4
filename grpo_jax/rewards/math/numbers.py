"""Exact values of plainly written numbers."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 100
MATH = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
WRAPPERS = (*MATH, (r"\boxed{", "}"), *MATH)

UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(
    rf"""
    (?P<sign>[+\-\u2212]?)
    (?:\\?\$\ ?)?
    (?P<inner_sign>[+\-\u2212]?)
    (?:
        (?P<decimal>(?:{UNSIGNED}(?:\.[0-9]+)?|\.[0-9]+))
        (?:[eE](?P<exponent>[+\-]?[0-9]{{1,3}}))?
        (?P<percent>\ ?\\?%)?
      | (?P<top>{UNSIGNED})\ ?/\ ?(?P<bottom>{UNSIGNED})
      | \\[dt]?frac\{{(?P<latex_top>[0-9]+)\}}\{{(?P<latex_bottom>[0-9]+)\}}
    )
    (?:\ dollars?)?
    """,
    re.VERBOSE,
)


def numeric_value(text: str) -> Fraction | None:
    r"""The exact value of a text that is a single number; None for any other text.

    A number consists of ASCII digits: an integer or decimal, optionally with commas between thousands and an exponent
    of up to three digits (exact: neither 1e-400 nor 1e400 is rounded), ``a/b`` or ``\frac{a}{b}``. Optional are a sign;
    ``$`` before it or "dollars" after it; a percent sign, which divides by 100; a final period; and around it
    ``$...$``, ``\(...\)``, ``\[...\]`` or ``\boxed{...}``. None for a division by zero, a list, an equation, any other
    unit (5 m is not 5 cm) and more than ``MAX_LENGTH`` characters.
    """
    text = strip_delimiters(text)
    if len(text) > MAX_LENGTH:
        return None
    match = NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    magnitude = _magnitude(match)
    is_negative = (match["sign"] or match["inner_sign"]) in ("-", "\u2212")
    return -magnitude if is_negative and magnitude is not None else magnitude


def strip_delimiters(text: str) -> str:
    """The text with single spaces, without a final period and without mathematics delimiters around it."""
    text = " ".join(text.split()).removesuffix(".").rstrip()
    for opening, closing in WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    return text


def _magnitude(match: re.Match[str]) -> Fraction | None:
    if match["decimal"] is None:
        top, bottom = match["top"] or match["latex_top"], match["bottom"] or match["latex_bottom"]
        top, bottom = int(top.replace(",", "")), int(bottom.replace(",", ""))
        return Fraction(top, bottom) if bottom else None
    integer, _, decimals = match["decimal"].replace(",", "").partition(".")
    exponent = int(match["exponent"] or 0) - len(decimals) - (2 if match["percent"] else 0)
    return int(integer + decimals) * Fraction(10) ** exponent
