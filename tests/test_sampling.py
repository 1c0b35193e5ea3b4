import inspect
import math
from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.stats
from hypothesis import assume, given
from oracle import f32, f64

from grpo_jax.log_probs import token_log_probs
from grpo_jax.sampling import Sampling, adjust_logits, filter_logits, sample_token

V = 12

ROWS = 16


@partial(jax.jit, static_argnums=2)
def sample(key_data, logits, sampling):
    """Tokens, their log-probabilities and the filtered logits of a few rows."""
    return *sample_token(jax.random.wrap_key_data(key_data), logits, sampling), filter_logits(logits, sampling)


def keys_of(seed, rows=ROWS):
    return np.random.default_rng(seed).integers(0, 2**32, (rows, 2), dtype=np.uint32)


def padded(rows):
    """Logits of a few rows with a few tokens, among others of one shape: tokens of -inf are never sampled."""
    result = np.full((ROWS, V), -np.inf, np.float32)
    result[:, 0] = 0
    for i, row in enumerate(rows):
        result[i] = np.append(f32(row), np.full(V - len(row), -np.inf))
    return result


KNOBS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 8, "top_p": 0.85, "min_p": 0.05},
    {"temperature": 0.0},
]
names = ["-".join(f"{k}={v}" for k, v in knobs.items()) or "plain" for knobs in KNOBS]


def kept(logits, **knobs):
    """The tokens of one row that a filter keeps."""
    row = np.append(f32(logits), np.full(V - len(logits), -np.inf, np.float32))
    result = np.asarray(filter_logits(jnp.asarray(row[None]), Sampling(**knobs)))[0]
    return set(np.flatnonzero(result > -np.inf).tolist())


def logits_of(*probabilities):
    return np.log(f64(probabilities))


def near_a_bound(logits, knobs):
    """Whether rounding to float32 may decide about a token: two nearly equal thresholds keep different sets."""
    moved = [
        {**knobs, "top_p": np.clip(knobs.get("top_p", 1) + d, 1e-3, 1), "min_p": max(knobs.get("min_p", 0) + d, 0)}
        for d in (-1e-5, 1e-5)
        if knobs.get("top_p", 1) < 1 or knobs.get("min_p", 0) > 0
    ]
    return any(oracle.kept_tokens(logits, **m) != oracle.kept_tokens(logits, **knobs) for m in moved)


# XLA flushes subnormal numbers to 0, the oracle does not.
LOGITS = st.floats(-6, 6, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)


# Filters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", KNOBS, ids=names)
@given(hnp.arrays(np.float32, V, elements=st.one_of(LOGITS, st.sampled_from([0.0, 1.0, -1e4, -np.inf]))))
def test_filters_keep_exactly_the_tokens_of_the_oracle(knobs, logits):
    assume(logits.max() > -np.inf)
    assume(not near_a_bound(logits, knobs))
    filtered = np.asarray(sample(keys_of(0), padded([logits]), Sampling(**knobs))[2])[0]
    assert set(np.flatnonzero(filtered > -np.inf).tolist()) == oracle.kept_tokens(logits, **knobs)
    divisor = knobs.get("temperature", 1.0) or 1.0
    wanted = logits[filtered > -np.inf] / divisor
    np.testing.assert_allclose(filtered[filtered > -np.inf], wanted, rtol=1e-6)


