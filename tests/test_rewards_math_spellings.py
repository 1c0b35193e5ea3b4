"""The spellings of final answers: golds of every form against themselves and their mutations, and pairs by spelling."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from grpo_jax.rewards.math.compare import same_answer
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.rewards.math.units import read_counted_noun, read_unit

DATA = Path(__file__).parent / "data"
GOLDS = (DATA / "math_golds.txt").read_text().splitlines()
PAIRS = [json.loads(line) for line in (DATA / "math_spellings.jsonl").read_text().splitlines()]
SWAPS = [
    *(("[", "("), ("(0", "[0"), ("]", ")"), ("<", r"\le "), (r"\le", ">"), (r"\sqrt", r"2\sqrt"), (r"\pi", r"2\pi ")),
    *(("sin", "cos"), ("x", "z^2"), (r"\cup", r"\cap"), ("cm", "mm"), (r"\pm", "")),
]
SAME_VALUE = {(r"e^{2\pi i/5}", r"e^{22\pi  i/5}")}
SIGNED = re.compile(r"(?![0(]|\\(?:text|mathbb|emptyset|varnothing|\{|begin|langle|pm|infty)|\d+:)[\dx(\\][^=<>,]*")


def mutations(gold):
    """Wrong answers: another digit, sign, bracket, function, unit or order, or a part dropped."""
    for digit in re.finditer(r"(?<![A-Za-z_{])\d|(?<=\{)\d(?=[^}]*\})", gold):
        yield gold[: digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end() :]
    for sign in re.finditer(r"(?<![\^{(,=]|\\)(?<=.)[+\-](?=.)", gold):
        yield gold[: sign.start()] + ("-" if sign[0] == "+" else "+") + gold[sign.end() :]
    if SIGNED.fullmatch(gold) and gold != r"\infty":
        yield "-" + gold
    yield from (gold.replace(part, other, 1) for part, other in SWAPS if part in gold)
    if parts := re.fullmatch(r"(\(|\\\{|)([^()\[\]{}]+),([^,()\[\]{}]+?)(\)|\\\}|)", gold):
        yield parts[1] + parts[2] + parts[4]
        if parts[1] == "(" and parts[2].strip() != parts[3].strip():
            yield f"({parts[3]},{parts[2]})"


def test_golds_of_every_form_equal_themselves():
    """99.5 % of them, bare, between dollars and in a box."""
    assert len(GOLDS) > 400
    forms = [(gold, [gold, f"${gold}$", rf"\boxed{{{gold}}}"]) for gold in GOLDS]
    unequal = [
        gold for gold, texts in forms if read_answer(gold) is None or not all(same_answer(gold, t) for t in texts)
    ]
    assert len(unequal) <= 0.005 * len(GOLDS), unequal


def test_no_mutation_of_a_gold_equals_it():
    pairs = [(gold, wrong) for gold in GOLDS if read_answer(gold) for wrong in mutations(gold)]
    assert len(pairs) > 1500
    assert {pair for pair in pairs if same_answer(*pair)} <= SAME_VALUE


def test_golds_are_equal_only_where_they_have_one_value():
    """Each against the thirty that follow: the equal pairs are those of a list that was checked by hand."""
    read = [gold for gold in GOLDS if read_answer(gold)]
    known = {tuple(json.loads(line)) for line in (DATA / "math_golds_equal.jsonl").read_text().splitlines()}
    found = {
        (a, b) for place, a in enumerate(read) for b in read[place + 1 : place + 31] if a != b and same_answer(a, b)
    }
    assert found == known


@pytest.mark.parametrize("is_equal", [True, False])
def test_pairs_by_spelling(is_equal):
    """In a box, in a tag, and compared as they are."""
    chosen = [pair for pair in PAIRS if pair["equal"] == is_equal]
    assert len(chosen) > 130
    for pair in chosen:
        gold, answer = pair["gold"], pair["answer"]
        assert same_answer(gold, answer) == is_equal, pair
        assert math_reward([""], [rf"\boxed{{{answer}}}"], answer=[gold]) == [float(is_equal)], pair
        if not re.search(r"\\boxed|\\fbox", answer):
            assert math_reward([""], [f"<answer>{answer}</answer>"], answer=[gold]) == [float(is_equal)], pair


@pytest.mark.parametrize(
    ("text", "scale", "dimension"),
    [
        ("cm^2", "1/10000", {"length": 2}),
        ("square feet", "0.09290304", {"length": 2}),
        ("cubic centimeters", "1/1000000", {"length": 3}),
        ("mL", "1/1000000", {"length": 3}),
        ("km/h", "5/18", {"length": 1, "time": -1}),
        ("miles per hour", "0.44704", {"length": 1, "time": -1}),
        ("kg m/s^2", "1", {"length": 1, "mass": 1, "time": -2}),
        ("N", "1", {"length": 1, "mass": 1, "time": -2}),
        ("kWh", "3600000", {"length": 2, "mass": 1, "time": -2}),
        ("meters per second squared", "1", {"length": 1, "time": -2}),
        ("cents", "1/100", {"dollar": 1}),
    ],
)
def test_units_in_base_units(text, scale, dimension):
    assert read_unit(text) == (Fraction(scale), tuple(sorted(dimension.items())))


@pytest.mark.parametrize("text", ["percent", "dozen", "million", "k", "x", "ways", "", "Mg m s foo", "per hour per"])
def test_what_is_not_a_unit_of_measurement(text):
    assert read_unit(text) is None


@pytest.mark.parametrize("words", ["apples", "red marbles", "ways", "people", "students in class", "pounds of apples"])
def test_nouns_are_counted(words):
    assert read_counted_noun(words, Fraction(5)) is not None


@pytest.mark.parametrize(
    "words",
    ["million", "or more", "is wrong", "squared", "apple", "apples or pears", "thirds", "times", "if wrong", "s"],
)
def test_words_that_say_more_than_a_noun_are_not_counted(words):
    assert read_counted_noun(words, Fraction(5)) is None
