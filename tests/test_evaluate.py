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
from scipy import stats

from grpo_jax.evaluate import estimate, maj_at_k, maj_at_k_per_problem, paired_test, pass_at_k, pass_at_k_per_problem
from grpo_jax.rewards.math.compare import same_answers
from grpo_jax.rewards.math.vote import identify_answers

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


def test_votes_by_the_equality_of_mathematics():
    answers = [
        ["2\\sqrt{3}", "2\\sqrt3", "\\sqrt{12}", "7", "7", None, "7.0", "??(", "??(", "x+1", "1+x", "0.5", "50%"]
    ]
    numbers = identify_answers(answers, same_answers)
    np.testing.assert_array_equal(np.unique(numbers[0, :3]).size, 1)
    np.testing.assert_array_equal(numbers[0, 3:5], numbers[0, [6, 3]])
    assert numbers[0, 5] == -1
    assert numbers[0, 7] == numbers[0, 8]
    assert numbers[0, 9] == numbers[0, 10]
    assert numbers[0, 11] == numbers[0, 12]
    assert len(set(numbers[0].tolist())) == 6
    right = jnp.array([[True, True, True, False, False]])
    assert maj_at_k(identify_answers([answers[0][:5]], same_answers), right, 5) == 1
    assert maj_at_k(identify_answers([answers[0][:5]]), right, 5) == 0


def test_what_is_the_same_as_a_third_is_the_same():
    same = {("a", "b"), ("b", "c"), ("d", "e")}
    numbers = identify_answers([["a", "c", "b", "d", "e", "f"]], lambda a, b: (a, b) in same or (b, a) in same)
    assert [len(set(numbers[0, part].tolist())) for part in (slice(0, 3), slice(3, 5), slice(0, 6))] == [1, 1, 3]


def test_each_pair_of_different_texts_is_compared_at_most_once_and_numbers_are_not():
    compared = []

    def same(a, b):
        compared.append(frozenset((a, b)))
        return False

    texts = ["x", "y", "x", "z", "5", "6", "5.0", None]
    identify_answers([texts * 8], same)
    assert len(compared) == len(set(compared)) == 3 + 3 * 2


def test_rows_of_different_lengths():
    with pytest.raises(ValueError, match=r"same number of answers; there are rows of \[1, 2\]"):
        identify_answers([["1"], ["1", "2"]])


@pytest.mark.parametrize(("shape", "k"), [((2, 3), 4), ((2, 3), 0), ((2, 3), -1), ((0, 3), 1)])
def test_k_is_checked_at_trace_time(shape, k):
    correct, ids = jax.ShapeDtypeStruct(shape, jnp.bool_), jax.ShapeDtypeStruct(shape, jnp.int32)
    with pytest.raises(ValueError, match=f"k is {k} for {shape[0]} problems of 3 samples each; it must be from 1 to 3"):
        jax.eval_shape(lambda c: pass_at_k(c, k), correct)
    with pytest.raises(ValueError, match=f"k is {k} for {shape[0]} problems"):
        jax.eval_shape(lambda a, c: maj_at_k(a, c, k), ids, correct)


def test_shares_are_the_same_jitted_and_eager(key, variant):
    correct = jax.random.bernoulli(key, 0.5, (3, 4))
    expected = np.mean(np.asarray(correct), axis=1)
    np.testing.assert_allclose(variant(lambda c: pass_at_k(c, 1))(correct), expected.mean(), rtol=1e-6)
    shares = variant(lambda a, c: maj_at_k(a, c, 3))(correct.astype(jnp.int32), correct)
    np.testing.assert_allclose(shares, (np.asarray(correct)[:, :3].sum(1) >= 2).mean(), rtol=1e-6)


def test_the_figures_of_each_problem_are_those_of_that_problem_alone(key):
    correct = jax.random.bernoulli(key, 0.4, (6, 5))
    answers = jnp.where(correct, 0, jax.random.randint(key, (6, 5), -1, 3))
    answers = jnp.where(~correct & (answers == 0), 1, answers)
    for n in range(6):
        row = slice(n, n + 1)
        np.testing.assert_allclose(pass_at_k_per_problem(correct, 3)[n], pass_at_k(correct[row], 3), rtol=1e-6)
        share = brute_force_maj(np.asarray(answers[row]), np.asarray(correct[row]), 5)
        np.testing.assert_allclose(maj_at_k_per_problem(answers, correct, 5)[n], share, rtol=1e-6)


# Confidence intervals -------------------------------------------------------------------------------------------------


def exact_bca(values, confidence):
    """The interval of the bootstrap with every resample in place of some (Efron and Tibshirani 1993, 14.3)."""
    N = len(values)
    means = np.sort(values[np.array(list(itertools.product(range(N), repeat=N)))].mean(1))
    below = ((means < values.mean() - 1e-9).mean() + (means <= values.mean() + 1e-9).mean()) / 2
    left_out = (values.sum() - values) / (N - 1)
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z0 = stats.norm.ppf(below)
    z = z0 + stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    return np.quantile(means, stats.norm.cdf(z0 + z / (1 - acceleration * z)))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_an_interval_against_every_resample(confidence):
    values = np.array([0.0, 0.1, 0.15, 0.3, 0.35, 2.0])
    result = estimate(values, confidence=confidence)
    assert result.mean == pytest.approx(values.mean())
    assert result.problems == 6
    np.testing.assert_allclose([result.low, result.high], exact_bca(values, confidence), atol=0.02)
    assert result.high - result.mean > 1.5 * (result.mean - result.low)  # as skewed as the values