def test_top_k_keeps_ties_with_the_k_th():
    assert kept([3, 1, 2, 2, 0], top_k=2) == {0, 2, 3}
    assert kept([1, 1, 1, 1], top_k=1) == {0, 1, 2, 3}
    assert kept([3, 1, 2, 2, 0], top_k=5) == kept([3, 1, 2, 2, 0], top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_set_with_at_least_that_probability():
    logits = logits_of(0.125, 0.5, 0.125, 0.25)
    assert kept(logits, top_p=0.01) == {1}
    assert kept(logits, top_p=0.499) == {1}
    assert kept(logits, top_p=0.501) == {1, 3}
    assert kept(logits, top_p=0.749) == {1, 3}
    assert kept(logits, top_p=0.8) == {0, 1, 2, 3}  # equally likely tokens are kept or removed together
    assert kept(logits, top_p=1.0) == {0, 1, 2, 3}


def test_min_p_keeps_tokens_at_least_that_fraction_as_likely_as_the_likeliest():
    logits = logits_of(0.5, 0.3, 0.15, 0.05)
    assert kept(logits, min_p=0.61) == {0}
    assert kept(logits, min_p=0.59) == {0, 1}
    assert kept(logits, min_p=0.11) == {0, 1, 2}
    assert kept(logits, min_p=0.0) == {0, 1, 2, 3}


def test_filters_apply_in_order_each_to_the_tokens_the_one_before_kept():
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert kept(logits, top_p=0.55) == {0, 1}
    assert kept(logits, top_k=2, top_p=0.55) == {0}  # 0.4 of the 0.7 that top-k keeps is 0.571
    assert kept(logits, temperature=4.0, top_p=0.5) == {0, 1}
    assert kept(logits, temperature=0.25, top_p=0.5) == {0}  # temperature is applied first
    assert kept(logits, top_p=0.75, min_p=0.4) == {0, 1, 2}
    assert kept(logits, top_p=0.65, min_p=0.4) == {0, 1}


def test_greedy_keeps_only_the_first_of_equals():
    assert kept([1, 5, 5, 0], temperature=0.0) == {1}
    assert kept([1, 5, 5, 0], temperature=0.0, top_k=2, top_p=0.3) == {1}


def test_t9_filters_work_in_float32():
    logits = padded([[1.0, 2.0, 3.0]]).astype(jnp.bfloat16)
    for knobs in ({}, KNOBS[5]):
        _, log_probs, filtered = sample(keys_of(0), logits, Sampling(**knobs))
        assert log_probs.dtype == filtered.dtype == jnp.float32
    expected = oracle.log_softmax(f64(logits))
    tokens, log_probs, _ = sample(keys_of(0), logits, Sampling())
    np.testing.assert_allclose(log_probs, expected[np.arange(ROWS), np.asarray(tokens)], atol=1e-5)


# Sampling ------------------------------------------------------------------------------------------------------------

LOGITS = f32([2.0, 0.5, -1.0, 2.0, 1.2, -np.inf, 0.0, -0.3, 1.0, -2.0, 0.7, -5.0])


@pytest.mark.parametrize("knobs", KNOBS[:-1], ids=names[:-1])
def test_samples_follow_the_exact_distribution_and_report_its_log_probabilities(knobs):
    draws = 200_000
    tokens, log_probs, _ = sample(keys_of(11, draws), np.broadcast_to(LOGITS, (draws, V)), Sampling(**knobs))
    p = oracle.sampling_distribution(LOGITS, **knobs)
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert counts[p == 0].sum() == 0
    assert scipy.stats.chisquare(counts[p > 0], draws * p[p > 0]).pvalue > 1e-6
    np.testing.assert_allclose(log_probs, np.log(p[np.asarray(tokens)]), rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_likeliest_token_with_log_probability_0():
    logits = padded([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0], [-1e4, -1e4, -1e3]])
    tokens, log_probs, _ = sample(keys_of(0), logits, Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens[:3], [1, 0, 2])
    np.testing.assert_array_equal(log_probs, 0)


@pytest.mark.parametrize("knobs", KNOBS, ids=names)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1.0, 30.0, 1e4]))
def test_a_sampled_token_is_a_kept_one_and_has_its_log_probability(knobs, seed, scale):
    rng = np.random.default_rng(seed)
    logits = f32(rng.normal(size=(ROWS, V)) * scale)
    logits[rng.random((ROWS, V)) < 0.2] = -np.inf
    logits[:, seed % V] = f32(scale)
    tokens, log_probs, filtered = sample(keys_of(seed), logits, Sampling(**knobs))
    assert tokens.dtype == jnp.int32
    expected = oracle.token_log_probs(f64(filtered), np.asarray(tokens))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-5)


policy_log_probs = jax.jit(token_log_probs, static_argnames="temperature")


