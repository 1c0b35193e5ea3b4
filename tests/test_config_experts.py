"""Memory and time by arithmetic of models with experts and latent attention."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from published import PUBLISHED, shrunk

from grpo_jax.config import memory
from grpo_jax.config.decoding import Decoding
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.speeds import Rates
from grpo_jax.devices import planning_for
from grpo_jax.loop import plan_search
from grpo_jax.models import from_hf_config
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.memory import activation_bytes, experts_bytes
from grpo_jax.models.sizes import expert_size

SPARSE, LATENT = (from_hf_config(PUBLISHED[name]) for name in ("Qwen3-30B-A3B", "DeepSeek-V3"))
WEIGHTS, EXPERTS = 30_532_122_624, 48 * 128 * 3 * 2048 * 768
V5P, H100 = Rates(459e12, 2765e9, 270e9, 1e-6, 3, 90e9), Rates(989e12, 3352e9, 450e9, 3e-6, link=450e9)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-30B-A3B"]))
    return GRPOConfig(
        run_dir=Path("run"),
        model=str(tmp_path),
        rewards=RewardConfig(format_weight=0.2),
        dtype="bfloat16",
        num_prompts=32,
        group_size=8,
        max_prompt_length=512,
        max_completion_length=1024,
    )


def axes(**sizes):
    return {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, **sizes}


def test_experts_are_a_part_of_what_a_run_holds(config):
    need = memory.reckon(config, SPARSE, axes())
    assert need.state == pytest.approx(12 * WEIGHTS, rel=1e-6)
    assert need.rollout == 2 * WEIGHTS
    for sizes in (axes(fsdp=16), axes(expert=16), axes(fsdp=4, expert=2, tensor=2)):
        assert need.state_on(sizes) == pytest.approx(12 * WEIGHTS / 16, rel=1e-3)
    assert need.rollout_share(4) == pytest.approx(1 / 4, rel=2e-3)
    assert need.experts == 128 * 3 * 2048 * 768 * (2 * 2 + 4)  # of one layer, gathered, with gradients in float32
    limit = 80 * 10**9
    assert need.tokens_on(axes(expert=16), limit) > need.tokens_on(axes(fsdp=16), limit) > 0
    adapters = memory.reckon(replace(config, lora=LoRA(rank=8)), SPARSE, axes())
    assert adapters.state == pytest.approx(2 * WEIGHTS + 12 * LoRA(rank=8).size(SPARSE), rel=1e-6)


@pytest.mark.parametrize(("sizes", "rows", "gathered"), [((1, 1), 8, 1), ((1, 4), 12, 4), ((2, 1), 6, 1)])
def test_activations_of_a_layer_with_experts(sizes, rows, gathered):
    tensor, expert = sizes
    count = activation_bytes(
        SPARSE, length=1, itemsize=2, remat="offload", fused_attention=True, tensor=tensor, expert=expert
    )
    heads = 2 * 2 * (3 * 32 + 2 * 4) * 128 / tensor
    of_rows = 2 * rows * (4 * 2048 + 6 * 768) + gathered * (2 * 2 + 8) * 2048
    assert count == 2 * 4 * 2048 + heads + of_rows + 8 * 2048


def test_the_largest_layer_counts_and_an_mlp_without_a_gate_is_smaller():
    given = {"length": 1, "itemsize": 2, "fused_attention": True, "tensor": 1}
    mixed = from_hf_config(PUBLISHED["GLM-4.5-Air"])
    dense = replace(mixed, sparse=(), experts=None)
    largest, all_dense = (activation_bytes(each, remat="offload", **given) for each in (mixed, dense))
    first, rest = mixed.num_layers - mixed.num_sparse(), mixed.num_sparse()
    assert activation_bytes(mixed, remat="none", **given) == first * all_dense + rest * largest
    plain = replace(dense, gated_mlp=False)
    assert all_dense - activation_bytes(plain, remat="offload", **given) == 2 * 2 * dense.intermediate_size
    wide = replace(LATENT, latent=replace(LATENT.latent, value_dim=LATENT.latent.value_dim + 1))
    more = activation_bytes(wide, remat="offload", **given) - activation_bytes(LATENT, remat="offload", **given)
    assert more == 2 * 2 * 2 * LATENT.num_heads
    assert experts_bytes(dense, 2) == 0


def decoding(decoder, rates, rows=16):
    numbers = {"columns": 1000, "itemsize": 2, "cache_itemsize": 2, "cache_limit": 1e18, "devices": 1, "near": 1}
    return Decoding(decoder=decoder, rows=rows, rates=rates, **numbers)


def test_latents_are_cached_once_for_all_heads_and_devices():
    assert decoding(LATENT, V5P).cache_on(1) == 16 * 1000 * 2 * (512 + 64)
    assert replace(decoding(LATENT, V5P), devices=2).cache_on(2) == 16 * 1000 * 2 * (512 + 64)


def test_a_decode_step_reads_the_experts_that_rows_are_sent_to():
    weights = 2 * WEIGHTS
    experts = 2 * EXPERTS

    def seconds(rates, rows):
        steps = decoding(SPARSE, rates, rows)
        return steps.seconds(1, weights) - steps.cache_on(1) / 2 / rates.memory

    for rows, read in ((1, 8 / 128), (4, 32 / 128), (16, 1), (64, 1)):
        assert seconds(V5P, rows) == pytest.approx((weights - experts * (1 - read)) / 2765e9)
        assert seconds(H100, rows) == pytest.approx(weights / 3352e9)  # all of them, in one product
    many = 10**5  # products of the experts that a row is sent to take the longest
    active = weights - experts * (1 - 8 / 128)
    assert decoding(SPARSE, V5P, many).seconds(1, weights) == pytest.approx(
        max(active * many / 459e12, weights / 2765e9 + decoding(SPARSE, V5P, many).cache_on(1) / 2 / 2765e9)
    )


def test_the_sampler_shards_experts_evenly(config):
    six = replace(SPARSE, experts=replace(SPARSE.experts, count=126))
    need = memory.reckon(config, SPARSE, axes(fsdp=16))
    assert memory.rollout_tensor(need, SPARSE, axes(fsdp=16), 60 * 10**9) == 4
    assert memory.rollout_tensor(need, six, axes(fsdp=16), 60 * 10**9) == 2  # the most that divides 126
    assert expert_size(SPARSE) == 3 * 2048 * 768


def test_meshes_with_an_expert_axis_are_ranked_for_models_with_experts(tmp_path):
    small = shrunk(PUBLISHED["Qwen3-30B-A3B"])
    (tmp_path / "config.json").write_text(json.dumps(small))
    config = GRPOConfig(model=str(tmp_path), num_prompts=8, group_size=2, max_prompt_length=4, max_completion_length=8)
    with planning_for(jax.devices()[:8], None):
        ranked = plan_search.rank_meshes(config, 8, limit=None, rates=None)
        assert {each.mesh.expert for each in ranked} == {1, 2, 4, 8}
        small["num_experts"] = 6
        (tmp_path / "config.json").write_text(json.dumps(small))
        found = {
            (each.mesh.expert, each.mesh.tensor) for each in plan_search.rank_meshes(config, 8, limit=None, rates=None)
        }
        assert found == {(1, 1), (2, 1), (1, 2)}
