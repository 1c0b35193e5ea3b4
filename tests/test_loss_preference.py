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
import torch
from hypothesis import given
from oracle import f32, f64
from torch.nn.functional import logsigmoid

from grpo_jax.loss import (
    bradley_terry_loss,
    dpo_loss,
    hinge_preference,
    ipo_loss,
    sigmoid_preference,
    simpo_loss,
    squared_preference,
)

SHAPES = [(4, 3), (2, 8), (4, 8)]  # pairs and columns; the last can be made of the others
JUNK = [np.nan, np.inf, -np.inf]

smoothed = partial(sigmoid_preference, label_smoothing=0.2)
oracle_smoothed = partial(oracle.sigmoid_preference, label_smoothing=0.2)

# Each composition, as (what is under test, the oracle's knobs for the same).
compositions = {
    "dpo": (dpo_loss, {}),
    "smoothed": (partial(dpo_loss, objective=smoothed), {"objective": oracle_smoothed}),
    "hinge": (
        partial(dpo_loss, beta=0.3, objective=hinge_preference),
        {"beta": 0.3, "objective": oracle.hinge_preference},
    ),
    "ipo": (ipo_loss, {"objective": oracle.squared_preference, "per_token": True}),
    "simpo": (
        simpo_loss,
        {"beta": 2.0, "objective": partial(oracle.sigmoid_preference, target_margin=1.0), "per_token": True},
    ),
    "without_reference": (partial(dpo_loss, ref_log_probs=None, beta=0.7), {"beta": 0.7}),
    "rpo": (partial(dpo_loss, beta=0.5, sft_coef=0.7), {"beta": 0.5, "sft_coef": 0.7}),
    "everything": (
        partial(dpo_loss, beta=0.3, objective=smoothed, per_token=True, sft_coef=1.5),
        {"beta": 0.3, "objective": oracle_smoothed, "per_token": True, "sft_coef": 1.5},
    ),
}
of_reward_models = {
    "plain": ({}, False),
    "margins": ({}, True),
    "centred": ({"centring": 0.05}, False),
    "centred_margins": ({"centring": 0.3}, True),
}


def batch_of(name="dpo", seed=0, shape=SHAPES[0], junk=np.nan, unmasked=False):
    """Random pairs with holes and empty completions in the mask, and junk at every masked position.

    All numbers are multiples of 1 / 16, of which sums are exact: what is a tie in float64 is one in float32 too.
    """
    rng = np.random.default_rng(seed)
    pairs, columns = shape
    mask = rng.random((pairs, 2, columns)) < rng.choice([0.3, 0.7, 0.95])
    mask[rng.random((pairs, 2)) < 0.2] = False
    if unmasked:
        mask[..., 0] = True
    log_probs = -rng.integers(0, rng.choice([4, 64]), mask.shape) / 16
    batch = {"log_probs": np.where(mask, f32(log_probs), f32(junk)), "mask": mask}
    if name not in ("simpo", "without_reference"):
        sums = np.where(mask, log_probs, 0).sum(2)
        batch["ref_log_probs"] = f32(sums + rng.integers(-16, 17, sums.shape) / rng.choice([4, 16]))
    return batch


def scores_of(seed, with_margins, pairs=4):
    rng = np.random.default_rng(seed)
    scores = f32(rng.integers(-40, 41, (pairs, 2)) / rng.choice([2, 16]))
    scores[rng.random(pairs) < 0.2, 1] = 0.25
    scores[rng.random(pairs) < 0.2] = 0.25  # a tie
    return scores, f32(rng.integers(0, 49, pairs) / 16) if with_margins else None


@partial(jax.jit, static_argnums=0)
def value_and_grad(loss, x, others):
    def value(x):
        pair, metrics = loss(x, **others)
        return pair.value, (pair, metrics)

    return jax.value_and_grad(value, has_aux=True)(x)


def run(loss, batch):
    """Value, gradient by the log-probabilities, metrics."""
    (value, (_, metrics)), grad = value_and_grad(loss, batch["log_probs"], without(batch, "log_probs"))
    return float(value), np.asarray(grad), {name: float(m.value) for name, m in metrics.items()}


def without(batch, name):
    return {k: v for k, v in batch.items() if k != name}


