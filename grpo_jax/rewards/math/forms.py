"""Forms of expressions (expanded, factored), and the formulas in a question."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from grpo_jax.rewards.math.expression import Node, variables
from grpo_jax.rewards.math.final_answer import Answer
from grpo_jax.rewards.math.latex import normalize, split_top_level
from grpo_jax.rewards.math.reader import read_answer

FORMS = ("expanded", "factored", "as-written")
MAX_DEGREE = 12
DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
PLAIN_FORMULA = re.compile(r"[0-9A-Za-z()+\-*/^.,=<> ]+")
OPERATOR = re.compile(r"[+\-*/^=<>(]")
MAX_FORMULAS = 40


def has_form(text: str, gold: str, form: str) -> bool:
    """Whether an answer is written in a form. Answers other than expressions have every form but ``as-written``.

    Args:
        text: answer to check.
        gold: gold answer, whose spelling ``as-written`` requires.
        form: ``expanded``, ``factored`` or ``as-written``.
    """
    if form == "as-written":
        return _spelling(text) == _spelling(gold)
    answer = read_answer(text)
    node = None if answer is None else _expression(answer)
    if node is None:
        return True
    return _is_expanded(node) if form == "expanded" else _is_factored(node)


def formulas(question: str) -> list[str]:
    """The distinct formulas in a question and the sides of their relations, at most ``MAX_FORMULAS``."""
    matches = [next(group for group in match if group) for match in DELIMITED.findall(question)]
    if not matches:
        words = re.sub(r"(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z(])", "\n", question)
        matches = [match.strip(" .,") for match in PLAIN_FORMULA.findall(words) if OPERATOR.search(match)]
    matches = matches[:MAX_FORMULAS]
    sides = [side for formula in matches for side in split_top_level(formula[:400], r"=|\\le|\\ge|<|>|,")]
    return list(dict.fromkeys([*matches, *sides]))[:MAX_FORMULAS]


def _spelling(text: str) -> str:
    return re.sub(r"[\s{}]", "", normalize(text) or text)


def _expression(answer: Answer) -> Node | None:
    if answer.kind == "equation":
        return None if answer.value[2] is None else _expression(answer.value[2])
    return answer.value if answer.kind == "expression" and variables(answer.value) else None


def _is_expanded(node: Node) -> bool:
    """Whether an expression is a sum of distinct monomials: no product or power of a sum, like terms collected."""
    terms = node[1:] if node[0] == "add" else (node,)
    monomials = [_monomial(term) for term in terms]
    return None not in monomials and len(set(monomials)) == len(monomials)


def _monomial(node: Node) -> frozenset[tuple[str, object]] | None:
    """The powers of the variables in a monomial; None if the expression is not a monomial."""
    powers: Counter[object] = Counter()
    for factor in _factors(node):
        if not variables(factor):
            continue
        base, exponent = (factor[1], factor[2]) if factor[0] == "pow" else (factor, ("number", 1))
        if "add" in (base[0], exponent[0]) or factor[0] in ("div", "mul"):
            return None
        powers[base] += exponent[1] if exponent[0] == "number" else 1
    return frozenset((str(base), power) for base, power in powers.items())


def _factors(node: Node) -> list[Node]:
    if node[0] == "mul":
        return [factor for part in node[1:] for factor in _factors(part)]
    if node[0] == "div" and not variables(node[2]):
        return _factors(node[1])
    return [node]


def _is_factored(node: Node) -> bool:
    """Whether an expression is a product of powers of irreducible polynomials without common integer factors."""
    bases = [factor[1] if factor[0] == "pow" and factor[2][0] == "number" else factor for factor in _factors(node)]
    return all(not variables(base) or base[0] == "variable" or _is_irreducible(base) for base in bases)


def _is_irreducible(node: Node) -> bool:
    import sympy

    names = {name: sympy.Symbol(f"v{index}") for index, name in enumerate(sorted(variables(node)))}
    try:
        polynomial = sympy.Poly(_sympy(node, names), *names.values(), domain="QQ")
    except (ValueError, sympy.PolynomialError):
        return False
    if polynomial.total_degree() > MAX_DEGREE:
        return False
    content, primitive = polynomial.primitive()
    return abs(content) == 1 or content.q != 1 if primitive.is_irreducible else False


def _sympy(node: Node, names: dict[str, Any]) -> Any:
    """A polynomial as a SymPy expression; ``ValueError`` for any other expression."""
    import sympy

    name, parts = node[0], node[1:]
    if name == "number":
        return sympy.Rational(parts[0].numerator, parts[0].denominator)
    if name == "variable":
        return names[parts[0]]
    if name == "pow" and parts[1][0] == "number" and parts[1][1] in range(MAX_DEGREE + 1):
        return sympy.Pow(_sympy(parts[0], names), int(parts[1][1]))
    if name in ("add", "mul"):
        values = [_sympy(part, names) for part in parts]
        return sympy.Add(*values) if name == "add" else sympy.Mul(*values)
    if name == "div" and parts[1][0] == "number" and parts[1][1]:
        return _sympy(parts[0], names) / _sympy(parts[1], names)
    raise ValueError(f"{name} is not part of a polynomial")
