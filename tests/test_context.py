"""Sequences whose tokens several devices share."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params
from jax.sharding import PartitionSpec as Spec
from layouts import T, assert_close, config_of, mesh_of, sampled, scored

from grpo_jax.models import build_model, kernels
from grpo_jax.models.context import ContextAttention, dealt_out, in_order
from grpo_jax.models.splash import dealt_slots
from grpo_jax.sharding import param_shardings, rollout_mesh

EXPECTED = {}


def check_context(case, sizes, layout, *, value=False, context=4, attention="plain", **options):
    """Scores and gradients on data x fsdp x tensor devices and ``context`` more, against one device."""
    config = config_of(case, num_hidden_layers=2, layer_types=None)
    config = replace(config, scalar_head=value)
    params, name = random_params(config), f"{case} {layout} {value}"
    if name not in EXPECTED:
        EXPECTED[name] = scored(config, params, mesh_of(1, 1, 1), layout, value=value)
    found = scored(config, params, mesh_of(*sizes, context), layout, value=value, attention=attention, **options)
    assert_close(found, EXPECTED[name])


@pytest.mark.parametrize(("sizes", "context", "layout"), [((1, 2, 2), 2, "padded"), ((2, 1, 1), 4, "shared")])
def test_tokens_over_context_give_the_gradients_of_one_device(sizes, context, layout):
    """Rows of 14 and 30 tokens, which 4 does not divide; windows, soft caps, padding, shared prompts."""
    check_context("gemma2", sizes, layout, context=context)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes", "layout", "value"),
    [
        ("qwen3_sliding_bias", (1, 2, 1), "documents", False),
        ("llama_longrope", (1, 2, 1), "padded", True),
        ("gemma3", (1, 1, 1), "shared", True),
    ],
)
def test_families_layouts_and_values_over_context(case, sizes, layout, value):
    check_context(case, sizes, layout, value=value)


@pytest.mark.slow
def test_stacked_layers_that_are_recomputed_over_context():
    check_context("gemma2", (1, 2, 1), "padded", remat="block", scan_layers=True)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_kernels_over_context_are_plain_attention(name):
    mesh, S = mesh_of(1, 2, 1, 2), 512
    rng = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(rng.normal(size=(2, S, n, 16)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, S)), axis=1)[:, ::-1].copy(), jnp.int32)
    is_real = dealt_out(segments, 2) > 0

    def outputs(kernel):
        def loss(*inputs):
            out = kernel(*inputs, segments, window=150, softcap=None)
            return jnp.where(is_real[:, :, None, None], jnp.tanh(out), 0).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(queries, keys, values)

    assert_close(outputs(ContextAttention(name, mesh, interpret=True)), outputs(ContextAttention("plain", mesh)))


def test_devices_of_context_are_replicas_of_the_sampler():
    assert dict(rollout_mesh(mesh_of(1, 2, 1, 4), 1).shape) == {
        "data": 8,
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 1,
    }
    assert dict(rollout_mesh(mesh_of(1, 2, 1, 4), 4).shape) == {
        "data": 2,
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 4,
    }
    with pytest.raises(ValueError, match=r"rollout_tensor is 3; .* mesh.fsdp x mesh.context x mesh.tensor = 8"):
        rollout_mesh(mesh_of(1, 2, 1, 4), 3)


@pytest.mark.slow
def test_the_sampler_draws_the_same_with_the_devices_of_context():
    config = config_of("qwen2", num_hidden_layers=2, layer_types=None)
    params = random_params(config)
    one, many = (sampled(config, params, mesh, 2) for mesh in (mesh_of(1, 1, 2), mesh_of(1, 2, 1, 4)))
    assert np.array_equal(one.completion_ids, many.completion_ids)
    assert one.completion_ids.shape[1] == T


def test_parameters_are_sharded_over_context_as_over_fsdp():
    config = config_of("qwen2", num_hidden_layers=2, layer_types=None)
    shardings = param_shardings(random_params(config), mesh_of(1, 2, 1, 4))
    assert shardings["layers_0"]["mlp"]["up"]["kernel"].spec == Spec(("fsdp", "context"), "tensor")


def test_a_model_over_context_takes_whole_sequences_only():
    config = config_of("qwen2", num_hidden_layers=2, layer_types=None)
    model = build_model(config, mesh=mesh_of(1, 1, 1, 2))
    assert model.token_shards == 2
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"over mesh.context, a model takes whole sequences with positions and no"):
        model.apply(random_params(config), ids, ids, None, model.init_cache(2, 4))


def test_the_kernel_over_context(monkeypatch):
    config, mesh = config_of("qwen2"), mesh_of(1, 1, 1, 2)
    assert kernels.choose_kernel("auto", config, jnp.bfloat16, mesh) == ContextAttention("plain", mesh)
    monkeypatch.setattr(kernels, "hardware", lambda _: "tpu")
    chosen = kernels.choose_kernel("auto", config, jnp.bfloat16, mesh)
    assert chosen == ContextAttention("splash", mesh)
    assert [chosen.padded_length(n) for n in (14, 512, 600, 1900, 33_792)] == [512, 512, 1024, 2048, 33_792]
    assert ContextAttention("splash", mesh_of(1, 1, 1, 8)).padded_length(33_792) == 36_864  # blocks of 384, not of 128
    assert not kernels.takes_segments(chosen)


@pytest.mark.parametrize("context", [2, 4])
def test_blocks_are_dealt_out_for_equal_work_and_sent_back(context):
    mesh, S = mesh_of(1, 2, 1, context), 4 * context
    x = jnp.arange(2.0 * S).reshape(2, S, 1)
    dealt = dealt_out(x[:, :, 0], context)
    assert len({int(slots.sum()) for slots in dealt_slots(S, context).reshape(context, -1)}) == 1
    assert not np.array_equal(dealt, x[:, :, 0])
    assert np.array_equal(in_order(dealt[:, :, None], mesh), x)
