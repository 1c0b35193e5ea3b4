"""Hybrids: layers with the gated delta rule and with attention, in sampler and trainer, on meshes and with adapters."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import assert_close, mesh_of, sampled, scored

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.models import (
    LoRA,
    add_adapters,
    build_model,
    from_hf_config,
    init_params,
    merge_adapters,
    param_shapes,
)
from grpo_jax.models.config import with_layers
from grpo_jax.models.flops import training_flops
from grpo_jax.models.memory import activation_bytes
from grpo_jax.models.preparation import STACKED, Repetition, find_repetition
from grpo_jax.rollout import Sampler, generate
from grpo_jax.rollout.buckets import MemoryLimits
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh
from grpo_jax.train import completion_log_probs
from grpo_jax.types import PrefixCache

HYBRID = {
    "model_type": "qwen3_5_text",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    # Small outputs of the rule, such as that of a first token whose query and key are almost orthogonal, are divided
    # by their size: with the usual epsilon, rounding of the weights changes gradients by more than is compared here.
    "rms_norm_eps": 1e-2,
}
CONFIG = from_hf_config(HYBRID)
T, GROUP, WIDTH = 70, 4, 6  # two chunks of the KV cache
OPTIONS = {"group_size": GROUP, "max_completion_length": T, "eos_ids": (5,), "pad_id": 0}


@pytest.fixture(scope="module")
def hybrid():
    return build_model(CONFIG), init_params(CONFIG, jax.random.key(1))


def prompts_of(count=16):
    rng = np.random.default_rng(0)
    ids = [rng.integers(6, 31, rng.integers(1, WIDTH + 1)).tolist() for _ in range(count)]
    return pad_prompts(ids, max_prompt_length=WIDTH, pad_id=0, index=range(count))


def assert_same(found, wanted):
    found, wanted = vars(found).copy(), vars(wanted).copy()
    chex.assert_trees_all_close(found.pop("rollout_log_probs"), wanted.pop("rollout_log_probs"), atol=2e-5)
    chex.assert_trees_all_equal(found, wanted)


@pytest.fixture(scope="module")
def rollout(hybrid):
    """Samples of the loop without compaction."""
    model, params = hybrid
    return jax.jit(partial(generate, model, sampling=Sampling(), **OPTIONS))(params, prompts_of(), jax.random.key(0))


def test_states_follow_their_rows_through_compaction(hybrid, rollout):
    model, params = hybrid
    sampler = Sampler(model, Sampling(), **OPTIONS)
    assert_same(sampler(params, prompts_of(), jax.random.key(0)), rollout)
    lengths = rollout.completion_mask.sum(1)
    assert lengths.min() < 10
    assert lengths.max() > 64  # rows leave early, and the second chunk is opened


@pytest.mark.slow
def test_states_follow_their_rows_through_merges(hybrid):
    model, params = hybrid
    stats, prompts, key = [], prompts_of(32), jax.random.key(0)
    whole = Sampler(model, Sampling(), **OPTIONS)(params, prompts, key)
    sampler = Sampler(model, Sampling(), **OPTIONS, max_rows=64, ahead=2, report=stats.append)
    assert_same(sampler(params, prompts, key), whole)
    assert stats[0].batches == 3  # two batches, and what is left of them as a third


def test_sampler_and_trainer_agree(hybrid, rollout):
    model, params = hybrid
    log_probs, _ = jax.jit(partial(completion_log_probs, model))(params, rollout)
    mask = np.asarray(rollout.completion_mask)
    gap = np.abs(np.asarray(rollout.rollout_log_probs) - np.asarray(log_probs))[mask]
    assert gap.max() <= 1e-5 * np.abs(np.asarray(log_probs)[mask]).max()


@pytest.mark.slow
def test_a_coarser_cache_leaves_states_in_their_precision(hybrid):
    model, params = hybrid
    sampler = Sampler(model, Sampling(), **OPTIONS, cache_dtype=jnp.int8)
    found = sampler(params, prompts_of(), jax.random.key(0))
    log_probs, _ = jax.jit(partial(completion_log_probs, model))(params, found)
    mask = np.asarray(found.completion_mask)
    gap = np.abs(np.asarray(found.rollout_log_probs) - np.asarray(log_probs))[mask]
    assert 1e-4 < gap.max() < 1
    assert {x.dtype for x in jax.tree.leaves(model.init_states(1))} == {jnp.dtype("float32")}
    coarse = build_model(CONFIG, dtype=jnp.bfloat16).init_states(1)[0]
    assert {name: x.dtype.name for name, x in coarse.items()} == {
        **dict.fromkeys(("q_inputs", "k_inputs", "v_inputs"), "bfloat16"),
        "state": "float32",
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_packed_rows_give_the_gradients_of_padded_ones(hybrid, layout):
    _, params = hybrid
    one = mesh_of(1, 1, 1)
    assert_close(scored(CONFIG, params, one, layout), scored(CONFIG, params, one, "padded"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "shared", "documents"])
def test_eight_devices_give_the_gradients_of_one(hybrid, layout):
    _, params = hybrid
    expected = scored(CONFIG, params, mesh_of(1, 1, 1), layout)
    assert_close(scored(CONFIG, params, mesh_of(2, 2, 2), layout), expected)


@pytest.mark.slow
def test_eight_devices_give_the_samples_of_one(hybrid):
    _, params = hybrid
    assert_same(sampled(CONFIG, params, mesh_of(2, 2, 2), 2), sampled(CONFIG, params, mesh_of(1, 1, 1), 1))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_stacked_layers_give_the_gradients_of_unrolled_ones(remat):
    one, config = mesh_of(1, 1, 1), with_layers(CONFIG, CONFIG.kinds * 2)
    params = init_params(config, jax.random.key(1))
    assert find_repetition(config) == Repetition(period=2, count=2)
    expected = scored(config, params, one, "shared")
    assert STACKED in build_model(config, scan_layers=True).preparation.prepare(params)
    assert_close(scored(config, params, one, "shared", scan_layers=True, remat=remat), expected)


def test_a_prompt_continues_in_later_calls(hybrid):
    """Chunks of a prompt, with padding on both sides, and single tokens: states and columns of earlier calls."""
    model, params = hybrid
    ids = jax.random.randint(jax.random.key(2), (2, 12), 0, 32)
    mask = jnp.arange(12)[None] >= jnp.array([[0], [3]])
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    apply = jax.jit(model.apply, static_argnames="start")
    whole, _ = apply(params, ids, positions, mask)
    cache = model.init_cache(2, 12)
    found = []
    for start, end in ((0, 7), (7, 11), (11, 12)):
        own = slice(start, end)
        out, cache = apply(params, ids[:, own], positions[:, own], mask, cache, start=start)
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1)[mask], whole[mask], atol=2e-5)


def test_calls_without_the_states_they_continue_are_refused(hybrid):
    model, params = hybrid
    ids, cache = jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 4)
    message = "a call on tokens after the first needs the states"
    with pytest.raises(ValueError, match=message):
        model.apply(params, ids, ids, None, cache, 1)
    with pytest.raises(ValueError, match=message):
        model.apply(params, ids, ids, None, cache, 0, [PrefixCache(cache, start=-4)])


def test_prefix_caches_have_no_states(hybrid):
    model, params = hybrid
    ids = jnp.zeros((1, 4), jnp.int32)
    _, cache = model.apply(params, ids, ids, None, model.init_cache(1, 6))
    assert [entry.keys() for entry in model.first_columns(cache, 4)] == [set(), {"keys", "values"}]
    chunks = [model.first_columns(cache, 2)] * 2
    joined = model.join_columns(chunks, jnp.array([0, 2]), jnp.int32(4))
    assert [entry.keys() for entry in joined] == [set(), {"keys", "values"}]
    assert joined[1]["values"].shape[2] == 4


def test_memory_limits_count_states(hybrid):
    model, _ = hybrid
    size = sum(x.nbytes for x in jax.tree.leaves(model.init_states(1)))
    assert size == CONFIG.state_bytes(4) == 4 * (3 * (2 * 2 * 8 + 4 * 12) + 4 * 8 * 12)
    row, prompt = size + 64 * 2 * 2 * 16 * 4, 6 * 2 * 2 * 16 * 4  # with keys and values of one layer
    limits = partial(MemoryLimits, model, group_size=4, max_completion_length=64, devices=1, max_rows=None)
    assert limits(cache_bytes=2 * row + prompt).num_group_parts(6) == 2
    assert limits(cache_bytes=2 * row + prompt - 1).num_group_parts(6) == 4


def test_sequences_over_several_devices_are_refused():
    with pytest.raises(ValueError, match=r"mesh.context is 2, and this model has layers with the gated delta rule"):
        build_model(CONFIG, mesh=make_mesh(context=2, devices=jax.devices()[:2]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["linear_attention"] * 2}, "at least one must be full_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "supported are full_attention and linear_attention"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim in config.json must be a positive integer, not 0"),
        ({"full_attention_interval": 0}, "full_attention_interval in config.json must be at least 1"),
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16'"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(HYBRID | fields)
    with pytest.raises(ValueError, match=r"layer_types has \['linear_attention'\]"):
        from_hf_config({"model_type": "qwen3", **HYBRID_SIZES, "layer_types": ["linear_attention"] * 2})


HYBRID_SIZES = {name: value for name, value in HYBRID.items() if "linear" not in name and "interval" not in name}
HYBRID_SIZES.pop("model_type")


def test_new_layers_forget_at_many_rates_and_preserve_variance():
    config = replace(CONFIG, delta=replace(CONFIG.delta, value_heads=64))
    delta = init_params(config, jax.random.key(0))["layers_0"]["delta"]
    rates = np.exp(delta["A_log"])
    assert 0.01 <= rates.min() < 2
    assert 14 < rates.max() <= 16
    assert all((x == 1).all() for x in (delta["dt_bias"], delta["norm"]["scale"]))
    assert np.square(delta["v_conv"]).sum(-1).mean() == pytest.approx(1, rel=0.2)


def test_flops_and_memory_count_the_states():
    attention_only = replace(CONFIG, mixers=())
    lengths = np.array([40])
    params = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(CONFIG))) - 2 * 32 * 32
    pairs = 40 * 41 / 2
    expected = 6 * (params * 40 + 32 * 32 * 40) + 12 * 4 * 16 * pairs + 18 * 4 * 8 * 12 * 40
    assert training_flops(CONFIG, 0, lengths) == expected
    options = {"length": 40, "itemsize": 4, "fused_attention": True, "tensor": 1}
    whole, one = (activation_bytes(CONFIG, remat=remat, **options) for remat in ("none", "offload"))
    assert whole == one + activation_bytes(attention_only, remat="none", **options) // 2


LORA = LoRA(rank=4, alpha=8.0)


@pytest.mark.parametrize("quantize", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_adapters_are_those_of_each_layer(hybrid, quantize):
    model, params = hybrid
    lora = replace(LORA, quantize=quantize)
    adapted = add_adapters(jax.tree.map(jnp.copy, params), CONFIG, lora, jax.random.key(2), dtype=jnp.float32)
    found = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(adapted["layers_0"])]
    assert sum("kernel_lora_a" in path for path in found) == 5 + 3
    assert [name for name in "abkoqvz" if f"['delta']['{name}']['kernel_lora_a']" in found] == [*"koqvz"]
    count = sum(x.size for path, x in jax.tree.leaves_with_path(adapted) if "lora" in path[-1].key)
    assert lora.size(CONFIG) == count
    noise = jax.random.normal(jax.random.key(3), (4096,))
    adapted = jax.tree.map_with_path(
        lambda path, x: x + 0.1 * noise[: x.size].reshape(x.shape) if path[-1].key == "kernel_lora_b" else x, adapted
    )
    ids = jnp.arange(12).reshape(1, 12)
    found, _ = jax.jit(build_model(CONFIG, lora=lora).apply)(adapted, ids, ids)
    wanted, _ = jax.jit(model.apply)(merge_adapters(adapted, CONFIG, lora), ids, ids)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next"])
def test_adapters_lie_in_the_rows_of_what_they_adapt(model_type):
    """The product of the exported matrices is the change of the stored matrix."""
    from grpo_jax.models.hf_keys import key_table
    from grpo_jax.models.lora_files import adapter_tensors
    from grpo_jax.models.pretrained import Pretrained

    config = from_hf_config(HYBRID | {"model_type": model_type} | ({"num_experts": 0} if "next" in model_type else {}))
    lora = replace(LORA, targets=("(attention|delta)/(q|k|v|z|o|out_gate)",))
    params = add_adapters(init_params(config, jax.random.key(0)), config, lora, jax.random.key(1), dtype=jnp.float32)
    params = jax.tree.map_with_path(
        lambda path, x: jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape), params
    )
    like = Pretrained.__new__(Pretrained)
    object.__setattr__(like, "config", config)
    object.__setattr__(like, "lora", lora)
    exported = adapter_tensors(params, like)
    merged = merge_adapters(params, config, lora)
    checked = 0
    for path, entry in key_table(config).items():
        layer, module, name, *_ = *path.split("/"), "", ""
        if module not in ("attention", "delta") or name not in ("q", "k", "v", "z", "o", "out_gate"):
            continue
        before = np.asarray(params[layer][module][name]["kernel"])
        change = np.asarray(merged[layer][module][name]["kernel"]) - before
        stored = f"base_model.model.{entry.names[0].removesuffix('.weight')}"
        product = exported[f"{stored}.lora_B.weight"] @ exported[f"{stored}.lora_A.weight"] * lora.scale
        read = entry.view.read(product, entry.shape, [range(size) for size in entry.shape])
        np.testing.assert_allclose(read, change, atol=2e-4)
        checked += 1
    assert checked == 5 + 5