def oracle_loss(batch, knobs, log_probs=None):
    log_probs = batch["log_probs"] if log_probs is None else log_probs
    return oracle.dpo_loss(log_probs, batch["mask"], batch.get("ref_log_probs"), **knobs)


bradley_terry = {name: partial(bradley_terry_loss, **knobs) for name, (knobs, _) in of_reward_models.items()}


def close(actual, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=atol)


same_metrics = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


# Every composition against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", compositions)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), junk=st.sampled_from(JUNK))
def test_values_gradients_and_metrics_agree_with_the_oracle_whatever_stands_at_masked_positions(
    name, seed, shape, junk
):
    loss, knobs = compositions[name]
    batch = batch_of(name, seed, shape, junk)
    value, grad, metrics = run(loss, batch)
    expected, expected_metrics = oracle_loss(batch, knobs)
    close(value, expected)
    same_metrics(metrics, expected_metrics)
    np.testing.assert_array_equal(grad[~batch["mask"]], 0)
    if name != "hinge" or not near_the_hinge(batch):
        varied = oracle.numeric_grad(lambda x: oracle_loss(batch, knobs, x)[0], batch["log_probs"], batch["mask"])
        close(grad, varied)


def near_the_hinge(batch):
    """Whether some margin lies where a finite difference steps across the hinge, and gradients are of either side."""
    ratios = np.where(batch["mask"], f64(batch["log_probs"]), 0).sum(2) - batch["ref_log_probs"]
    return bool((np.abs(1 - 0.3 * (ratios[:, 0] - ratios[:, 1])) < 1e-4).any())


@pytest.mark.parametrize("name", compositions)
def test_junk_at_masked_positions_changes_no_bit_of_loss_gradient_or_metrics(name):
    loss, _ = compositions[name]
    value, grad, metrics = run(loss, batch_of(name, 5, junk=0.0))
    assert not batch_of(name, 5)["mask"].all()
    for junk in JUNK:
        chex.assert_trees_all_equal(run(loss, batch_of(name, 5, junk=junk)), (value, grad, metrics))


