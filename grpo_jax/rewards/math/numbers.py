"""Numbers as answers write them, by their exact value."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST_NUMBER = 100
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
    r"""The exact value of a text that is one number and nothing else; None for anything else.

    A number is made of ASCII digits: an integer, with or without commas between thousands; a decimal, with or without
    an exponent of up to three digits, so that neither 1e-400 nor 1e400 is rounded; ``a/b`` or ``\frac{a}{b}``. It may
    have a sign; ``$`` before it or the word dollars after it; a percent sign, which divides by 100; a closing period;
    and around it ``$...$``, ``\(...\)``, ``\[...\]`` or ``\boxed{...}``. A division by zero, a list, an equation, any
    other unit (5 m is not 5 cm) and a text of more than 100 characters have no value.
    """
    text = unwrap(text)
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    magnitude = _magnitude(match)
    is_negative = (match["sign"] or match["inner_sign"]) in ("-", "\u2212")
    return -magnitude if is_negative and magnitude is not None else magnitude


def unwrap(text: str) -> str:
    """A text with runs of blanks made one space, and without a closing period and mathematics delimiters around it."""
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
    whole, _, decimals = match["decimal"].replace(",", "").partition(".")
    exponent = int(match["exponent"] or 0) - len(decimals) - (2 if match["percent"] else 0)
    return int(whole + decimals) * Fraction(10) ** exponent
