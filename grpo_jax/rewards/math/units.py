"""Units of measurement and counted nouns."""

from __future__ import annotations

import re
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]

PREFIXES = {"n": -9, "u": -6, "m": -3, "c": -2, "d": -1, "": 0, "k": 3, "M": 6, "G": 9}
LENGTH, MASS, TIME, CHARGE = "length", "mass", "time", "charge"
METRIC: dict[str, tuple[str, Fraction | int, dict[str, int]]] = {
    "m": ("nmcdk", 1, {LENGTH: 1}),
    "g": ("mk", Fraction(1, 1000), {MASS: 1}),
    "s": ("num", 1, {TIME: 1}),
    "l": ("mcd", Fraction(1, 1000), {LENGTH: 3}),
    "N": ("k", 1, {LENGTH: 1, MASS: 1, TIME: -2}),
    "J": ("kM", 1, {LENGTH: 2, MASS: 1, TIME: -2}),
    "W": ("mkMG", 1, {LENGTH: 2, MASS: 1, TIME: -3}),
    "Pa": ("kM", 1, {LENGTH: -1, MASS: 1, TIME: -2}),
    "Hz": ("kMG", 1, {TIME: -1}),
    "C": ("mun", 1, {CHARGE: 1}),
    "A": ("m", 1, {CHARGE: 1, TIME: -1}),
    "V": ("mk", 1, {LENGTH: 2, MASS: 1, TIME: -2, CHARGE: -1}),
    "ohm": ("kM", 1, {LENGTH: 2, MASS: 1, TIME: -1, CHARGE: -2}),
    "T": ("m", 1, {MASS: 1, TIME: -1, CHARGE: -1}),
    "mol": ("m", 1, {"mole": 1}),
    "K": ("", 1, {"kelvin": 1}),
    "eV": ("kMG", Fraction(1602176634, 10**28), {LENGTH: 2, MASS: 1, TIME: -2}),
    "cal": ("k", Fraction(4184, 1000), {LENGTH: 2, MASS: 1, TIME: -2}),
}
SIZES: list[tuple[dict[str, int], dict[str, str]]] = [
    ({LENGTH: 1}, {"in": "0.0254", "ft": "0.3048", "yd": "0.9144", "mi": "1609.344", "AU": "149597870700"}),
    ({LENGTH: 2}, {"ha": "1e4", "acre": "4046.8564224"}),
    ({LENGTH: 3}, {"gal": "0.003785411784", "qt": "0.000946352946", "pt": "0.000473176473"}),
    ({MASS: 1}, {"lb": "0.45359237", "oz": "0.028349523125", "t": "1000"}),
    ({TIME: 1}, {"min": "60", "h": "3600", "day": "86400", "week": "604800"}),
    ({LENGTH: 2, MASS: 1, TIME: -2}, {"erg": "1e-7"}),
    ({LENGTH: 1, MASS: 1, TIME: -2}, {"dyn": "1e-5"}),
    ({LENGTH: -1, MASS: 1, TIME: -2}, {"atm": "101325", "bar": "1e5"}),
    ({"month": 1}, {"month": "1", "year": "12", "decade": "120"}),
    ({"dollar": 1}, {"usd": "1", "cent": "0.01"}),
    ({"pound sterling": 1}, {"gbp": "1", "pence": "0.01"}),
]
"""Units without metric prefixes: the powers of base units, and the sizes of the units that have them."""
OTHER_UNITS = {name: (Fraction(size), powers) for powers, sizes in SIZES for name, size in sizes.items()}
BASE_UNITS = {"ly": "light year", "deg": "angle", "rad": "radian", "eur": "euro", "jpy": "yen", "cny": "yuan"}
BASE_UNITS |= {"inr": "rupee", "celsius": "degree Celsius", "fahrenheit": "degree Fahrenheit", "unit": "unit"}
OTHER_UNITS |= {name: (Fraction(1), {base: 1}) for name, base in BASE_UNITS.items()}
UNIT_NAMES = {
    **{"inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "hectare": "ha"},
    **{"pound": "lb", "lbs": "lb", "ounce": "oz", "tonne": "t", "gallon": "gal", "quart": "qt", "pint": "pt"},
    **{"second": "s", "sec": "s", "minute": "min", "mins": "min", "hour": "h", "hr": "h", "hrs": "h", "yr": "year"},
    **{"meter": "m", "metre": "m", "gram": "g", "liter": "l", "litre": "l", "L": "l", "mL": "ml", "joule": "J"},
    **{"newton": "N", "watt": "W", "pascal": "Pa", "hertz": "Hz", "coulomb": "C", "ampere": "A", "amp": "A"},
    **{"volt": "V", "Ohm": "ohm", "tesla": "T", "mole": "mol", "kelvin": "K", "calorie": "cal", "dyne": "dyn"},
    **{"degree": "deg", "radian": "rad", "dollar": "usd", "USD": "usd", "euro": "eur", "EUR": "eur", "GBP": "gbp"},
    **{"yen": "jpy", "yuan": "cny", "rupee": "inr", "penny": "pence", "un": "unit", "lightyear": "ly"},
}
WORD_PREFIXES = {"nano": "n", "micro": "u", "milli": "m", "centi": "c", "deci": "d", "kilo": "k", "mega": "M"}
WORD_PREFIXES |= {"giga": "G"}
PHRASES = {
    **{"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "kWh": "kW h", "\u20ac": "eur", "\u00a3": "gbp"},
    **{"\u00a5": "jpy", "\u20b9": "inr", "degrees celsius": "celsius", "degrees c": "celsius", "degrees": "deg"},
    **{"degrees fahrenheit": "fahrenheit", "degrees f": "fahrenheit", "light years": "ly", "light-years": "ly"},
    **{"us dollars": "usd", "pounds sterling": "gbp", "degree": "deg", "cc": "cm^3", "sec": "s"},
}
TRAILING_REMARK = re.compile(r" (?:old|long|tall|wide|high|deep|away|left|remaining|each|(?:in )?total|altogether)$")
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
FACTOR = re.compile(
    r"(?:(square|sq|cubic|cu)\.? +)?([A-Za-z]+)\.?(?: ?\^ ?(?:\{ ?(-?\d) ?\}|(-?\d))|([23])| (squared|cubed))?"
)
SCALING = (
    "hundred thousand million billion trillion dozen score gross pair couple half halve third quarter fourth fifth "
    "sixth seventh eighth ninth tenth eleventh twelfth hundredth thousandth ten percent percentile pct time fold "
    "squared cubed factorial plus minus less more over divided modulo mod base negative decimal power remainder "
    "choose inverse reciprocal root log than between by into against k m bn mn x th st nd rd zero one two three four "
    "five six seven eight nine eleven twelve lakh crore"
)
QUALIFYING = (
    "or and to not is was are were has have except without approximately about almost nearly at least most wrong "
    "incorrect false right correct but if when other maybe perhaps probably be can may rather no nor neither either"
)
QUALIFIERS = frozenset(QUALIFYING.split())
SCALES = frozenset(SCALING.split())
"""Words that change the value of a number. ``QUALIFIERS`` change the statement: "5 or more" is not 5."""
IRREGULAR = "people men women children feet teeth geese mice fish sheep deer dice oxen cattle persons pence"
IRREGULAR_PLURALS = frozenset(IRREGULAR.split())


def read_unit(text: str) -> tuple[Fraction, Dimension] | None:
    """The size of a unit in base units and its powers of the base units; None if it is not a unit of measurement.

    ``cm^2``, ``square feet``, ``km/h``, ``miles per hour``, ``kg m/s^2`` and ``cents`` are units; ``percent``,
    ``dozen`` and ``million`` are not: they are scales, which change the value.
    """
    text = " ".join(text.replace(r"\cdot", " ").replace(r"\text", "").split())
    text = TRAILING_REMARK.sub("", text)
    text = PHRASES.get(text, PHRASES.get(text.lower(), text))
    text = re.sub(r"per (second|hour|minute) (?:per \1|squared)", r"/ \1^2", text)
    scale, powers, sign = Fraction(1), {}, 1
    for part in re.split(r"( ?/ ?| per )", text):
        if part.strip() in ("/", "per"):
            sign = -1
            continue
        position, part = 0, part.strip("() ")
        while position < len(part):
            match = FACTOR.match(part, position)
            unit = _base_unit(match[2]) if match else None
            if match is None or unit is None or (match[1] and (match[3] or match[4] or match[5] or match[6])):
                return None
            exponent = int(match[3] or match[4] or match[5] or POWERS.get(match[1] or match[6] or "", 1)) * sign
            scale *= Fraction(unit[0]) ** exponent
            for base, power in unit[1].items():
                powers[base] = powers.get(base, 0) + power * exponent
            position = match.end() + (len(part[match.end() :]) - len(part[match.end() :].lstrip(" -")))
        if not part:
            return None
    return scale, tuple(sorted((base, power) for base, power in powers.items() if power))


def read_counted_noun(words: str, number: Fraction | None) -> tuple[Fraction, Dimension] | None:
    """A counted noun (``apples``, ``red marbles``, ``ways``) as a unit; None if the words may say anything else.

    Words that scale, compare, negate or calculate (``million``, ``or more``, ``is wrong``, ``squared``) are refused.

    Args:
        words: text after the number.
        number: the number, or None for an expression; a singular noun needs 1, -1 or a fraction.
    """
    words = TRAILING_REMARK.sub("", words.strip(" .").replace("-", " "))
    if not re.fullmatch(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}| a){0,4}", words):
        return None
    written = words.lower().split()
    names = [singular(word) for word in written]
    is_number = any(re.fullmatch(r"\w+(?:teen|ty|teenth|tieth|illion|illionth)|basis", name) for name in names)
    if is_number or SCALES & {*names, *written} or QUALIFIERS & {*written}:  # "cans" is a noun, "can" is not
        return None
    is_plural = any(word != name or word in IRREGULAR_PLURALS for word, name in zip(written, names, strict=True))
    if not is_plural and (number is None or (number.denominator == 1 and abs(number) != 1)):
        return None
    return Fraction(1), ((f"counted {' '.join(names)}", 1),)


def is_cents(unit: tuple[Fraction, Dimension] | None) -> bool:
    """Whether a unit is a hundredth of a currency: its numbers cannot be compared with those without a unit."""
    return unit is not None and unit[0] == Fraction(1, 100) and unit[1] in ((("dollar", 1),), (("pound sterling", 1),))


def singular(word: str) -> str:
    """An English noun without its plural ending."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 2 else word


def _base_unit(name: str) -> tuple[Fraction | int, dict[str, int]] | None:
    # Short names are matched exactly and by case: ms, Nm and Mg are not m, nm and mg.
    for spelling in (name, singular(name), name.lower(), singular(name.lower())) if len(name) > 3 else (name,):
        symbol = UNIT_NAMES.get(spelling, spelling)
        if symbol in OTHER_UNITS:
            return OTHER_UNITS[symbol]
        if word := next((prefix for prefix in WORD_PREFIXES if symbol.startswith(prefix)), ""):
            symbol = WORD_PREFIXES[word] + UNIT_NAMES.get(symbol[len(word) :], symbol[len(word) :])
        for base, (prefixes, scale, powers) in METRIC.items():
            prefix = symbol.removesuffix(base)
            if symbol.endswith(base) and (prefix == "" or (len(prefix) == 1 and prefix in prefixes)):
                return Fraction(10) ** PREFIXES[prefix] * scale, powers
    return None
