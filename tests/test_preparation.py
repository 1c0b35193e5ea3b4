"""Prepared parameters: compute dtype, stacked layers, sharded gradients; and the policies of rematerialization."""

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import SMALL, quick_jit, random_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.loss import supervised_loss
from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.models.preparation import STACKED, Repetition, find_repetition, stack_layers
from grpo_jax.models.remat import check_remat
from grpo_jax.sharding import make_mesh, param_shardings, replicated, shard_rows
from grpo_jax.train import (
    completion_log_probs,
    init_state,
    make_log_prob_fn,
    make_train_step,
    packed_log_probs,
    policy_and_values,
    with_value_head,
)
from grpo_jax.types import Batch, Mean, Metrics, Model, Packed, Params, TrainState

WINDOWS = {"sliding_window": 4, "sliding_window_pattern": 2, "head_dim": 16}
CONFIGS = {
    "tied": from_hf_config({"model_type": "qwen2", **SMALL, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "untied": from_hf_config({"model_type": "llama", **SMALL, "num_hidden_layers": 3}),
    # Windows and ropes alternate; one layer is left over.
    "gemma3": from_hf_config({"model_type": "gemma3_text", **SMALL, "num_hidden_layers": 5, **WINDOWS}),
}
MESHES: dict[str, dict[str, Any]] = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def batch():
    """Padded on both sides, 8 rows of 5 + 6 tokens."""
    rng = np.random.default_rng(0)

    def ids(*shape):
        return jnp.asarray(rng.integers(0, SMALL["vocab_size"], shape), jnp.int32)

    prompt_mask = jnp.arange(5)[None, :] >= jnp.arange(8)[:, None] % 4
    mask = jnp.arange(6)[None, :] < 1 + jnp.arange(8)[:, None] % 6
    advantages = jnp.asarray(rng.normal(size=8), jnp.float32)
    return Batch(ids(8, 5), prompt_mask, ids(8, 6), mask, mask, advantages, jnp.zeros((8, 6)))


def policy_loss(model: Model, params: Params, batch: Batch) -> tuple[Mean, Metrics]:
    log_probs, entropy = completion_log_probs(model, params, batch, chunk_size=16)
    loss = supervised_loss(log_probs * batch.advantages[:, None] - 0.1 * entropy, batch.loss_mask)
    return loss, {"entropy": supervised_loss(entropy, batch.loss_mask)}


def update(config, batch, *, mesh=None, parts=1, dtype=jnp.float32, gradient_dtype=jnp.float32, **building):
    """The loss, and the gradients as an optimizer is given them, which keeps them."""
    mesh = make_mesh(data=1) if mesh is None else mesh
    model = build_model(config, mesh=mesh, dtype=dtype, **building)
    params = random_params(config)
    params = jax.device_put(params, param_shardings(params, mesh))
    optimizer = optax.trace(0.0)
    step = make_train_step(
        partial(policy_loss, model),
        optimizer,
        num_micro_batches=parts,
        preparation=model.preparation,
        gradient_dtype=gradient_dtype,
    )
    state = init_state(params, optimizer, with_reference=False, replicated=replicated(mesh))
    state, metrics = step(state, shard_rows(batch, mesh))
    return float(metrics["loss"]), state.opt_state.trace


def assert_close(actual, expected, tolerance):
    """The loss, and each gradient relative to its largest entry."""
    np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max()), actual[1], expected[1]
    )


@pytest.fixture(scope="module")
def unrolled(batch):
    """Loss and gradients of each model, unrolled on one device."""
    return {name: update(config, batch, scan_layers=False) for name, config in CONFIGS.items()}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tied", {"mesh": "2x2x2", "parts": 2, "scan_layers": True, "remat": "block"}),
        ("untied", {"mesh": "fsdp", "scan_layers": True}),
        ("gemma3", {"mesh": "data", "scan_layers": True, "remat": "block"}),
        ("gemma3", {"mesh": "one", "parts": 4, "scan_layers": True}),
        ("untied", {"mesh": "2x2x2", "parts": 2, "scan_layers": False, "remat": "block"}),
    ],
)
def test_loss_and_gradients_do_not_depend_on_stacking_recomputation_parts_and_devices(batch, unrolled, name, settings):
    mesh = make_mesh(**MESHES[settings["mesh"]])
    actual = update(CONFIGS[name], batch, **{**settings, "mesh": mesh})
    assert_close(actual, unrolled[name], 1e-5)