def test_t7_sampler_and_policy_give_token_1_log_9_tenths():
    logits = padded([[0.0, np.log(3)]] * ROWS)
    tokens, log_probs, _ = sample(keys_of(0), logits, Sampling(temperature=0.5))
    np.testing.assert_allclose(log_probs, np.where(np.asarray(tokens) == 1, np.log(0.9), np.log(0.1)), rtol=1e-5)
    np.testing.assert_allclose(log_probs, policy_log_probs(logits, tokens, temperature=0.5), rtol=1e-6)
    assert set(np.asarray(tokens).tolist()) == {0, 1}


@pytest.mark.parametrize("knobs", [{"top_k": 2}, {"top_p": 0.75}], ids=["top_k", "top_p"])
def test_t10_the_samplers_log_probabilities_are_the_truncated_ones_and_differ_from_the_policys(knobs):
    logits = padded([logits_of(0.5, 0.3, 0.15, 0.05)] * ROWS)
    tokens, log_probs, _ = sample(keys_of(1), logits, Sampling(**knobs))
    gap = np.asarray(log_probs) - np.asarray(policy_log_probs(logits, tokens))
    np.testing.assert_allclose(gap, np.full(ROWS, -np.log(0.8)), rtol=1e-5)
    assert Sampling(**knobs).alters_policy


@pytest.mark.parametrize("knobs", KNOBS, ids=names)
def test_t14_a_row_depends_on_its_own_key_and_logits_only(knobs):
    rng = np.random.default_rng(5)
    keys, logits, order = keys_of(5), f32(rng.normal(size=(ROWS, V)) * 3), rng.permutation(ROWS)
    tokens, log_probs = (np.asarray(x) for x in sample(keys, logits, Sampling(**knobs))[:2])
    moved = sample(keys[order], logits[order], Sampling(**knobs))
    np.testing.assert_array_equal(moved[0], tokens[order])
    np.testing.assert_array_equal(moved[1], log_probs[order])
    keys[1:], logits[1:] = keys_of(6, ROWS - 1), 0
    others = sample(keys, logits, Sampling(**knobs))
    assert (others[0][0], others[1][0]) == (tokens[0], log_probs[0])


def test_t14_the_size_of_the_batch_does_not_change_a_sample():
    keys, logits = keys_of(7), f32(np.random.default_rng(7).normal(size=(ROWS, 300)) * 3)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    tokens, log_probs = (np.asarray(x) for x in sample(keys, logits, sampling)[:2])
    alone = sample(keys[:1], logits[:1], sampling)
    np.testing.assert_array_equal(alone[0], tokens[:1])
    np.testing.assert_allclose(alone[1], log_probs[:1], rtol=1e-6, atol=1e-6)


def test_different_keys_sample_independently_and_equal_keys_identically():
    logits = np.zeros((ROWS, V), np.float32)
    tokens = [np.asarray(sample(keys_of(seed), logits, Sampling())[0]) for seed in range(20)]
    assert len({tuple(row.tolist()) for row in tokens}) == 20
    assert set(np.concatenate(tokens).tolist()) == set(range(V))
    same = sample(np.repeat(keys_of(0, 1), ROWS, 0), logits, Sampling())[0]
    assert len(set(np.asarray(same).tolist())) == 1


@pytest.mark.parametrize("knobs", [{}, KNOBS[5], KNOBS[6]], ids=["plain", "all", "greedy"])
def test_a_vocabulary_of_one_token(knobs):
    tokens, log_probs, _ = sample(keys_of(0), np.full((ROWS, 1), -7, np.float32), Sampling(**knobs))
    np.testing.assert_array_equal(tokens, 0)
    np.testing.assert_array_equal(log_probs, 0)


def test_extreme_logits():
    logits = padded([[1e4, -1e4, 0.0], [-1e4, -1e4, -np.inf], [-np.inf, -np.inf, 1e4]])
    for seed in range(20):
        tokens, log_probs, _ = sample(keys_of(seed), logits, Sampling())
        assert (tokens[0], tokens[2]) == (0, 2)
        assert tokens[1] in (0, 1)
        np.testing.assert_allclose(log_probs[:3], [0, -np.log(2), 0], rtol=1e-5, atol=1e-5)