@pytest.mark.parametrize("name", compositions)
def test_l3_more_padding_columns_change_neither_loss_nor_gradient(name):
    loss, _ = compositions[name]
    batch = batch_of(name, 11, (4, 3))
    more = ((0, 0), (0, 0), (0, 5))
    wider = {
        **batch,
        "log_probs": np.pad(batch["log_probs"], more, constant_values=np.nan),
        "mask": np.pad(batch["mask"], more),
    }
    (value, grad, metrics), (wide_value, wide_grad, wide_metrics) = run(loss, batch), run(loss, wider)
    close(wide_value, value, rtol=1e-6, atol=1e-7)
    close(wide_grad[..., :3], grad, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(wide_grad[..., 3:], 0)
    same_metrics(wide_metrics, metrics, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", compositions)
def test_l2_micro_batches_merge_to_the_loss_the_gradient_and_the_metrics_of_the_whole(name):
    loss, _ = compositions[name]
    batch = batch_of(name, 13, (4, 8))
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    check_merged(loss, [(part["log_probs"], without(part, "log_probs")) for part in parts], *run(loss, batch))


def check_merged(loss, parts, value, grad, metrics):
    """Check that the parts, merged as a train step does it, are the whole's value, gradient and metrics."""
    results = [value_and_grad(loss, x, others) for x, others in parts]
    pairs, pair_metrics = jax.tree.map(lambda *x: jnp.stack(x), *(aux for (_, aux), _ in results))
    pair = pairs.reduce()
    close(pair.value, value, rtol=1e-6, atol=1e-6)
    of_sums = [np.asarray(g) * float(aux[0].count) for (_, aux), g in results]
    close(np.concatenate(of_sums) / float(pair.count), grad, rtol=1e-6, atol=1e-6)
    same_metrics({name: float(m.reduce().value) for name, m in pair_metrics.items()}, metrics, rtol=1e-6, atol=1e-6)


# Against torch, as TRL has it ----------------------------------------------------------------------------------------


def trl_losses(log_probs, mask, ref, loss_type, beta, label_smoothing=0.0, simpo_gamma=0.0):
    """``DPOTrainer.dpo_loss``, and ``CPOTrainer.cpo_loss`` of type simpo, from the log-probabilities of tokens."""
    logps = torch.where(mask, log_probs, 0.0).sum(-1)
    if loss_type in ("ipo", "simpo"):
        logps = logps / mask.sum(-1)
        ref = None if ref is None else ref / mask.sum(-1)
    chosen_logps, rejected_logps = logps[:, 0], logps[:, 1]
    logits = chosen_logps - rejected_logps
    if ref is not None:
        logits = logits - (ref[:, 0] - ref[:, 1])
    if loss_type == "simpo":
        logits = logits - simpo_gamma / beta
    if loss_type in ("sigmoid", "simpo"):
        losses = -logsigmoid(beta * logits) * (1 - label_smoothing) - logsigmoid(-beta * logits) * label_smoothing
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * logits)
    else:
        losses = (logits - 1 / (2 * beta)) ** 2
    return losses


trl_knobs = {
    "dpo": {"loss_type": "sigmoid", "beta": 0.1},
    "smoothed": {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge", "beta": 0.3},
    "ipo": {"loss_type": "ipo", "beta": 0.1},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
}


@pytest.mark.parametrize("name", trl_knobs)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
def test_values_and_gradients_are_those_of_trl_in_torch(name, seed, shape):
    batch = batch_of(name, seed, shape, unmasked=True)
    value, grad, metrics = run(compositions[name][0], batch)
    mask = torch.tensor(batch["mask"])
    log_probs = torch.tensor(np.nan_to_num(f64(batch["log_probs"])), requires_grad=True)
    ref = torch.tensor(f64(batch["ref_log_probs"])) if "ref_log_probs" in batch else None
    loss = trl_losses(log_probs, mask, ref, **trl_knobs[name]).mean()
    loss.backward()
    close(value, loss.item())
    if name != "hinge" or not near_the_hinge(batch):
        close(grad, log_probs.grad)
    if name in ("dpo", "smoothed", "hinge"):
        rewards = trl_knobs[name]["beta"] * (torch.where(mask, log_probs, 0.0).sum(-1) - ref).detach()
        close(metrics["rewards/chosen"], rewards[:, 0].mean())
        close(metrics["rewards/rejected"], rewards[:, 1].mean())
        close(metrics["rewards/margins"], (rewards[:, 0] - rewards[:, 1]).mean())


@pytest.mark.parametrize("name", of_reward_models)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_reward_models_loss_is_that_of_trl_in_torch(name, seed):
    knobs, with_margins = of_reward_models[name]
    scores, margins = scores_of(seed, with_margins)
    twin = torch.tensor(f64(scores), requires_grad=True)
    rewards_chosen, rewards_rejected = twin[:, 0], twin[:, 1]
    if margins is not None:
        loss = -logsigmoid(rewards_chosen - rewards_rejected - torch.tensor(f64(margins))).mean()
    else:
        loss = -logsigmoid(rewards_chosen - rewards_rejected).mean()
    if "centring" in knobs:
        loss = loss + knobs["centring"] * torch.mean((rewards_chosen + rewards_rejected) ** 2)
    loss.backward()
    (value, _), grad = value_and_grad(bradley_terry[name], scores, {"margins": margins})
    close(value, loss.item())
    close(grad, twin.grad)


# Objectives ----------------------------------------------------------------------------------------------------------


@jax.jit
def objectives(margin):
    return {
        "sigmoid": sigmoid_preference(margin),
        "sigmoid_of_all": sigmoid_preference(margin, beta=0.5, label_smoothing=0.4, target_margin=1.5),
        "hinge": hinge_preference(margin),
        "hinge_of_beta": hinge_preference(margin, beta=0.5),
        "squared": squared_preference(margin),
        "squared_of_beta": squared_preference(margin, beta=0.5),
    }


@given(hnp.arrays(np.float32, 5, elements=st.floats(-60, 60, width=32) | st.sampled_from([0.0, 10.0, 2.0, 1e4, -1e4])))
def test_objectives_agree_with_the_oracle(margin):
    everything = {"beta": 0.5, "label_smoothing": 0.4, "target_margin": 1.5}
    expected = {
        "sigmoid": [oracle.sigmoid_preference(x) for x in f64(margin)],
        "sigmoid_of_all": [oracle.sigmoid_preference(x, **everything) for x in f64(margin)],
        "hinge": [oracle.hinge_preference(x) for x in f64(margin)],
        "hinge_of_beta": [oracle.hinge_preference(x, beta=0.5) for x in f64(margin)],
        "squared": [oracle.squared_preference(x) for x in f64(margin)],
        "squared_of_beta": [oracle.squared_preference(x, beta=0.5) for x in f64(margin)],
    }
    ours = objectives(margin)
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        close(ours[name], values)


def test_objectives_are_finite_far_from_0_and_so_are_their_gradients():
    margin = f32([-1e8, -1e4, 0, 1e4, 1e8])
    for name, slopes in jax.jit(jax.jacobian(objectives))(margin).items():
        slope = np.diagonal(slopes)
        chex.assert_tree_all_finite((objectives(margin)[name], slope))
        if "of" not in name and name != "squared":
            close(slope[[0, 1, 3, 4]], [-0.1, -0.1, 0, 0])  # as wrong as can be, the pull is beta; right, it is nothing


def test_label_smoothing_is_the_share_of_pairs_taken_to_be_the_wrong_way_round():
    margin = f32([-3, -0.5, 0, 2, 40])
    right, wrong, mixed = (
        jax.jit(partial(sigmoid_preference, beta=0.5, label_smoothing=share))(x)
        for x, share in ((margin, 0.0), (-margin, 0.0), (margin, 0.25))
    )
    close(mixed, 0.75 * f64(right) + 0.25 * f64(wrong))


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, float("nan")])
def test_a_label_smoothing_that_is_no_share_of_wrong_labels_is_refused_by_name_and_value(share):
    with pytest.raises(ValueError, match=rf"label_smoothing is {share}; .* from 0 to below 0\.5"):
        jax.eval_shape(partial(sigmoid_preference, label_smoothing=share), np.zeros(2, np.float32))


