"""Grading of mathematics by the final answer.

A policy finds whatever fools its grader. So equality is decided exactly (by rational arithmetic, to 150 digits, or at
points that nobody can know), kinds must match, and what cannot be read is wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.answer import extract_answer, gold_answer
from grpo_jax.rewards.math.evaluation import TooLargeError, digits_needed, evaluate, work_limit
from grpo_jax.rewards.math.expression import TRIGONOMETRIC, Node, constants, operations, substitute, variables
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.forms import FORMS, formulas, has_form
from grpo_jax.rewards.math.intervals import Piece
from grpo_jax.rewards.math.latex import UNIT_VECTORS
from grpo_jax.rewards.math.numbers import numeric_value
from grpo_jax.rewards.math.parameters import differ_in_domain, with_parameter_of
from grpo_jax.rewards.math.points import SMALL
from grpo_jax.rewards.math.reader import as_interval, read_answer
from grpo_jax.rewards.math.symbolic import agree, constant_ratio, real_value
from grpo_jax.rewards.math.units import is_cents, read_unit
from grpo_jax.rewards.math.words import same_text

LOGGER = logging.getLogger(__name__)
DEGREES, RADIANS = read_unit("degrees"), read_unit("radians")
LEFT_TO_DO = {name: name for name in ("min", "max", "gcd", "lcm", "floor", "ceil", "abs")}
LEFT_TO_DO |= {"binom": "factorial", "factorial": "factorial"} | dict.fromkeys(TRIGONOMETRIC, "trigonometric")
"""Operations that an answer is expected to have carried out, unless the gold has one of their kind too."""


def load_parser() -> None:
    """Import mpmath and compute an expression once, which fills its caches."""
    same_answer(r"\frac{x+1}{2}", r"\sqrt{2}+x^2")


@per_sample(columns=("answer",), warm_up=load_parser)
def math_reward(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str | None],
    form: str | None = None,
    **_columns: list[Any],
) -> list[float | None]:
    """1.0 where a completion's final answer equals the gold answer as mathematics, else 0.0.

    None where the gold is None, cannot be read, is an identity, or does not have the form that is required.

    Args:
        prompts: the texts that the completions continue, which may have opened the thought; or an empty list.
        completions: the final answer is what ``extract_answer`` finds; without one the score is 0.0.
        answer: the gold answers, bare or as a solution that ``gold_answer`` reads; see ``same_answer`` for what is
            equal.
        form: of expressions, which form is required besides equality: ``expanded`` (a sum of distinct monomials),
            ``factored`` (a product of irreducible polynomials) or ``as-written`` (the same text but for spacing and
            spelling). For tasks where the question, copied, would equal its answer.

    Raises:
        ValueError: an unknown form.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}, not one of {', '.join(FORMS)}")
    prompts = prompts or [""] * len(completions)
    return [_score(*row, form) for row in zip(prompts, completions, answer, strict=True)]


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
        LOGGER.info("scored 0: comparing with the gold answer %.100r takes too much work: %.200r", gold, answer)
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


def stands_in_question(question: str, gold: str) -> bool:
    """Whether a formula of a question, or one side of it, equals the gold answer: copying it would score.

    Formulas are what mathematics delimiters enclose, and runs of formula characters in plain text. A gold answer that
    cannot be read does not stand anywhere.

    Args:
        question: the text of the problem.
        gold: the final gold answer.
    """
    value = numeric_value(gold)
    if value is not None:  # by far the most frequent kind, and a hundred times as fast
        return any(numeric_value(formula) == value for formula in formulas(question))
    right = read_answer(gold)
    if right is None:
        return False
    return any(given is not None and _same_within_limit(right, given) for given in map(read_answer, formulas(question)))


def _same_within_limit(gold: Answer, given: Answer) -> bool:
    try:
        with work_limit():
            return _same(gold, given)
    except TooLargeError:
        return False


