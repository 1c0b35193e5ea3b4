"""Equations, inequalities and memberships among final answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.expression import Node, difference, parse, variables
from grpo_jax.rewards.math.final_answer import INVALID, Answer, as_node, is_constant_scalar, is_scalar
from grpo_jax.rewards.math.intervals import INFINITY, MINUS_INFINITY, Piece, complement, union
from grpo_jax.rewards.math.latex import split_top
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

Reader = Callable[[str], Answer | None]


def read_relation(text: str, read: Reader) -> Answer | None:
    """An equation, an inequality or a membership; None for a text without a relation, or with several.

    Args:
        text: tidy LaTeX.
        read: the reader of its sides.
    """
    if len(split_top(text, ",|;")) > 1 or re.search(AND, text):
        return None
    parts = split_top(text, RELATION)
    sides, signs = parts[::2], [sign.strip() for sign in parts[1::2]]
    if not signs:
        return None
    if not all(sides):
        return INVALID
    if signs == [r"\approx"] and re.fullmatch(NAME, sides[0]):
        signs = ["="]
    if signs[-1] == r"\approx":
        return _rounded(read(text.rpartition(r"\approx")[0].strip()), read(sides[-1]), sides[-1])
    if set(signs) == {"="}:
        return _equation(sides[0], sides[1], read) if len(signs) == 1 else _chain(sides, read)
    is_long = len(signs) > 2 and not all(re.fullmatch(NAME, side) for side in sides)
    if is_long or {"=", r"\approx"} & set(signs) or (len(signs) > 1 and set(signs) & {r"\in", r"\ne"}):
        return INVALID
    if signs == [r"\in"]:
        value = read(sides[1])
        return named(sides[0], value and (as_interval(value) or value), {"interval", "set"})
    return _inequality(sides, signs, read)


def _rounded(exact: Answer | None, approximate: Answer | None, written: str) -> Answer:
    r"""``2\sqrt{3} \approx 3.464``: the exact value, where the other is it rounded or cut off."""
    if exact is None or approximate is None or exact.kind not in ("number", "expression"):
        return INVALID
    node = as_node(exact)
    if variables(node) or approximate.kind != "number" or approximate.unit not in (None, exact.unit):
        return INVALID
    decimal = re.match(r"-?\d[\d,]*(?:\.(\d+))?(?![\d./])", written)
    error = real_value(difference(node, as_node(approximate)))
    if decimal is None or error is None or approximate.value == 0:
        return INVALID
    units = float(error) * 10 ** len(decimal[1] or "") * (1 if approximate.value > 0 else -1)
    # Rounded or, with decimals, cut off.
    return exact if abs(units) <= (0.5 if decimal[1] else 0.499) or (decimal[1] and 0 < units < 0.999) else INVALID


def named(name: str, value: Answer | None, kinds: set[str]) -> Answer:
    """The value of one of these kinds as the variable's; ``INVALID`` for a name that is not a variable's."""
    if value is None or value.kind not in kinds or not re.fullmatch(NAME, name) or value.name not in (None, name):
        return INVALID
    return replace(value, name=name.strip())


def _chain(sides: list[str], read: Reader) -> Answer:
    r"""``V = \frac43 \pi 3^3 = 36\pi``: the last side, if all are equal."""
    value = read(sides[-1])
    if value is not None and is_constant_scalar(value) and all(re.fullmatch(NAME, side) for side in sides[:-1]):
        names = [side.strip() for side in sides[:-1]]
        return assigned(names, [value] * len(names)) if len(set(names)) == len(names) else INVALID
    nodes = [parse(side) for side in sides[1:]]
    last = _equation(sides[0], sides[-1], read)
    if last.name is None or last.kind not in ("number", "expression") or last.unit is not None:
        return INVALID
    known = [each for each in nodes if each is not None and not variables(each) and is_evaluable(each)]
    if len(known) < len(nodes) or not all(agree(known[-1], each) for each in known[:-1]):
        return INVALID
    return last


def _equation(left: str, right: str, read: Reader) -> Answer:
    if function := FUNCTION_OF.fullmatch(left):
        value = read(right)
        name, argument = (function[1] or "y'").replace(" ", ""), function[2] or "x"
        if value is not None and value.kind == "list" and all(map(is_scalar, value.value)):
            return Answer(
                "list", tuple(Answer("equation", (None, name, each), parameter=argument) for each in value.value)
            )
        is_value = is_scalar(value) or (value is not None and value.kind == "cases")
        return Answer("equation", (None, name, value), parameter=argument) if is_value else INVALID
    for name, other in ((left, right), (right, left)):
        is_variable = re.fullmatch(NAME, name) is not None
        if (is_variable or QUANTITY.fullmatch(name)) and not (is_variable and _has_variable(other, name)):
            value = read(other)
            name = re.sub(r"\\text ?\{|[\s}{|]", "", name)
            if value is None or value.name is not None or value.kind in ("equation", "inequality", "text"):
                return INVALID
            if value.kind != "expression" or not variables(value.value):
                return replace(value, name=name)
            if not is_variable:
                return Answer("equation", (None, name, value))
            return Answer("equation", (difference(("variable", name), value.value), name, value))
    if re.fullmatch(rf"\( ?(?:{NAME})(?: ?, ?(?:{NAME}))+ ?\)", left):
        return _named_tuple(left, read(right))
    nodes = parse(left), parse(right)
    whole = None if nodes[0] is None or nodes[1] is None else difference(nodes[0], nodes[1])
    if re.fullmatch(r"[a-z](?: ?\+ ?[a-z])+", left) and is_constant_scalar(value := read(right)):
        return Answer("equation", (whole, left.replace(" ", ""), value))
    return Answer("equation", (whole, None, None)) if _varies(whole) else INVALID


def _has_variable(text: str, name: str) -> bool:
    node, variable = parse(text), parse(name)
    return variable is not None and node is not None and variable[1] in variables(node)


def _varies(node: Node | None) -> bool:
    """Whether an equation or inequality says anything: an identity does not."""
    return node is not None and bool(variables(node)) and is_evaluable(node) and not is_constant(node)


def _named_tuple(names: str, value: Answer | None) -> Answer:
    """``(x, y) = (2, 4)``, with as many values as names."""
    known = [name.strip() for name in names.strip("() ").split(",")]
    if value is None or value.kind != "tuple" or len(known) != len(value.value) or len(set(known)) < len(known):
        return INVALID
    return assigned(known, value.value)


def assigned(names: Sequence[str], values: Sequence[Answer]) -> Answer:
    """Values by name. Letters that follow each other in the alphabet are in its order."""
    codes = sorted(ord(name) for name in names if len(name) == 1)
    if len(codes) == len(names) and codes[-1] - codes[0] == len(codes) - 1:
        names, values = zip(*sorted(zip(names, values, strict=True), key=lambda pair: pair[0]), strict=True)
    return Answer("tuple", tuple(values), name=",".join(names))


def _inequality(sides: list[str], signs: list[str], read: Reader) -> Answer:
    if signs == [r"\ne"] and re.fullmatch(NAME, sides[0]):
        points = as_points(read(sides[1]))
        return INVALID if points is None else Answer("interval", complement(points), name=sides[0].strip())
    named = [place for place, side in enumerate(sides) if re.fullmatch(NAME, side)]
    if len(named) == len(sides) > 2:
        return _ranking(sides, signs)
    ends = [read(side) for place, side in enumerate(sides) if [place] != named]
    if len(named) == 1 and all(is_constant_scalar(end) for end in ends):
        first, second = ends[0], ends[-1]
        if first is None or second is None:
            return INVALID
        if len(signs) == 1:
            sign = signs[0] if named == [0] else FLIPPED[signs[0]]
            pieces = half_line(sign, first)
        elif named == [1] and all(sign in ("<", r"\le") for sign in signs):
            pieces = [Piece(first, signs[0] == r"\le", second, signs[1] == r"\le")]
        elif named == [1] and all(sign in (">", r"\ge") for sign in signs):
            pieces = [Piece(second, signs[1] == r"\ge", first, signs[0] == r"\ge")]
        else:
            return INVALID
        return interval(pieces, sides[named[0]].strip())
    if len(signs) != 1 or signs[0] == r"\ne":
        return INVALID
    absolute = _absolute(sides, signs[0]) or _absolute(sides[::-1], FLIPPED[signs[0]])
    if absolute is not None:
        return absolute
    greater, less = sides if signs[0] in (">", r"\ge") else sides[::-1]
    nodes = parse(greater), parse(less)
    whole = None if nodes[0] is None or nodes[1] is None else difference(nodes[0], nodes[1])
    return Answer("inequality", (whole, signs[0] in (r"\le", r"\ge"))) if _varies(whole) else INVALID


def _ranking(names: list[str], signs: list[str]) -> Answer:
    """``a < c < b``, also read from the other end."""
    if not (set(signs) <= {"<", r"\le"} or set(signs) <= {">", r"\ge"}):
        return INVALID
    if signs[0] in (">", r"\ge"):
        names, signs = names[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    return Answer("tuple", tuple(Answer("text", text.strip()) for text in (*names, *signs)))


def half_line(sign: str, end: Answer) -> list[Piece]:
    r"""The numbers that stand in a relation to an end: one piece, or two for ``\ne``."""
    below, above = Piece(MINUS_INFINITY, False, end, sign == r"\le"), Piece(end, sign == r"\ge", INFINITY, False)
    return [below, above] if sign == r"\ne" else [below if sign in ("<", r"\le") else above]


def interval(pieces: list[Piece] | tuple[Piece, ...], name: str | None = None) -> Answer:
    """The union of pieces as an answer."""
    merged = union(list(pieces))
    return INVALID if merged is None else Answer("interval", merged, name=name)


def as_points(points: Answer | None) -> tuple[Piece, ...] | None:
    """A number, a set or a list of numbers as intervals of one point; None for anything else."""
    if points is None:
        return None
    values = points.value if points.kind in ("set", "list") else (points,)
    return union([Piece(each, True, each, True) for each in values]) if all(map(is_constant_scalar, values)) else None


def as_interval(pair: Answer) -> Answer | None:
    """``(0, 1)``, where it is known to be an interval."""
    if pair.kind != "tuple" or len(pair.value) != 2 or not all(is_constant_scalar(each) for each in pair.value):
        return None
    found = interval([Piece(pair.value[0], False, pair.value[1], False)], pair.name)
    return None if found.kind == "invalid" else found


def read_congruence(text: str, read: Reader) -> Answer | None:
    r"""``x \equiv 3 \pmod{7}`` or ``1, 4 \pmod 5``: residue classes."""
    match = CONGRUENCE.fullmatch(text)
    residues = match and read(match["residues"])
    if match is None or residues is None or int(match["modulus"]) < 2:
        return None
    values = residues.value if residues.kind == "list" else (residues,)
    if any(value.kind != "number" or value.unit or value.value.denominator != 1 for value in values):
        return None
    modulus = int(match["modulus"])
    classes = [Answer("congruence", (int(value.value) % modulus, modulus)) for value in values]
    return (
        replace(classes[0], name=match["name"])
        if len(classes) == 1
        else Answer("list", tuple(classes), name=match["name"])
    )


def _absolute(sides: list[str], sign: str) -> Answer | None:
    """``|x-1| < 2`` as an interval; None for anything else."""
    nodes = [parse(side) for side in sides]
    if nodes[0] is None or nodes[1] is None or nodes[0][0] != "abs" or variables(nodes[1]):
        return None
    inner, radius = nodes[0][1], real_value(nodes[1])
    middle = [part for part in (inner[1:] if inner[0] == "add" else (inner,)) if part[0] != "variable"]
    if len(variables(inner)) != 1 or any(variables(part) for part in middle) or radius is None or radius <= 0:
        return None
    if len(middle) + 1 != (len(inner) - 1 if inner[0] == "add" else 1):
        return None
    shift = difference(("number", Fraction(0)), ("add", ("number", Fraction(0)), *middle))
    low, high = (_as_scalar(("add", shift, end)) for end in (difference(("number", Fraction(0)), nodes[1]), nodes[1]))
    closed = sign in (r"\le", r"\ge")
    inside = [Piece(low, closed, high, closed)]
    outside = [*half_line("<" if sign == ">" else r"\le", low), *half_line(sign, high)]
    return interval(inside if sign in ("<", r"\le") else outside, next(iter(variables(inner))))


def _as_scalar(node: Node) -> Answer:
    value = real_value(node)
    return Answer("number", value) if isinstance(value, Fraction) else Answer("expression", node)