def test_no_uniform_number_samples_a_removed_token(monkeypatch):
    # Rounding makes a parallel cumulative sum over many tokens decrease by a last bit at some places. Uniform numbers
    # at such a place occur in one of 50,000 samples with a vocabulary of 50,000, so the test constructs them.
    size, sampling = 20_000, Sampling(top_p=0.95)
    logits = f32(np.random.default_rng(1).normal(size=(1, size)) * 3)
    p = oracle.sampling_distribution(logits[0], top_p=0.95)
    likely = np.cumsum(p)[np.argsort(-p)[:12]]
    numbers = f32(np.append(likely, [0, 1])[:, None] + np.arange(-3, 4) * 2.0**-24)
    numbers = numbers[(numbers >= 0) & (numbers < 1)]
    rows = len(numbers)
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape: jnp.full(shape, jnp.asarray(numbers)[jax.random.key_data(key)[1]])
    )
    keys = np.stack([np.zeros(rows), np.arange(rows)], 1).astype(np.uint32)
    tokens, log_probs, _ = sample(keys, np.repeat(logits, rows, 0), sampling)
    probabilities = p[np.asarray(tokens)]
    assert (probabilities > 0).all()
    np.testing.assert_allclose(log_probs, np.log(probabilities), rtol=1e-4)


EVERY_KNOB = {"temperature": 0.8, "top_k": 200, "top_p": 0.9, "min_p": 0.002}


@pytest.mark.parametrize("knobs", [{}, pytest.param(EVERY_KNOB, marks=pytest.mark.slow)], ids=["plain", "all"])
def test_a_million_samples_over_many_blocks_follow_the_exact_distribution(knobs):
    """A vocabulary of several blocks, the last one incomplete; every filter; chi-square."""
    size, batch, batches = 333, 50_000, 20
    logits = f32(np.random.default_rng(3).normal(size=size) * 1.5)
    p = oracle.sampling_distribution(logits, **knobs)
    counts = np.zeros(size, int)
    for seed in range(batches):
        tokens, log_probs, _ = sample(keys_of(seed, batch), np.broadcast_to(logits, (batch, size)), Sampling(**knobs))
        counts += np.bincount(np.asarray(tokens), minlength=size)
    assert counts.sum() == 1_000_000
    assert counts[p == 0].sum() == 0
    assert (p == 0).any() == bool(knobs)
    assert scipy.stats.chisquare(counts[p > 0], counts.sum() * p[p > 0]).pvalue > 1e-6
    np.testing.assert_allclose(log_probs, np.log(p[np.asarray(tokens)]), rtol=1e-4, atol=1e-5)


# Penalties -----------------------------------------------------------------------------------------------------------


def adjusted(logits, in_prompt=(), in_completion=(), **knobs):
    """One row of adjusted logits, where some tokens are in the prompt and some in the completion."""
    seen = [
        jnp.zeros((1, len(logits)), bool).at[0, jnp.array(tokens, int)].set(True)
        for tokens in (in_prompt, in_completion)
    ]
    options = {name: knobs.pop(name) for name in ("length", "eos_ids") if name in knobs}
    return adjust_logits(
        jnp.array([logits], jnp.float32), Sampling(**knobs), in_prompt=seen[0], in_completion=seen[1], **options
    )[0].tolist()


def test_a_repetition_penalty_divides_positive_logits_and_multiplies_others():
    found = adjusted([2.0, -2.0, 2.0, -2.0, 0.0], in_prompt=[0], in_completion=[1, 4], repetition_penalty=2.0)
    assert found == [1.0, -4.0, 2.0, -2.0, 0.0]


def test_a_presence_penalty_applies_to_completion_tokens_only():
    assert adjusted([1.0, 1.0, 1.0], in_prompt=[0], in_completion=[1], presence_penalty=0.75) == [1.0, 0.25, 1.0]
    assert adjusted([1.0, 1.0], in_completion=[1], presence_penalty=-0.5) == [1.0, 1.5]


def test_a_bias_is_added_and_may_exclude_a_token():
    assert adjusted([1.0, 1.0, 1.0], logit_bias=((2, -3.0), (0, -math.inf))) == [-math.inf, 1.0, -2.0]
    with pytest.raises(ValueError, match=r"logit_bias has tokens \[3, 9\]; the vocabulary has 3"):
        adjusted([1.0, 1.0, 1.0], logit_bias=((3, 1.0), (0, 1.0), (9, 1.0)))