def test_bfloat16_gradients_are_close_to_float32_ones_however_they_are_accumulated(batch, unrolled):
    (mean_loss, exact), size = unrolled["tied"], lambda tree: float(optax.tree.norm(tree))
    for gradient_dtype, most in ((jnp.float32, 0.03), (jnp.bfloat16, 0.04)):
        settings: dict[str, Any] = {
            "scan_layers": True,
            "parts": 4,
            "dtype": jnp.bfloat16,
            "gradient_dtype": gradient_dtype,
        }
        loss, gradients = update(CONFIGS["tied"], batch, **settings)
        assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(loss, mean_loss, rtol=0.02)
        assert 0.001 < size(jax.tree.map(jnp.subtract, gradients, exact)) / size(exact) < most


def test_gradients_lie_as_the_parameters_do(batch):
    mesh = make_mesh(**MESHES["2x2x2"])
    config = CONFIGS["untied"]
    model = build_model(config, mesh=mesh, scan_layers=True, remat="block")
    params = random_params(config)
    wanted = param_shardings(params, mesh)

    @quick_jit
    def gradient(params, batch):
        def loss(prepared):
            return policy_loss(model, model.preparation.constrain(prepared), batch)[0].sum

        return jax.grad(loss)(model.preparation.prepare(params))

    @quick_jit
    def accumulated(params, batch):
        """Traced into another function, a step has no shardings of its own."""
        loss_fn, settings = partial(policy_loss, model), {"num_micro_batches": 2, "preparation": model.preparation}
        state = TrainState(jnp.int32(0), params, optax.trace(0.0).init(params))
        return make_train_step(loss_fn, optax.trace(0.0), **settings)(state, batch)[0].opt_state.trace

    params, batch = jax.device_put(params, wanted), shard_rows(batch, mesh)
    kernel = gradient(params, batch)[STACKED][0]["mlp"]["up"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", "tensor")), 3)
    found = accumulated(params, batch)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, wanted))


def test_the_program_of_a_step_does_not_grow_with_the_layers(batch):
    def lines(num_layers, scan_layers):
        config = from_hf_config({"model_type": "llama", **SMALL, "num_hidden_layers": num_layers})
        model = build_model(config, scan_layers=scan_layers, remat="block")
        params = init_params(config, jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda params: policy_loss(model, params, batch)[0].sum))
        text = gradient.lower(model.preparation.prepare(params)).compile().as_text()
        assert text is not None
        return len(text.splitlines())

    assert lines(6, True) < 1.1 * lines(2, True)
    assert lines(6, False) > 1.8 * lines(2, False)


def test_matrices_of_layers_are_cast_and_embeddings_heads_and_vectors_are_not():
    model, params = (
        build_model(CONFIGS["untied"], dtype=jnp.bfloat16, scan_layers=True),
        random_params(CONFIGS["untied"]),
    )
    prepared = model.preparation.prepare(params)
    layers, others = prepared[STACKED][0], {k: v for k, v in prepared.items() if k != STACKED}
    dtypes = {x.ndim: x.dtype for x in jax.tree.leaves(layers)}
    assert dtypes == {2: jnp.float32, 3: jnp.bfloat16, 4: jnp.bfloat16}
    assert {x.dtype for x in jax.tree.leaves(others)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_close(model.preparation.restore(prepared), params, rtol=2**-8)


def test_float32_parameters_that_are_not_stacked_are_taken_as_they_are():
    params = random_params(CONFIGS["tied"])
    model = build_model(CONFIGS["tied"])
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, model.preparation.prepare(params), params))