def _score(prompt: str, completion: str, gold: str | None, form: str | None) -> float | None:
    if gold is None:
        return None
    try:
        return float(same_answer(gold_answer(gold), extract_answer(completion, prompt) or "", form=form))
    except ValueError:
        return None


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


def _of_one_kind(gold: Answer, given: Answer) -> tuple[Answer, Answer]:
    """Both answers, where they are of two kinds that can denote one thing, in the gold's kind."""
    kinds = gold.kind, given.kind
    if kinds == ("interval", "tuple"):
        return gold, as_interval(given) or given
    if kinds == ("tuple", "interval") and len(given.value) == 1:
        return as_interval(gold) or gold, given
    if kinds == ("tuple", "matrix") or kinds == ("matrix", "tuple"):
        return _as_tuple(gold), _as_tuple(given)
    if set(kinds) == {"tuple", "expression"}:
        return _as_unit_vectors(gold), _as_unit_vectors(given)
    if set(kinds) == {"equation", "expression"}:
        return _solution(gold, given), _solution(given, gold)
    if kinds == ("number", "equation") and re.fullmatch(r"[a-w](?:\+[a-w])+", given.value[1] or ""):
        return gold, given.value[2]  # m+n = 11
    if "congruence" in kinds:
        return _as_congruence(gold), _as_congruence(given)
    if kinds == ("text", "list") or kinds == ("list", "text"):
        return _as_letters(gold), _as_letters(given)
    if set(kinds) == {"ratio", "expression"}:
        return _as_fraction(gold), _as_fraction(given)
    if set(kinds) == {"set", "number"} or set(kinds) == {"set", "expression"}:
        return _as_element(gold), _as_element(given)
    if kinds == ("ratio", "time"):
        return gold, _as_ratio(given)
    if set(kinds) == {"ratio", "number"}:
        return _as_fraction(gold), _as_fraction(given)
    if set(kinds) == {"set", "list"}:
        return replace(gold, kind="set"), replace(given, kind="set")
    if set(kinds) <= {"number", "expression"} and DEGREES in (gold.unit, given.unit) and gold.unit != given.unit:
        return _in_degrees(gold), _in_degrees(given)
    if kinds == ("number", "expression") and gold.unit is not None:
        return gold, _with_letter_as_unit(given)
    return gold, given


def _as_tuple(answer: Answer) -> Answer:
    """A column as a tuple."""
    if answer.kind == "matrix" and len(answer.value) > 1 and all(len(row) == 1 for row in answer.value):
        return Answer("tuple", tuple(row[0] for row in answer.value), name=answer.name)
    return answer


def _as_unit_vectors(answer: Answer) -> Answer:
    scalars = ("number", "expression")
    if answer.kind != "tuple" or len(answer.value) not in (2, 3) or any(e.kind not in scalars for e in answer.value):
        return answer
    parts = [("mul", as_node(part), ("variable", name)) for part, name in zip(answer.value, UNIT_VECTORS, strict=False)]
    written = [part for part in parts if part[1] != ("number", 0)]  # a component of zero is not
    return Answer("expression", ("add", *written)) if written else answer


def _solution(answer: Answer, other: Answer) -> Answer:
    """``x+1``, of ``y = x+1``."""
    if answer.kind != "equation" or answer.value[2] is None or answer.value[1] in variables(other.value):
        return answer
    return answer.value[2]


def _as_congruence(answer: Answer) -> Answer:
    r"""``x = 7k+3, k \in \mathbb{Z}`` as the class of 3 modulo 7."""
    if answer.kind not in ("equation", "expression"):
        return answer
    value = answer.value[2] if answer.kind == "equation" else answer
    if value is None or value.kind != "expression" or answer.domain != "Z" or answer.parameter is None:
        return answer
    name = answer.parameter
    if variables(value.value) != {name}:
        return answer
    digits = digits_needed(value.value, SMALL)
    at_zero, at_one = (evaluate(value.value, {name: Fraction(place)}, digits) for place in (0, 1))
    if not isinstance(at_zero, Fraction) or not isinstance(at_one, Fraction) or at_zero == at_one:
        return answer
    step = at_one - at_zero
    line = ("add", ("number", at_zero), ("mul", ("number", step), ("variable", name)))
    if at_zero.denominator * step.denominator != 1 or not agree(value.value, line):
        return answer
    variable = answer.value[1] if answer.kind == "equation" else None
    return Answer("congruence", (int(at_zero % abs(step)), int(abs(step))), name=variable)


