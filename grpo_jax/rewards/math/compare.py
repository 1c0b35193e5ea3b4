"""Whether two final answers are the same, kind by kind: by value, not by text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from grpo_jax.rewards.math.conversions import _of_one_kind
from grpo_jax.rewards.math.evaluation import TooLargeError, work_limit
from grpo_jax.rewards.math.expression import TRIGONOMETRIC, Node, operations, variables
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.forms import has_form
from grpo_jax.rewards.math.intervals import Piece
from grpo_jax.rewards.math.parameters import differ_in_domain, with_parameter_of
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.rewards.math.symbolic import agree, constant_ratio
from grpo_jax.rewards.math.units import is_cents
from grpo_jax.rewards.math.words import same_text

LOGGER = logging.getLogger(__name__)
LEFT_TO_DO = {name: name for name in ("min", "max", "gcd", "lcm", "floor", "ceil", "abs")}
LEFT_TO_DO |= {"binom": "factorial", "factorial": "factorial"} | dict.fromkeys(TRIGONOMETRIC, "trigonometric")
"""Operations that an answer is expected to have carried out, unless the gold has one of their kind too."""


def same_answer(gold: str, answer: str, *, form: str | None = None) -> bool:
    r"""Whether two final answers are the same.

    - Numbers by exact value: 0.5, 1/2, 50% and ``\frac12`` are the same, 0.333 and 1/3 are not, nor are 50% and 50.
      Where the gold is written as a number, so must the answer be: 2+3 is not yet 5.
    - Units must measure the same thing (5 m is 500 cm), and nouns be the same; where only one side has one, the numbers
      decide. Percent, dozens and millions are not units, and a gold without a unit is not answered in cents.
    - Expressions of the same variables by their values, to 150 places or at 24 points to 40. What the gold does not
      leave to be worked out (a sine, a binomial, a factorial, a floor), the answer must not leave either. ``y = x+1``
      is ``x+1``, and ``x = 5`` is 5, but where both are named the names must be the same.
    - Sets and bare lists without order, lists with their repeats; tuples with their order, also as vectors; unions of
      intervals as sets of numbers, also as inequalities in one variable; matrices; equations and inequalities up to a
      constant factor; ratios up to one; times of day.
    - Words without case; letters of choice and initials with it, and with the text beside them where both have it;
      numerals with their base.

    Args:
        gold: the right answer.
        answer: the answer to be judged; what cannot be read, or takes more work than the limit, equals nothing.
        form: as in ``math_reward``.

    Raises:
        ValueError: the gold cannot be read, or does not have the form.
    """
    right = read_answer(gold)
    if right is None:
        raise ValueError(f"the gold answer cannot be read: {gold!r:.200}")
    if form is not None and not has_form(gold, gold, form):
        raise ValueError(f"the gold answer is not {form}: {gold!r:.200}")
    given = read_answer(answer)
    if given is None or (form is not None and not has_form(answer, gold, form)):
        return False
    try:
        with work_limit():
            return _same(right, given)
    except TooLargeError:
        LOGGER.info("not equal: comparison with the gold answer %.100r takes too much work: %.200r", gold, answer)
        return False


def same_answers(answer: str, other: str) -> bool:
    """Whether two answers are the same, whichever of them were the gold; False where one cannot be read.

    For majority votes. ``same_answer`` is stricter with the answer than with the gold.
    """
    for gold, given in ((answer, other), (other, answer)):
        try:
            if same_answer(gold, given):
                return True
        except ValueError:
            continue
    return False


def _same(gold: Answer, given: Answer) -> bool:
    if gold.letter or given.letter:
        return _same_choice(gold, given)
    if gold.name is not None and given.name is not None and gold.name != given.name and not _are_labels(gold, given):
        return False
    renamed = with_parameter_of(gold, given)
    if renamed is None or differ_in_domain(gold, given):
        return False
    gold, given = _of_one_kind(gold, renamed)
    if {gold.kind, given.kind} == {"number", "expression"}:
        # A gold that is written as a number asks for one; a gold to be worked out may be answered by its value.
        return gold.kind == "expression" and _same_scalar(gold, given)
    if gold.kind != given.kind:
        return False
    return COMPARE[gold.kind](gold, given)


def _are_labels(gold: Answer, given: Answer) -> bool:
    """Whether one is a point by its label, ``P(4, 0)``, and the other says its coordinates by name."""
    return gold.kind == given.kind == "tuple" and ("," in str(gold.name)) != ("," in str(given.name))


def _same_part(gold: Answer, given: Answer) -> bool:
    """Whether two parts of an answer are the same: here a set with one element is not that element."""
    return (gold.kind == "set") == (given.kind == "set") and _same(gold, given)


def _same_choice(gold: Answer, given: Answer) -> bool:
    bare = [replace(each, letter=None) for each in (gold, given)]
    if gold.letter and given.letter:
        return gold.letter == given.letter and _same(*bare)
    letter = gold.letter or given.letter
    other = given if gold.letter else gold
    if other.kind == "text" and len(other.value) == 1:
        return other.value == letter
    return _same(*bare)


def _scales(gold: Answer, given: Answer) -> tuple[Fraction, Fraction] | None:
    """What the two values are multiplied by to be compared; None where their units differ in kind."""
    if gold.unit is None or given.unit is None:
        return None if gold.unit is None and is_cents(given.unit) else (Fraction(1), Fraction(1))
    return (gold.unit[0], given.unit[0]) if gold.unit[1] == given.unit[1] else None


def _same_scalar(gold: Answer, given: Answer) -> bool:
    """Whether two scalars have the same variables and the same value."""
    scales = _scales(gold, given)
    if scales is None:
        return False
    if gold.kind == given.kind == "number":
        return gold.value * scales[0] == given.value * scales[1]
    nodes = as_node(gold), as_node(given)
    if variables(nodes[0]) != variables(nodes[1]):
        return False
    if given.kind == "expression" and _left_to_do(nodes[1]) - _left_to_do(nodes[0]):
        return False  # sin 60 is the question, not yet its answer
    if scales[0] != scales[1]:
        nodes = ("mul", ("number", scales[0]), nodes[0]), ("mul", ("number", scales[1]), nodes[1])
    return agree(*nodes)


def _left_to_do(node: Node) -> frozenset[str]:
    """Kinds of operations still to be carried out; a binomial or a factorial of a variable is a closed form."""
    left = frozenset(LEFT_TO_DO[name] for name in operations(node) & LEFT_TO_DO.keys())
    return left - {"factorial"} if variables(node) else left


def _same_parts(gold: Answer, given: Answer) -> bool:
    return len(gold.value) == len(given.value) and all(map(_same_part, gold.value, given.value))


def _same_set(gold: Answer, given: Answer) -> bool:
    forward = all(any(_same_part(a, b) for b in given.value) for a in gold.value)
    return forward and all(any(_same_part(a, b) for a in gold.value) for b in given.value)


def _same_list(gold: Answer, given: Answer) -> bool:
    """Whether each of the one has a partner of its own among the other."""
    if len(gold.value) != len(given.value):
        return False
    if _is_ranking(gold):
        return _same_parts(gold, given)
    rest = list(given.value)
    for a in gold.value:
        place = next((place for place, b in enumerate(rest) if _same_part(a, b)), None)
        if place is None:
            return False
        rest.pop(place)
    return True


def _is_ranking(answer: Answer) -> bool:
    """Whether a list is one of three letters or more out of their order, as objects are ranked."""
    letters = [each.value for each in answer.value if each.kind == "text" and len(each.value) == 1]
    return len(letters) == len(answer.value) > 2 and letters != sorted(letters)


def _same_intervals(gold: Answer, given: Answer) -> bool:
    def is_same(a: Piece, b: Piece) -> bool:
        ends = (a.has_low, a.has_high) == (b.has_low, b.has_high)
        return ends and _same(a.low, b.low) and _same(a.high, b.high)

    return len(gold.value) == len(given.value) and all(map(is_same, gold.value, given.value))


def _same_matrix(gold: Answer, given: Answer) -> bool:
    shapes = [(len(each.value), len(each.value[0])) for each in (gold, given)]
    if shapes[0] != shapes[1]:
        return False
    return all(_same(a, b) for x, y in zip(gold.value, given.value, strict=True) for a, b in zip(x, y, strict=True))


def _same_equation(gold: Answer, given: Answer) -> bool:
    (left, name, right), (other_left, other_name, other_right) = gold.value, given.value
    if left is None or other_left is None:
        is_called = name == other_name or (left is None) != (other_left is None)
        if "y" not in (name, other_name):
            is_called = name == other_name
        return is_called and right is not None and other_right is not None and _same(right, other_right)
    return constant_ratio(left, other_left) not in (None, 0)


def _same_inequality(gold: Answer, given: Answer) -> bool:
    ratio = constant_ratio(gold.value[0], given.value[0])
    return gold.value[1] == given.value[1] and ratio is not None and ratio > 0


def _same_time(gold: Answer, given: Answer) -> bool:
    """Equal hours and minutes, modulo half a day where only one of them has "a.m." or "p.m."."""
    (hour, minute, has_half), (other_hour, other_minute, other_has_half) = gold.value, given.value
    without = [each for each, has in ((hour, has_half), (other_hour, other_has_half)) if not has]
    period = 12 if len(without) == 1 and 1 <= without[0] <= 12 else 24
    return minute == other_minute and (hour - other_hour) % period == 0


COMPARE: dict[str, Callable[[Answer, Answer], bool]] = {
    "number": _same_scalar,
    "expression": _same_scalar,
    "text": lambda a, b: same_text(a.value, b.value),
    "infinity": lambda a, b: a.value == b.value,
    "congruence": lambda a, b: a.value == b.value and (None in (a.name, b.name) or a.name == b.name),
    "time": _same_time,
    "ratio": _same_parts,
    "cases": _same_list,
    "set": _same_set,
    "list": _same_list,
    "tuple": _same_parts,
    "interval": _same_intervals,
    "matrix": _same_matrix,
    "equation": _same_equation,
    "inequality": _same_inequality,
}
