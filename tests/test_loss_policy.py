import inspect
from functools import partial

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from oracle import f32, f64

from grpo_jax.advantage import group_relative
from grpo_jax.loss import (
    cispo,
    cispo_loss,
    clipped_surrogate,
    constant_length,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    ppo_loss,
    sapo,
    sapo_loss,
    sequence_log_ratio,
    sequence_mean,
    supervised_loss,
    token_log_ratio,
    token_mean,
    truncated_importance,
)

B, T = 4, 6
JUNK = [np.nan, np.inf, -np.inf]

aggregations = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": partial(constant_length, length=8),
}
dual = partial(clipped_surrogate, dual_clip=3.0)
oracle_dual = partial(oracle.clipped, dual_clip=3.0)

# Each composition, as (what is under test, the oracle's knobs for the same); junk fields are filled in by ``batch_of``.
compositions = {
    "grpo": (grpo_loss, {}),
    "grpo_kl": (partial(grpo_loss, kl_coef=0.3), {"kl_coef": 0.3}),
    "gspo_kl_corrected": (
        partial(gspo_loss, kl_coef=0.3, kl_correction=True),
        {
            "surrogate": partial(oracle.clipped, low=3e-4, high=4e-4),
            "per_sequence": True,
            "kl_coef": 0.3,
            "kl_correction": True,
        },
    ),
    "everything": (
        partial(
            grpo_loss, kl=kl_k2, kl_coef=0.2, entropy_coef=0.1, importance_cap=1.1, aggregate=token_mean, surrogate=dual
        ),
        {
            "kl": oracle.k2,
            "kl_coef": 0.2,
            "entropy_coef": 0.1,
            "cap": 1.1,
            "aggregate": "token",
            "surrogate": oracle_dual,
        },
    ),
    "dr_grpo": (partial(dr_grpo_loss, max_completion_length=8), {"aggregate": "constant", "length": 8}),
    "dapo": (dapo_loss, {"surrogate": partial(oracle.clipped, low=0.2, high=0.28), "aggregate": "token"}),
    "gspo": (gspo_loss, {"surrogate": partial(oracle.clipped, low=3e-4, high=4e-4), "per_sequence": True}),
    "cispo": (cispo_loss, {"surrogate": oracle.cispo, "aggregate": "token"}),
    "sapo": (sapo_loss, {"surrogate": oracle.sapo}),
}


