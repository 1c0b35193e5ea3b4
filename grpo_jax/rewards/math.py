"""Right or wrong by the final answer, for mathematics: math-verify's parser, behind a guard that trusts nothing.

A grader that is fooled once is fooled ten thousand times, for a policy finds what fools it. So equality is decided
exactly (rational arithmetic, or agreement to 150 digits), kinds must match, and what is not understood is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from grpo_jax.rewards.answer import extract_answer
from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.read_math import Answer, as_interval, read_answer
from grpo_jax.rewards.symbolic import agree, constant_ratio, parsed_expression, variables

TRIGONOMETRY = ("sin", "cos", "tan", "cot", "sec", "csc")


def load_parser() -> None:
    """Import the parser and compute an expression once, which fills its caches."""
    same_answer(r"\frac{x+1}{2}", r"\sqrt{2}+x^2")


@per_sample(columns=("answer",), warm_up=load_parser)
def math_reward(
    prompts: list[str], completions: list[str], *, answer: list[str | None], **_columns: list[Any]
) -> list[float | None]:
    """1.0 where a completion's final answer equals the gold answer as mathematics, else 0.0.

    None where the gold is None or cannot be read: nothing is right by an accident of parsing.

    Args:
        prompts: not looked at.
        completions: the final answer is what ``extract_answer`` finds; without one the score is 0.0.
        answer: the gold answers, bare or as a solution from which ``extract_answer`` takes it; see ``same_answer``
            for what is equal.
    """
    return [_score(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def same_answer(gold: str, answer: str) -> bool:
    r"""Whether two final answers are the same.

    - Numbers by exact value: 0.5, 1/2, 50% and ``\frac12`` are one, 0.333 and 1/3 are not, nor are 50% and 50. Where
      the gold is written as a number, so must the answer be: 2+3 is not yet 5.
    - Units must measure the same thing (5 m is 500 cm); where only one side has a unit, the numbers decide. Percent,
      cents, dozens and millions are no units.
    - Expressions of the same variables by their values, to 150 places or at random points to 40. What the gold does not
      leave to be worked out (a sine, a binomial, a factorial, a floor), the answer must not leave either.
    - Sets and bare lists without order, lists with their repeats; tuples with their order; intervals and unions of
      them with their brackets, or as inequalities in one variable; matrices; equations and inequalities up to a
      constant factor. ``x = 5`` is 5.
    - Words without case; letters of choice and names in capitals with it; numerals with their base.

    Args:
        gold: the right one.
        answer: the one to be judged; what cannot be read is not the same as anything.

    Raises:
        ValueError: the gold cannot be read.
    """
    right = read_answer(gold)
    if right is None:
        raise ValueError(f"the gold answer cannot be read: {gold!r:.200}")
    given = read_answer(answer)
    return given is not None and _same(right, given)


def _score(completion: str, gold: str | None) -> float | None:
    if gold is None:
        return None
    final_gold = extract_answer(gold)
    try:
        final = extract_answer(completion)
        return float(same_answer(gold if final_gold is None else final_gold, "" if final is None else final))
    except ValueError:
        return None


def _same(gold: Answer, given: Answer) -> bool:
    if gold.name is not None and given.name is not None and gold.name.strip() != given.name.strip():
        return False
    if (
        gold.name is None
        and given.kind == "tuple"
        and given.name
        and given.name != ",".join(sorted(given.name.split(",")))
    ):
        return False  # (y, x) = ... is another order than the usual one
    if gold.kind in ("set", "list") and given.kind in ("set", "list"):
        if gold.kind == given.kind == "list" and len(gold.value) != len(given.value):
            return False
        return _unordered(gold.value, given.value, distinct="set" in (gold.kind, given.kind))
    if {gold.kind, given.kind} == {"number", "expression"}:
        # A gold that is written as a number asks for one; a gold to be worked out may be answered by its value.
        return gold.kind == "expression" and given.unit is None and _equal(gold, given)
    if gold.kind == given.kind == "expression" and _work(given.value) - _work(gold.value):
        return False  # sin 60 is the question, not yet its answer
    if gold.kind == "interval" and given.kind == "tuple":
        given = as_interval(given) or given
    if gold.kind != given.kind:
        return False
    compare: dict[str, Callable[[Answer, Answer], bool]] = {
        "number": _same_number,
        "text": lambda a, b: a.value == b.value,
        "infinity": lambda a, b: a.value == b.value,
        "expression": _equal,
        "tuple": lambda a, b: len(a.value) == len(b.value) and all(map(_same, a.value, b.value)),
        "interval": _same_intervals,
        "matrix": _same_matrix,
        "equation": _same_equation,
        "inequality": _same_inequality,
    }
    return compare[gold.kind](gold, given)


def _same_number(gold: Answer, given: Answer) -> bool:
    if gold.unit is None or given.unit is None:
        return gold.value == given.value
    return gold.unit[1] == given.unit[1] and gold.value * gold.unit[0] == given.value * given.unit[0]


def _unordered(gold: tuple[Answer, ...], given: tuple[Answer, ...], *, distinct: bool) -> bool:
    if distinct:
        forward = all(any(_same(a, b) for b in given) for a in gold)
        return forward and all(any(_same(a, b) for a in gold) for b in given)
    return _pair_off(gold, given, _same)


def _pair_off(gold: tuple[Any, ...], given: tuple[Any, ...], same: Callable[[Any, Any], bool]) -> bool:
    """Whether each of the one has a partner of its own among the other, and none is left over."""
    rest = list(given)
    for a in gold:
        place = next((place for place, b in enumerate(rest) if same(a, b)), None)
        if place is None:
            return False
        rest.pop(place)
    return not rest


def _same_intervals(gold: Answer, given: Answer) -> bool:
    def matches(a: tuple, b: tuple) -> bool:
        return a[1] == b[1] and a[3] == b[3] and _same(a[0], b[0]) and _same(a[2], b[2])

    return _pair_off(gold.value, given.value, matches)


def _same_matrix(gold: Answer, given: Answer) -> bool:
    shapes = [(len(each.value), len(each.value[0])) for each in (gold, given)]
    if shapes[0] != shapes[1]:
        return False
    return all(_same(a, b) for x, y in zip(gold.value, given.value, strict=True) for a, b in zip(x, y, strict=True))


def _same_equation(gold: Answer, given: Answer) -> bool:
    if isinstance(gold.value, tuple) or isinstance(given.value, tuple):
        both = isinstance(gold.value, tuple) and isinstance(given.value, tuple)
        return both and gold.value[0] == given.value[0] and _same(gold.value[1], given.value[1])
    return constant_ratio(gold.value, given.value) not in (None, 0)


def _same_inequality(gold: Answer, given: Answer) -> bool:
    ratio = constant_ratio(gold.value[0], given.value[0])
    return gold.value[1] == given.value[1] and ratio is not None and ratio > 0


def _work(expression: str) -> set[str]:
    """The functions in an expression that an answer is expected to have worked out, unless the gold has them too."""
    inverse = re.sub(r"\\arc", r"\\", expression)
    found = re.findall(r"\\(sin|cos|tan|cot|sec|csc|binom|min|max|gcd|lcm|lfloor|lceil)(?![a-z])|(!|\|)", inverse)
    return {"trigonometry" if name in TRIGONOMETRY else name or mark for name, mark in found}


def _equal(gold: Answer, given: Answer) -> bool:
    """Whether two scalars have the same variables and, wherever both are defined, the same value."""
    if gold.kind == given.kind == "number":
        return gold.value == given.value
    names = [variables(each.value) if each.kind == "expression" else frozenset() for each in (gold, given)]
    if names[0] != names[1]:
        return False
    return agree(*(each.value if each.kind == "number" else parsed_expression(each.value) for each in (gold, given)))
