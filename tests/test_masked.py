import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from oracle import f32, f64

from grpo_jax.masked import (
    is_last,
    last_unmasked,
    masked_count,
    masked_mean,
    masked_sum,
    masked_variance,
    max_pair,
    mean_pair,
    positions,
    whiten,
    zero_where_masked,
)
from grpo_jax.types import Max, Mean

SHAPE = (3, 4)
JUNK = [np.nan, np.inf, -np.inf]

floats = st.floats(-100, 100, width=32)
extreme = st.one_of(floats, st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, 0.7, 1e-6, -1e6]))
arrays = hnp.arrays(np.float32, SHAPE, elements=extreme)
masks = hnp.arrays(np.bool_, SHAPE)
junk = st.sampled_from(JUNK)


def polluted(x, mask, value=np.nan):
    return np.where(mask, x, f32(value)).astype(np.float32)


def close(actual, expected, scale=1.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, scale))


jitted = {
    "sum": jax.jit(masked_sum),
    "mean": jax.jit(masked_mean),
    "row_mean": jax.jit(lambda x, m: masked_mean(x, m, 1)),
    "column_sum": jax.jit(lambda x, m: masked_sum(x, m, 0)),
    "variance_0": jax.jit(masked_variance),
    "variance_1": jax.jit(lambda x, m: masked_variance(x, m, 1)),
    "variance_2": jax.jit(lambda x, m: masked_variance(x, m, 2)),
    "whiten": jax.jit(whiten),
    "whiten_in_place": jax.jit(lambda x, m: whiten(x, m, shift_mean=False, epsilon=0.5)),
    "mean_pair": jax.jit(mean_pair),
    "max_pair": jax.jit(max_pair),
    "rows_mean": jax.jit(lambda x, m: jax.vmap(mean_pair)(x, m).reduce().value),
    "rows_max": jax.jit(lambda x, m: jax.vmap(max_pair)(x, m).reduce().value),
    "positions": jax.jit(positions),
    "last": jax.jit(last_unmasked),
    "is_last": jax.jit(is_last),
}

# Sums, means, variances ----------------------------------------------------------------------------------------------


@given(arrays, masks, junk)
def test_sum_and_mean_agree_with_the_oracle(x, mask, value):
    bad = polluted(x, mask, value)
    magnitude = float(np.abs(x).sum())
    close(jitted["sum"](bad, mask), f64(x)[mask].sum(), magnitude)
    close(jitted["mean"](bad, mask), oracle.mean(x, mask), magnitude)
    rows = [oracle.mean(x[i], mask[i]) for i in range(SHAPE[0])]
    close(jitted["row_mean"](bad, mask), rows, magnitude)
    columns = [f64(x[:, i])[mask[:, i]].sum() for i in range(SHAPE[1])]
    close(jitted["column_sum"](bad, mask), columns, magnitude)


@given(arrays, masks, junk, st.sampled_from([0, 1, 2]))
def test_variance_agrees_with_the_oracle(x, mask, value, ddof):
    expected = oracle.variance(x, mask, ddof)
    close(jitted[f"variance_{ddof}"](polluted(x, mask, value), mask), expected, float(np.abs(x).max()) ** 2 * 1e-2)


@pytest.mark.parametrize("ddof", [0, 1, 2, 5])
def test_variance_is_zero_where_there_are_not_more_entries_than_ddof(ddof):
    x, variance = jnp.array([1.0, 3.0, 8.0, -4.0, 7.0, 2.0]), jax.jit(lambda x, m: masked_variance(x, m, ddof))
    for count in range(7):
        value = float(variance(x, np.arange(6) < count))
        assert (value == 0) == (count <= max(ddof, 1)), (count, value)


def test_count_is_float32_and_counts_what_is_unmasked():
    mask = jnp.array([[True, False, True], [False, False, False]])
    assert masked_count(mask).dtype == jnp.float32
    assert float(masked_count(mask)) == 2
    np.testing.assert_array_equal(masked_count(mask, 1), [2, 0])
    np.testing.assert_array_equal(masked_count(mask, 0), [1, 0, 1])


def test_everything_masked_is_zero_with_zero_gradient():
    x, mask = np.full(SHAPE, np.nan, np.float32), np.zeros(SHAPE, bool)

    def all_of_them(x, mask):
        return masked_sum(x, mask) + masked_mean(x, mask) + masked_variance(x, mask) + whiten(x, mask).sum()

    value, grad = jax.jit(jax.value_and_grad(all_of_them))(x, mask)
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros(SHAPE))
    np.testing.assert_array_equal(jitted["whiten"](x, mask), np.zeros(SHAPE))