def batch_of(seed, junk=np.nan, unmasked=False):
    """Random sequences with holes and empty rows in the mask, and junk at every masked position."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((B, T)) < rng.choice([0.2, 0.6, 0.95])) | unmasked
    mask[rng.random(B) < 0.2] &= unmasked

    def field(x):
        return np.where(mask, f32(x), f32(junk))

    log_probs = -rng.gamma(2.0, 0.5, (B, T))
    return {
        "log_probs": field(log_probs),
        "advantages": f32(rng.choice([-1.5, -0.3, 0.0, 0.8, 2.0], B)),
        "mask": mask,
        "old_log_probs": field(log_probs + rng.normal(size=(B, T)) * rng.choice([0.05, 0.5])),
        "ref_log_probs": field(log_probs + rng.normal(size=(B, T)) * 0.5),
        "rollout_log_probs": field(log_probs + rng.normal(size=(B, T)) * 0.3),
        "entropy": field(rng.gamma(2.0, 0.5, (B, T))),
    }


@partial(jax.jit, static_argnums=0)
def value_and_grad(loss, log_probs, advantages, mask, others):
    def value(log_probs):
        pair, metrics = loss(log_probs, advantages, mask, **others)
        return pair.value, metrics

    return jax.value_and_grad(value, has_aux=True)(log_probs)


def run(loss, batch):
    others = {k: v for k, v in batch.items() if k not in ("log_probs", "advantages", "mask")}
    (value, metrics), grad = value_and_grad(loss, batch["log_probs"], batch["advantages"], batch["mask"], others)
    return float(value), np.asarray(grad), {name: float(m.value) for name, m in metrics.items()}


def oracle_loss(batch, log_probs=None, **knobs):
    names = {"old": "old_log_probs", "ref": "ref_log_probs", "rollout": "rollout_log_probs", "entropy": "entropy"}
    fields = {name: batch.get(key) for name, key in names.items()}
    varied = batch["log_probs"] if log_probs is None else log_probs
    return oracle.grpo_loss(varied, batch["advantages"], batch["mask"], base=batch["log_probs"], **fields, **knobs)


@partial(jax.jit, static_argnames="aggregate")
def on_policy(log_probs, advantages, mask, aggregate):
    return grpo_loss(log_probs, advantages, mask, aggregate=aggregate)[0].value


advantages_of_4 = jax.jit(partial(group_relative, group_size=4))


def close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)


# Every composition against the oracle --------------------------------------------------------------------------------


def near_a_kink(batch, low, high, per_sequence):
    """Whether some ratio lies so close to a bound of the clip that a finite difference would step across it."""
    new, old = (np.where(batch["mask"], f64(batch[k]), 0) for k in ("log_probs", "old_log_probs"))
    d = new - old
    if per_sequence:
        d = d.sum(1) / np.maximum(batch["mask"].sum(1), 1)
    return any((np.abs(np.exp(d) - bound) < 2e-5).any() for bound in (1 - low, 1 + high, 3.0))


@pytest.mark.parametrize("name", compositions)
@given(seed=st.integers(0, 2**32 - 1), junk=st.sampled_from(JUNK))
def test_l5_values_and_gradients_agree_with_the_oracle_whatever_stands_at_masked_positions(name, seed, junk):
    loss, knobs = compositions[name]
    batch = batch_of(seed, junk)
    value, grad, metrics = run(loss, batch)
    close(value, oracle_loss(batch, **knobs))
    chex.assert_tree_all_finite((value, grad, metrics))
    np.testing.assert_array_equal(grad[~batch["mask"]], 0)
    surrogate = knobs.get("surrogate", oracle.clipped)
    bounds = surrogate.keywords if isinstance(surrogate, partial) else {}
    per_sequence = knobs.get("per_sequence", False)
    if not near_a_kink(batch, bounds.get("low", 0.2), bounds.get("high", 0.2), per_sequence):
        expected = oracle.numeric_grad(partial(oracle_loss, batch, **knobs), batch["log_probs"], batch["mask"])
        close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo_kl_corrected", "cispo", "everything"])
def test_on_policy_without_old_log_probs_agrees_with_the_oracle(name):
    loss, knobs = compositions[name]
    batch = {k: v for k, v in batch_of(7).items() if k != "old_log_probs"}
    assert batch["mask"].any()
    value, grad, _ = run(loss, batch)
    close(value, oracle_loss(batch, **knobs))
    expected = oracle.numeric_grad(partial(oracle_loss, batch, **knobs), batch["log_probs"], batch["mask"])
    close(grad, expected, rtol=1e-4, atol=1e-5)


def test_advantages_may_differ_from_token_to_token():
    batch = batch_of(3)
    spread = np.where(batch["mask"], batch["advantages"][:, None], f32(np.nan))
    chex.assert_trees_all_equal(run(grpo_loss, batch), run(grpo_loss, {**batch, "advantages": spread}))
    varied = f32(np.random.default_rng(0).normal(size=(B, T)))
    close(run(grpo_loss, {**batch, "advantages": varied})[0], oracle_loss({**batch, "advantages": varied}))


# Aggregation ---------------------------------------------------------------------------------------------------------


def test_l1_lengths_1_and_3_with_advantages_plus_and_minus_1():
    mask = np.array([[True, False, False], [True, True, True]])
    expected = {"token": 0.5, "sequence": 0.0, "constant": 0.125}
    for name, aggregate in aggregations.items():
        close(on_policy(np.zeros((2, 3), np.float32), f32([1, -1]), mask, aggregate=aggregate), expected[name])


def test_empty_sequences_do_not_count():
    x, mask = f32([[1, 2, 3], [4, 5, 6]]), np.array([[True, True, False], [True, False, False]])
    more = np.append(x, np.full((3, 3), np.nan, np.float32), 0), np.append(mask, np.zeros((3, 3), bool), 0)
    values = jax.jit(lambda x, m: [aggregate(x, m).value for aggregate in aggregations.values()])
    close(values(x, mask), [7 / 3, (1.5 + 4) / 2, 7 / 16])
    close(values(*more), values(x, mask))


@jax.jit
def part_sums(batch):
    """Sums, counts and gradients of sums of one micro-batch, for every aggregation."""

    def total(log_probs, aggregate):
        rest = {k: v for k, v in batch.items() if k not in ("log_probs", "advantages", "mask")}
        knobs = {"kl_coef": 0.1, "entropy_coef": 0.1, "importance_cap": 2.0, "aggregate": aggregate}
        pair, metrics = grpo_loss(log_probs, batch["advantages"], batch["mask"], **rest, **knobs)
        return pair.sum, (pair, metrics)

    grads = {k: jax.grad(partial(total, aggregate=f), has_aux=True) for k, f in aggregations.items()}
    return {k: f(batch["log_probs"]) for k, f in grads.items()}


def micro_batched(batch, parts):
    """Value, gradient and metrics of the batch computed in parts, as a train step merges them."""
    rows = len(batch["advantages"]) // parts
    results = [part_sums({k: v[i * rows : (i + 1) * rows] for k, v in batch.items()}) for i in range(parts)]
    merged = {}
    for name in aggregations:
        grads, aux = zip(*(r[name] for r in results), strict=True)
        pair, metrics = jax.tree.map(lambda *x: jnp.stack(x), *aux)
        pair, metrics = pair.reduce(), {k: float(m.reduce().value) for k, m in metrics.items()}
        merged[name] = float(pair.value), np.concatenate(grads) / max(float(pair.count), 1), metrics
    return merged


@pytest.mark.parametrize("seed", range(4))
def test_l2_micro_batches_give_the_loss_the_gradients_and_the_metrics_of_the_whole(seed):
    batches = [batch_of(seed), batch_of(seed + 100)]
    batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    whole = micro_batched(batch, 1)
    for parts in (2, 4):
        chex.assert_trees_all_close(micro_batched(batch, parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo_kl", "everything", "dr_grpo", "gspo"])
def test_l3_ten_more_padding_columns_change_neither_loss_nor_gradient(name):
    loss, _ = compositions[name]
    batch = batch_of(11)
    wider = {
        k: v if v.ndim == 1 else np.pad(v, ((0, 0), (0, 10)), constant_values=False if k == "mask" else np.nan)
        for k, v in batch.items()
    }
    (value, grad, metrics), (wide_value, wide_grad, wide_metrics) = run(loss, batch), run(loss, wider)
    close(wide_value, value, rtol=1e-6, atol=1e-7)
    close(wide_grad[:, :T], grad, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(wide_grad[:, T:], 0)
    close(list(wide_metrics.values()), list(metrics.values()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", compositions)
def test_l4_everything_masked_gives_loss_0_and_gradients_0(name):
    batch = batch_of(0)
    batch = {k: np.full_like(v, np.nan) if v.ndim == 2 and k != "mask" else v for k, v in batch.items()}
    value, grad, metrics = run(compositions[name][0], {**batch, "mask": np.zeros((B, T), bool)})
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
    assert set(metrics.values()) == {0.0}


def test_a5_a_sample_without_a_reward_drops_out_of_the_loss():
    batch = batch_of(5, unmasked=True)
    rewards = f32([1.0, 0.0, np.nan, 0.5])
    advantages = np.asarray(advantages_of_4(rewards))
    mask = batch["mask"] & ~np.isnan(rewards)[:, None]
    rows = ~np.isnan(rewards)
    for aggregate in (token_mean, sequence_mean):
        with_absent = on_policy(batch["log_probs"], advantages, mask, aggregate=aggregate)
        without = on_policy(batch["log_probs"][rows], advantages[rows], mask[rows], aggregate=aggregate)
        close(with_absent, without)


# Surrogates ----------------------------------------------------------------------------------------------------------


def surrogate_at(f, ratio, advantage):
    """Value and gradient by the log-probability of one token whose old log-probability is 0."""
    return of_one_token(f, np.log(f32(ratio)), f32(advantage))


@partial(jax.jit, static_argnums=0)
def of_one_token(f, log_prob, advantage):
    return jax.value_and_grad(lambda log_prob: f(jnp.exp(log_prob), advantage, log_prob))(log_prob)


clip_higher = partial(clipped_surrogate, epsilon_low=0.2, epsilon_high=0.28)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(1.5, 1, -1.28), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8)]
)
def test_l6_clip_higher(ratio, advantage, expected):
    close(surrogate_at(clip_higher, ratio, advantage)[0], expected)


def test_l6_dual_clip_caps_the_side_of_negative_advantages():
    close(surrogate_at(dual, 10, -2)[0], 6)
    close(surrogate_at(dual, 2, -2)[0], 4)
    close(surrogate_at(dual, 10, 2)[0], -2.4)
    assert surrogate_at(dual, 10, -2)[1] == 0
    assert surrogate_at(dual, 2, -2)[1] != 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(0.5, -1, 0), (2, -1, 2), (2, 1, 0), (0.5, 1, -0.5), (1, 1, -1), (1, -1, 1), (1.1, 1, -1.1)],
)
def test_l7_gradient_of_the_clipped_surrogate(ratio, advantage, gradient):
    close(surrogate_at(clipped_surrogate, ratio, advantage)[1], gradient)


@partial(jax.jit, static_argnames="low")
def three_surrogates(ratio, advantage, log_prob, low):
    token, knobs = (ratio, advantage, log_prob), {"epsilon_low": low, "epsilon_high": low + 0.08}
    gate = sapo(*token, temperature_positive=0.9, temperature_negative=2.0)
    return clipped_surrogate(*token, **knobs), cispo(*token, **knobs), gate


@given(st.floats(-3, 3, width=32), st.sampled_from([-2.0, -0.5, 0.0, 1.0]), st.sampled_from([0.1, 0.2]))
def test_surrogates_agree_with_the_oracle(log_ratio, advantage, low):
    ratio, log_prob = f32(np.exp(f32(log_ratio))), f32(-1.5)
    twin = (float(ratio), float(ratio), advantage, float(log_prob))
    expected = [
        oracle.clipped(*twin, low=low, high=low + 0.08),
        oracle.cispo(*twin, low=low, high=low + 0.08),
        oracle.sapo(*twin, positive=0.9, negative=2.0),
    ]
    close(three_surrogates(ratio, f32(advantage), log_prob, low=low), expected)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, float("nan")])
def test_a_dual_clip_not_above_1_is_refused_by_name_and_value(dual_clip):
    with pytest.raises(ValueError, match=f"dual_clip is {dual_clip}.*above 1"):
        jax.eval_shape(partial(clipped_surrogate, dual_clip=dual_clip), f32(1), f32(1))


def test_l11_the_clipped_weight_of_cispo_carries_no_gradient_and_the_log_probability_does():
    for ratio, weight in [(10.0, 5.0), (3.0, 3.0), (1.0, 1.0), (1e-3, 1e-3)]:
        for advantage in (1.5, -1.5):
            value, gradient = surrogate_at(cispo, ratio, advantage)
            close(value, -weight * advantage * np.log(ratio), rtol=1e-4)
            close(gradient, -weight * advantage)


def test_cispo_has_no_lower_bound_at_epsilon_low_1():
    close(surrogate_at(cispo, 1e-6, 1.0)[1], -1e-6, atol=1e-9)
    close(surrogate_at(partial(cispo, epsilon_low=0.2), 1e-6, 1.0)[1], -0.8)


def test_shapes_that_do_not_fit_are_named():
    unchecked = inspect.unwrap(grpo_loss)  # by jaxtyping, as users call it
    x, mask = jnp.zeros((4, 3)), jnp.ones((4, 3), bool)
    for advantages in (jnp.zeros(3), jnp.zeros(1), jnp.float32(0), jnp.zeros((4, 1))):
        with pytest.raises(ValueError, match=r"advantages has the shape .*; one per sequence is \(4,\)"):
            unchecked(x, advantages, mask)
    with pytest.raises(AssertionError, match=r"has shape \(4, 1\) but expected \(4, 3\).*\[mask\]"):
        unchecked(x, jnp.zeros(4), mask[:, :1])
    with pytest.raises(AssertionError, match=r"has type float32 but expected bool.*\[mask\]"):
        unchecked(x, jnp.zeros(4), mask.astype(jnp.float32))
    with pytest.raises(AssertionError, match=r"has rank 1 .* but expected 2.*\[log_probs\]"):
        unchecked(x[0], jnp.zeros(4), mask)
    with pytest.raises(AssertionError, match=r"has shape \(4, 2\) but expected \(4, 3\).*\[old_log_probs\]"):
        unchecked(x, jnp.zeros(4), mask, old_log_probs=x[:, :2])


def test_hyperparameters_that_would_divide_by_zero_are_refused():
    with pytest.raises(ValueError, match=r"temperatures must be above 0, not 1\.0 and 0\.0"):
        surrogate_at(partial(sapo, temperature_negative=0.0), 1.0, 1.0)
    with pytest.raises(ValueError, match="length is 0"):
        constant_length(jnp.ones((1, 2)), jnp.ones((1, 2), bool), length=0)


def test_the_gate_of_sapo():
    close(surrogate_at(sapo, 1.0, 2.0)[0], -4.0)  # sigmoid(0) 4 / 1 = 2
    close(surrogate_at(sapo, 1.0, -2.0)[0], 4 / 1.05)
    for advantage in (2.0, -2.0):
        close(surrogate_at(sapo, 1.0, advantage)[1], -advantage)  # on policy, that of the unclipped objective
    slow, fast = (surrogate_at(partial(sapo, temperature_negative=tau), 4.0, -1.0)[1] for tau in (1.0, 2.0))
    assert 0 < float(fast) < float(slow)  # the larger temperature lets an off-policy token fade faster


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_a_log_ratio_beyond_the_exponential_of_float32_leaves_loss_and_gradient_finite(name, advantage):
    batch = batch_of(0, unmasked=True)
    batch["old_log_probs"] = batch["log_probs"] - f32(100)
    batch["advantages"] = np.full(B, advantage, np.float32)
    value, grad, metrics = run(compositions[name][0], batch)
    chex.assert_tree_all_finite((value, grad, metrics))
    if name != "cispo" or advantage == 0:
        np.testing.assert_array_equal(grad, 0)


# Ratios --------------------------------------------------------------------------------------------------------------


def test_l8_first_on_policy_pass_without_kl():
    batch = batch_of(1, unmasked=True)
    batch["advantages"] = np.asarray(advantages_of_4(f32([1, 0, 0, 1])))
    value, grad, metrics = run(grpo_loss, {k: v for k, v in batch.items() if k != "old_log_probs"})
    repeated = run(grpo_loss, {**batch, "old_log_probs": batch["log_probs"]})
    chex.assert_trees_all_equal(repeated[:2], (value, grad))
    close(value, 0, atol=1e-6)
    assert np.linalg.norm(grad) > 0.1
    assert metrics["clip_ratio/region_mean"] == 0
    np.testing.assert_array_equal(ratios_of({**batch, "old_log_probs": batch["log_probs"]}), 1)


def test_l9_once_the_policy_has_moved_ratios_differ_from_1_and_clips_are_counted():
    batch = batch_of(1, unmasked=True)
    assert (ratios_of(batch) != 1).all()
    assert run(grpo_loss, batch)[2]["clip_ratio/region_mean"] > 0


def ratios_of(batch):
    return np.exp(jax.jit(token_log_ratio)(*(batch[k] for k in ("log_probs", "old_log_probs", "mask"))))


def test_l10_the_sequence_ratio_is_normalized_by_length():
    log_probs, mask = np.full((1, 100), 0.012, np.float32), np.ones((1, 100), bool)
    ratio = np.exp(jax.jit(sequence_log_ratio)(log_probs, np.zeros_like(log_probs), mask))
    assert ratio.shape == (1, 100)
    close(ratio, np.full((1, 100), np.exp(0.012)), rtol=1e-6)
    close(ratio[0, 0], 1.0121, atol=5e-5)


def test_l5_the_sequence_ratio_is_the_mean_of_the_unmasked_tokens_at_each_of_them():
    mask = np.array([[True, False, True], [False, False, False]])
    log_probs, old = f32([[0.2, np.nan, 0.4], [np.nan, np.inf, 0.0]]), np.zeros((2, 3), np.float32)
    close(jax.jit(sequence_log_ratio)(log_probs, old, mask), [[0.3, 0, 0.3], [0, 0, 0]])
    close(jax.jit(token_log_ratio)(log_probs, old, mask), [[0.2, 0, 0.4], [0, 0, 0]])


# KL ------------------------------------------------------------------------------------------------------------------


estimators = jax.jit(lambda *x: [kl(*x) for kl in (kl_k1, kl_k2, kl_k3)])
gradients = jax.jit(lambda x, ref: [jax.grad(lambda x: kl(x, ref).sum())(x) for kl in (kl_k1, kl_k2, kl_k3)])  # noqa: B023


def test_l12_k3_and_its_gradients():
    d, ref = f32([-1, 0, 0.5]), f32([-1.25, -0.5, -3])
    close(estimators(ref + d, ref)[2], [0.71828, 0.0, 0.10653])
    close(gradients(ref + d, ref)[2], 1 - np.exp(-d))

    @jax.jit
    @jax.value_and_grad
    def corrected(log_probs):
        mask, advantages = jnp.ones((3, 1), bool), jnp.zeros(3)
        knobs = {"ref_log_probs": jnp.asarray(ref)[:, None], "kl_coef": 1.0, "kl_correction": True}
        return grpo_loss(log_probs, advantages, mask, **knobs)[0].sum

    value, gradient = corrected((ref + d)[:, None])
    close(value, 0.71828 + 0.10653)
    close(gradient[:, 0], d)  # on policy


FAR = f32([-1e6, -1e4, -1000, -90, -89, -21, 21, 90, 1000, 1e4])


def test_k3_is_finite_and_keeps_its_direction_however_far_apart_the_policies_are():
    zeros = np.zeros_like(FAR)
    values, slopes = estimators(FAR, zeros)[2], gradients(FAR, zeros)[2]
    chex.assert_tree_all_finite((values, slopes))
    assert (np.diff(values[:6]) < 0).all()  # further from the reference is never better
    assert (np.sign(slopes) == np.sign(FAR)).all()
    near = f32([-19.9, -10, 0, 10])
    close(estimators(near, np.zeros(4, np.float32))[2], np.expm1(-near.astype(np.float64)) + near, rtol=1e-5)
    close(gradients(f32([-20, -25]), np.zeros(2, np.float32))[2], np.full(2, 1 - np.exp(20.0)), rtol=1e-5)


@pytest.mark.parametrize("name", compositions)
def test_losses_and_gradients_are_finite_however_far_apart_the_policies_are(name):
    loss = partial(compositions[name][0], kl_coef=0.5, kl_correction=True, importance_cap=2.0)
    others = ("old_log_probs", "ref_log_probs", "rollout_log_probs")
    for gap in (-1e4, -90, 90, 1e4):
        for moved in ([each] for each in others) if gap < 0 else [others]:
            batch = batch_of(1)
            batch |= {each: batch["log_probs"] - f32(gap) for each in moved}
            chex.assert_tree_all_finite(run(loss, batch))


def test_l12_k1_and_k2():
    log_probs, ref = f32([-1, -2, -3]), f32([-2, -2, -1])
    close(estimators(log_probs, ref)[0], [1, 0, -2])
    close(gradients(log_probs, ref)[0], [1, 1, 1])  # says nothing of the reference
    close(estimators(log_probs, ref)[1], [0.5, 0, 2])
    close(gradients(log_probs, ref)[1], [1, 0, -2])


@given(hnp.arrays(np.float32, 64, elements=st.floats(-20, 20, width=32)))
def test_k2_and_k3_are_never_negative(d):
    for scale in (1, 1e-3, 1e-6):
        _, k2, k3 = estimators(d * f32(scale), np.zeros(64, np.float32))
        assert np.min(k2) >= 0
        assert np.min(k3) >= 0


def test_estimators_are_unbiased_or_not_as_they_say():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    log_p, log_q = f32(np.log(p)), f32(np.log(q))
    kl = (p * np.log(p / q)).sum()
    k1, k2, k3 = (p @ np.asarray(x) for x in estimators(log_p, log_q))
    close([k1, k3], [kl, kl])
    assert abs(k2 - kl) > 1e-2

    @jax.jit
    def jacobians(logits):
        """Of each token's estimate, k3 weighted by the ratio last, by the logits of the policy."""

        def all_four(logits):
            log_probs = jax.nn.log_softmax(logits)
            ratio = jnp.exp(log_probs - jax.lax.stop_gradient(log_probs))
            k1, k2, k3 = (k(log_probs, jnp.asarray(log_q)) for k in (kl_k1, kl_k2, kl_k3))
            return k1, k2, k3, k3 * ratio

        return jax.jacobian(all_four)(logits)

    k1, k2, k3, weighted_k3 = (p @ np.asarray(jacobian) for jacobian in jacobians(log_p))
    true = oracle.numeric_grad(lambda z: (np.exp(oracle.log_softmax(z)) * (oracle.log_softmax(z) - log_q)).sum(), log_p)
    close([k2, weighted_k3], [true, true])
    close(k1, np.zeros(3))
    assert np.abs(k3 - true).max() > 1e-2


