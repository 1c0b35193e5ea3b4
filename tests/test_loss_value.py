import inspect
from functools import partial

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from oracle import f32, f64

from grpo_jax.advantage import gae
from grpo_jax.loss import value_loss

SHAPES = [(4, 3), (2, 8), (4, 8)]  # the last can be made of the others
JUNK = [np.nan, np.inf, -np.inf]
EPSILONS = [None, 0.2, 0.5]


def batch_of(seed=0, shape=SHAPES[0], junk=np.nan):
    """Random values with holes and empty rows in the mask, and junk at every masked position."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < rng.choice([0.2, 0.6, 0.95])
    mask[rng.random(shape[0]) < 0.2] = False
    old = rng.normal(size=shape) * rng.choice([0.5, 5])

    def field(x):
        return np.where(mask, f32(x), f32(junk))

    return {
        "values": field(old + rng.normal(size=shape) * 0.4),
        "returns": field(old + rng.normal(size=shape) * 0.6),
        "mask": mask,
        "old_values": field(old),
    }


@partial(jax.jit, static_argnames="epsilon")
def value_and_grad(values, returns, mask, old_values=None, epsilon=None):
    def value(values):
        pair, metrics = value_loss(values, returns, mask, old_values=old_values, epsilon=epsilon)
        return pair.value, (pair, metrics)

    return jax.value_and_grad(value, has_aux=True)(values)


def run(batch, epsilon):
    (value, (_, metrics)), grad = value_and_grad(**batch, epsilon=epsilon)
    return float(value), np.asarray(grad), {name: float(m.value) for name, m in metrics.items()}


def close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)


same_metrics = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def near_a_kink(batch, epsilon):
    """Whether a finite difference at some value would step across a bound of the clip, or from one side to another."""
    values, returns, old = (np.where(batch["mask"], f64(batch[k]), 0) for k in ("values", "returns", "old_values"))
    distance = np.abs(np.abs(values - old) - epsilon)
    clipped = np.clip(values, old - epsilon, old + epsilon)
    between = np.abs((values + clipped) / 2 - returns)
    return bool((batch["mask"] & ((distance < 1e-4) | ((clipped != values) & (between < 1e-4)))).any())


@pytest.mark.parametrize("epsilon", EPSILONS)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), junk=st.sampled_from(JUNK))
def test_values_gradients_and_metrics_agree_with_the_oracle_whatever_stands_at_masked_positions(
    epsilon, seed, shape, junk
):
    batch = batch_of(seed, shape, junk)
    value, grad, metrics = run(batch, epsilon)

    def loss(values):
        return oracle.value_loss(values, batch["returns"], batch["mask"], old=batch["old_values"], epsilon=epsilon)

    expected, expected_metrics = loss(batch["values"])
    close(value, expected)
    np.testing.assert_array_equal(grad[~batch["mask"]], 0)
    if epsilon is None or not near_a_kink(batch, epsilon):
        same_metrics(metrics, expected_metrics)
        close(grad, oracle.numeric_grad(lambda values: loss(values)[0], batch["values"], batch["mask"]))


@pytest.mark.parametrize("epsilon", [0.2, 0.5])
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
def test_values_and_gradients_are_those_of_trl_and_verl_in_torch(epsilon, seed, shape):
    batch = batch_of(seed, shape, junk=0.0)
    batch["mask"][0, 0] = True  # theirs divides by the number of tokens
    if near_a_kink(batch, epsilon):
        return
    vpred = torch.tensor(f64(batch["values"]), requires_grad=True)
    values, returns, mask = (torch.tensor(f64(batch[k])) for k in ("old_values", "returns", "mask"))
    vpredclipped = torch.clamp(vpred, values - epsilon, values + epsilon)
    vf_losses1, vf_losses2 = (vpred - returns) ** 2, (vpredclipped - returns) ** 2
    vf_loss = 0.5 * (torch.max(vf_losses1, vf_losses2) * mask).sum() / mask.sum()
    vf_clipfrac = ((vf_losses2 > vf_losses1).double() * mask).sum() / mask.sum()
    vf_loss.backward()
    value, grad, metrics = run(batch, epsilon)
    close(value, vf_loss.item())
    close(grad, vpred.grad)
    close(metrics["value/clip_ratio"], vf_clipfrac)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_junk_at_masked_positions_changes_no_bit_of_loss_gradient_or_metrics(epsilon):
    value, grad, metrics = run(batch_of(5, junk=0.0), epsilon)
    assert 0 < batch_of(5)["mask"].sum() < 12
    for junk in JUNK:
        chex.assert_trees_all_equal(run(batch_of(5, junk=junk), epsilon), (value, grad, metrics))


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_l3_more_padding_columns_change_neither_loss_nor_gradient(epsilon):
    batch = batch_of(11, (4, 3))
    wider = {k: np.pad(v, ((0, 0), (0, 5)), constant_values=False if k == "mask" else np.nan) for k, v in batch.items()}
    (value, grad, metrics), (wide_value, wide_grad, wide_metrics) = run(batch, epsilon), run(wider, epsilon)
    close(wide_value, value, rtol=1e-6, atol=1e-7)
    close(wide_grad[:, :3], grad, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(wide_grad[:, 3:], 0)
    same_metrics(wide_metrics, metrics, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_l2_micro_batches_merge_to_the_loss_the_gradient_and_the_metrics_of_the_whole(epsilon):
    batch = batch_of(13, (4, 8))
    batch["mask"][:2, 1:] = False  # parts of different weight
    value, grad, metrics = run(batch, epsilon)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    results = [value_and_grad(**part, epsilon=epsilon) for part in parts]
    pairs, pair_metrics = jax.tree.map(lambda *x: jnp.stack(x), *(aux for (_, aux), _ in results))
    pair = pairs.reduce()
    close(pair.value, value, rtol=1e-6, atol=1e-6)
    of_sums = [np.asarray(g) * float(aux[0].count) for (_, aux), g in results]
    close(np.concatenate(of_sums) / float(pair.count), grad, rtol=1e-6, atol=1e-6)
    same_metrics({name: float(m.reduce().value) for name, m in pair_metrics.items()}, metrics, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_l4_everything_masked_gives_loss_0_and_gradients_0(epsilon):
    batch = {k: np.zeros_like(v) if k == "mask" else np.full_like(v, np.nan) for k, v in batch_of().items()}
    value, grad, metrics = run(batch, epsilon)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
    assert set(metrics.values()) == {0.0}


def test_the_larger_of_both_sides_counts_and_a_value_that_has_moved_far_enough_is_pulled_no_further():
    # From 0, by 1 where 0.2 is allowed: towards its return, past its return, away from it; and within the bounds.
    batch = {
        "values": f32([[1.0, 1.0, 1.0], [0.1, 9, 9], [9, 9, 9], [9, 9, 9]]),
        "returns": f32([[2.0, 0.0, -1.0], [0.3, 9, 9], [9, 9, 9], [9, 9, 9]]),
        "mask": np.array([[True, True, True], [True, False, False], [False] * 3, [False] * 3]),
        "old_values": np.zeros((4, 3), np.float32),
    }
    value, grad, metrics = run(batch, 0.2)
    close(value, (1.8**2 + 1 + 4 + 0.2**2) / 2 / 4)
    close(grad[:2], [[0, 1 / 4, 2 / 4], [-0.2 / 4, 0, 0]])
    expected = {"value/mean": 3.1 / 4, "value/error": (1 + 1 + 4 + 0.04) / 4, "value/clip_ratio": 1 / 4}
    same_metrics(metrics, expected)
    value, grad, metrics = run(batch, None)
    close(value, (1 + 1 + 4 + 0.04) / 2 / 4)
    close(grad[:2], [[-1 / 4, 1 / 4, 2 / 4], [-0.2 / 4, 0, 0]])
    assert metrics.keys() == {"value/mean", "value/error"}


def test_without_epsilon_old_values_are_not_needed_and_change_nothing():
    batch = batch_of(3)
    chex.assert_trees_all_equal(run(batch, None), run({k: v for k, v in batch.items() if k != "old_values"}, None))


def test_on_the_first_pass_the_error_is_the_advantage_and_nothing_is_clipped():
    rng = np.random.default_rng(0)
    rewards, values, mask = f32(rng.normal(size=(4, 8))), f32(rng.normal(size=(4, 8))), rng.random((4, 8)) < 0.7
    advantages, returns = jax.jit(gae)(rewards, values, mask)
    value, grad, metrics = run({"values": values, "returns": returns, "mask": mask, "old_values": values}, 0.2)
    close(value, (f64(advantages)[mask] ** 2).mean() / 2)
    close(grad, -f64(advantages) / mask.sum())
    assert metrics["value/clip_ratio"] == 0


def test_the_gradient_flows_through_values_alone():
    batch = batch_of(4, junk=0.0)

    def loss(values, returns, old_values):
        knobs = {"old_values": old_values, "epsilon": 0.2}
        return value_loss(values, returns, jnp.asarray(batch["mask"]), **knobs)[0].value

    arrays = [batch[k] for k in ("values", "returns", "old_values")]
    of_values, of_returns, of_old = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    assert np.abs(of_values).max() > 0
    assert run(batch, 0.2)[2]["value/clip_ratio"] > 0
    np.testing.assert_array_equal(of_returns, 0)
    np.testing.assert_array_equal(of_old, 0)


@pytest.mark.parametrize("name", ["returns", "mask", "old_values"])
@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (1, 3), (4,), ()])
def test_shapes_that_differ_are_refused_at_trace_time_and_named(name, shape):
    unchecked = inspect.unwrap(value_loss)  # by jaxtyping, as users call it
    fields = {k: jnp.zeros((4, 3), bool if k == "mask" else np.float32) for k in ("values", "returns", "mask")}
    fields["old_values"] = jnp.zeros((4, 3))
    fields[name] = jnp.zeros(shape, fields[name].dtype)
    for epsilon in (None, 0.2):
        with pytest.raises(AssertionError, match=rf"has shape \(.*\) but expected \(4, 3\).*\[{name}\]") as error:
            jax.eval_shape(partial(unchecked, epsilon=epsilon), **fields)
        assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    ("epsilon", "with_old"), [(0.2, False), (0.0, True), (-0.1, True), (float("nan"), True), (0.0, False)]
)
def test_an_epsilon_not_above_0_or_without_old_values_is_refused_at_trace_time(epsilon, with_old):
    x, mask = np.zeros((4, 3), np.float32), np.ones((4, 3), bool)
    others = {"old_values": x} if with_old else {}
    with pytest.raises(ValueError, match=f"epsilon is {epsilon}; it must be above 0, and needs old_values"):
        jax.eval_shape(partial(value_loss, epsilon=epsilon), x, x, mask, **others)
