"""Parsing of written numbers: fractions, repeating decimals, percentages, units, ratios and times of day."""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_jax.rewards.math.answer import numeric_value
from grpo_jax.rewards.math.expression import parse
from grpo_jax.rewards.math.final_answer import Answer
from grpo_jax.rewards.math.latex import balanced, split_top_level
from grpo_jax.rewards.math.symbolic import is_evaluable
from grpo_jax.rewards.math.units import read_counted_noun, read_unit

WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBER_WORDS = {word: number for number, word in enumerate((WORDS + " seventeen eighteen nineteen twenty").split())}
SCIENTIFIC = re.compile(
    r"(?:([+\-]?) ?([\d.,]+) ?(?:\\times|\\cdot|\*|x) ?|([+\-]?))10 ?\^ ?(?:\{ ?([+\-]?\d{1,3}) ?\}|(\d{1,3}))"
)
OPERAND = r"(?:\{ ?([+\-]?) ?([^{}]+?) ?\}| ?(\d))"
FRACTION = re.compile(rf"([+\-]?) ?\\frac ?{OPERAND} ?{OPERAND}(%?)")
OVER = re.compile(r"([+\-]?) ?\{? ?([+\-]?\d+) ?\\over ?(\d+) ?\}?")
MIXED = re.compile(
    r"([+\-]?) ?(\d+)(?: (\d+) ?/ ?(\d+)| ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}| ?\\frac ?(\d)(\d)) ?(%?)"
)
REPEATING = re.compile(
    r"([+\-]?)(\d*)\.(\d*) ?(?:\\(?:overline|bar|dot) ?\{ ?(\d+) ?\}|\\(?:bar|dot) ?(\d)|\( ?(\d+) ?\))"
    r" ?(?:\\ldots|\.\.\.)?(%?)"
)
CONTINUED = re.compile(r"([+\-]?)(\d*)\.(\d*?)(\d+?)(\4+) ?(?:\\ldots|\.\.\.)")
PERCENT = re.compile(r" ?\\text\{ ?(?:percent|pct|per cent)\.? ?\}| (?:percent|pct|per cent)\.?(?![A-Za-z])")
CURRENCY = re.compile(r"([+\-]?) ?(\$|\u20ac|\u00a3|\u00a5|\u20b9|USD|EUR|GBP|Rs\.?) ?(?=[\d.\\])")
CURRENCIES = {"$": "dollars", "Rs": "rupees", "Rs.": "rupees"}
DEGREES_MINUTES = re.compile(r"(\d+) degrees (\d{1,2}) ?(?:'|\^ ?\{? ?\\prime ?\}?)(?: ?(\d{1,2}) ?(?:''|\"))?")
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALED = re.compile(r"(.*[\d}]) ?(?:\\text ?\{)? ?(thousand|million|billion|trillion)(?: ?\}|(?= |$))(.*)")
TIME = re.compile(r"(\d{1,2})(?: ?: ?(\d{2}))? ?(?:\\text\{)? ?(?:([aApP])\.? ?[mM]\.?)? ?\}?")
UNIT_TEXT = re.compile(
    # Possessive quantifiers: with others, a run of letters has exponentially many matches.
    r"(?:\\text\{[^{}]*\}|\\cdot|[A-Za-z]{2,}+\.?|(?<=[/ }(])[A-Za-z]|[ /()\-]|\^ ?\{ ?-?\d ?\}|\^ ?\d)++"
)


