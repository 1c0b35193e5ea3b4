"""What a final answer says as mathematics: its kind, its value, its unit. What is not understood says nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo_jax.rewards.answer import numeric_value
from grpo_jax.rewards.latex import balanced, split_top, tidy
from grpo_jax.rewards.symbolic import mentions, parsed_expression, variables
from grpo_jax.rewards.units import Dimension, read_unit

NAME = r"[A-Za-z](?:_\{?\w\}?)?|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho) ?"
FUNCTION_OF = re.compile(r"([A-Za-z]) ?\( ?([a-z](?:, ?[a-z])*) ?\)")
RELATION = r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\in(?![a-z])|=|<|>)"
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
WORD = re.compile(r"[A-Za-z]+(?:[ '\-][A-Za-z]+)*")
SHORT_WORDS = {"no", "yes", "up", "none", "even", "odd", "true", "false", "all"}


@dataclass(frozen=True)
class Answer:
    """What an answer says.

    Attributes:
        kind: ``number``, ``expression``, ``text``, ``set``, ``list``, ``tuple``, ``matrix``, ``interval``,
            ``equation`` or ``inequality``.
        value: a Fraction for a number, tidy LaTeX for an expression, lower-case text for a text, parts for the rest.
        unit: of a number, where it has one: how many of its base units it is, and which these are.
        name: the variable that is said to be it, as in ``x = 5``.
    """

    kind: str
    value: Any
    unit: tuple[Fraction, Dimension] | None = None
    name: str | None = None


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer | None:
    """What a final answer says; None for what cannot be read, or not without doubt."""
    tidied = tidy(text)
    return None if tidied is None else _read(tidied)


def _read(text: str) -> Answer | None:
    if not text:
        return None
    inner = _grouped(text)
    if inner is not None:
        return _read(inner)
    for reader in (_number, _choice, _alternatives, _relation, _collection, _list, _expression):
        found = reader(text)
        if found is not None:
            return found if found.kind != "nothing" else None
    return None


def _number(text: str) -> Answer | None:
    text = re.sub(r"\^ ?\{? ?\\circ ?\}?", r" degrees", text)
    text = re.sub(r" ?\\text\{ ?percent ?\}| percent", "%", text)
    value = _exact(text)
    if value is not None:
        dollars = "$" in text or "dollar" in text
        return Answer("number", value, read_unit("dollars") if dollars else None)
    if text[0] in "\u20ac\u00a3":
        value, unit = _exact(text[1:].strip()), read_unit(text[0])
        return None if value is None else Answer("number", value, unit)
    unit = re.fullmatch(r"(.*?[\d}]) ?\\text\{([^{}]*)\} ?(\^ ?\{? ?[23] ?\}?)?", text)
    bare = re.fullmatch(r"(.*?[\d}]) ?([A-Za-z][A-Za-z /]*?)\.? ?(\^ ?\{? ?[23] ?\}?)?", text)
    if unit:
        number, name = unit[1], unit[2].strip(" .") + (unit[3] or "").replace(" ", "")
    elif bare and len(bare[2]) > 1:  # a single letter may be a variable
        number, name = bare[1], bare[2] + (bare[3] or "").replace(" ", "")
    else:
        return None
    value, measure = _exact(number), read_unit(name)
    return None if value is None or measure is None else Answer("number", value, measure)


def _exact(text: str) -> Fraction | None:
    """The value of a number that is written out: as ``numeric_value``, or in one of LaTeX's ways."""
    text = re.sub(r"^([+\-]) +", r"\1", text.strip())
    value = numeric_value(text)
    if value is not None:
        return value
    if match := re.fullmatch(r"([+\-]?) ?\\frac ?\{ ?([+\-]?) ?([^{}]+) ?\} ?\{ ?([+\-]?) ?([^{}]+) ?\}(%?)", text):
        top, bottom = numeric_value(match[3]), numeric_value(match[5])
        if top is None or not bottom:
            return None
        sign = (-1) ** [match[1], match[2], match[4]].count("-")
        return sign * top / bottom / (100 if match[6] else 1)
    if match := re.fullmatch(r"([+\-]?) ?(\d+)(?: (\d+) ?/ ?(\d+)| ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}) ?(%?)", text):
        top, bottom = int(match[3] or match[5]), int(match[4] or match[6])
        if not 0 < top < bottom:
            return None
        return (int(match[2]) + Fraction(top, bottom)) * (-1 if match[1] == "-" else 1) / (100 if match[7] else 1)
    if match := re.fullmatch(
        r"([+\-]?) ?([\d.,]+) ?(?:\\times|\\cdot) ?10 ?\^ ?(?:\{ ?([+\-]?\d{1,3}) ?\}|(\d))", text
    ):
        value = numeric_value(match[1] + match[2])
        return None if value is None else value * Fraction(10) ** int(match[3] or match[4])
    if match := re.fullmatch(r"([+\-]?)(\d*)\.(\d*) ?\\overline ?\{ ?(\d+) ?\}", text):
        places, period = match[3], match[4]
        value = Fraction(int("0" + match[2] + places), 10 ** len(places))
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(places))
        return -value if match[1] == "-" else value
    return None


