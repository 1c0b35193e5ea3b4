"""Parsing of equations, inequalities, memberships and congruences in final answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.expression import Node, difference, parse, variables
from grpo_jax.rewards.math.final_answer import INVALID, Answer, as_node, is_constant_scalar, is_scalar
from grpo_jax.rewards.math.intervals import INFINITY, MINUS_INFINITY, Interval, complement, union
from grpo_jax.rewards.math.latex import split_top_level
from grpo_jax.rewards.math.symbolic import agree, is_constant, is_evaluable, real_value

NAME = r"[A-Za-z](?:_(?:\{\w+\}|\w))?'?|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|rho) ?"
FUNCTION_OF = re.compile(
    r"([A-Za-z](?:_\w)?(?:'{1,2}| ?\^ ?\{ ?-1 ?\})?) ?\( ?([a-z])(?:, ?[a-z])* ?\)|\\frac ?\{ ?d(?:y|f) ?\} ?\{ ?dx ?\}"
)
QUANTITY = re.compile(
    r"(?:m ?)?\\(?:angle|triangle) ?[A-Z]{1,3}|\|?[A-Z]{2,4}\|?|\[ ?[A-Z]{3,6} ?\]|\\overline ?\{ ?[A-Z]{2} ?\}"
    r"|\\text\{[A-Za-z]\}|[A-Za-z] ?\( ?(?:[A-Z]|-?\d+) ?\)|[A-Z]_\{ ?(?:\\triangle )?\w+ ?\}"
    r"|(?:\\text\{)?[A-Za-z]{3,}(?: [A-Za-z]+)*\}?"
)
RELATION = r"(\\approx|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\in(?![a-z])|=|<|>)"
CONGRUENCE = re.compile(
    rf"(?:(?P<name>{NAME}) ?\\equiv ?)?(?P<residues>[^=<>]+?) ?\(? ?(?:\\text\{{ ?mod ?\}}|mod|\\[pb]?mod) ?"
    r"\{? ?(?P<modulus>\d+) ?\}? ?\)?"
)
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
OR, AND = r"\\text\{ ?or ?\}| or ", r"\\text\{ ?and ?\}| and "

Parser = Callable[[str], Answer | None]


def read_relation(text: str, parse_side: Parser) -> Answer | None:
    """Parse an equation, an inequality or a membership.

    Args:
        text: normalized LaTeX.
        parse_side: parser of the sides of the relation.

    Returns:
        The answer; ``INVALID`` for an invalid relation; None for a text without a relation or with a list of them.
    """
    if len(split_top_level(text, ",|;")) > 1 or re.search(AND, text):
        return None
    parts = split_top_level(text, RELATION)
    sides, signs = parts[::2], [sign.strip() for sign in parts[1::2]]
    if not signs:
        return None
    if not all(sides):
        return INVALID
    if signs == [r"\approx"] and re.fullmatch(NAME, sides[0]):
        signs = ["="]
    if signs[-1] == r"\approx":
        return _rounded(parse_side(text.rpartition(r"\approx")[0].strip()), parse_side(sides[-1]), sides[-1])
    if set(signs) == {"="}:
        return _equation(sides[0], sides[1], parse_side) if len(signs) == 1 else _chain(sides, parse_side)
    is_long = len(signs) > 2 and not all(re.fullmatch(NAME, side) for side in sides)
    if is_long or {"=", r"\approx"} & set(signs) or (len(signs) > 1 and set(signs) & {r"\in", r"\ne"}):
        return INVALID
    if signs == [r"\in"]:
        value = parse_side(sides[1])
        return with_name(sides[0], value and (as_interval(value) or value), {"interval", "set"})
    return _inequality(sides, signs, parse_side)


def _rounded(exact: Answer | None, approximate: Answer | None, approximate_text: str) -> Answer:
    r"""The exact value of ``2\sqrt{3} \approx 3.464``; ``INVALID`` unless the decimal is it rounded or truncated."""
    if exact is None or approximate is None or exact.kind not in ("number", "expression"):
        return INVALID
    node = as_node(exact)
    if variables(node) or approximate.kind != "number" or approximate.unit not in (None, exact.unit):
        return INVALID
    decimal = re.match(r"-?\d[\d,]*(?:\.(\d+))?(?![\d./])", approximate_text)
    error = real_value(difference(node, as_node(approximate)))
    if decimal is None or error is None or approximate.value == 0:
        return INVALID
    error_in_last_digit = float(error) * 10 ** len(decimal[1] or "") * (1 if approximate.value > 0 else -1)
    is_rounded = abs(error_in_last_digit) <= (0.5 if decimal[1] else 0.499)
    is_truncated = decimal[1] and 0 < error_in_last_digit < 0.999
    return exact if is_rounded or is_truncated else INVALID


def with_name(name: str, value: Answer | None, kinds: set[str]) -> Answer:
    """The value of a variable, as in ``x = 5``.

    Args:
        name: text of the variable.
        value: parsed value.
        kinds: allowed kinds of the value.

    Returns:
        ``value`` with the name; ``INVALID`` if the text is not a variable or the value has another kind or name.
    """
    if value is None or value.kind not in kinds or not re.fullmatch(NAME, name) or value.name not in (None, name):
        return INVALID
    return replace(value, name=name.strip())


def _chain(sides: list[str], parse_side: Parser) -> Answer:
    r"""The last side of a chain such as ``V = \frac43 \pi 3^3 = 36\pi``, if the sides are equal."""
    value = parse_side(sides[-1])
    if value is not None and is_constant_scalar(value) and all(re.fullmatch(NAME, side) for side in sides[:-1]):
        names = [side.strip() for side in sides[:-1]]
        return named_values(names, [value] * len(names)) if len(set(names)) == len(names) else INVALID
    nodes = [parse(side) for side in sides[1:]]
    last = _equation(sides[0], sides[-1], parse_side)
    if last.name is None or last.kind not in ("number", "expression") or last.unit is not None:
        return INVALID
    constants = [node for node in nodes if node is not None and not variables(node) and is_evaluable(node)]
    if len(constants) < len(nodes) or not all(agree(constants[-1], node) for node in constants[:-1]):
        return INVALID
    return last


def _equation(left: str, right: str, parse_side: Parser) -> Answer:
    if function := FUNCTION_OF.fullmatch(left):
        value = parse_side(right)
        name, argument = (function[1] or "y'").replace(" ", ""), function[2] or "x"
        if value is not None and value.kind == "list" and all(map(is_scalar, value.value)):
            equations = (Answer("equation", (None, name, item), parameter=argument) for item in value.value)
            return Answer("list", tuple(equations))
        is_value = is_scalar(value) or (value is not None and value.kind == "cases")
        return Answer("equation", (None, name, value), parameter=argument) if is_value else INVALID
    for name, other in ((left, right), (right, left)):
        is_variable = re.fullmatch(NAME, name) is not None
        if (is_variable or QUANTITY.fullmatch(name)) and not (is_variable and _has_variable(other, name)):
            value = parse_side(other)
            name = re.sub(r"\\text ?\{|[\s}{|]", "", name)
            if value is None or value.name is not None or value.kind in ("equation", "inequality", "text"):
                return INVALID
            if value.kind != "expression" or not variables(value.value):
                return replace(value, name=name)
            if not is_variable:
                return Answer("equation", (None, name, value))
            return Answer("equation", (difference(("variable", name), value.value), name, value))
    if re.fullmatch(rf"\( ?(?:{NAME})(?: ?, ?(?:{NAME}))+ ?\)", left):
        return _named_tuple(left, parse_side(right))
    node = _difference(left, right)
    if re.fullmatch(r"[a-z](?: ?\+ ?[a-z])+", left) and is_constant_scalar(value := parse_side(right)):
        return Answer("equation", (node, left.replace(" ", ""), value))
    return Answer("equation", (node, None, None)) if _is_conditional(node) else INVALID


def _difference(left: str, right: str) -> Node | None:
    nodes = parse(left), parse(right)
    return None if nodes[0] is None or nodes[1] is None else difference(nodes[0], nodes[1])


def _has_variable(text: str, name: str) -> bool:
    node, variable = parse(text), parse(name)
    return variable is not None and node is not None and variable[1] in variables(node)


def _is_conditional(node: Node | None) -> bool:
    """Whether the difference of two sides is not constant: identities and contradictions are not answers."""
    return node is not None and bool(variables(node)) and is_evaluable(node) and not is_constant(node)


def _named_tuple(names: str, value: Answer | None) -> Answer:
    """The values of ``(x, y) = (2, 4)``; ``INVALID`` unless there are as many values as names."""
    parts = [name.strip() for name in names.strip("() ").split(",")]
    if value is None or value.kind != "tuple" or len(parts) != len(value.value) or len(set(parts)) < len(parts):
        return INVALID
    return named_values(parts, value.value)


def named_values(names: Sequence[str], values: Sequence[Answer]) -> Answer:
    """Values of several variables as a tuple; consecutive letters of the alphabet are sorted.

    Args:
        names: distinct names of the variables.
        values: their values, in the same order.
    """
    codes = sorted(ord(name) for name in names if len(name) == 1)
    if len(codes) == len(names) and codes[-1] - codes[0] == len(codes) - 1:
        names, values = zip(*sorted(zip(names, values, strict=True), key=lambda pair: pair[0]), strict=True)
    return Answer("tuple", tuple(values), name=",".join(names))


def _inequality(sides: list[str], signs: list[str], parse_side: Parser) -> Answer:
    if signs == [r"\ne"] and re.fullmatch(NAME, sides[0]):
        points = as_points(parse_side(sides[1]))
        return INVALID if points is None else Answer("interval", complement(points), name=sides[0].strip())
    named = [index for index, side in enumerate(sides) if re.fullmatch(NAME, side)]
    if len(named) == len(sides) > 2:
        return _ranking(sides, signs)
    ends = [parse_side(side) for index, side in enumerate(sides) if [index] != named]
    if len(named) == 1 and all(is_constant_scalar(end) for end in ends):
        first, second = ends[0], ends[-1]
        if first is None or second is None:
            return INVALID
        if len(signs) == 1:
            sign = signs[0] if named == [0] else FLIPPED[signs[0]]
            intervals = half_line(sign, first)
        elif named == [1] and all(sign in ("<", r"\le") for sign in signs):
            intervals = [Interval(first, signs[0] == r"\le", second, signs[1] == r"\le")]
        elif named == [1] and all(sign in (">", r"\ge") for sign in signs):
            intervals = [Interval(second, signs[1] == r"\ge", first, signs[0] == r"\ge")]
        else:
            return INVALID
        return interval_answer(intervals, sides[named[0]].strip())
    if len(signs) != 1 or signs[0] == r"\ne":
        return INVALID
    absolute = _absolute_value(sides, signs[0]) or _absolute_value(sides[::-1], FLIPPED[signs[0]])
    if absolute is not None:
        return absolute
    node = _difference(*(sides if signs[0] in (">", r"\ge") else sides[::-1]))
    return Answer("inequality", (node, signs[0] in (r"\le", r"\ge"))) if _is_conditional(node) else INVALID


def _ranking(names: list[str], signs: list[str]) -> Answer:
    """The ascending order of ``a < c < b`` or ``b > c > a``."""
    if not (set(signs) <= {"<", r"\le"} or set(signs) <= {">", r"\ge"}):
        return INVALID
    if signs[0] in (">", r"\ge"):
        names, signs = names[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    return Answer("tuple", tuple(Answer("text", text.strip()) for text in (*names, *signs)))


def half_line(sign: str, end: Answer) -> list[Interval]:
    r"""The real numbers x with ``x < end`` and the like, as one interval, or two for ``\ne``.

    Args:
        sign: ``<``, ``>``, ``\le``, ``\ge`` or ``\ne``.
        end: constant.
    """
    below, above = Interval(MINUS_INFINITY, False, end, sign == r"\le"), Interval(end, sign == r"\ge", INFINITY, False)
    return [below, above] if sign == r"\ne" else [below if sign in ("<", r"\le") else above]


def interval_answer(intervals: list[Interval], name: str | None = None) -> Answer:
    """The union of intervals as an answer; ``INVALID`` if the ends of one are not real or not in order.

    Args:
        intervals: intervals in any order.
        name: variable whose values these are.
    """
    merged = union(intervals)
    return INVALID if merged is None else Answer("interval", merged, name=name)


def as_points(points: Answer | None) -> tuple[Interval, ...] | None:
    """The points of a number, a set or a list of numbers as intervals; None for any other answer."""
    if points is None:
        return None
    values = points.value if points.kind in ("set", "list") else (points,)
    return union([Interval(x, True, x, True) for x in values]) if all(map(is_constant_scalar, values)) else None


def as_interval(pair: Answer) -> Answer | None:
    """A pair such as ``(0, 1)`` as an open interval; None if it cannot be one."""
    if pair.kind != "tuple" or len(pair.value) != 2 or not all(map(is_constant_scalar, pair.value)):
        return None
    answer = interval_answer([Interval(pair.value[0], False, pair.value[1], False)], pair.name)
    return None if answer.kind == "invalid" else answer


def read_congruence(text: str, parse_side: Parser) -> Answer | None:
    r"""Parse residue classes such as ``x \equiv 3 \pmod{7}`` or ``1, 4 \pmod 5``; None for any other text.

    Args:
        text: normalized LaTeX.
        parse_side: parser of the residues.
    """
    match = CONGRUENCE.fullmatch(text)
    residues = match and parse_side(match["residues"])
    if match is None or residues is None or int(match["modulus"]) < 2:
        return None
    values = residues.value if residues.kind == "list" else (residues,)
    if any(value.kind != "number" or value.unit or value.value.denominator != 1 for value in values):
        return None
    modulus = int(match["modulus"])
    classes = [Answer("congruence", (int(value.value) % modulus, modulus)) for value in values]
    answer = classes[0] if len(classes) == 1 else Answer("list", tuple(classes))
    return replace(answer, name=match["name"])


def _absolute_value(sides: list[str], sign: str) -> Answer | None:
    """The interval of ``|x-1| < 2``; None for any other inequality."""
    nodes = [parse(side) for side in sides]
    if nodes[0] is None or nodes[1] is None or nodes[0][0] != "abs" or variables(nodes[1]):
        return None
    inner, radius = nodes[0][1], real_value(nodes[1])
    terms = inner[1:] if inner[0] == "add" else (inner,)
    offset = [term for term in terms if term[0] != "variable"]
    if len(variables(inner)) != 1 or any(variables(term) for term in offset) or radius is None or radius <= 0:
        return None
    if len(offset) + 1 != len(terms):
        return None
    zero = ("number", Fraction(0))
    center = difference(zero, ("add", zero, *offset))
    low, high = (_as_scalar(("add", center, end)) for end in (difference(zero, nodes[1]), nodes[1]))
    closed = sign in (r"\le", r"\ge")
    inside = [Interval(low, closed, high, closed)]
    outside = [*half_line("<" if sign == ">" else r"\le", low), *half_line(sign, high)]
    return interval_answer(inside if sign in ("<", r"\le") else outside, next(iter(variables(inner))))


def _as_scalar(node: Node) -> Answer:
    value = real_value(node)
    return Answer("number", value) if isinstance(value, Fraction) else Answer("expression", node)