def read_number(text: str) -> Answer | None:
    """A number, or a constant expression with a unit; None for any other text (normalized LaTeX)."""
    text = PERCENT.sub("%", re.sub(r"\^ ?\{? ?\\circ ?\}? ?", r" degrees ", text)).strip()
    if match := DEGREES_MINUTES.fullmatch(text):
        degrees, minutes, seconds = (int(group or 0) for group in match.groups())
        return Answer("number", degrees + Fraction(60 * minutes + seconds, 3600), read_unit("degrees"))
    text = re.sub(r"([\d.,]+) ?([\u20ac\u00a3\u00a5\u20b9])", r"\2\1", text)
    value = exact_number(text)
    if value is not None:
        return Answer("number", value, read_unit("dollars") if "$" in text or "dollar" in text else None)
    if match := CURRENCY.match(text):
        amount = read_number(match[1] + text[match.end() :])
        if rest := re.fullmatch(r"([\d.,]+) ?(?:\\text ?\{ ?)?((?:per|/) ?[a-z]+) ?\}?", text[match.end() :]):
            return read_number(f"{match[1]}{rest[1]} {CURRENCIES.get(match[2], match[2])} {rest[2]}")
        unit = read_unit(CURRENCIES.get(match[2], match[2]))
        if amount is None or amount.unit not in (None, unit) or amount.kind != "number":
            return None
        return Answer("number", amount.value, unit)
    if match := SCALED.fullmatch(text):
        amount = read_number(f"{match[1]} {match[3] or ''}".strip())
        is_plain = amount is not None and amount.kind == "number"
        return Answer("number", amount.value * SCALES[match[2]], amount.unit) if amount and is_plain else None
    if match := re.fullmatch(r"(\d+) ?\^? ?\{? ?(?:\\text\{ ?)?(?:st|nd|rd|th) ?\}?(?: ?\})?", text):
        return Answer("number", Fraction(match[1]), (Fraction(1), (("ordinal", 1),)))
    return _compound(text) or _measured(text)


def exact_number(text: str) -> Fraction | None:
    """The value of a number that ``numeric_value`` reads or that is written in LaTeX; None for any other text."""
    text = re.sub(r"^([+\-]) +", r"\1", text.strip())
    if re.fullmatch(r"[+\-]?\d{1,3}(?: \d{3})+(?:\.\d+)? ?%?", text):
        text = text.replace(" ", "")
    value = Fraction(text) if re.fullmatch(r"[+\-]?\d+(?:\.\d+)?", text) else numeric_value(text)
    if value is not None:
        return value
    if match := FRACTION.fullmatch(text):
        top, bottom = numeric_value(match[3] or match[4]), numeric_value(match[6] or match[7])
        if top is None or not bottom:
            return None
        sign = (-1) ** [match[1], match[2], match[5]].count("-")
        return sign * top / bottom / (100 if match[8] else 1)
    if (match := OVER.fullmatch(text)) and int(match[3]):
        return Fraction(int(match[2]), int(match[3])) * (-1 if match[1] == "-" else 1)
    if match := MIXED.fullmatch(text):
        top, bottom = int(match[3] or match[5] or match[7]), int(match[4] or match[6] or match[8])
        if not 0 < top < bottom:
            return None
        return (int(match[2]) + Fraction(top, bottom)) * (-1 if match[1] == "-" else 1) / (100 if match[9] else 1)
    if match := SCIENTIFIC.fullmatch(text):
        value = numeric_value((match[1] + match[2]) if match[2] else f"{match[3]}1")
        return None if value is None else value * Fraction(10) ** int(match[4] or match[5])
    if match := REPEATING.fullmatch(text):
        return _repeating(match[1], match[2], match[3], match[4] or match[5] or match[6]) / (100 if match[7] else 1)
    if match := CONTINUED.fullmatch(text):
        return _repeating(match[1], match[2], match[3], match[4])
    return None