def test_no_eos_token_before_the_minimum_length():
    short = {"min_length": 2, "eos_ids": (0, 2)}
    assert adjusted([5.0, 1.0, 5.0], length=1, **short) == [-math.inf, 1.0, -math.inf]
    assert adjusted([5.0, 1.0, 5.0], length=jnp.int32(2), **short) == [5.0, 1.0, 5.0]


def test_penalties_come_before_the_bias_and_this_before_the_minimum_length():
    found = adjusted(
        [4.0, 4.0],
        in_completion=[0, 1],
        repetition_penalty=2.0,
        presence_penalty=1.0,
        logit_bias=((0, 3.0), (1, 3.0)),
        min_length=1,
        eos_ids=(1,),
    )
    assert found == [4.0, -math.inf]  # 4 / 2 - 1 + 3


@pytest.mark.parametrize(
    ("f", "arguments", "name"),
    [
        (adjust_logits, {"logits": (V,)}, "logits"),
        (adjust_logits, {"logits": (4, V), "in_prompt": (4, 1)}, "in_prompt"),
        (adjust_logits, {"logits": (4, V), "in_completion": (1, V)}, "in_completion"),
        (filter_logits, {"logits": (V,)}, "logits"),
        (sample_token, {"keys": (1, 2), "logits": (4, V)}, "keys: one per row of logits"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_at_trace_time_and_named(f, arguments, name):
    arrays = {name: jnp.zeros(shape) for name, shape in arguments.items()}
    f = inspect.unwrap(f)  # without the tests' check of annotations
    with pytest.raises(AssertionError, match=rf"\[{name}\]"):
        jax.eval_shape(partial(f, sampling=Sampling()), **arrays)


# Settings ------------------------------------------------------------------------------------------------------------


def test_settings_are_hashable_and_equal_by_value_so_that_they_can_be_static():
    assert Sampling(temperature=0.5, top_k=3) == Sampling(temperature=0.5, top_k=3)
    assert hash(Sampling(temperature=0.5, top_k=3)) == hash(Sampling(temperature=0.5, top_k=3))
    with pytest.raises(AttributeError):
        Sampling().temperature = 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("knobs", "alters"),
    [
        ({}, False),
        ({"temperature": 0.3}, False),
        ({"temperature": 0.0}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.99}, True),
        ({"min_p": 0.01}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"logit_bias": ((0, 1.0),)}, True),
        ({"min_length": 1}, True),
    ],
)
def test_alters_policy_says_whether_the_distribution_is_not_the_policys_own(knobs, alters):
    assert Sampling(**knobs).alters_policy is alters


@pytest.mark.parametrize(
    ("knob", "value", "right"),
    [
        ("temperature", -0.1, "0 .greedy. or above"),
        ("temperature", float("nan"), "0 .greedy. or above"),
        ("top_k", 0, "at least 1, or None"),
        ("top_k", -5, "at least 1, or None"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("top_p", float("nan"), "above 0 and at most 1"),
        ("min_p", -0.1, "at least 0 and below 1"),
        ("min_p", 1.0, "at least 0 and below 1"),
        ("min_p", float("nan"), "at least 0 and below 1"),
        ("temperature", float("inf"), "0 .greedy. or above"),
        ("repetition_penalty", 0.0, "above 0 .1 for none."),
        ("repetition_penalty", float("nan"), "above 0 .1 for none."),
        ("presence_penalty", float("inf"), "finite .0 for none."),
        ("min_length", -1, "at least 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name_value_and_range(knob, value, right):
    with pytest.raises(ValueError, match=f"{knob} is {value}; it must be {right}"):
        Sampling(**{knob: value})


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (((-1, 0.0),), "0.0 for token -1; tokens start at 0"),
        (((1, float("inf")),), "inf for token 1; tokens start at 0, biases are finite or -inf"),
        (((1, float("nan")),), "nan for token 1"),
        (((1, 0.0), (1, 2.0)), "has a token twice"),
    ],
)
def test_an_invalid_bias_is_refused(bias, message):
    with pytest.raises(ValueError, match=message):
        Sampling(logit_bias=bias)
