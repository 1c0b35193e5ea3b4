"""LoRA adapters of models with layers of several kinds, experts, latent attention and fused tensors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params
from published import PUBLISHED, shrunk
from safetensors.numpy import load_file

from grpo_jax.models import (
    LoRA,
    Pretrained,
    add_adapters,
    build_model,
    from_hf_config,
    merge_adapters,
    save_adapters,
    save_pretrained,
)
from grpo_jax.models.lora_files import adapter_config
from grpo_jax.models.sizes import linear_sizes
from grpo_jax.sharding import make_mesh, param_shardings
from grpo_jax.train import trainable_part

IDS = jnp.arange(16).reshape(2, 8) % 32
ADAPTED = {
    "Qwen3-30B-A3B": {"attention/q", "attention/k", "attention/v", "attention/o"},
    "GLM-4.5-Air": {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down"}
    | {"mlp/shared/gate", "mlp/shared/up", "mlp/shared/down"},
    "DeepSeek-V3": {"attention/q_a", "attention/q_b", "attention/kv_a", "attention/o", "mlp/gate", "mlp/up", "mlp/down"}
    | {"mlp/shared/gate", "mlp/shared/up", "mlp/shared/down"},
    "Moonlight-16B-A3B": {"attention/q", "attention/kv_a", "attention/o", "mlp/gate", "mlp/up", "mlp/down"}
    | {"mlp/shared/gate", "mlp/shared/up", "mlp/shared/down"},
    "Qwen3-Next-80B-A3B": {"attention/q", "attention/k", "attention/v", "attention/o"}
    | {"delta/q", "delta/k", "delta/v", "delta/z", "delta/o"}
    | {"mlp/shared/gate", "mlp/shared/up", "mlp/shared/down"},
    "Phi-3-mini-4k": {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down"},
    "StarCoder2-15B": {"attention/q", "attention/k", "attention/v", "attention/o", "mlp/up", "mlp/down"},
}


def adapted(name, lora):
    """The configuration, and parameters with adapters whose B is not zero."""
    hf_config = shrunk(PUBLISHED[name])
    config = from_hf_config(hf_config)
    params = add_adapters(random_params(config), config, lora, jax.random.key(2), dtype=jnp.float32)

    def move(path, x):
        noise = jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
        return x + 0.1 * noise if path[-1].key == "kernel_lora_b" else x

    return hf_config, config, jax.tree.map_with_path(move, params)


@pytest.mark.parametrize("name", ADAPTED)
def test_by_default_attention_and_the_mlps_of_all_tokens_have_adapters(name):
    _, config, params = adapted(name, LoRA(rank=4))
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable_part(params)):
        layer, *module, kind = [entry.key for entry in path]
        found.add("/".join(module))
        inputs, outputs = linear_sizes(config, config.kinds[int(layer.removeprefix("layers_"))])["/".join(module)]
        assert leaf.shape == ((inputs, 4) if kind == "kernel_lora_a" else (4, outputs))
    assert found == ADAPTED[name]
    assert sum(x.size for x in jax.tree.leaves(trainable_part(params))) == LoRA(rank=4).size(config)


@pytest.mark.parametrize(("name", "quantize"), [("DeepSeek-V3", "nf4"), ("GLM-4.5-Air", None)])
def test_merged_and_applied_adapters_agree(name, quantize):
    lora = LoRA(rank=4, alpha=8.0, quantize=quantize)
    _, config, params = adapted(name, lora)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    applied = jax.jit(build_model(config, lora=lora).apply)(params, IDS, positions)[0]
    model, merged = build_model(config), merge_adapters(params, config, lora)
    expected = jax.jit(model.apply)(merged, IDS, positions)[0]
    np.testing.assert_allclose(applied, expected, atol=1e-5 * float(np.abs(expected).max()))
    bare = jax.tree.map_with_path(lambda path, x: 0 * x if "_lora_b" in path[-1].key else x, params)
    without = jax.jit(model.apply)(merge_adapters(bare, config, lora), IDS, positions)[0]
    assert np.abs(without - expected).max() > 0.01


@pytest.mark.parametrize("name", ["Phi-3-mini-4k", "DeepSeek-V3", "GLM-4.5-Air", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B"])
def test_files_of_adapters_mean_what_merging_them_does(name, tmp_path):
    """By PEFT's formula on the stored tensors: ``W + (alpha / r) B A``, with a module's own r and alpha."""
    lora = LoRA(rank=2, alpha=3.0)
    hf_config, config, params = adapted(name, lora)
    like = Pretrained(build_model(config), params, config, hf_config, None, None, (1,), 0, lora=lora)
    save_adapters(tmp_path / "adapter", params, like)
    base = jax.tree.map_with_path(lambda path, x: 0 * x if "_lora_b" in path[-1].key else x, params)
    stored = {}
    for kind, of_kind in (("base", base), ("merged", params)):
        save_pretrained(tmp_path / kind, merge_adapters(of_kind, config, lora), hf_config=hf_config)
        stored[kind] = load_file(tmp_path / kind / "model.safetensors")
    tensors, facts = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), adapter_config(like)

    def of_module(pattern, module, default):
        found = [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)]
        return found[0] if found else default

    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    for key, tensor in stored["base"].items():
        module = key.removesuffix(".weight")
        expected = tensor
        is_target = any(module == name or module.endswith("." + name) for name in facts["target_modules"])
        assert is_target == (module in modules)
        if module in modules:
            a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
            rank = of_module(facts["rank_pattern"], module, facts["r"])
            assert a.shape[0] == b.shape[1] == rank
            expected = tensor + of_module(facts["alpha_pattern"], module, facts["lora_alpha"]) / rank * b @ a
            assert np.abs(expected - tensor).max() > 1e-3
        np.testing.assert_allclose(stored["merged"][key], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("Qwen3-30B-A3B", "mlp/.*", "'mlp/..' names mlp/experts/gate, which cannot have adapters; name one of attent"),
        ("GLM-4.5-Air", "mlp/experts/(gate|up)", "names mlp/experts/gate, which cannot have adapters; name one of"),
        ("DeepSeek-V3", "attention/(k|v)_b", "names attention/k_b, which cannot have adapters; name one of"),
        ("DeepSeek-V3", "attention/k", "'attention/k' matches none of the matrices attention/q_a, attention/q_b, "),
    ],
)
def test_targets_that_cannot_have_adapters_are_refused(name, target, message):
    config = from_hf_config(shrunk(PUBLISHED[name]))
    with pytest.raises(ValueError, match=re.escape(message).replace(r"/\.\.", "/..")):
        LoRA(rank=2, targets=("attention/o", target)).check(config)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "GLM-4.5-Air"])
def test_adapters_lie_on_a_mesh_as_their_matrices(name):
    _, _, params = adapted(name, LoRA(rank=4))
    mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings(params, mesh)):
        if path[-1].key == "kernel_lora_b" and path[-2].key in ("q", "q_b", "up"):
            assert sharding.spec[1] == "tensor"