def test_l14_without_variance_the_policy_term_is_0_and_the_gradient_of_the_kl_remains():
    batch = batch_of(1)
    batch["advantages"] = np.asarray(advantages_of_4(np.full(4, 0.7, np.float32)))
    value, grad, _ = run(grpo_loss, batch)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
    value, grad, _ = run(compositions["grpo_kl"][0], batch)
    assert value > 0
    assert np.linalg.norm(grad) > 1e-3


# Metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_are_what_they_are_named_for():
    ratios = f32([[0.5, 1.5, 1.0, 9], [0.5, 0.6, 1.5, 9]])
    mask = np.array([[True, True, True, False], [True, True, True, False]])
    log_probs = f32(np.full((2, 4), -1))
    rollout = log_probs - np.log(ratios) - f32([[0.1, 0.2, 0.3, 9], [0.4, -0.5, 0, 9]])
    ref, entropy = log_probs - f32(0.5), f32([[1, 2, 3, 99], [4, 5, 6, 99]])
    batch = {"log_probs": log_probs, "advantages": f32([1, -1]), "mask": mask}
    fields = {"old_log_probs": log_probs - np.log(ratios), "ref_log_probs": ref, "rollout_log_probs": rollout}
    _, _, metrics = run(grpo_loss, {**batch, **fields, "entropy": entropy})
    expected = {
        "clip_ratio/high_mean": 1 / 6,  # 1.5 at A > 0; the one at A < 0 is not clipped
        "clip_ratio/low_mean": 2 / 6,  # 0.5 and 0.6 at A < 0
        "clip_ratio/region_mean": 3 / 6,
        "kl": np.exp(-0.5) - 1 + 0.5,
        "entropy": 3.5,
        "sampling/sampling_logp_difference/mean": 0.25,
        "sampling/sampling_logp_difference/max": 0.5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value)