@pytest.mark.parametrize(
    "f",
    [
        zero_where_masked,
        masked_sum,
        masked_mean,
        masked_variance,
        whiten,
        lambda x, m: whiten(x, m, shift_mean=False),
        last_unmasked,
        lambda x, m: mean_pair(x, m).value,
        lambda x, m: max_pair(x, m).value,
    ],
    ids=["zero", "sum", "mean", "variance", "whiten", "whiten_in_place", "last", "mean_pair", "max_pair"],
)
def test_l5_nothing_at_a_masked_position_reaches_a_result_or_its_gradient(f):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=SHAPE).astype(np.float32), f32(rng.normal(size=SHAPE))
    mask = np.array([[True, False, True, True], [False, True, False, False], [False, False, False, False]])

    @jax.jit
    @jax.value_and_grad
    def scalar(x):
        result = f(x, jnp.asarray(mask))
        return (result * weights.reshape(-1)[: result.size].reshape(result.shape)).sum()

    value_clean, grad_clean = scalar(polluted(x, mask, 0))
    for junk_value in JUNK:
        value_bad, grad_bad = scalar(polluted(x, mask, junk_value))
        assert np.isfinite(value_bad)
        np.testing.assert_array_equal(value_bad, value_clean)
        np.testing.assert_array_equal(grad_bad, grad_clean)
        np.testing.assert_array_equal(np.asarray(grad_bad)[~mask], 0)


# Pairs ---------------------------------------------------------------------------------------------------------------


@given(arrays, masks, junk)
def test_merged_parts_of_a_mean_are_the_mean_of_the_whole(x, mask, value):
    bad = polluted(x, mask, value)
    whole, merged = jitted["mean_pair"](bad, mask), jitted["rows_mean"](bad, mask)
    close(merged, oracle.mean(x, mask), float(np.abs(x).max()))
    assert int(whole.count) == mask.sum()
    close(whole.value, merged, float(np.abs(x).max()))


@given(arrays, masks, junk)
def test_merged_parts_of_a_maximum_are_the_maximum_of_the_whole(x, mask, value):
    bad = polluted(x, mask, value)
    expected = x[mask].max() if mask.any() else 0
    assert float(jitted["max_pair"](bad, mask).value) == expected
    assert float(jitted["rows_max"](bad, mask)) == expected


def test_an_empty_mean_is_zero_and_differentiable():
    value, grad = jax.jit(jax.value_and_grad(lambda s: Mean(s, jnp.float32(0)).value))(f32(np.nan))
    assert value == 0
    assert grad == 0


def test_the_maximum_of_nothing_is_minus_infinity_on_its_way_and_zero_at_the_end():
    shape = np.ones(SHAPE, np.float32)
    nothing = jitted["max_pair"](shape, np.zeros(SHAPE, bool))
    assert nothing.max == -jnp.inf
    assert nothing.value == 0
    negative = jitted["max_pair"](-5 * shape, np.ones(SHAPE, bool))
    merged = jax.tree.map(lambda *parts: jnp.stack(parts), nothing, negative).reduce()
    assert isinstance(merged, Max)
    assert merged.value == -5


def test_a_mean_of_flags_is_the_share_that_is_set():
    flags, mask = np.array([True, False, True, True]), np.array([True, True, True, False])
    close(jitted["mean_pair"](flags, mask).value, 2 / 3)


def test_pairs_are_accumulated_in_float32():
    x, mask = np.ones(1000, jnp.bfloat16), np.ones(1000, bool)
    pair = jitted["mean_pair"](x, mask)
    assert pair.sum.dtype == pair.count.dtype == jitted["max_pair"](x, mask).max.dtype == jnp.float32
    assert float(pair.sum) == float(pair.count) == 1000


def test_pairs_pass_through_jit_scan_and_grad():
    def body(_, x):
        return None, mean_pair(x, jnp.ones(4, bool))

    x = jnp.arange(12.0).reshape(3, 4)
    value, grad = jax.jit(jax.value_and_grad(lambda x: jax.lax.scan(body, None, x)[1].reduce().value))(x)
    assert value == 5.5
    np.testing.assert_allclose(grad, np.full((3, 4), 1 / 12), rtol=1e-6)


# Whitening -----------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, SHAPE, elements=floats), masks, junk)
def test_a9_whitening_takes_mean_and_variance_over_unmasked_entries_only(x, mask, value):
    bad = polluted(x, mask, value)
    expected = oracle.whiten(x, mask)
    if oracle.variance(x, mask) > 1e-4:
        np.testing.assert_allclose(jitted["whiten"](bad, mask), expected, rtol=1e-4, atol=1e-4)
    close(jitted["whiten_in_place"](bad, mask), oracle.whiten(x, mask, shift_mean=False, epsilon=0.5), np.abs(x).max())


