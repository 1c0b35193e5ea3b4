r"""Parameters, whose names are arbitrary: the integer of ``n\pi, n \in \mathbb{Z}``, the argument of ``f(x) = x``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo_jax.rewards.math.expression import Node, constants, substitute, variables
from grpo_jax.rewards.math.final_answer import Answer
from grpo_jax.rewards.math.latex import balanced

START = re.compile(r"[,;(]|\\text|\\forall|(?<![A-Za-z\\])(?:where|for|with)(?![A-Za-z])")
ADJECTIVES = r"positive|non-?negative|negative|non-?zero"
KINDS = r"integer|natural number|whole number|real number|real constant|real|constant"
WORDS = (
    r"(?:where|for|with|\\forall)(?: (?:all|any|every|each|some|arbitrary|an?))*"
    rf"(?: (?P<adjective>{ADJECTIVES}))?(?: (?P<kind>{KINDS})s?)?"
)
MEMBER = r" ?\\in ?(?:\\mathbb ?)?\{? ?(?P<set>[NZQRC]) ?\}?(?: ?[\^_] ?\{? ?(?P<sign>\+|>=? ?0|\\ge ?0) ?\}?)?"
IS_A = rf" (?:is|being) (?:an?|any|some)(?: arbitrary)?(?: (?P<other_adjective>{ADJECTIVES}))? (?P<other_kind>{KINDS})"
PARAMETER = re.compile(
    rf"[,;]? ?\(? ?(?P<words>{WORDS})? ?(?P<name>[a-zA-Z])(?![A-Za-z'_^(])(?P<domain>{MEMBER}|{IS_A})? ?\)?"
)
SETS = {"integer": "Z", "natural number": "N", "whole number": "N", "constant": None}
INTEGER_LETTERS = frozenset("klmn")
"""Letters that are taken for integer parameters if the answer does not declare them."""


def split_parameter(text: str) -> tuple[str, str, str | None] | None:
    r"""The expression, parameter and domain of an answer that ends in the declaration of a parameter; else None.

    ``("k\pi", "k", "Z")`` for ``k\pi, k \in \mathbb{Z}``. The domain is None if it is not stated.
    """
    for start in START.finditer(text):
        main, rest = text[: start.start()].strip(" ,;"), text[start.start() :]
        rest = " ".join(re.sub(r"\\text ?\{([^{}]*)\}", r" \1 ", rest.replace("$", " ")).split())
        match = PARAMETER.fullmatch(rest)
        if match is None or not (match["words"] or match["domain"]) or not main or not balanced(main):
            continue
        if match["name"] in re.findall(r"[a-zA-Z]", re.sub(r"\\[a-z]+", "", main)):
            return main, match["name"], _domain(match)
    return None


def _domain(match: re.Match[str]) -> str | None:
    kind = match["kind"] or match["other_kind"]
    domain = match["set"] or (SETS.get(kind, "R") if kind else None)
    sign = match["sign"] or match["adjective"] or match["other_adjective"] or ""
    if domain == "Z" and sign in ("+", "> 0", ">0", "positive"):
        return "N"
    return domain + sign.replace(" ", "") if domain else None


def rename_parameter(gold: Answer, answer: Answer) -> Answer | None:
    """The answer with its parameter renamed to the gold's; None if it uses the gold's name for another variable.

    An answer's undeclared parameter is its only letter of ``INTEGER_LETTERS`` that is not in the gold. A gold's
    undeclared parameter is recognised in multiples of pi only: otherwise the letter may be a variable of the problem.

    Args:
        gold: gold answer.
        answer: answer to rename.
    """
    if gold.parameter is None and answer.parameter is None:
        return answer
    gold_names, names = _names(gold), _names(answer)
    new = gold.parameter
    if new is None and "pi" in _names(gold, constants):
        new = _single_integer_letter(gold_names - names, answer.parameter)
    old = answer.parameter or _single_integer_letter(names - gold_names, gold.parameter)
    if new is None or old is None or new == old:
        return answer
    if new in names:
        return None if answer.parameter else answer
    return _renamed(answer, old, new)


def differ_in_domain(gold: Answer, answer: Answer) -> bool:
    """Whether the answer states another domain for its parameter than the gold.

    A gold without a domain allows real numbers and integers, and for the argument of a function any domain.

    Args:
        gold: gold answer.
        answer: answer to compare.
    """
    if gold.domain is not None or answer.domain is None:
        return gold.domain is not None and answer.domain is not None and gold.domain != answer.domain
    is_function = gold.kind == "equation" and gold.value[0] is None
    return not is_function and answer.domain not in (("R",) if gold.kind in ("interval", "number") else ("R", "Z"))


def _single_integer_letter(names: frozenset[str], parameter: str | None) -> str | None:
    is_integer = len(names) == 1 and names <= INTEGER_LETTERS and parameter in INTEGER_LETTERS
    return next(iter(names)) if is_integer else None


def _names(value: Any, collect: Callable[[Node], frozenset[str]] = variables) -> frozenset[str]:
    """The variables, or constants, of an answer or a part of one."""
    if isinstance(value, Answer):
        return _names(value.value, collect)
    if not isinstance(value, tuple):
        return frozenset()
    if value and isinstance(value[0], str):
        return collect(value)
    return frozenset().union(*(_names(part, collect) for part in value))


def _renamed(value: Any, old: str, new: str) -> Any:
    """An answer, or a part of one, with a variable renamed."""
    if isinstance(value, Answer):
        return replace(value, value=_renamed(value.value, old, new))
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], str):
        return substitute(value, ("variable", old), ("variable", new))
    return tuple(_renamed(part, old, new) for part in value)
