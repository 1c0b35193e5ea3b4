r"""Letters that an answer chooses freely: the integer of ``n\pi, n \in \mathbb{Z}``, the argument of ``f(x) = x``."""

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
CHOSEN_FREELY = frozenset("klmn")
"""Letters that are taken for an integer parameter where an answer does not say what they stand for."""


def split_parameter(text: str) -> tuple[str, str, str | None] | None:
    r"""What an answer says for all values of a letter, the letter, and where its values are from, if that is said.

    ``k\pi, k \in \mathbb{Z}`` is ``k\pi`` for a k of ``Z``. None for a text that does not end so.
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


def with_parameter_of(gold: Answer, given: Answer) -> Answer | None:
    """The given answer with the gold's name for its parameter; None where it has that name for another thing.

    Where the given one does not say what its parameter is, that is its only letter of k to n that the gold lacks. Where
    the gold does not, that holds for multiples of pi alone: else its letter may be one of the problem.
    """
    if gold.parameter is None and given.parameter is None:
        return given
    mine, theirs = _names(gold), _names(given)
    name = gold.parameter or (_only(mine - theirs, given.parameter) if "pi" in _names(gold, constants) else None)
    other = given.parameter or _only(theirs - mine, gold.parameter)
    if name is None or other is None or name == other:
        return given
    if name in theirs:
        return None if given.parameter else given
    return _renamed(given, other, name)


def differ_in_domain(gold: Answer, given: Answer) -> bool:
    """Whether the given answer says that its parameter has other values than the gold's.

    Where the gold does not say it, they are real numbers or integers; of a function's argument, whatever is given.
    """
    if gold.domain is not None or given.domain is None:
        return gold.domain is not None and given.domain is not None and gold.domain != given.domain
    is_function = gold.kind == "equation" and gold.value[0] is None
    return not is_function and given.domain not in (("R",) if gold.kind in ("interval", "number") else ("R", "Z"))


def _only(names: frozenset[str], parameter: str | None) -> str | None:
    is_integer = len(names) == 1 and names <= CHOSEN_FREELY and parameter in CHOSEN_FREELY
    return next(iter(names)) if is_integer else None


def _names(value: Any, of: Callable[[Node], frozenset[str]] = variables) -> frozenset[str]:
    """The variables, or constants, in an answer or in a part of one."""
    if isinstance(value, Answer):
        return _names(value.value, of)
    if not isinstance(value, tuple):
        return frozenset()
    if value and isinstance(value[0], str):
        return of(value)
    return frozenset().union(*(_names(each, of) for each in value))


def _renamed(value: Any, name: str, other: str) -> Any:
    """An answer, or a part of one, with a variable renamed."""
    if isinstance(value, Answer):
        return replace(value, value=_renamed(value.value, name, other))
    if not isinstance(value, tuple):
        return value
    if value and isinstance(value[0], str):
        return substitute(value, ("variable", name), ("variable", other))
    return tuple(_renamed(each, name, other) for each in value)