def test_a9_whitened_entries_have_mean_0_and_variance_1_and_masked_ones_are_0():
    rng = np.random.default_rng(0)
    x, mask = f32(rng.normal(size=(5, 40)) * 3 + 100), rng.random((5, 40)) < 0.6
    y = np.asarray(jitted["whiten"](x, mask), np.float64)
    close(oracle.mean(y, mask), 0)
    close(oracle.variance(y, mask), 1)
    np.testing.assert_array_equal(y[~mask], 0)
    kept = np.asarray(jax.jit(lambda x, m: whiten(x, m, shift_mean=False))(x, mask), np.float64)
    close(oracle.mean(kept, mask), oracle.mean(x, mask))
    close(oracle.variance(kept, mask), 1)


@pytest.mark.parametrize("value", [0.7, 1000.1, 12345.678])
def test_whitening_equal_entries_gives_mean_0_not_the_rounding_of_a_mean(value):
    assert np.abs(jitted["whiten"](np.full(SHAPE, value, np.float32), np.ones(SHAPE, bool))).max() < 1e-5


def test_whiten_gradient_agrees_with_the_oracle():
    rng = np.random.default_rng(1)
    x, mask, weights = rng.normal(size=SHAPE), rng.random(SHAPE) < 0.7, rng.normal(size=SHAPE)
    expected = oracle.numeric_grad(lambda x: (oracle.whiten(x, mask) * weights).sum(), x, mask)
    scalar = jax.jit(jax.grad(lambda x: (whiten(x, jnp.asarray(mask)) * f32(weights)).sum()))
    grad = scalar(polluted(x, mask, 0))
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


# Positions and last entries ------------------------------------------------------------------------------------------


@given(masks)
def test_a_position_is_the_number_of_unmasked_tokens_before_it(mask):
    result = np.asarray(jitted["positions"](mask))
    assert result.dtype == np.int32
    for row, index in np.ndindex(SHAPE):
        if mask[row, index] or not mask[row, :index].any():
            assert result[row, index] == mask[row, :index].sum()


def test_t5_left_padding_by_any_amount_leaves_positions_unchanged():
    for padding in range(3):
        mask = np.broadcast_to(np.arange(4) >= padding, SHAPE)
        result = np.asarray(jitted["positions"](mask))[0]
        np.testing.assert_array_equal(result, [0] * padding + list(range(4 - padding)))


@given(masks)
def test_is_last_is_true_at_the_last_unmasked_position_of_each_row_and_nowhere_else(mask):
    result = np.asarray(jitted["is_last"](mask))
    assert result.dtype == bool
    np.testing.assert_array_equal(result, oracle.is_last(mask))
    np.testing.assert_array_equal(result.sum(1), mask.any(1))  # nowhere in a row that is all masked


def test_the_last_entry_is_where_is_last_says_also_beyond_holes_and_left_padding():
    mask = np.array([[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    expected = np.array([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(jitted["is_last"](mask), expected)
    np.testing.assert_array_equal(jitted["last"](f32(np.arange(1, 13)).reshape(SHAPE), mask), [4, 7, 0])


@pytest.mark.parametrize("value", JUNK)
def test_the_last_entry_is_given_as_it_is_and_nothing_of_those_before_it(value):
    x = f32([[value, value, 3, 0], [1, 2, value, 0], [value, value, value, value]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(jitted["last"](x, mask), f32([3, value, 0]))
    np.testing.assert_array_equal(
        jax.jit(jax.grad(lambda x: last_unmasked(x, jnp.asarray(mask)).sum()))(x), oracle.is_last(mask)
    )


@given(arrays, masks, junk)
def test_last_unmasked_agrees_with_the_oracle(x, mask, value):
    expected = [row[np.flatnonzero(m)[-1]] if m.any() else 0 for row, m in zip(x, mask, strict=True)]
    np.testing.assert_array_equal(jitted["last"](polluted(x, mask, value), mask), expected)


@pytest.mark.parametrize("pad_id", [0, 2, 7])
def test_l16_a_reward_model_reads_its_score_at_the_last_attended_token_whatever_the_pad_id(pad_id):
    ids = np.array([[5, 7, 2, pad_id], [0, 2, 7, 0], [7, pad_id, pad_id, pad_id]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=bool)
    scores = f32(ids * 10 + np.arange(4))
    np.testing.assert_array_equal(jitted["last"](scores, mask), [22, 3, 70])
    np.testing.assert_array_equal(np.argmax(jitted["is_last"](mask), axis=1), [2, 3, 0])
