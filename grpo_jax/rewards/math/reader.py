"""Parser of final answers into ``Answer``. Ambiguous or unknown text is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial

from grpo_jax.rewards.math.evaluation import TooLargeError, work_limit
from grpo_jax.rewards.math.expression import Node, parse, variables
from grpo_jax.rewards.math.final_answer import INVALID, Answer, as_node, is_constant_scalar, is_scalar
from grpo_jax.rewards.math.intervals import INFINITY, MINUS_INFINITY, REALS, Interval, complement, intersection
from grpo_jax.rewards.math.latex import balanced, normalize, split_top_level
from grpo_jax.rewards.math.numerals import NUMBER_WORDS, exact_number, read_number, read_numeral, read_ratio
from grpo_jax.rewards.math.parameters import split_parameter
from grpo_jax.rewards.math.relations import (
    AND,
    NAME,
    OR,
    RELATION,
    as_interval,
    as_points,
    half_line,
    interval_answer,
    named_values,
    read_congruence,
    read_relation,
    with_name,
)
from grpo_jax.rewards.math.symbolic import is_evaluable, real_value
from grpo_jax.rewards.math.units import QUALIFIERS
from grpo_jax.rewards.math.words import read_choice, read_words

CASES = re.compile(
    r"(?:\\\{ ?)?\\begin ?\{(?:cases|aligned|array)\}(?:\{[lcr|]*\})?(.*)\\end ?\{(?:cases|aligned|array)\}"
)
MATRIX = re.compile(r"(.*?)(?: ?\\cdot)? ?\\begin ?\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end ?\{\2\}")
REAL_SET = re.compile(r"\\mathbb ?\{ ?R ?\}")
MULTIPLE = re.compile(
    r"(-|-? ?(?:\d+|[a-dk-nr-t]|\\(?:lambda|mu) ?|\\frac ?\{ ?\d+ ?\} ?\{ ?\d+ ?\})) ?(\(.+\)|\\langle.+\\rangle)"
)
ANSWER_WORDS = (
    "the|so|thus|therefore|hence|our|final|correct|required|total|expected|answer|answers|value|result|solution|"
    "solutions|probability|area|volume|length|perimeter|distance|sum|product|number|cost|price|speed|time|measure|"
    "minimum|maximum"
)
ANSWER_PREFIX = re.compile(
    rf"(?:\\text ?\{{ ?)?(?:(?:{ANSWER_WORDS}),? )*(?:{ANSWER_WORDS}) ?(?:is|are|equals|=|:):?"
    r" ?(?:\} ?|(?=[\d\\(\-]))",
    re.IGNORECASE,
)
"""Words that introduce the answer. Other words might introduce another value, such as "half of the answer is"."""
SET_BUILDER = re.compile(rf"({NAME}) ?(?:\\in ?{REAL_SET.pattern})? ?(?:\||:|\\text ?\{{ ?such that ?\}}) ?(.+)")
NUMBER_SET = re.compile(r"\\mathbb ?\{ ?([NZQC]) ?\}(?: ?\^ ?\{? ?([+\-*]) ?\}?)?")
REALS_EXCEPT = re.compile(
    r"(?:all )?(?P<nonzero>non-?zero )?real numbers?(?: x)?"
    r"(?: (?:except|other than|not equal to)(?: for)? (?P<points>.+))?"
)


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer | None:
    """Parse a final answer; None if it is ambiguous, unknown or exceeds the work limit.

    ``text`` is LaTeX or plain text of at most ``latex.MAX_LENGTH`` characters, without the sentence around it.
    """
    normalized = normalize(text)
    if normalized is None:
        return None
    try:
        with work_limit():
            return _read(normalized)
    except (TooLargeError, RecursionError):
        return None


def _read(text: str) -> Answer | None:
    text = re.sub(r"^\\approx ?", "", text)
    if not text:
        return None
    inner = _ungrouped(text)
    if inner is not None:
        return _read(inner)
    if prefix := ANSWER_PREFIX.match(text):
        return _read(text[prefix.end() :].strip())
    congruence, relation = (partial(reader, parse_side=_read) for reader in (read_congruence, read_relation))
    readers = (read_numeral, _choice, read_number, read_ratio, _prose, _with_parameter, congruence)
    for reader in (*readers, _alternatives, relation, _collection, _list, _expression):
        answer = reader(text)
        if answer is not None:
            return answer if answer.kind != "invalid" else None
    return None


def _choice(text: str) -> Answer | None:
    choice = read_choice(text)
    content = choice and _read(choice[1].strip())
    if choice is None or content is None or content.letter or (content.kind == "text" and len(content.value) == 1):
        return None
    is_qualified = QUALIFIERS & set(re.findall(r"[a-z]+", choice[1].lower()))
    return None if is_qualified else replace(content, letter=choice[0])


def _prose(text: str) -> Answer | None:
    plain = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).split())
    if match := REALS_EXCEPT.fullmatch(plain):
        points = "0" if match["nonzero"] else match["points"]
        excluded = as_points(_read(points)) if points else ()
        return INVALID if excluded is None else Answer("interval", complement(excluded))
    if plain.lower() in NUMBER_WORDS:
        return Answer("number", Fraction(NUMBER_WORDS[plain.lower()]))
    return read_words(text)


def _with_parameter(text: str) -> Answer | None:
    r"""An answer that declares its parameter: ``\frac{\pi}{4}+k\pi, k \in \mathbb{Z}``."""
    parts = split_parameter(text)
    answer = parts and _read(parts[0])
    if parts is None or answer is None:
        return None
    # With two parameters, the argument of a function and a constant, the argument is the one that may be renamed.
    return replace(answer, parameter=answer.parameter or parts[1], domain=parts[2] or answer.domain)


def _alternatives(text: str) -> Answer | None:
    """Intervals or values joined by "or"."""
    parts = split_top_level(text, OR)
    if len(parts) == 1:
        return None
    answers = [_read(part) for part in parts]
    known = [answer for answer in answers if answer is not None]
    if len(known) == len(answers) and all(answer.kind == "interval" for answer in known):
        return _union(answers)
    if len(known) == len(answers) and all(answer.kind == "text" and len(answer.value) > 1 for answer in known):
        return Answer("text", " or ".join(sorted(answer.value for answer in known)))
    return _read_items("list", parts)


def _collection(text: str) -> Answer | None:
    """Sets, tuples, intervals, unions, differences and matrices."""
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Answer("set", ())
    if REAL_SET.fullmatch(text):
        return Answer("interval", (REALS,))
    if re.fullmatch(rf"{REAL_SET.pattern} ?(?:\^ ?\{{? ?\+ ?\}}?|_ ?\{{ ?> ?0 ?\}}|_ ?\+)", text):
        return Answer("interval", tuple(half_line(">", Answer("number", Fraction(0)))))
    if re.fullmatch(r"[\](\[].*[,;].*[)\][]", text) and (text[0] == "]" or text[-1] == "["):
        text = text[0].replace("]", "(") + text[1:-1] + text[-1].replace("[", ")")
    if match := NUMBER_SET.fullmatch(text):
        return Answer("text", f"the set {match[1]}{match[2] or ''}")
    parts = split_top_level(text, r"\\cup(?![a-z])")
    if len(parts) > 1:
        return _union([_read(part) for part in parts])
    parts = split_top_level(
        re.sub(r"(\\mathbb ?\{ ?R ?\}) ?- ?(?=\\\{)", r"\1 \\setminus ", text), r"\\setminus(?![a-z])"
    )
    if len(parts) == 2:
        base, removed = (_as_intervals(_read(part)) for part in parts)
        remaining = None if base is None or removed is None else intersection(base, complement(removed))
        return INVALID if remaining is None else Answer("interval", remaining)
    if (match := CASES.fullmatch(text)) and (r"{cases}" in text or "=" in text):
        return _cases([row.strip() for row in match[1].split(r"\\") if row.strip()])
    if match := MATRIX.fullmatch(text):
        return _matrix(match[3], match[1].strip())
    if r"\begin" in text:
        return INVALID
    if multiple := MULTIPLE.fullmatch(text):
        vector, factor = _read(multiple[2]), parse("-1" if multiple[1] == "-" else multiple[1])
        if vector is not None and vector.kind == "tuple" and factor is not None and all(map(is_scalar, vector.value)):
            return Answer("tuple", tuple(_product(factor, entry) for entry in vector.value))
    point = re.fullmatch(r"([ABD-Z]) ?(\(.+\))", text)
    if point and _outer_brackets(point[2]) != (None, None) and len(split_top_level(point[2][1:-1], ",")) > 1:
        coordinates = _read(point[2])
        return replace(coordinates, name=point[1]) if coordinates and coordinates.kind == "tuple" else INVALID
    opening, closing = _outer_brackets(text)
    if opening is None or closing is None:
        return None
    inner = text[len(opening) : -len(closing)].strip()
    if opening == r"\{":
        return _set(inner)
    items = split_top_level(inner, ",")
    items = items if len(items) > 1 else split_top_level(inner, ";")
    if opening == "(" and len(items) > 1 and re.search(r"\\pm|\\mp", inner):
        return None  # several tuples
    if len(items) == 1:
        return None if opening == "(" and closing == ")" else INVALID
    if len(items) == 2 and opening != r"\langle" and ((opening, closing) != ("(", ")") or r"\infty" in inner):
        low, high = (_scalar(item) for item in items)
        if low is not None and high is not None and is_constant_scalar(low) and is_constant_scalar(high):
            low_closed = opening == "[" and low.kind != "infinity"
            high_closed = closing == "]" and high.kind != "infinity"
            return interval_answer([Interval(low, low_closed, high, high_closed)])
        if low is not None and high is not None:
            return Answer("tuple", (Answer("text", opening), low, high, Answer("text", closing)))
    if (opening, closing) in (("(", ")"), (r"\langle", r"\rangle")):
        return _read_items("tuple", items)
    return INVALID


def _set(inner: str) -> Answer:
    builder = SET_BUILDER.fullmatch(inner)
    if builder is None:
        return _read_items("set", _elements(inner))
    return with_name(builder[1].strip(), _read(builder[2]), {"interval"})


def _cases(rows: list[str]) -> Answer:
    """A function defined by cases, or a system of equations."""
    cells = [[cell.strip(" ,") for cell in split_top_level(row, "&")] for row in rows]
    if all(len(row) == 1 for row in cells) or all("=" in row[-1] and "=" not in row[0] for row in cells):
        return _read_items("list", ["".join(row) for row in cells])
    items = []
    for row in cells:
        condition = re.sub(r"\\text ?\{ ?(?:if|for|when) ?\}", "", row[-1]).strip()
        pair = _read(row[0]), _read(condition)
        if len(row) != 2 or None in pair:
            return INVALID
        items.append(Answer("tuple", pair))
    return Answer("cases", tuple(items))


def _ungrouped(text: str) -> str | None:
    """The content of brackets around the text that only group; None if there are none."""
    inner = text[1:-1].strip()
    if text[0] == "{" and text[-1] == "}" and balanced(inner) and not re.search(r"\\over(?![a-z])|\\choose", inner):
        return inner
    if text[0] + text[-1] not in ("()", "[]") or _outer_brackets(text) == (None, None):
        return None
    if re.fullmatch(r"\\begin ?\{(matrix|array)\}.*\\end ?\{\1\}", inner):
        return inner
    is_single = len(split_top_level(inner, ",|;")) == 1 and not re.search(RELATION, inner)
    return inner if text[0] == "(" and is_single and not re.fullmatch(r"[A-Z]", inner) else None


def _as_intervals(part: Answer | None) -> tuple[Interval, ...] | None:
    """The intervals of an interval, of a pair that may be an open interval, or of a set of points; else None."""
    part = part and (as_interval(part) or part)
    if part is None:
        return None
    if part.kind == "interval":
        return part.value
    return as_points(part) if part.kind in ("set", "list") else None


def _union(parts: list[Answer | None]) -> Answer:
    """The union of sets or of intervals; ``INVALID`` if a part is neither."""
    names = {part.name for part in parts if part is not None and part.name}
    if len(names) > 1 or any(part is None for part in parts):
        return INVALID
    name = names.pop() if names else None
    if all(part is not None and part.kind == "set" for part in parts):
        return Answer("set", tuple(item for part in parts if part is not None for item in part.value), name=name)
    unions = [_as_intervals(part) for part in parts]
    if None in unions:
        return INVALID
    return interval_answer([interval for union in unions for interval in union or ()], name)


def _outer_brackets(text: str) -> tuple[str, str] | tuple[None, None]:
    """The pair of brackets around the whole text; ``(None, None)`` if there is none."""
    opening = next((bracket for bracket in (r"\{", r"\langle", "(", "[") if text.startswith(bracket)), None)
    closing = next((bracket for bracket in (r"\}", r"\rangle", ")", "]") if text.endswith(bracket)), None)
    curly = [opening == r"\{", opening == r"\langle"]
    if opening is None or closing is None or curly != [closing == r"\}", closing == r"\rangle"]:
        return None, None
    depth = 0
    for match in re.finditer(r"\\[{}]|\\[lr]angle|\\.|[(\[{)\]}]", text):
        depth += (match[0] in (r"\{", r"\langle", "(", "[", "{")) - (match[0] in (r"\}", r"\rangle", ")", "]", "}"))
        if depth == 0 and match.end() < len(text):
            return None, None
    return opening, closing


def _elements(inner: str) -> list[str]:
    return split_top_level(inner, rf",? ?(?:{AND})|,|;") if inner else []


def _list(text: str) -> Answer | None:
    r"""A list of answers, or the values of an expression with ``\pm``."""
    parts = _elements(text)
    if len(parts) > 1:
        return _read_items("list", parts)
    signs = re.findall(r"\\pm|\\mp", text)
    if not signs or len(signs) > 2:
        return None
    upper = ["+" if sign == r"\pm" else "-" for sign in signs]
    lower = ["-" if sign == r"\pm" else "+" for sign in signs]
    choices = itertools.product("+-", repeat=2) if signs == [r"\pm", r"\pm"] else (upper, lower)
    cases = []
    for choice in choices:
        remaining = iter(choice)
        cases.append(re.sub(r"\\pm|\\mp", lambda _, signs=remaining: next(signs), text).removeprefix("+").strip())
    return _read_items("list", cases)


def _read_items(kind: str, parts: list[str]) -> Answer:
    """A set, list or tuple of the parsed parts, whose names are checked; ``INVALID`` if a part cannot be parsed."""
    items: list[Answer] = []
    for part in parts:
        item = _read(part)
        if item is None:
            return INVALID
        is_pair = item.kind == "list" and r"\pm" in part  # the values of an expression with \pm
        items += [replace(value, name=item.name) for value in item.value] if is_pair else [item]
    if items and all(item.kind == "tuple" and re.fullmatch("[A-Z]", item.name or "") for item in items):
        return Answer(kind, tuple(items))  # labelled points
    names = [item.name for item in items]
    given_names = [name for name in names if name is not None]
    if kind != "tuple" and names and names[0] and all(item.kind == "interval" for item in items if item.name):
        return _conjunction(items)
    bare = tuple(replace(item, name=None) for item in items)
    if kind == "list" and len(set(given_names)) == len(names) > 1 and all(is_constant_scalar(item) for item in bare):
        stems = {name.partition("_")[0] for name in given_names}
        return Answer("list", bare) if len(stems) == 1 else named_values(given_names, bare)
    if kind == "list" and (solution := _solution(items)) is not None:
        return solution
    is_named = len(set(given_names)) == 1 and (len(given_names) == len(names) or names[0] is not None)
    if given_names and (kind == "tuple" or not is_named):
        return INVALID
    return Answer(kind, bare, name=given_names[0] if given_names else None)


def _solution(items: list[Answer]) -> Answer | None:
    """The tuple of values of ``x = 2+3t, y = 1-2t``; None if a value contains one of the names."""
    names = [item.value[1] if item.kind == "equation" else item.name for item in items]
    values = [item.value[2] if item.kind == "equation" else replace(item, name=None) for item in items]
    if None in names or len(set(names)) < len(names) or len(names) < 2 or not all(map(is_scalar, values)):
        return None
    used = frozenset().union(*(variables(as_node(value)) for value in values))
    return None if used & set(names) else named_values([str(name) for name in names], values)


def _conjunction(items: list[Answer]) -> Answer:
    r"""The intersection of conditions, ``x > 1, x \ne 3`` or ``x \ne 1, 3``; their union if it is empty."""
    common, name, parts = (REALS,), items[0].name, []
    for item in items:
        if item.name != name and not (item.name is None and is_constant_scalar(item)):
            return INVALID
        part = item.value
        if item.name is None:  # another point that the first condition excludes
            excluded = complement(items[0].value)
            if len(excluded) != 1 or excluded[0].low != excluded[0].high:
                return INVALID
            part = complement((Interval(item, True, item, True),))
        common = intersection(common, part)
        if common is None:
            return INVALID
        parts += part
    return Answer("interval", common, name=name) if common else interval_answer(parts, name)


def _matrix(inner: str, factor: str) -> Answer:
    rows = [[_scalar(cell) for cell in split_top_level(row, "&")] for row in inner.split(r"\\") if row.strip()]
    if not rows or len({len(row) for row in rows}) != 1 or any(cell is None for row in rows for cell in row):
        return INVALID
    scale = parse(factor) if factor else None
    if factor and (scale is None or variables(scale) or not is_evaluable(scale)):
        return INVALID
    if scale is not None:
        rows = [[_product(scale, cell) for cell in row if cell is not None] for row in rows]
    return Answer("matrix", tuple(tuple(row) for row in rows))


def _product(scale: Node, cell: Answer) -> Answer:
    node = ("mul", scale, as_node(cell))
    value = real_value(node) if not variables(node) else None
    return Answer("number", value) if isinstance(value, Fraction) else Answer("expression", node)


def _expression(text: str) -> Answer | None:
    if match := re.fullmatch(r"([+\-]?) ?\\infty", text):
        return MINUS_INFINITY if match[1] == "-" else INFINITY
    node = parse(text)
    return Answer("expression", node) if node is not None and is_evaluable(node) else None


def _scalar(text: str) -> Answer | None:
    value = exact_number(text)
    return _expression(text) if value is None else Answer("number", value)
