"""Recursive-descent parser of mathematical expressions in LaTeX or plain text, in linear time.

An expression is a nested tuple: ``("number", Fraction)``, ``("variable", name)``, ``("constant", "pi" | "e" | "i")`` or
an operation and its operands: ``add``, ``mul``, ``div``, ``pow``, ``abs``, ``factorial``, ``binom`` or a function name.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo_jax.rewards.math.latex import LETTERS

Node = tuple[Any, ...]

TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\.|\S")
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
INVERSE_TRIGONOMETRIC = ("arcsin", "arccos", "arctan")
FUNCTIONS = (*TRIGONOMETRIC, *INVERSE_TRIGONOMETRIC, "sinh", "cosh", "tanh", "coth", "ln", "lg", "log", "exp")
VARIADIC = ("min", "max", "gcd", "lcm")
CLOSING = {"(": ")", "[": "]", "{": "}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
MAX_DEPTH = 60
"""Maximum nesting; honest answers have fewer than ten levels."""
HALF, MINUS_ONE = ("number", Fraction(1, 2)), ("number", Fraction(-1))
DEGREE = ("div", ("constant", "pi"), ("number", Fraction(180)))


@lru_cache(maxsize=4096)
def parse(text: str) -> Node | None:
    r"""The expression of a text that ``latex.normalize`` returned; None if it is not an expression.

    - Products may be implicit, except before a digit: ``x2`` may be a power or an index. Products and ``/`` have equal
      precedence and associate to the left.
    - ``2\frac{1}{2}`` is a mixed number. ``x^10`` is the tenth power.
    - The argument of a function without brackets extends to the next operator or function.
    - Every letter is a variable, case-sensitive; ``e`` and ``i`` are the constants. Words (four letters in a row),
      calls of f, g and h, and derivatives are rejected.
    """
    if re.search(r"[A-Za-z]{4}", re.sub(r"\\[a-zA-Z]+|_ ?\{ ?\w+ ?\}", "", text)):
        return None
    parser = _Parser(TOKEN.findall(text))
    try:
        node = parser.sum(0)
    except (_NotAnExpressionError, IndexError):
        return None
    return None if parser.peek() else node


@lru_cache(maxsize=4096)
def variables(node: Node) -> frozenset[str]:
    """The names of the variables of an expression."""
    if node[0] == "variable":
        return frozenset((node[1],))
    return frozenset().union(*(variables(part) for part in node[1:] if isinstance(part, tuple)))


@lru_cache(maxsize=4096)
def operations(node: Node) -> frozenset[str]:
    """The operations, functions and kinds of leaves in an expression."""
    inner = frozenset().union(*(operations(part) for part in node[1:] if isinstance(part, tuple)))
    return inner | {node[0]}


def constants(node: Node) -> frozenset[str]:
    """The names of the constants of an expression: ``pi``, ``e``, ``i``."""
    if node[0] == "constant":
        return frozenset((node[1],))
    return frozenset().union(*(constants(part) for part in node[1:] if isinstance(part, tuple)))


def substitute(node: Node, old: Node, new: Node) -> Node:
    """``node`` with every subexpression ``old`` replaced by ``new``.

    Args:
        node, old, new: expressions.
    """
    if node == old:
        return new
    return (node[0], *(substitute(part, old, new) if isinstance(part, tuple) else part for part in node[1:]))


def difference(left: Node, right: Node) -> Node:
    """``left - right``.

    Args:
        left, right: expressions.
    """
    return ("add", left, ("mul", MINUS_ONE, right))


class _NotAnExpressionError(Exception):
    pass


class _Parser:
    """Every parsing method takes its level of nesting and advances ``position`` past what it has parsed."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.bars = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise _NotAnExpressionError
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.position += 1
        return True

    def sum(self, depth: int) -> Node:
        terms = [self.product(depth)]
        while self.peek() in ("+", "-"):
            sign = self.take()
            term = self.product(depth)
            terms.append(_negative(term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def product(self, depth: int) -> Node:
        if self.peek() in ("+", "-"):
            return _negative(self.product(depth + 1)) if self.take() == "-" else self.product(depth + 1)
        node = self.power(depth)
        while True:
            token = self.peek()
            if token in (r"\cdot", r"\times", "*"):
                self.take()
                node = _times(node, self.signed(depth))
            elif token in ("/", r"\div"):
                self.take()
                node = ("div", node, self.signed(depth))
            elif self.starts_factor() or (token[:1].isdigit() and self.continues_product()):
                node = _times(node, self.power(depth))
            else:
                return node

    def continues_product(self) -> bool:
        r"""Whether a number may be a factor here: in ``\pi 2``, and a power as in ``n2^n``; not in ``x2``."""
        before, after = self.tokens[self.position - 1], self.tokens[self.position + 1 : self.position + 2]
        is_factor = before == ")" or (len(before) == 1 and before.isalpha())
        return before in (r"\pi", "!") or (after == ["^"] and is_factor)

    def signed(self, depth: int) -> Node:
        return _negative(self.power(depth)) if self.accept("-") else self.power(depth)

    def starts_factor(self) -> bool:
        token = self.peek()
        if token == "|":
            return self.bars == 0
        starts = (r"\pi", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", "(", "[", "{")
        return token in starts or (token.isalpha() and token.isascii()) or token in LETTERS or self.is_function(token)

    @staticmethod
    def is_function(token: str) -> bool:
        return token[:1] == "\\" and token[1:] in (*FUNCTIONS, *VARIADIC)

    def power(self, depth: int) -> Node:
        node = self.atom(depth)
        while self.peek() in ("!", "^"):
            if self.take() == "!":
                if self.peek() == "!" or node[0] in ("factorial", "pow"):
                    raise _NotAnExpressionError
                node = ("factorial", node)
                continue
            if self.is_degree():
                return _times(node, DEGREE)
            node = ("pow", node, self.exponent(depth + 1))
            if self.peek() == "^":
                raise _NotAnExpressionError
        return node

    def is_degree(self) -> bool:
        for shape in ((r"\circ",), ("{", r"\circ", "}")):
            if tuple(self.tokens[self.position : self.position + len(shape)]) == shape:
                self.position += len(shape)
                return True
        return False

    def exponent(self, depth: int) -> Node:
        if self.accept("-"):
            return _negative(self.exponent(depth + 1))
        self.accept("+")
        node = self.atom(depth)
        return ("pow", node, self.exponent(depth + 1)) if self.accept("^") else node

    def atom(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _NotAnExpressionError
        token = self.take()
        if token[-1].isdigit() and token[0] != "\\":
            return self.number(token, depth)
        if token in ("(", "[", "{"):
            return self.grouped(depth, CLOSING[token])
        if token == "|":
            self.bars += 1
            node = self.sum(depth + 1)
            self.take("|")
            self.bars -= 1
            return ("abs", node)
        if token in (r"\lfloor", r"\lceil"):
            return (token[2:], self.grouped(depth, CLOSING[token]))
        if token == r"\pi":
            return ("constant", "pi")
        if token == r"\frac":
            return self.fraction(depth)
        if token == r"\binom":
            return ("binom", self.argument(depth), self.argument(depth))
        if token == r"\sqrt":
            return self.root(depth)
        if self.is_function(token):
            return self.variadic(token[1:], depth) if token[1:] in VARIADIC else self.call(token[1:], depth)
        if token in LETTERS or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.symbol(token)
        raise _NotAnExpressionError

    def number(self, token: str, depth: int) -> Node:
        value = Fraction(token)
        if self.peek() == "_" or self.peek()[:1].isdigit():
            raise _NotAnExpressionError
        if token.isdigit() and self.peek() == r"\frac":
            start = self.position
            self.take()
            part = self.fraction(depth)
            if all(term[0] == "number" and term[1].denominator == 1 for term in part[1:]) and part[1][1] < part[2][1]:
                return ("number", value + part[1][1] / part[2][1])
            self.position = start
        return ("number", value)

    def grouped(self, depth: int, closing: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum(depth + 1)
        if closing == "}" and self.accept(r"\over"):
            node = ("div", node, self.sum(depth + 1))
        elif closing == "}" and self.accept(r"\choose"):
            node = ("binom", node, self.sum(depth + 1))
        self.take(closing)
        self.bars = bars
        return node

    def argument(self, depth: int) -> Node:
        r"""Operand of ``\frac``, ``\sqrt`` or ``\binom``: a group, a digit, a letter or a command."""
        token = self.peek()
        if token == "{":
            self.take()
            return self.grouped(depth, "}")
        if token[:1].isdigit():
            self.position += 1
            if len(token) > 1:
                self.position -= 1
                self.tokens[self.position] = token[1:]
            return ("number", Fraction(token[0]))
        return self.atom(depth + 1)

    def fraction(self, depth: int) -> Node:
        start = self.position
        top = self.argument(depth)
        middle = self.position
        bottom = self.argument(depth)
        if self.peek()[:1].isdigit():
            raise _NotAnExpressionError
        spans = (start, middle), (middle, self.position)
        over, under = ("".join(self.tokens[first:last]).strip("{}") for first, last in spans)
        if re.match(r"d(\^|\w?$)", over) and re.match(r"d\w", under):
            raise _NotAnExpressionError  # a derivative
        return ("div", top, bottom)

    def root(self, depth: int) -> Node:
        order = None
        if self.accept("["):
            order = self.grouped(depth, "]")
        inner = self.grouped(depth, ")") if self.accept("(") else self.argument(depth)
        return ("pow", inner, HALF if order is None else ("div", ("number", Fraction(1)), order))

    def variadic(self, name: str, depth: int) -> Node:
        opening = self.take("(", "[", r"\{")
        items = [self.sum(depth + 1)]
        while self.accept(","):
            items.append(self.sum(depth + 1))
        self.take({"(": ")", "[": "]"}.get(opening, r"\}"))
        return (name, *items)

    def call(self, name: str, depth: int) -> Node:
        base = exponent = None
        if name == "log" and self.accept("_"):
            base = self.argument(depth)
        if self.accept("^"):
            exponent = self.exponent(depth + 1)
        if exponent == MINUS_ONE:
            if f"arc{name}" not in INVERSE_TRIGONOMETRIC:
                raise _NotAnExpressionError
            name, exponent = f"arc{name}", None
        inner = self.atom(depth + 1) if self.peek() in ("(", "[", "{", "|") else self.factors(depth + 1)
        if name == "exp":
            node: Node = ("pow", ("constant", "e"), inner)
        elif name == "lg" or base is not None:
            node = ("div", ("ln", inner), ("ln", base or ("number", Fraction(10))))
        else:
            node = (name, inner)
        return node if exponent is None else ("pow", node, exponent)

    def factors(self, depth: int) -> Node:
        """Argument of a function without brackets."""
        if not (self.starts_factor() or self.peek()[:1].isdigit()):
            raise _NotAnExpressionError
        node = self.power(depth)
        while self.starts_factor() and not self.is_function(self.peek()) and self.peek() not in ("(", "["):
            node = _times(node, self.power(depth))
        return node

    def symbol(self, token: str) -> Node:
        name = token
        if self.accept("_"):
            name += "_" + self.subscript()
        if self.peek() in ("'", '"') or (token in "fghFGH" and self.peek() == "("):
            raise _NotAnExpressionError
        return ("constant", name) if name in ("e", "i") else ("variable", name)

    def subscript(self) -> str:
        if not self.accept("{"):
            return self.take().removeprefix("\\")
        parts = []
        while not self.accept("}"):
            token = self.take()
            if not re.fullmatch(r"\w+|[+\-]|\\[a-z]+", token):
                raise _NotAnExpressionError
            parts.append(token)
        return "".join(parts)


def _negative(node: Node) -> Node:
    if node[0] == "number":
        return ("number", -node[1])
    return ("mul", MINUS_ONE, *node[1:]) if node[0] == "mul" else ("mul", MINUS_ONE, node)


def _times(left: Node, right: Node) -> Node:
    return (*left, right) if left[0] == "mul" else ("mul", left, right)