def test_metrics_are_left_out_with_what_they_are_made_of_and_given_without_a_coefficient():
    batch = {k: v for k, v in batch_of(1).items() if k in ("log_probs", "advantages", "mask")}
    clips = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
    assert run(grpo_loss, batch)[2].keys() == clips
    full = batch_of(1)
    value, grad, metrics = run(grpo_loss, full)
    assert metrics.keys() > clips | {"kl", "entropy"}
    bare = {k: full[k] for k in ("log_probs", "advantages", "mask", "old_log_probs")}
    chex.assert_trees_all_equal(run(grpo_loss, bare)[:2], (value, grad))  # what is only logged changes nothing


def test_the_gradient_flows_through_log_probs_and_entropy_alone():
    batch = batch_of(4)
    names = list(batch)

    def loss(*floats):
        fields = dict(zip([n for n in names if n != "mask"], floats, strict=True))
        knobs = {"kl_coef": 0.3, "kl_correction": True, "entropy_coef": 0.1, "importance_cap": 1.5}
        return grpo_loss(mask=jnp.asarray(batch["mask"]), **fields, **knobs)[0].value

    arrays = [jnp.asarray(np.nan_to_num(batch[n])) for n in names if n != "mask"]
    grads = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)
    moved = {n for n, g in zip([n for n in names if n != "mask"], grads, strict=True) if np.abs(g).max() > 0}
    assert moved == {"log_probs", "entropy"}


