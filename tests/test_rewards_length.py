# ruff: noqa: RUF001
"""Length and repetition: the values of the papers, computed by hand."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.length import cosine_length_reward, soft_overlong_reward
from grpo_jax.rewards.repetition import repeated_share, repetition_reward


def overlong(length, max_length=100, cache=20):
    return soft_overlong_reward([""], [""], completion_length=[length], max_length=max_length, cache=cache)[0]


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1)])
def test_r2_soft_overlong(length, expected):
    assert overlong(length) == expected


@given(st.integers(0, 200), st.integers(1, 100))
def test_soft_overlong_falls_and_is_bounded(length, cache):
    assert -1 <= overlong(length + 1, cache=cache) <= overlong(length, cache=cache) <= 0


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_a_cache_that_does_not_fit(cache):
    with pytest.raises(ValueError, match=f"cache is {cache}; it must be between 1 and max_length = 100"):
        overlong(50, cache=cache)


def cosine(answer, length, **settings):
    return cosine_length_reward(
        [""], [f"<answer>{answer}</answer>"], completion_length=[length], max_length=100, answer=["5"], **settings
    )[0]


@pytest.mark.parametrize(
    ("answer", "length", "expected"),
    [("5", 0, 1.0), ("5", 50, 0.75), ("6", 0, -1.0), ("6", 50, -0.75), ("5", 100, -1.0), ("6", 120, -1.0)],
)
def test_cosine(answer, length, expected):
    assert cosine(answer, length) == pytest.approx(expected)


def test_cosine_against_its_formula_with_other_ends():
    found = cosine("5", 30, right=(2.0, 1.0), exceeded=-10.0)
    assert found == pytest.approx(1.0 + (2.0 - 1.0) * (1 + math.cos(math.pi * 0.3)) / 2)
    assert cosine("5", 100, exceeded=-10.0) == -10.0


@given(st.integers(0, 98))
def test_right_is_worth_more_the_shorter_and_wrong_the_longer(length):
    assert cosine("5", length) > cosine("5", length + 1) > cosine("6", length + 1) > cosine("6", length)


def test_cosine_has_no_score_where_accuracy_has_none():
    absent = lambda prompts, completions, **columns: [None]  # noqa: E731
    assert cosine("5", 10, accuracy=absent) is None
    with pytest.raises(ValueError, match="max_length is 0"):
        cosine_length_reward([""], [""], completion_length=[1], max_length=0, answer=["5"])


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("", 4, 0),
        ("a b c", 4, 0),
        ("a b c d", 4, 0),
        ("a a a a a", 4, 0.5),  # two of them, one distinct
        ("A a, a! a", 1, 1 - 3 / 6),
        ("one two three four one two three four", 4, 1 - 4 / 5),
        ("3+8=11;3+8=11;", 4, 1 - 6 / 9),
        ("计算计算计算", 2, 1 - 2 / 5),
        ("12 12 12", 1, 1 - 1 / 3),
    ],
)
def test_the_share_of_repeated_n_grams(text, n, expected):
    assert repeated_share(text, n) == pytest.approx(expected)
    assert repetition_reward([""], [text], n=n) == [-repeated_share(text, n)]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 400,
        "a" * 20,
        "wait" * 50,
        "хаха" * 50,
        "เราคำนวณผลรวม" * 20,
        "ຄຳຕອບ" * 30,
        "ចម្លើយ" * 30,
        "အဖြေ" * 30,
        "答案是" * 30,
        "答えは" * 30,
        "정답은" * 30,
        "🙂" * 50,
        "👩\u200d👧" * 30,
        "." * 100,
        "-=" * 50,
        "_" * 100,
        "1" * 100,
        "3." + "3" * 100,
        "\n" * 200,
        " " * 200,
        "\u200b" * 100,
        "e\u0301" * 100,
        "ข้อ A " * 40,
        "so 我们 🙂 " * 30,
    ],
)
def test_repetition_without_words_between_blanks_is_seen(text):
    assert repeated_share(text) > 0.75


@pytest.mark.parametrize(
    "text",
    [
        "ก่อนอื่นเราคำนวณผลรวมของจำนวนทั้งสองแล้วหารด้วยสามเพื่อหาค่าเฉลี่ย",
        "首先我们计算两个数的和，然后除以三。",
        "हम दो संख्याओं का योग निकालते हैं",
        "Die Donaudampfschifffahrtsgesellschaft fährt.",
        "3.14159265358979323846264338327950288419716939937510",
        "def f():\n                        return 1\n",
        "well hmm, yesss 1000000 zzz",
    ],
)
def test_ordinary_text_in_any_script_does_not_repeat_itself(text):
    assert repeated_share(text) == 0


@given(st.text(), st.integers(1, 5))
def test_repetition_is_a_share(text, n):
    assert 0 <= repeated_share(text, n) < 1
    assert repeated_share(text + text, n) >= repeated_share(text, n) or len(text) < 8 * n


@pytest.mark.parametrize("piece", ["a", "a ", "ก", "中", "1", " ", "\u0301", "ab1"])
def test_repetition_takes_linear_time(piece):
    start = time.process_time()
    repeated_share(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 2


def test_an_n_gram_has_a_word():
    with pytest.raises(ValueError, match="n is 0"):
        repeated_share("a", 0)
