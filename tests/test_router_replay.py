"""The experts that the sampler chose, used again by the trainer; and losses of the router."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import quick_jit, random_params
from layouts import mesh_of
from published import PUBLISHED, ids_and_mask, shrunk

from grpo_jax.config.training import PolicyLossConfig
from grpo_jax.models import build_model, from_hf_config
from grpo_jax.rollout import Sampler, generate
from grpo_jax.sampling import Sampling
from grpo_jax.train import RouterLosses, completion_log_probs, micro_batch, pack, routed_log_probs
from grpo_jax.train.packing import in_batch_order
from grpo_jax.types import Batch, Prompts

CONFIG = from_hf_config(shrunk(PUBLISHED["Qwen3-30B-A3B"]))
LENGTHS = {"group_size": 4, "max_completion_length": 20, "eos_ids": (1,), "pad_id": 0}
LOSSES = RouterLosses(balance=0.1, z=0.01)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def prompts():
    ids, mask = ids_and_mask(10, (0, 4, 7))
    return Prompts(jnp.asarray(ids), jnp.asarray(mask), jnp.arange(3))


def recorded(params, prompts, dtype=jnp.float32):
    sampler = Sampler(build_model(CONFIG, dtype=dtype), Sampling(), **LENGTHS, record_experts=True)
    return sampler(params, prompts, jax.random.key(0))


@pytest.fixture(scope="module")
def rollout(params, prompts):
    return recorded(params, prompts)


def without_experts(rollout):
    return replace(rollout, prompt_experts=None, completion_experts=None)


def log_probs_of(params, rollout, dtype=jnp.float32):
    model = build_model(CONFIG, dtype=dtype)
    return quick_jit(lambda params, rollout: completion_log_probs(model, params, rollout)[0])(params, rollout)


def gap(params, rollout, dtype):
    difference = jnp.abs(log_probs_of(params, rollout, dtype) - rollout.rollout_log_probs)
    return float(jnp.where(rollout.completion_mask, difference, 0).max())


def test_the_sampler_records_the_experts_of_every_token(params, prompts, rollout):
    B, P, T, L, k = 12, 10, 20, CONFIG.num_sparse(), 2
    assert rollout.prompt_experts.shape == (B, P, L, k)
    assert rollout.completion_experts.shape == (B, T, L, k)
    kept = np.asarray(rollout.completion_experts)[np.asarray(rollout.completion_mask)]
    assert kept.min() >= 0
    assert kept.max() < CONFIG.experts.count
    assert (kept[..., 0] != kept[..., 1]).all()
    plain = Sampler(build_model(CONFIG), Sampling(), **LENGTHS)(params, prompts, jax.random.key(0))
    assert plain.completion_experts is None
    np.testing.assert_array_equal(plain.completion_ids, rollout.completion_ids)
    whole = generate(
        build_model(CONFIG), params, prompts, jax.random.key(0), Sampling(), **LENGTHS, record_experts=True
    )
    np.testing.assert_array_equal(np.asarray(whole.completion_experts)[np.asarray(rollout.completion_mask)], kept)
    np.testing.assert_array_equal(whole.prompt_experts, rollout.prompt_experts)


def test_in_float32_the_trainer_chooses_what_the_sampler_did(params, rollout):
    assert gap(params, rollout, jnp.float32) <= 1e-5
    np.testing.assert_allclose(log_probs_of(params, without_experts(rollout)), log_probs_of(params, rollout), atol=1e-5)


def test_replay_narrows_the_gap_of_another_precision(params, prompts):
    def undecided(path, x):
        """A router whose scores are close, so that rounding decides."""
        return x[:, :1] + x / 500 if "router" in jax.tree_util.keystr(path) else x

    close = jax.tree.map_with_path(undecided, params)
    sampled = recorded(close, prompts, jnp.bfloat16)
    with_replay, without = (gap(close, each, jnp.float32) for each in (sampled, without_experts(sampled)))
    print(f"largest gap {with_replay:.1e} with replay, {without:.1e} without")
    assert with_replay < without / 2


def test_the_recorded_experts_are_those_that_compute(params, rollout):
    others = replace(rollout, completion_experts=(rollout.completion_experts + 1) % CONFIG.experts.count)
    assert gap(params, others, jnp.float32) > 0.01


@pytest.mark.parametrize("packing", ["shared", "separate"])
def test_packed_rows_replay_as_padded_ones(packing, params, rollout):
    # Other experts than the model's own, so that a row's token with those of another would show.
    rng = np.random.default_rng(0)
    of_prompt = rng.integers(0, 4, (3, *rollout.prompt_experts.shape[1:])).repeat(4, axis=0)
    experts = [of_prompt, rng.integers(0, 4, rollout.completion_experts.shape)]
    experts = [np.stack([x[..., 0], x[..., 1] + 4], axis=-1).astype(np.int16) for x in experts]
    other = replace(rollout, prompt_experts=experts[0], completion_experts=experts[1])
    part = micro_batch(pack(other, packing, micro_batch_tokens=4096), 0)
    found = quick_jit(lambda params, part: completion_log_probs(build_model(CONFIG), params, part)[0])(params, part)
    found = in_batch_order(found, part.rows, jnp.zeros(rollout.completion_ids.shape))
    expected = log_probs_of(params, other)
    np.testing.assert_allclose(jnp.where(rollout.completion_mask, found - expected, 0), 0, atol=2e-5)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_layers_replay_their_own_choices(is_scanned, params, rollout):
    """Of each layer its own, whether layers are stacked or not."""
    model = build_model(CONFIG, scan_layers=is_scanned, remat="block")
    found = quick_jit(
        lambda params, rollout: completion_log_probs(model, model.preparation.prepare(params), rollout)[0]
    )(params, rollout)
    difference = jnp.where(rollout.completion_mask, found - log_probs_of(params, rollout), 0)
    np.testing.assert_allclose(difference, 0, atol=1e-5)


def test_recorded_experts_need_a_model_with_experts(rollout):
    dense = from_hf_config(shrunk(PUBLISHED["Qwen3-0.6B"]))
    with pytest.raises(ValueError, match="this model has no experts"):
        completion_log_probs(build_model(dense), random_params(dense), rollout)


def router_loss(params, batch):
    """The sum of the weighted terms over completion tokens."""
    *_, terms = routed_log_probs(build_model(CONFIG), params, batch)
    return jnp.where(batch.completion_mask, LOSSES.balance * terms.balance + LOSSES.z * terms.z, 0).sum()


@pytest.mark.parametrize("packing", ["shared", "separate"])
def test_losses_of_the_router_do_not_depend_on_the_layout(packing, params, rollout):
    batch = Batch.from_rollout(rollout, jnp.zeros(len(rollout.truncated)))
    expected = quick_jit(jax.value_and_grad(router_loss))(params, batch)
    part = micro_batch(pack(batch, packing, micro_batch_tokens=4096), 0)
    found = quick_jit(jax.value_and_grad(router_loss))(params, part)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), found[1], expected[1])


def test_gradients_of_the_router_losses_reach_the_router(params, rollout):
    batch = Batch.from_rollout(rollout, jnp.zeros(len(rollout.truncated)))
    grads = quick_jit(jax.grad(router_loss))(params, batch)
    assert float(jnp.abs(grads["layers_0"]["mlp"]["router"]["kernel"]).max()) > 0


def test_a_policy_loss_adds_the_terms_to_each_token(params, rollout):
    batch = Batch.from_rollout(rollout, jnp.ones(len(rollout.truncated)))
    model = build_model(CONFIG)
    settings = {"max_completion_length": 20, "sampler_alters_policy": False}
    outputs = quick_jit(lambda params, batch: routed_log_probs(model, params, batch))(params, batch)

    def loss_of(**coefs):
        config = PolicyLossConfig(loss="dapo", **coefs)
        return config.build(lambda *_: outputs, **settings)(params, batch)

    plain, _ = loss_of()
    found, metrics = loss_of(router_balance_coef=0.1, router_z_coef=0.01)
    assert {"router/balance_loss", "router/z_loss"} <= metrics.keys()
    expected = plain.sum + 0.1 * metrics["router/balance_loss"].sum + 0.01 * metrics["router/z_loss"].sum
    np.testing.assert_allclose(found.sum, expected, rtol=1e-5)


def test_coefficients_without_effect_are_refused():
    with pytest.raises(ValueError, match="router_z_coef is -1"):
        PolicyLossConfig(router_z_coef=-1.0)


def test_replay_on_an_expert_axis_is_that_of_one_device(params, rollout):
    mesh = mesh_of(1, 2, 2, expert=2)
    model = build_model(CONFIG, mesh=mesh)
    rows = jax.tree.map(lambda x: x[:8], rollout)
    found = quick_jit(lambda params, rows: completion_log_probs(model, params, rows)[0])(params, rows)
    difference = jnp.where(rows.completion_mask, found - log_probs_of(params, rollout)[:8], 0)
    np.testing.assert_allclose(difference, 0, atol=2e-5)