def _as_letters(answer: Answer) -> Answer:
    """Several letters of choice, ``B, D``, as one text."""
    if answer.kind != "list" or any(each.kind != "text" or len(each.value) != 1 for each in answer.value):
        return answer
    return Answer("text", "".join(each.value for each in answer.value))


def _as_element(answer: Answer) -> Answer:
    """The only element of a set."""
    return answer.value[0] if answer.kind == "set" and len(answer.value) == 1 else answer


def _as_ratio(answer: Answer) -> Answer:
    """``10:14``, which looks like a time of day."""
    if answer.kind != "time" or answer.value[2] or 0 in answer.value[:2]:
        return answer
    total = sum(answer.value[:2])
    return Answer("ratio", tuple(Answer("number", Fraction(each, total)) for each in answer.value[:2]))


def _as_fraction(answer: Answer) -> Answer:
    if answer.kind == "ratio" and len(answer.value) == 1:
        return answer.value[0]
    if answer.kind != "ratio" or len(answer.value) != 2 or any(each.kind != "number" for each in answer.value):
        return answer
    return Answer("number", answer.value[0].value / answer.value[1].value)


def _with_letter_as_unit(answer: Answer) -> Answer:
    """``5 N`` or ``9.8 m/s^2`` as a number with its unit, where a unit is expected."""
    number, letters = _coefficient(answer.value)
    unit = read_unit(letters) if number is not None and letters else None
    return answer if unit is None else Answer("number", number, unit)


def _coefficient(node: Node) -> tuple[Fraction | None, str]:
    """The number in front of a product of powers of letters, and these as the text of a unit."""
    name, parts = node[0], node[1:]
    if name == "number":
        return parts[0], ""
    if name == "variable":
        return Fraction(1), parts[0]
    if name == "pow" and parts[0][0] == "variable" and parts[1][0] == "number":
        return Fraction(1), f"{parts[0][1]}^{{{parts[1][1]}}}"
    if name not in ("mul", "div"):
        return None, ""
    pairs = [_coefficient(each) for each in parts]
    if any(number is None for number, _ in pairs) or (name == "div" and pairs[1][0] != 1):
        return None, ""
    coefficient = Fraction(1)
    for number, _ in pairs:
        coefficient *= number or 0
    return coefficient, ("/" if name == "div" else " ").join(letters for _, letters in pairs if letters)


def _scales(gold: Answer, given: Answer) -> tuple[Fraction, Fraction] | None:
    """What the two values are multiplied by to be compared; None where their units differ in kind."""
    if gold.unit is None or given.unit is None:
        return None if gold.unit is None and is_cents(given.unit) else (Fraction(1), Fraction(1))
    return (gold.unit[0], given.unit[0]) if gold.unit[1] == given.unit[1] else None


def _in_degrees(answer: Answer) -> Answer:
    r"""``\frac{2\pi}{3}``, which has radians as unit or a pi and no unit, in degrees.

    Only a rational number of up to 360 of them, for a multiple of pi: others are hardly angles.
    """
    if answer.kind != "expression" or answer.unit not in (None, RADIANS) or "pi" not in constants(answer.value):
        return answer
    if variables(answer.value) or "add" in operations(answer.value):
        return answer
    value = real_value(substitute(answer.value, ("constant", "pi"), ("number", Fraction(180))))
    is_multiple = (
        isinstance(value, Fraction)
        and abs(value) <= 360
        and agree(answer.value, ("mul", ("number", value / 180), ("constant", "pi")))
    )
    return Answer("number", value, DEGREES) if is_multiple else answer


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