def test_an_interval_of_many_figures_is_students():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    result = estimate(values)
    np.testing.assert_allclose([result.low, result.high], [low, high], atol=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say_where_samples_of_a_problem_are_alike():
    rng = np.random.default_rng(2)
    N, G, trials, truth = 24, 16, 200, 0.4
    hits = as_if_independent = 0
    for _ in range(trials):
        values = rng.binomial(G, rng.beta(0.6, 0.9, N)) / G
        result = estimate(values)
        hits += result.low <= truth <= result.high
        error = 1.96 * math.sqrt(values.mean() * (1 - values.mean()) / (N * G))
        as_if_independent += abs(values.mean() - truth) <= error
    assert 0.91 <= hits / trials <= 0.99
    assert as_if_independent / trials < 0.75


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("problems", [1, 7, 256])
def test_equal_shares_are_not_certain(right, problems):
    result = estimate(np.full(problems, float(right)), bounds=(0.0, 1.0))
    expected = stats.binomtest(right * problems, problems).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose([result.mean, result.low, result.high], [right, expected.low, expected.high], atol=1e-12)


def test_equal_figures_without_bounds_have_an_interval_without_width():
    result = estimate(np.full(4, 2.5))
    assert (result.mean, result.low, result.high) == (2.5, 2.5, 2.5)


def test_the_same_figures_have_the_same_interval_and_another_seed_hardly_another():
    values = np.random.default_rng(3).random(50)
    assert estimate(values) == estimate(values)
    other = estimate(values, seed=1)
    assert other != estimate(values)
    assert other.low == pytest.approx(estimate(values).low, abs=0.01)


# Paired tests ---------------------------------------------------------------------------------------------------------


def sign_flips(differences):
    """The two-sided p-value, by every sign flip."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    return np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-5)


@pytest.mark.parametrize("problems", [1, 2, 5, 9, 13])
def test_p_of_few_problems_is_that_of_every_sign_flip(problems):
    rng = np.random.default_rng(problems)
    for _ in range(3):  # thirds in float32, whose sums tie but for their last bits
        before, after = (rng.binomial(3, share, problems).astype(np.float32) / np.float32(3) for share in (0.3, 0.6))
        expected = sign_flips(after.astype(np.float64) - before)
        assert paired_test(before, after).p == pytest.approx(expected, abs=1e-9)


def test_p_of_more_problems_is_near_that_of_every_sign_flip():
    rng = np.random.default_rng(2)
    before = rng.random(16)
    after = before + rng.normal(0.12, 0.3, 16)
    expected = sign_flips(after - before)
    assert 0.05 < expected < 0.6
    assert paired_test(before, after).p == pytest.approx(expected, abs=0.02)


def test_many_problems_against_students_paired_test():
    rng = np.random.default_rng(5)
    before = rng.random(200)
    after = before + rng.normal(0.02, 0.15, 200)
    result, expected = paired_test(before, after), stats.ttest_rel(after, before)
    assert result.p == pytest.approx(expected.pvalue, abs=0.02)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([result.low, result.high], [interval.low, interval.high], atol=0.003)
    assert result.difference == pytest.approx((after - before).mean())
    assert (result.before, result.after) == (pytest.approx(before.mean()), pytest.approx(after.mean()))


def test_pairs_are_seen_through_what_problems_differ_in():
    rng = np.random.default_rng(6)
    before = rng.random(40)
    after = before + rng.normal(0.03, 0.03, 40)
    assert paired_test(before, after).p < 0.001
    assert paired_test(before, rng.permutation(after)).p > 0.05


@pytest.mark.parametrize("problems", [6, 30])
def test_before_and_after_the_other_way_round(problems):
    rng = np.random.default_rng(7)
    before, after = rng.random(problems), rng.random(problems) + 0.1
    there, back = paired_test(before, after), paired_test(after, before)
    assert there.p == back.p
    np.testing.assert_allclose([there.difference, there.low, there.high], [-back.difference, -back.high, -back.low])


def test_nothing_changed():
    values = np.array([0.0, 0.25, 1.0, 0.5])
    result = paired_test(values, values, bounds=(0.0, 1.0))
    assert (result.difference, result.p, result.problems) == (0.0, 1.0, 4)
    assert result.low == -result.high < -0.5  # four problems of which none changed are few
    unbounded = paired_test(values, values)
    assert (unbounded.low, unbounded.high) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_figures_that_have_no_mean(values):
    values = np.array(values)
    with pytest.raises(ValueError, match="needs a finite value for each of at least one problem"):
        estimate(values)
    with pytest.raises(ValueError, match="needs a finite value"):
        paired_test(values, np.zeros(len(values)))
    with pytest.raises(ValueError, match="needs a finite value"):
        paired_test(np.zeros(len(values)), values)