def test_a_target_margin_is_won_by_after_beta():
    close(jax.jit(partial(sigmoid_preference, beta=2.0, target_margin=3.0))(f32([1.5])), [np.log(2)])


# DPO -----------------------------------------------------------------------------------------------------------------


def plain(log_probs, ref):
    """One pair of completions of 3 tokens each: the log-probabilities of all, and the reference's sums."""
    return {"log_probs": f32(log_probs), "mask": np.ones((1, 2, 3), bool), "ref_log_probs": f32(ref)}


def test_l15_dpo_of_a_policy_equal_to_its_reference_is_log_2():
    batch = batch_of(seed=3, shape=(4, 3))
    batch["ref_log_probs"] = f32(np.where(batch["mask"], batch["log_probs"], 0).sum(2))
    value, grad, metrics = run(dpo_loss, batch)
    close(value, 0.693147, atol=1e-6)
    close(grad, np.where(batch["mask"], [[[-0.1 / 2 / 4], [0.1 / 2 / 4]]], 0))  # chosen up, rejected down, by beta / 2
    assert metrics["rewards/margins"] == 0
    assert metrics["rewards/accuracies"] == 0.5


def test_l15_dpo_of_a_margin_of_3_at_beta_0_1():
    batch = plain([[[-1, -1, -1], [-2, -2, -3]]], [[-4, -8]])  # ratios 1 and 1
    close(run(dpo_loss, batch)[0], 0.693147, atol=1e-6)
    batch["ref_log_probs"] = f32([[-4, -5]])  # ratios 1 and -2
    value, _, metrics = run(dpo_loss, batch)
    close(value, 0.55436, atol=1e-5)
    expected = {
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.2,
        "rewards/margins": 0.3,
        "rewards/accuracies": 1.0,
        "logps/chosen": -3.0,
        "logps/rejected": -7.0,
        "nll_loss": 1.0,
    }
    same_metrics(metrics, expected)


def test_l15_ipo_divides_by_scored_tokens():
    batch = plain([[[-1, -1, np.nan], [-2, -4, -3]]], [[-4, -12]])
    batch["mask"][0, 0, 2] = False
    value, grad, metrics = run(ipo_loss, batch)
    margin = (-2 + 4) / 2 - (-9 + 12) / 3
    close(value, (margin - 5) ** 2)
    slope = 2 * (margin - 5)
    close(grad, [[[slope / 2, slope / 2, 0], [-slope / 3, -slope / 3, -slope / 3]]])
    close([metrics["rewards/chosen"], metrics["rewards/rejected"]], [0.1, 0.1])
    assert metrics["rewards/accuracies"] == 0.5
    close([metrics["logps/chosen"], metrics["logps/rejected"]], [-2, -9])  # sums over tokens all the same