def _choice(text: str) -> Answer | None:
    """A letter of choice, or words."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .")
    if match := re.fullmatch(r"\( ?([A-Z]) ?\)|([A-Z])", plain):
        return Answer("text", match[1] or match[2])
    if re.fullmatch(r"\( ?[a-z] ?\)", plain):
        return Answer("expression", plain.strip("() "))
    plain = " ".join(plain.split())
    if re.fullmatch(r"[A-Z]{2,}", plain):
        return Answer("text", plain)  # points, initials, digits: their order counts
    if match := re.fullmatch(r"([0-9A-Fa-f]*[0-9][0-9A-Fa-f]*)_(?:\{ ?(\d+) ?\}|(\d))", plain):
        return Answer("text", f"{match[1].lower().lstrip('0')} base {match[2] or match[3]}")
    if WORD.fullmatch(plain) and (r"\text" in text or plain.lower() in SHORT_WORDS or _is_prose(plain)):
        return Answer("text", plain.lower() if len(plain) > 1 else plain)
    return None


def _is_prose(plain: str) -> bool:
    words = re.split(r"[ '\-]", plain)
    if set(words) & {"or", "and"}:
        return False
    return any(len(word) > 2 for word in words)


def _alternatives(text: str) -> Answer | None:
    """What is joined by or: intervals, or values of one thing."""
    parts = split_top(text, r"\\text\{ ?or ?\}| or ")
    if len(parts) == 1:
        return None
    read = [_read(part) if part else None for part in parts]
    if all(each is not None and each.kind == "interval" for each in read):
        return _union(read)
    return _several("list", parts)


def _relation(text: str) -> Answer | None:
    if re.search(r"\\cup|\\cap|\\setminus", text) and not re.search(RELATION, text):
        return None
    parts = split_top(text, RELATION)
    if len(parts) == 1 or len(split_top(text, ",")) > 1 or re.search(r"\\text\{ ?and ?\}| and ", text):
        return None
    sides, signs = parts[::2], [sign.strip() for sign in parts[1::2]]
    if not all(sides) or len(signs) > 2:
        return Answer("nothing", None)
    if signs == [r"\in"]:
        value = _read(sides[1])
        return _named(sides[0], value and (as_interval(value) or value), {"interval", "set"})
    if signs == ["="]:
        return _equation(*sides)
    if "=" in signs or r"\in" in signs or (r"\ne" in signs and len(signs) > 1):
        return Answer("nothing", None)
    return _inequality(sides, signs)


def _named(name: str, value: Answer | None, kinds: set[str]) -> Answer:
    if value is None or value.kind not in kinds or not re.fullmatch(NAME, name) or value.name not in (None, name):
        return Answer("nothing", None)
    return Answer(value.kind, value.value, value.unit, name)


def _equation(left: str, right: str) -> Answer:
    if FUNCTION_OF.fullmatch(left):
        value = _read(right)
        scalar = value is not None and value.kind in ("number", "expression")
        return Answer("equation", (left.replace(" ", ""), value)) if scalar else Answer("nothing", None)
    for name, other in ((left, right), (right, left)):
        if re.fullmatch(NAME, name) and not mentions(other, name):
            value = _read(other)
            if value is None or value.name is not None or value.kind == "equation":
                return Answer("nothing", None)
            if value.kind == "expression" and variables(value.value):
                break
            return Answer(value.kind, value.value, value.unit, name)
    if re.fullmatch(rf"\( ?(?:{NAME})(?: ?, ?(?:{NAME}))+ ?\)", left):
        return _named_tuple(left, _read(right))
    difference = f"({left})-({right})"
    if not variables(difference) or parsed_expression(difference) is None:
        return Answer("nothing", None)
    return Answer("equation", difference)


def _named_tuple(names: str, value: Answer | None) -> Answer:
    """``(x, y) = (2, 4)``, where there are as many of both."""
    known = tuple(name.strip() for name in names.strip("() ").split(","))
    if value is None or value.kind != "tuple" or len(known) != len(value.value):
        return Answer("nothing", None)
    return Answer("tuple", value.value, name=",".join(known))


def _inequality(sides: list[str], signs: list[str]) -> Answer:
    named = [place for place, side in enumerate(sides) if re.fullmatch(NAME, side)]
    others = [side for place, side in enumerate(sides) if [place] != named]
    values = [_scalar(side) for side in others]
    if len(named) == 1 and not any(value is None or _free(value) for value in values):
        if len(signs) == 2:
            if named != [1]:
                return Answer("nothing", None)
            if signs[0] in (">", r"\ge"):
                values, signs = values[::-1], [FLIPPED[sign] for sign in signs[::-1]]
            if not all(sign in ("<", r"\le") for sign in signs):
                return Answer("nothing", None)
            bounds = (values[0], signs[0] == r"\le", values[1], signs[1] == r"\le")
            return Answer("interval", (bounds,), name=sides[1])
        sign = signs[0] if named == [0] else FLIPPED[signs[0]]
        return _half_lines(sign, values[0], sides[named[0]])
    if len(signs) != 1 or signs[0] == r"\ne":
        return Answer("nothing", None)
    greater, less = sides if signs[0] in (">", r"\ge") else sides[::-1]
    difference = f"({greater})-({less})"
    if not variables(difference) or parsed_expression(difference) is None:
        return Answer("nothing", None)
    return Answer("inequality", (difference, signs[0] in (r"\le", r"\ge")))


def _half_lines(sign: str, value: Any, name: str) -> Answer:
    below, above = (_infinity(-1), False, value, sign == r"\le"), (value, sign == r"\ge", _infinity(1), False)
    if sign == r"\ne":
        return Answer("interval", (below, above), name=name)
    return Answer("interval", (below if sign in ("<", r"\le") else above,), name=name)


def _collection(text: str) -> Answer | None:
    """Sets, tuples, intervals, unions and matrices: what stands in brackets."""
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Answer("set", ())
    if re.fullmatch(r"\\mathbb ?\{ ?R ?\}", text):
        return Answer("interval", ((_infinity(-1), False, _infinity(1), False),))
    parts = split_top(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return _union([_read(part) if part else None for part in parts])
    if match := re.fullmatch(r"\\begin ?\{([pbv]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end ?\{\1\}", text):
        return _matrix(match[2]) if match[1] != "vmatrix" else Answer("nothing", None)
    opening, closing = _bracketed(text)
    if opening is None or closing is None:
        return None
    inner = text[len(opening) : -len(closing)].strip()
    if opening == r"\{":
        conditions = split_top(inner, r"\||:")
        if len(conditions) == 2:
            name, _, domain = conditions[0].partition(r"\in")
            if domain and not re.fullmatch(r" ?\\mathbb ?\{ ?R ?\}", domain):
                return Answer("nothing", None)
            return _named(name.strip(), _read(conditions[1]), {"interval"})
        return _several("set", _elements(inner))
    items = split_top(inner, ",")
    if len(items) == 1:
        return None if opening == "(" and closing == ")" else Answer("nothing", None)
    if len(items) == 2 and ((opening, closing) != ("(", ")") or r"\infty" in inner):
        ends = [_scalar(item) for item in items]
        if all(end is not None and not _free(end) for end in ends):
            return Answer("interval", ((ends[0], opening == "[", ends[1], closing == "]"),))
    if (opening, closing) == ("(", ")"):
        return _several("tuple", items)
    return Answer("nothing", None)


def _grouped(text: str) -> str | None:
    """What stands in brackets that only group, or that are part of how a matrix is written."""
    inner = text[1:-1].strip()
    if text[0] == "{" and text[-1] == "}" and balanced(inner):
        return inner
    if text[0] + text[-1] not in ("()", "[]") or _bracketed(text) == (None, None):
        return None
    if re.fullmatch(r"\\begin ?\{(matrix|array)\}.*\\end ?\{\1\}", inner):
        return inner
    alone = len(split_top(inner, ",")) == 1 and not re.search(RELATION, inner)
    return inner if text[0] == "(" and alone and not re.fullmatch(r"[A-Za-z]", inner) else None


def as_interval(pair: Answer) -> Answer | None:
    """``(0, 1)``, where it is known to be an interval."""
    if pair.kind != "tuple" or len(pair.value) != 2 or any(_free(each) for each in pair.value):
        return None
    return Answer("interval", ((pair.value[0], False, pair.value[1], False),))


def _bracketed(text: str) -> tuple[str, str] | tuple[None, None]:
    """The brackets that hold the whole text, if one pair does."""
    opening = next((each for each in (r"\{", "(", "[") if text.startswith(each)), None)
    closing = next((each for each in (r"\}", ")", "]") if text.endswith(each)), None)
    if opening is None or closing is None or (opening == r"\{") != (closing == r"\}"):
        return None, None
    depth = 0
    tokens = list(re.finditer(r"\\[{}]|\\.|[(\[{)\]}]", text))
    for match in tokens:
        depth += {r"\{": 1, "(": 1, "[": 1, "{": 1, r"\}": -1, ")": -1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0 and match.end() < len(text):
            return None, None
    return opening, closing


def _elements(inner: str) -> list[str]:
    return split_top(inner, r",? ?\\text\{ ?and ?\}|,? and |,|;") if inner else []


def _list(text: str) -> Answer | None:
    parts = _elements(text)
    signs = re.findall(r"\\pm|\\mp", text)
    if len(parts) == 1 and len(signs) == 1:
        parts = [re.sub(r"\\pm|\\mp", sign, text, count=1) for sign in ("+", "-")]
        parts = [part.removeprefix("+").strip() for part in parts]
    if len(parts) == 1:
        return None
    return _several("list", parts)


def _several(kind: str, parts: list[str]) -> Answer:
    items: list[Answer | None] = []
    for part in parts:
        item = _read(part) if part else None
        items += item.value if item is not None and item.kind == "list" and r"\pm" in part else [item]
    names = {item.name for item in items if item is not None}
    if any(item is None for item in items) or (kind != "tuple" and len(names) > 1):
        return Answer("nothing", None)
    bare = [Answer(item.kind, item.value, item.unit) for item in items if item is not None]
    return Answer(kind, tuple(bare), name=names.pop() if len(names) == 1 else None)


def _union(parts: list[Answer | None]) -> Answer:
    if any(part is None or part.kind != "interval" for part in parts):
        return Answer("nothing", None)
    names = {part.name for part in parts if part is not None and part.name}
    if len(names) > 1:
        return Answer("nothing", None)
    pieces = tuple(piece for part in parts if part is not None for piece in part.value)
    return Answer("interval", pieces, name=names.pop() if names else None)


def _matrix(inner: str) -> Answer:
    rows = [[_scalar(cell) for cell in split_top(row, "&")] for row in inner.split(r"\\") if row.strip()]
    if not rows or len({len(row) for row in rows}) != 1 or any(cell is None for row in rows for cell in row):
        return Answer("nothing", None)
    return Answer("matrix", tuple(tuple(row) for row in rows))


def _expression(text: str) -> Answer | None:
    if match := re.fullmatch(r"([+\-]?) ?\\infty", text):
        return _infinity(-1 if match[1] == "-" else 1)
    text = re.sub(r"(\d+(?:\.\d+)?) ?\^ ?\{? ?\\circ ?\}?", r"(\1 \\cdot \\frac{\\pi}{180})", text)
    return None if parsed_expression(text) is None else Answer("expression", text)


def _scalar(text: str) -> Answer | None:
    value = _number(text) or _expression(text) if text else None
    return value if value is not None and value.unit is None else None


def _infinity(sign: int) -> Answer:
    return Answer("infinity", sign)


def _free(value: Answer) -> bool:
    return value.kind == "expression" and bool(variables(value.value))