def read_ratio(text: str) -> Answer | None:
    """A ratio (``3:4``, ``3 to 4``) or a time of day (``2:30 p.m.``); None for any other text.

    The terms of a ratio sum to one, so that it equals its multiples. ``12:30``, which may be either, is a time.
    """
    match = TIME.fullmatch(text)
    if match and match[3]:
        hour, minute = int(match[1]), int(match[2] or 0)
        if not 1 <= hour <= 12 or minute > 59:
            return None
        return Answer("time", (hour % 12 + (12 if match[3] in "pP" else 0), minute, True))
    parts = split_top_level(text, r":|\\text\{ ?(?:to|:) ?\}| to ")
    if not 1 < len(parts) < 6:
        return None
    if match and match[2] and int(match[2]) < 60 and int(match[1]) < 24:
        return Answer("time", (int(match[1]), int(match[2]), False))
    values = [exact_number(part) for part in parts]
    if all(value is not None and value > 0 for value in values):
        total = sum(value for value in values if value is not None)
        return Answer("ratio", tuple(Answer("number", value / total) for value in values if value is not None))
    nodes = [parse(part) for part in parts]
    if all(node is not None and is_evaluable(node) for node in nodes):
        return Answer("ratio", tuple(Answer("expression", ("div", node, nodes[-1])) for node in nodes[:-1]))
    return None


def read_numeral(text: str) -> Answer | None:
    """A numeral with its base, such as ``1012_3``, as a text: only the same digits in the same base are equal."""
    plain = re.sub(r"\\(?:text|overline) ?\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(
        r"\(? ?([0-9A-Fa-f ]*[0-9][0-9A-Fa-f ]*|[A-F]{2,}) ?\)?"
        r"(?: ?_ ?(?:\{ ?\(? ?(\w+) ?\)? ?\}|(\d))|,? \(?(?:in )?base[ -](\w+)\)?) ?",
        plain,
    )
    if match is None:
        return None
    base = (match[2] or match[3] or match[4]).lower()
    digits = match[1].replace(" ", "").lower().lstrip("0") or "0"
    number = NUMBER_WORDS.get(base, int(base) if base.isdigit() else 0)
    is_valid = 2 <= number <= 36 and all(int(digit, 36) < number for digit in digits)
    return Answer("text", f"{digits} base {number}") if is_valid else None


def _repeating(sign: str, integer: str, decimals: str, period: str) -> Fraction:
    value = Fraction(int("0" + integer + decimals), 10 ** len(decimals))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
    return -value if sign == "-" else value


def _compound(text: str) -> Answer | None:
    """The sum ``2 hours 30 minutes`` or ``5 feet 3 inches``, in the first unit."""
    plain = re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text)
    parts = re.findall(r"([\d.]+) *([A-Za-z]+)(?: *,? *(?:and)? *)", plain)
    rebuilt = re.sub(r"[ ,]|and", "", plain)
    if len(parts) < 2 or "".join(number + name for number, name in parts).replace("and", "") != rebuilt:
        return None
    units = [read_unit(name) for _, name in parts]
    values = [numeric_value(number) for number, _ in parts]
    pairs = zip(values, units, strict=True)
    quantities = [(value, unit) for value, unit in pairs if value is not None and unit is not None]
    if len(quantities) < len(parts) or len({unit[1] for _, unit in quantities}) > 1:
        return None
    scales = [unit[0] for _, unit in quantities]
    if scales != sorted(set(scales), reverse=True):
        return None
    return Answer("number", sum(value * unit[0] for value, unit in quantities) / scales[0], quantities[0][1])


def _measured(text: str) -> Answer | None:
    """A number or a constant expression followed by a unit or a counted noun."""
    for match in re.finditer(
        r"(?<=[\d)}\]a-z%]) ?(?=\\text\{)|(?<=[\d)}]) ?(?<!\\)(?=[A-Za-z]{2})|(?<=[a-z]) (?=[A-Za-z]{2})", text
    ):
        number, rest = text[: match.start()].strip(), text[match.end() :].strip()
        if not re.search(r"\d|\\pi", number) or not balanced(number) or not UNIT_TEXT.fullmatch(rest):
            continue
        words = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", rest).replace(" ^", "^").split()).strip(" .")
        if "degrees" in words and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", number):
            return None  # the degrees belong to the argument of the function
        value = exact_number(number)
        unit = read_unit(words) or read_counted_noun(words, value)
        if unit is None:
            continue
        if value is not None:
            return Answer("number", value, unit)
        node = parse(number)
        if node is not None and is_evaluable(node):
            return Answer("expression", node, unit)
    return None