def test_per_token_a_completion_thrice_as_long_weighs_no_more():
    mask = np.zeros((4, 2, 3), bool)
    mask[:, :, 0] = True
    longer = mask.copy()
    longer[:, 1] = True
    log_probs = np.broadcast_to(f32([[[-1.0], [-2.5]]]), mask.shape)
    batches = [
        {"log_probs": log_probs, "mask": m, "ref_log_probs": np.zeros((4, 2), np.float32)} for m in (mask, longer)
    ]
    close(*(run(ipo_loss, batch)[0] for batch in batches))
    close(*(run(simpo_loss, without(batch, "ref_log_probs"))[0] for batch in batches))
    short, long = (run(dpo_loss, batch)[0] for batch in batches)
    assert long < short - 0.1


def test_simpo_has_no_reference_and_a_target_margin():
    batch = without(batch_of(seed=2, unmasked=True), "ref_log_probs")
    lengths = batch["mask"].sum(2)
    means = np.where(batch["mask"], f64(batch["log_probs"]), 0).sum(2) / lengths
    value, _, metrics = run(simpo_loss, batch)
    close(value, np.mean(np.log1p(np.exp(1 - 2 * (means[:, 0] - means[:, 1])))))
    close(metrics["rewards/chosen"], 2 * means[:, 0].mean())


def test_an_objective_is_given_the_margin_and_beta():
    batch = plain([[[-1, -1, -1], [-2, -2, -3]]], [[-4, -5]])
    value, _, _ = run(partial(dpo_loss, beta=0.25, objective=lambda margin, *, beta: 100 * margin + beta), batch)
    close(value, 300.25)


def test_the_chosen_completions_likelihood_is_a_mean_over_its_own_tokens_then_over_pairs():
    mask = np.array([[[True, False, False], [True, True, True]], [[True, True, True], [True, False, False]]])
    log_probs = f32([[[-6, 0, 0], [-1, -1, -1]], [[-1, -2, -3], [-9, 0, 0]]])
    batch = {"log_probs": log_probs, "mask": mask, "ref_log_probs": np.zeros((2, 2), np.float32)}
    value, grad, metrics = run(partial(dpo_loss, sft_coef=0.5), batch)
    preferred, preferred_grad, _ = run(dpo_loss, batch)
    close(metrics["nll_loss"], (6 + 2) / 2)
    close(value - preferred, 0.5 * 4)
    close(grad - preferred_grad, [[[-0.25, 0, 0], [0, 0, 0]], [[-0.25 / 3] * 3, [0, 0, 0]]])


def test_an_empty_completion_has_a_likelihood_of_1_and_divides_by_nothing():
    batch = batch_of(seed=1)
    batch = {**batch, "log_probs": np.full_like(batch["log_probs"], np.nan), "mask": np.zeros_like(batch["mask"])}
    batch["ref_log_probs"] = np.zeros((4, 2), np.float32)
    for name, expected in (("dpo", np.log(2)), ("ipo", 25), ("rpo", np.log(2))):
        value, grad, metrics = run(compositions[name][0], batch)
        close(value, expected)
        np.testing.assert_array_equal(grad, 0)
        assert metrics.pop("rewards/accuracies") == 0.5
        assert set(metrics.values()) == {0.0}


def test_the_gradient_flows_through_log_probs_alone():
    batch = batch_of(seed=4, unmasked=True)

    def loss(log_probs, ref_log_probs):
        pair, _ = dpo_loss(log_probs, jnp.asarray(batch["mask"]), ref_log_probs=ref_log_probs, sft_coef=1.0)
        return pair.value

    of_policy, of_reference = jax.jit(jax.grad(loss, argnums=(0, 1)))(batch["log_probs"], batch["ref_log_probs"])
    assert np.abs(of_policy).max() > 0
    np.testing.assert_array_equal(of_reference, 0)


