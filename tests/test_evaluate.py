import itertools
import math
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.evaluate import identify_answers, maj_at_k, pass_at_k

shapes = st.just((3, 5))
correct_arrays = shapes.flatmap(lambda shape: hnp.arrays(np.bool_, shape))


@given(correct_arrays, st.data())
def test_pass_at_k_against_every_choice_of_k_samples(correct, data):
    k = data.draw(st.integers(1, correct.shape[1]))
    choices = list(itertools.combinations(range(correct.shape[1]), k))
    expected = np.mean([[row[list(choice)].any() for choice in choices] for row in correct])
    np.testing.assert_allclose(pass_at_k(jnp.asarray(correct), k), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "right", "k"),
    [(1024, 1, 512), (1024, 700, 300), (1024, 3, 1), (64, 0, 64), (64, 64, 1), (1024, 1024, 1024)],
)
def test_pass_at_k_of_many_samples_against_binomials(samples, right, k):
    correct = jnp.arange(samples)[None] < right
    expected = 1 - Fraction(math.comb(samples - right, k), math.comb(samples, k))
    np.testing.assert_allclose(pass_at_k(correct, k), float(expected), rtol=1e-5, atol=1e-6)


def test_pass_at_1_is_the_mean():
    correct = jnp.array([[True, False, True, False], [False] * 4, [True] * 4])
    np.testing.assert_allclose(pass_at_k(correct, 1), 0.5, rtol=1e-6)


def brute_force_maj(answers, correct, k):
    shares = []
    for row, right in zip(answers[:, :k], correct[:, :k], strict=True):
        votes = Counter(answer for answer in row.tolist() if answer >= 0)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        right_answers = {answer for answer, ok in zip(row.tolist(), right, strict=True) if ok}
        shares.append(np.mean([winner in right_answers for winner in winners]) if winners else 0.0)
    return np.mean(shares)


@given(shapes.flatmap(lambda shape: hnp.arrays(np.int32, shape, elements=st.integers(-1, 3))), st.data())
def test_maj_at_k_against_counting(answers, data):
    k = data.draw(st.integers(1, answers.shape[1]))
    gold = data.draw(hnp.arrays(np.int32, (len(answers), 1), elements=st.integers(0, 3)))
    correct = answers == gold
    share = maj_at_k(jnp.asarray(answers), jnp.asarray(correct), k)
    np.testing.assert_allclose(share, brute_force_maj(answers, correct, k), rtol=1e-6)


@pytest.mark.parametrize(
    ("answers", "gold", "k", "expected"),
    [
        ([0, 1, 1], 1, 3, 1.0),
        ([0, 1, 1], 1, 1, 0.0),
        ([0, 1, 1], 1, 2, 0.5),
        ([0, 0, 1, 1, 2], 1, 5, 0.5),
        ([0, 1, 2], 2, 3, 1 / 3),
        ([-1, -1, 5], 5, 3, 1.0),
        ([-1, -1, 5], 5, 2, 0.0),
        ([-1, -1, -1], 5, 3, 0.0),
    ],
)
def test_ties_count_in_part_and_no_answer_never_wins(answers, gold, k, expected):
    answers = jnp.array([answers])
    np.testing.assert_allclose(maj_at_k(answers, answers == gold, k), expected, rtol=1e-6)


def test_a_sample_without_an_answer_has_no_vote_even_if_called_right():
    assert maj_at_k(jnp.array([[-1, -1]]), jnp.array([[True, True]]), 2) == 0


def test_identify_answers():
    ids = identify_answers([["5", "5.0", "6", None, "$5", " "], ["x", "x.", "y", "1/2", "0.5", "X"]])
    np.testing.assert_array_equal(ids, [[0, 0, 1, -1, 0, -1], [0, 0, 1, 2, 2, 3]])
    assert ids.dtype == jnp.int32


@given(st.lists(st.lists(st.none() | st.sampled_from(["1", "1.0", "2", "a", ""]), min_size=4, max_size=4), min_size=1))
def test_ids_are_equal_if_and_only_if_answers_are(answers):
    value = {"1": "1", "1.0": "1", "2": "2", "a": "a", "": None, None: None}
    for row, ids in zip(answers, np.asarray(identify_answers(answers)), strict=True):
        for (a, i), (b, j) in itertools.product(zip(row, ids, strict=True), repeat=2):
            assert (value[a] == value[b]) == (i == j)
            assert (value[a] is None) == (i == -1)


def test_rows_of_different_lengths():
    with pytest.raises(ValueError, match=r"same number of answers; there are rows of \[1, 2\]"):
        identify_answers([["1"], ["1", "2"]])


@pytest.mark.parametrize(("shape", "k"), [((2, 3), 4), ((2, 3), 0), ((2, 3), -1), ((0, 3), 1)])
def test_k_is_checked_at_trace_time(shape, k):
    correct, ids = jax.ShapeDtypeStruct(shape, jnp.bool_), jax.ShapeDtypeStruct(shape, jnp.int32)
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to the 3 samples .* there are {shape[0]}"):
        jax.eval_shape(lambda c: pass_at_k(c, k), correct)
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to the 3 samples"):
        jax.eval_shape(lambda a, c: maj_at_k(a, c, k), ids, correct)


def test_both_compile(key):
    correct = jax.random.bernoulli(key, 0.5, (3, 4))
    ids = correct.astype(jnp.int32)
    np.testing.assert_allclose(jax.jit(pass_at_k, static_argnums=1)(correct, 2), pass_at_k(correct, 2), rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(maj_at_k, static_argnums=2)(ids, correct, 3), maj_at_k(ids, correct, 3), rtol=1e-6
    )