@pytest.mark.parametrize(
    ("windows", "repetition"),
    [
        ((None,) * 3, Repetition(1, 3)),
        ((4, None) * 2, Repetition(2, 2)),
        ((4, None, 4, None, 4), Repetition(2, 2)),
        ((None, None, 4, 4), None),
        ((None,), None),
    ],
)
def test_layers_that_repeat_are_found(windows, repetition):
    config = CONFIGS["untied"]
    config = dataclasses.replace(
        config, num_layers=len(windows), windows=windows, ropes=config.ropes[:1] * len(windows)
    )
    assert find_repetition(config) == repetition


def test_a_model_whose_layers_do_not_repeat_is_not_stacked(batch):
    config = dataclasses.replace(CONFIGS["untied"], windows=(None, 4, 3))
    params = random_params(config)
    assert STACKED not in build_model(config, scan_layers=True).preparation.prepare(params)


def test_stacked_layers_refuse_a_later_part_of_a_sequence():
    config = CONFIGS["untied"]
    model = build_model(config, scan_layers=True)
    params = stack_layers(random_params(config), Repetition(1, 3))
    ids = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="whole sequences: start must be 0"):
        model.apply(params, ids, ids, None, model.init_cache(1, 8), 2)


def test_frozen_log_probs_and_packed_rows_with_stacked_layers(batch):
    config = CONFIGS["gemma3"]
    params = random_params(config)
    model = build_model(config, scan_layers=True)
    frozen = make_log_prob_fn(partial(completion_log_probs, model), num_micro_batches=2, preparation=model.preparation)
    plain = make_log_prob_fn(partial(completion_log_probs, model))
    chex.assert_trees_all_close(
        jnp.where(batch.completion_mask, frozen(params, batch), 0),
        jnp.where(batch.completion_mask, plain(params, batch), 0),
        atol=1e-5,
    )
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    packed = Packed(batch.completion_ids[:1], segments, jnp.array([[0, 1, 2, 0, 1, 0]]), segments > 0)
    score = quick_jit(partial(packed_log_probs, model))
    chex.assert_trees_all_close(score(model.preparation.prepare(params), packed), score(params, packed), atol=1e-5)


def test_a_value_head_beside_the_policy_is_kept(batch):
    config = CONFIGS["tied"]
    model = build_model(config, scan_layers=True)
    params = with_value_head(random_params(config), config.hidden_size)
    form = model.preparation.under("policy")
    prepared = form.prepare(params)
    assert set(prepared) == {"policy", "value"}
    outputs = quick_jit(partial(policy_and_values, model))
    chex.assert_trees_all_close(outputs(prepared, batch), outputs(params, batch), atol=1e-5)
    chex.assert_trees_all_equal(form.restore(prepared), params)


def device(platform, *kinds):
    memories = [SimpleNamespace(kind=kind) for kind in kinds]
    return SimpleNamespace(platform=platform, device_kind="a device", addressable_memories=lambda: memories)


def test_offload_without_host_memory_is_refused():
    check_remat("block", device("tpu", "device"))
    check_remat("offload", device("tpu", "device", "pinned_host"))
    with pytest.raises(ValueError, match="remat is offload, which needs pinned_host memory; a device has device: use"):
        check_remat("offload", device("tpu", "device"))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_block_inputs_are_offloaded(batch, unrolled, scan_layers):
    model = build_model(CONFIGS["tied"], scan_layers=scan_layers, remat="offload")
    params = model.preparation.prepare(random_params(CONFIGS["tied"]))
    gradient = jax.grad(lambda params: policy_loss(model, params, batch)[0].sum)
    kept = "f32<host>[4,8,11,32]" if scan_layers else "f32<host>[8,11,32]"
    assert kept in str(jax.make_jaxpr(gradient)(params))
    assert_close(update(CONFIGS["tied"], batch, scan_layers=scan_layers, remat="offload"), unrolled["tied"], 1e-5)
