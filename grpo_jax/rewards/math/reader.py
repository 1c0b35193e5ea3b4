"""Final answers as mathematics: their kind, value, unit and name. What is ambiguous or unknown is not read."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

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
    "the so thus therefore hence our final correct required total expected answer answers value result solution "
    "solutions probability area volume length perimeter distance sum product number cost price speed time measure "
    "minimum maximum"
)
ANSWER_PREFIX = re.compile(
    rf"(?:\\text ?\{{ ?)?(?:(?:{ANSWER_WORDS.replace(' ', '|')}),? )*(?:{ANSWER_WORDS.replace(' ', '|')}) ?(?:is|are|equals|=|:):?"
    r" ?(?:\} ?|(?=[\d\\(\-]))",
    re.IGNORECASE,
)
"""A value after words that say what it is. Any other words might say that it is something else: half of the answer."""
SET_BUILDER = re.compile(rf"({NAME}) ?(?:\\in ?{REAL_SET.pattern})? ?(?:\||:|\\text ?\{{ ?such that ?\}}) ?(.+)")
NUMBER_SET = re.compile(r"\\mathbb ?\{ ?([NZQC]) ?\}(?: ?\^ ?\{? ?([+\-*]) ?\}?)?")
REALS_EXCEPT = re.compile(
    r"(?:all )?(?P<nonzero>non-?zero )?real numbers?(?: x)?"
    r"(?: (?:except|other than|not equal to)(?: for)? (?P<points>.+))?"
)


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer | None:
    """Read a final answer; None for what cannot be read without doubt, or takes more than the work allowed.

    Args:
        text: LaTeX or plain text of at most 400 characters, without the sentence around it.
    """
    tidied = normalize(text)
    if tidied is None:
        return None
    try:
        with work_limit():
            return _read(tidied)
    except (TooLargeError, RecursionError):
        return None


def _read(text: str) -> Answer | None:
    if not text:
        return None
    text = re.sub(r"^\\approx ?", "", text)
    inner = _ungrouped(text) if text else None
    if inner is not None:
        return _read(inner)
    if prefix := ANSWER_PREFIX.match(text):
        return _read(text[prefix.end() :].strip())
    readers = (read_numeral, _choice, read_number, read_ratio, _prose, _with_parameter, _congruence)
    for reader in (*readers, _alternatives, _relation, _collection, _list, _expression):
        found = reader(text)
        if found is not None:
            return found if found.kind != "invalid" else None
    return None


def _choice(text: str) -> Answer | None:
    choice = read_choice(text)
    rest = choice and _read(choice[1].strip())
    if choice is None or rest is None or rest.letter or (rest.kind == "text" and len(rest.value) == 1):
        return None
    says_more = set(re.findall(r"[a-z]+", choice[1].lower())) & QUALIFIERS
    return None if says_more else replace(rest, letter=choice[0])


def _prose(text: str) -> Answer | None:
    plain = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", text).split())
    if match := REALS_EXCEPT.fullmatch(plain):
        points = "0" if match["nonzero"] else match["points"]
        pieces = as_points(_read(points)) if points else ()
        return INVALID if pieces is None else Answer("interval", complement(pieces))
    if plain.lower() in NUMBER_WORDS:
        return Answer("number", Fraction(NUMBER_WORDS[plain.lower()]))
    return read_words(text)


def _with_parameter(text: str) -> Answer | None:
    r"""``\frac{\pi}{4}+k\pi, k \in \mathbb{Z}``."""
    found = split_parameter(text)
    answer = found and _read(found[0])
    if found is None or answer is None:
        return None
    # Of two letters, the argument of a function and a constant, the argument may be with_name otherwise.
    return replace(answer, parameter=answer.parameter or found[1], domain=found[2] or answer.domain)


def _alternatives(text: str) -> Answer | None:
    """Intervals, or values of one thing, joined by "or"."""
    parts = split_top_level(text, OR)
    if len(parts) == 1:
        return None
    read = [_read(part) if part else None for part in parts]
    if all(each is not None and each.kind == "interval" for each in read):
        return _union(read)
    if all(each is not None and each.kind == "text" and len(each.value) > 1 for each in read):
        return Answer("text", " or ".join(sorted(each.value for each in read if each is not None)))
    return _read_items("list", parts)


def _congruence(text: str) -> Answer | None:
    return read_congruence(text, _read)


def _relation(text: str) -> Answer | None:
    return read_relation(text, _read)


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
        return _union([_read(part) if part else None for part in parts])
    parts = split_top_level(
        re.sub(r"(\\mathbb ?\{ ?R ?\}) ?- ?(?=\\\{)", r"\1 \\setminus ", text), r"\\setminus(?![a-z])"
    )
    if len(parts) == 2:
        base, removed = (_as_intervals(_read(part)) if part else None for part in parts)
        rest = None if base is None or removed is None else intersection(base, complement(removed))
        return INVALID if rest is None else Answer("interval", rest)
    if (match := CASES.fullmatch(text)) and (r"{cases}" in text or "=" in text):
        return _cases([row.strip() for row in match[1].split(r"\\") if row.strip()])
    if match := MATRIX.fullmatch(text):
        return _matrix(match[3], match[1].strip())
    if r"\begin" in text:
        return INVALID
    if multiple := MULTIPLE.fullmatch(text):
        vector, factor = _read(multiple[2]), parse("-1" if multiple[1] == "-" else multiple[1])
        if vector is not None and vector.kind == "tuple" and factor is not None and all(map(is_scalar, vector.value)):
            return Answer("tuple", tuple(_product(factor, each) for each in vector.value))
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
            finite = low.kind != "infinity", high.kind != "infinity"
            return interval_answer([Interval(low, opening == "[" and finite[0], high, closing == "]" and finite[1])])
        if low is not None and high is not None and opening != r"\{":
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
    """Values by their conditions, or a system of equations."""
    cells = [[cell.strip(" ,") for cell in split_top_level(row, "&")] for row in rows]
    if all(len(row) == 1 for row in cells) or all("=" in row[-1] and "=" not in row[0] for row in cells):
        return _read_items("list", ["".join(row) for row in cells])
    items = []
    for row in cells:
        condition = re.sub(r"\\text ?\{ ?(?:if|for|when) ?\}", "", row[-1]).strip()
        read = _read(row[0]), _read(condition)
        if len(row) != 2 or read[0] is None or read[1] is None:
            return INVALID
        items.append(Answer("tuple", read))
    return Answer("cases", tuple(items))


def _ungrouped(text: str) -> str | None:
    """The inside of brackets that only group."""
    inner = text[1:-1].strip()
    if text[0] == "{" and text[-1] == "}" and balanced(inner) and not re.search(r"\\over(?![a-z])|\\choose", inner):
        return inner
    if text[0] + text[-1] not in ("()", "[]") or _outer_brackets(text) == (None, None):
        return None
    if re.fullmatch(r"\\begin ?\{(matrix|array)\}.*\\end ?\{\1\}", inner):
        return inner
    alone = len(split_top_level(inner, ",|;")) == 1 and not re.search(RELATION, inner)
    return inner if text[0] == "(" and alone and not re.fullmatch(r"[A-Z]", inner) else None


def _as_intervals(part: Answer | None) -> tuple[Interval, ...] | None:
    """The pieces of an interval_answer, of an open interval_answer that looks like a pair, or of a set of points."""
    part = part and (as_interval(part) or part)
    if part is None:
        return None
    if part.kind == "interval":
        return part.value
    return as_points(part) if part.kind in ("set", "list") else None


def _union(parts: list[Answer | None]) -> Answer:
    """The union of sets or of intervals."""
    names = {part.name for part in parts if part is not None and part.name}
    if len(names) > 1 or any(part is None for part in parts):
        return INVALID
    name = names.pop() if names else None
    if all(part is not None and part.kind == "set" for part in parts):
        return Answer("set", tuple(each for part in parts if part is not None for each in part.value), name=name)
    pieces = [_as_intervals(part) for part in parts]
    if any(each is None for each in pieces):
        return INVALID
    return interval_answer([piece for each in pieces if each is not None for piece in each], name)


def _outer_brackets(text: str) -> tuple[str, str] | tuple[None, None]:
    """The brackets that hold the whole text, if one pair does."""
    opening = next((each for each in (r"\{", r"\langle", "(", "[") if text.startswith(each)), None)
    closing = next((each for each in (r"\}", r"\rangle", ")", "]") if text.endswith(each)), None)
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
    parts = _elements(text)
    if len(parts) > 1:
        return _read_items("list", parts)
    signs = re.findall(r"\\pm|\\mp", text)
    if not signs or len(signs) > 2:
        return None
    choices = list(itertools.product("+-", repeat=2)) if signs == [r"\pm", r"\pm"] else None
    if choices is None:
        choices = [
            ["+" if sign == r"\pm" else "-" for sign in signs],
            ["-" if sign == r"\pm" else "+" for sign in signs],
        ]
    cases = []
    for choice in choices:
        left = iter(choice)
        cases.append(re.sub(r"\\pm|\\mp", lambda _, left=left: next(left), text).removeprefix("+").strip())
    return _read_items("list", cases)


def _read_items(kind: str, parts: list[str]) -> Answer:
    items: list[Answer] = []
    for part in parts:
        item = _read(part) if part else None
        if item is None:
            return INVALID
        items += (
            [replace(each, name=item.name) for each in item.value] if item.kind == "list" and r"\pm" in part else [item]
        )
    if items and all(item.kind == "tuple" and re.fullmatch("[A-Z]", item.name or "") for item in items):
        return Answer(kind, tuple(items))  # points by their labels
    names = [item.name for item in items]
    known = [name for name in names if name is not None]
    if kind != "tuple" and names and names[0] and all(item.kind == "interval" for item in items if item.name):
        return _conjunction(items)
    bare = tuple(replace(item, name=None) for item in items)
    if kind == "list" and len(set(known)) == len(names) > 1 and all(is_constant_scalar(item) for item in bare):
        stems = {name.partition("_")[0] for name in known}
        return Answer("list", bare) if len(stems) == 1 else named_values(known, bare)
    if kind == "list" and (solution := _solution(items)) is not None:
        return solution
    is_named = len(set(known)) == 1 and (len(known) == len(names) or names[0] is not None)
    if known and (kind == "tuple" or not is_named):
        return INVALID
    return Answer(kind, bare, name=known[0] if known else None)


def _solution(items: list[Answer]) -> Answer | None:
    """``x = 2+3t, y = 1-2t``: values by name, where none of them has another's name in it; None for anything else."""
    names = [item.value[1] if item.kind == "equation" else item.name for item in items]
    values = [item.value[2] if item.kind == "equation" else replace(item, name=None) for item in items]
    if None in names or len(set(names)) < len(names) or len(names) < 2 or not all(map(is_scalar, values)):
        return None
    used = frozenset().union(*(variables(as_node(value)) for value in values))
    return None if used & set(names) else named_values([str(name) for name in names], values)


def _conjunction(items: list[Answer]) -> Answer:
    r"""``x > 1, x \ne 3`` or ``x \ne 1, 3``: all conditions on one variable hold, or one of them where all cannot."""
    pieces, name, parts = (REALS,), items[0].name, []
    for item in items:
        if item.name != name and not (item.name is None and is_constant_scalar(item)):
            return INVALID
        part = item.value
        if item.name is None:  # another point that the first condition excludes
            excluded = complement(items[0].value)
            if len(excluded) != 1 or excluded[0].low != excluded[0].high:
                return INVALID
            part = complement((Interval(item, True, item, True),))
        both = intersection(pieces, part)
        if both is None:
            return INVALID
        pieces = both
        parts += part
    return Answer("interval", pieces, name=name) if pieces else interval_answer(parts, name)


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
    value = exact_number(text) if text else None
    return Answer("number", value) if value is not None else _expression(text) if text else None
