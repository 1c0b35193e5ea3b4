"""Units that an answer may have: what is not listed here is none."""

from __future__ import annotations

import re
from fractions import Fraction

METRE_POWERS = {"nm": -9, "mm": -3, "cm": -2, "dm": -1, "m": 0, "km": 3}
GRAM_POWERS = {"mg": -3, "g": 0, "kg": 3}
NAMES = {
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "kilometer": "km",
    "millimetre": "mm",
    "centimetre": "cm",
    "metre": "m",
    "kilometre": "km",
    "milligram": "mg",
    "gram": "g",
    "kilogram": "kg",
    "inch": "in",
    "inches": "in",
    "foot": "ft",
    "feet": "ft",
    "yard": "yd",
    "mile": "mi",
    "pound": "lb",
    "lbs": "lb",
    "ounce": "oz",
    "second": "s",
    "sec": "s",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "hrs": "h",
    "liter": "l",
    "litre": "l",
    "L": "l",
    "milliliter": "ml",
    "millilitre": "ml",
    "mL": "ml",
    "gallon": "gal",
    "degree": "deg",
    "radian": "rad",
    "dollar": "usd",
    "USD": "usd",
    "euro": "eur",
    "EUR": "eur",
    "unit": "unit",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year",
}
Dimension = tuple[tuple[str, int], ...]
BASES: dict[str, tuple[Fraction, str]] = {
    **{name: (Fraction(10) ** power, "length") for name, power in METRE_POWERS.items()},
    **{name: (Fraction(10) ** power, "mass") for name, power in GRAM_POWERS.items()},
    "in": (Fraction(254, 10000), "length"),
    "ft": (Fraction(3048, 10000), "length"),
    "yd": (Fraction(9144, 10000), "length"),
    "mi": (Fraction(1609344, 1000), "length"),
    "lb": (Fraction(45359237, 100000), "mass"),
    "oz": (Fraction(45359237, 1600000), "mass"),
    "s": (Fraction(1), "time"),
    "min": (Fraction(60), "time"),
    "h": (Fraction(3600), "time"),
    "day": (Fraction(86400), "time"),
    "week": (Fraction(604800), "time"),
    "month": (Fraction(1), "month"),
    "year": (Fraction(12), "month"),
    "l": (Fraction(1), "volume"),
    "ml": (Fraction(1, 1000), "volume"),
    "gal": (Fraction(1), "gallon"),
    "deg": (Fraction(1), "angle"),
    "rad": (Fraction(1), "radian"),
    "usd": (Fraction(1), "dollar"),
    "eur": (Fraction(1), "euro"),
    "gbp": (Fraction(1), "pound sterling"),
    "unit": (Fraction(1), "unit"),
}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
COMPOUNDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "€": "eur", "£": "gbp"}
FACTOR = re.compile(r"(?:(square|sq|cubic|cu)\.? +)?([A-Za-z]+)\.?(?: ?\^ ?\{?([23])\}?)?")


def read_unit(text: str) -> tuple[Fraction, Dimension] | None:
    """How many of its base units a unit is, and which these are; None for what is no unit known here.

    ``cm^2``, ``square feet``, ``km/h`` and ``miles per hour`` are units; ``cents``, ``percent``, ``dozen`` and
    ``million`` are not: they are scales, and a number without one is another number.
    """
    text = COMPOUNDS.get(text.strip(), text.strip())
    scale, powers = Fraction(1), {}
    for place, part in enumerate(re.split(r" ?/ ?| per ", text)):
        match = FACTOR.fullmatch(part.strip())
        base = match and _base(match[2])
        if match is None or base is None or (match[1] and match[3]):
            return None
        power = POWERS.get(match[1] or "", int(match[3] or 1)) * (-1 if place else 1)
        scale *= base[0] ** power
        powers[base[1]] = powers.get(base[1], 0) + power
    return scale, tuple(sorted(powers.items()))


def _base(name: str) -> tuple[Fraction, str] | None:
    # Of short names each letter and its case counts: ms, Nm and Mg are not m, nm and mg.
    spellings = (name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s"))
    for each in spellings if len(name) > 3 else (name,):
        known = NAMES.get(each, each)
        if known in BASES:
            return BASES[known]
    return None