# Coefficients and options --------------------------------------------------------------------------------------------


def loss_and_grad(batch, **options):
    fields = {k: v for k, v in batch.items() if k not in ("log_probs", "advantages", "mask")}

    def value(log_probs):
        pair, metrics = grpo_loss(log_probs, batch["advantages"], batch["mask"], **fields, **options)
        return pair.value, metrics

    return jax.value_and_grad(value, has_aux=True)(batch["log_probs"])


def test_traced_coefficients_give_the_static_result_in_one_trace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(batch, kl_coef, entropy_coef):
        return loss_and_grad(batch, kl_coef=kl_coef, entropy_coef=entropy_coef, kl_correction=True)

    batch = batch_of(2)
    for kl_coef, entropy_coef in [(0.3, 0.1), (0.05, 0.0), (0.0, 1.0)]:
        static = partial(loss_and_grad, kl_coef=kl_coef, entropy_coef=entropy_coef, kl_correction=True)
        ours = traced(batch, f32(kl_coef), f32(entropy_coef))
        chex.assert_trees_all_close(ours, jax.jit(static)(batch), rtol=1e-5, atol=1e-6)


def test_a_python_zero_leaves_its_term_out_of_the_program_and_an_array_does_not():
    batch = batch_of(2)

    def size(**options):
        return len(jax.make_jaxpr(partial(loss_and_grad, **options))(batch).eqns)

    assert size() == size(kl_coef=0.0, entropy_coef=0.0) < size(kl_coef=jnp.float32(0)) < size(kl_coef=0.1) + 2
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    grpo_loss(x, x, mask, kl_coef=0.0)
    with pytest.raises(ValueError, match="kl_coef is an array, which needs ref_log_probs; pass ref_log_probs"):
        jax.eval_shape(lambda kl_coef: grpo_loss(x, x, mask, kl_coef=kl_coef), jnp.float32(0))
    with pytest.raises(AssertionError, match=r"has shape \(2,\) but expected \(\).*\[entropy_coef\]"):
        inspect.unwrap(grpo_loss)(x, x, mask, entropy=x, entropy_coef=jnp.zeros(2))