def test_shapes_that_do_not_fit_are_refused_at_trace_time_and_named():
    unchecked = inspect.unwrap(dpo_loss)  # by jaxtyping, as users call it

    def trace(shape, mask_shape, ref_shape):
        ref = None if ref_shape is None else np.zeros(ref_shape, np.float32)
        return jax.eval_shape(
            lambda x, mask: unchecked(x, mask, ref_log_probs=ref),
            np.zeros(shape, np.float32),
            np.ones(mask_shape, bool),
        )

    for mask_shape in [(4, 2, 2), (4, 1, 3), (4, 2)]:
        with pytest.raises(AssertionError, match=r"has shape \(4, .*\) but expected \(4, 2, 3\).*\[mask\]"):
            trace((4, 2, 3), mask_shape, None)
    for shape in [(4, 3), (4, 3, 2), (2, 4, 2, 3)]:
        with pytest.raises(AssertionError, match=r"\[log_probs: chosen and rejected, \[B, 2, T\]\]") as error:
            trace(shape, shape, None)
        assert str(shape) in str(error.value)
    for ref_shape in [(4,), (4, 1), (4, 2, 3), (2, 2), ()]:
        with pytest.raises(AssertionError, match=r"has shape \(.*\) but expected \(4, 2\).*\[ref_log_probs\]"):
            trace((4, 2, 3), (4, 2, 3), ref_shape)
    trace((4, 2, 3), (4, 2, 3), (4, 2))


# Reward models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of_reward_models)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_reward_models_values_gradients_and_metrics_agree_with_the_oracle(name, seed):
    knobs, with_margins = of_reward_models[name]
    scores, margins = scores_of(seed, with_margins)
    (value, (_, metrics)), grad = value_and_grad(bradley_terry[name], scores, {"margins": margins})
    expected, expected_metrics = oracle.bradley_terry_loss(scores, margins=margins, **knobs)
    close(value, expected)
    same_metrics({k: float(m.value) for k, m in metrics.items()}, expected_metrics)
    varied = oracle.numeric_grad(lambda x: oracle.bradley_terry_loss(x, margins=margins, **knobs)[0], scores)
    close(grad, varied)


def test_a_reward_models_micro_batches_merge_to_the_whole():
    scores, margins = scores_of(2, True)
    loss = bradley_terry["centred_margins"]
    (value, (_, metrics)), grad = value_and_grad(loss, scores, {"margins": margins})
    parts = [(scores[rows], {"margins": margins[rows]}) for rows in (slice(0, 1), slice(1, 4))]
    check_merged(loss, parts, float(value), np.asarray(grad), {k: float(m.value) for k, m in metrics.items()})


def test_the_order_of_a_pair_is_judged_by_its_scores_whatever_margin_is_asked_for():
    scores, margins = f32([[2, 1], [1, 1], [0, 3], [1, 1]]), f32([5, 0, 0, 9])
    (value, (_, metrics)), _ = value_and_grad(bradley_terry["margins"], scores, {"margins": margins})
    close(value, np.mean(np.log1p(np.exp([4.0, 0, 3, 9]))))
    assert {k: float(m.value) for k, m in metrics.items()} == {
        "accuracy": 0.5,  # one right, one wrong, and two ties that are half each
        "margin": -0.5,
        "score/mean": 1.25,
    }


def test_centring_says_where_the_scores_lie_that_the_pairs_leave_open():
    scores = f32([[2, 1], [0, 3], [1, 1], [-1, 0]])
    moved = scores + f32(7)
    plain, plain_moved = (value_and_grad(bradley_terry["plain"], x, {"margins": None}) for x in (scores, moved))
    assert plain[0][0] == plain_moved[0][0]
    np.testing.assert_array_equal(plain[1], plain_moved[1])
    (value, _), grad = value_and_grad(bradley_terry["centred"], moved, {"margins": None})
    close(value - plain[0][0], 0.05 * np.mean(f64(moved).sum(1) ** 2))
    assert np.asarray(grad).sum(1).min() > 0  # descent moves every pair down, towards 0


def test_margins_that_are_not_one_for_each_pair_are_refused_at_trace_time():
    unchecked = inspect.unwrap(bradley_terry_loss)  # by jaxtyping, as users call it
    scores = np.zeros((4, 2), np.float32)
    for shape in [(), (1,), (2,), (4, 2), (4, 1)]:
        with pytest.raises(AssertionError, match=r"has shape \(.*\) but expected \(4\).*\[margins\]"):
            jax.eval_shape(lambda x, margins: unchecked(x, margins=margins), scores, np.zeros(shape, np.float32))