named = {
    "ppo": (ppo_loss, {"aggregate": token_mean}),
    "dapo": (dapo_loss, {"epsilon_high": 0.28, "aggregate": token_mean}),
    "dr_grpo": (
        partial(dr_grpo_loss, max_completion_length=8),
        {"aggregate": partial(constant_length, length=8)},
    ),
    "gspo": (gspo_loss, {"log_ratio": sequence_log_ratio, "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "cispo": (cispo_loss, {"surrogate": cispo, "epsilon_low": 1.0, "epsilon_high": 4.0, "aggregate": token_mean}),
    "sapo": (partial(sapo_loss, temperature_negative=2.0), {"surrogate": partial(sapo, temperature_negative=2.0)}),
}


@pytest.mark.parametrize("name", named)
def test_a_named_loss_is_grpo_loss_with_parts_replaced(name, variant):
    loss, parts = named[name]
    batch, options = batch_of(5), {"kl": kl_k2, "kl_coef": 0.1, "entropy_coef": 0.2, "importance_cap": 1.5}
    ours, expected = (variant(partial(f, **options)) for f in (loss, partial(grpo_loss, **parts)))
    batch = jax.tree.map(jnp.asarray, batch)
    chex.assert_trees_all_equal(ours(**batch), expected(**batch))
    assert loss is not grpo_loss
    shown = inspect.signature(loss).parameters
    fixed = {"log_ratio", "surrogate", "aggregate"}
    assert inspect.signature(grpo_loss).parameters.keys() - fixed <= shown.keys()  # what command lines read
    assert not fixed & shown.keys()
    with pytest.raises(TypeError, match="multiple values for keyword argument"):
        loss(**batch, **dict.fromkeys(parts.keys() & fixed))


# Correction of the sampler -------------------------------------------------------------------------------------------


weights = jax.jit(truncated_importance, static_argnames=("cap", "log_ratio"))
FIRST_TWO = np.array([[True, True, False]])


def test_t10_the_correction_weights_by_the_truncated_distribution_of_the_sampler():
    # The sampler removed tokens, so it says log(p / 0.8) where the policy says log p: the weight is the mass kept.
    old = np.log(f32([[0.5, 0.3, np.nan]]))
    close(weights(old, old - f32(np.log(0.8)), FIRST_TWO, cap=2.0), [[0.8, 0.8, 1]])


def test_truncated_importance_is_capped_is_1_where_masked_and_carries_no_gradient():
    old, rollout = f32([[0.0, 1.0, np.nan]]), f32([[0.5, -5.0, 0.0]])
    close(weights(old, rollout, FIRST_TWO, cap=2.0), [[np.exp(-0.5), 2, 1]])
    close(weights(old, rollout, FIRST_TWO, cap=0.5), [[0.5, 0.5, 1]])
    close(weights(old, np.full((1, 3), -np.inf, np.float32), FIRST_TWO, cap=2.0), [[2, 2, 1]])
    grads = jax.jit(jax.grad(lambda *x: weights(*x, FIRST_TWO, cap=2.0).sum(), argnums=(0, 1)))(old, rollout)
    np.testing.assert_array_equal(np.stack(grads), 0)


def test_truncated_importance_with_one_weight_a_sequence():
    old, rollout = f32([[0.2, 0.4, 9.0]]), np.zeros((1, 3), np.float32)
    ours = weights(old, rollout, FIRST_TWO, cap=5.0, log_ratio=sequence_log_ratio)
    close(ours, [[np.exp(0.3), np.exp(0.3), 1]])


def test_the_correction_weighs_the_policy_term_and_not_the_kl():
    batch = batch_of(6)
    batch["advantages"] = np.zeros(B, np.float32)
    kl_only = run(compositions["grpo_kl"][0], batch)[0]
    assert kl_only > 0
    assert run(partial(grpo_loss, kl_coef=0.3, importance_cap=0.01), batch)[0] == pytest.approx(kl_only, rel=1e-6)


# Losses without rewards ----------------------------------------------------------------------------------------------


def test_supervised_loss_is_the_cross_entropy_over_unmasked_tokens():
    log_probs, mask = f32([[-1, np.nan], [-2, -4]]), np.array([[True, False], [True, True]])
    value, grad = jax.jit(jax.value_and_grad(lambda x: supervised_loss(x, jnp.asarray(mask)).value))(log_probs)
    close(value, 7 / 3)
    close(grad, [[-1 / 3, 0], [-1 / 3, -1 / 3]])


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "value", "missing"),
    [
        ("kl_coef", 0.1, "ref_log_probs"),
        ("entropy_coef", -0.1, "entropy"),
        ("importance_cap", 2.0, "rollout_log_probs"),
        ("importance_cap", 0.0, ""),
    ],
)
def test_a_coefficient_without_what_it_weighs_is_refused_at_trace_time_by_name(knob, value, missing):
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=f"{knob} is {value}.*{missing}"):
        jax.eval_shape(partial(grpo_loss, **{knob: value}), x, x[:, 0], np.ones((2, 3), bool))
