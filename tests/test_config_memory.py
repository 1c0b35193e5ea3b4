"""Memory reckoned from a model's sizes: micro-batches, refusals and the reference's precision."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import quick_jit

from grpo_jax.config import memory
from grpo_jax.config.data import DataConfig
from grpo_jax.config.decoding import Decoding, decoding_of
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.memory import MICRO_BATCH_TOKENS
from grpo_jax.config.offline import DemonstrationConfig, PreferenceConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.speeds import Rates
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.models import from_hf_config
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.memory import activation_bytes
from grpo_jax.sharding import make_mesh, replicated
from grpo_jax.train import completion_log_probs, init_state, with_fresh_reference
from grpo_jax.train.forward import Rows

SEVEN_B = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
}
DECODER = from_hf_config(SEVEN_B)
WEIGHTS = 7_615_616_512
V5E, H100 = 16 * 10**9, 80 * 10**9


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    return GRPOConfig(
        run_dir=Path("run"),
        model=str(tmp_path),
        data=DataConfig(dataset="rows.jsonl"),
        rewards=RewardConfig(format_weight=0.2),
        dtype="bfloat16",
        num_prompts=32,
        group_size=8,
        max_prompt_length=512,
        max_completion_length=1024,
        mesh=MeshConfig(data=1, fsdp=8),
    )


def test_what_a_7b_run_holds(config):
    need = memory.reckon(config, DECODER, {"data": 1, "fsdp": 16, "tensor": 1})
    assert need.state == pytest.approx(3 * 4 * WEIGHTS, rel=1e-6)
    assert need.rollout == 2 * WEIGHTS
    assert need.state_on({"data": 1, "fsdp": 4, "tensor": 4}) == need.state // 16
    with_reference = replace(config, policy=PolicyLossConfig(kl_coef=0.01))
    assert memory.reckon(with_reference, DECODER, {"fsdp": 1, "tensor": 1}).state - need.state == 2 * WEIGHTS
    small = replace(config, optimizer=OptimizerConfig(optimizer="adafactor", gradient_dtype="bfloat16"))
    smaller = memory.reckon(small, DECODER, {"fsdp": 1, "tensor": 1})
    assert smaller.state < 0.34 * need.state
    assert need.update - smaller.update == 2 * WEIGHTS
    ppo = PPOConfig(
        run_dir=Path("run"), model=config.model, rewards=config.rewards, dtype="bfloat16", kl_reward_coef=0.0
    )
    assert memory.reckon(ppo, DECODER, {"fsdp": 1, "tensor": 1}).state == 2 * need.state
    assert memory.reckon(replace(ppo, critic="head"), DECODER, {"fsdp": 1, "tensor": 1}).state == need.state


def test_what_a_7b_run_with_adapters_holds(config):
    """Adapters with their moments in float32, and frozen weights, of which the adapted matrices are quantized."""
    matrices = LoRA(rank=16).matrices(DECODER).values()
    adapters = 28 * 16 * sum(inputs + outputs for inputs, outputs in matrices)
    needs = {
        quantize: memory.reckon(
            replace(config, lora=LoRA(rank=16, quantize=quantize)), DECODER, {"fsdp": 1, "tensor": 1}
        )
        for quantize in (None, "int8", "nf4")
    }
    assert needs[None].state == pytest.approx(2 * WEIGHTS + 3 * 4 * adapters, rel=1e-6)
    quantized = 28 * sum(inputs * outputs for inputs, outputs in matrices)
    for quantize, saved in (("int8", 1), ("nf4", 1.5)):
        assert needs[None].state - needs[quantize].state == saved * quantized
        assert needs[None].rollout - needs[quantize].rollout == saved * quantized


def test_what_is_offloaded_leaves_room_on_the_devices(config):
    axes = {"fsdp": 1, "tensor": 1}
    config = replace(config, policy=PolicyLossConfig(kl_coef=0.01))
    need, less = (
        memory.reckon(replace(config, offload=offload), DECODER, axes) for offload in ((), ("optimizer", "reference"))
    )
    assert need.state - less.state == pytest.approx((2 * 4 + 2) * WEIGHTS)
    assert less.update == need.update


def test_what_ppo_trains_as_a_whole_beside_adapters(config):
    ppo = PPOConfig(
        run_dir=Path("run"),
        model=config.model,
        rewards=config.rewards,
        dtype="bfloat16",
        kl_reward_coef=0.0,
        lora=LoRA(rank=16),
    )
    axes = {"fsdp": 1, "tensor": 1}
    actor = memory.reckon(replace(config, lora=LoRA(rank=16)), DECODER, axes)
    whole = memory.reckon(config, DECODER, axes)
    both = memory.reckon(ppo, DECODER, axes)
    assert both.state == pytest.approx(actor.state + whole.state, rel=1e-9)
    assert both.update == whole.update
    stacked = memory.reckon(replace(config, lora=LoRA(rank=16)), DECODER, {"fsdp": 8, "tensor": 1})
    assert stacked.update - actor.update == 2 * WEIGHTS  # the frozen weights once more


def test_offline_training_follows_the_memory_of_the_devices(config, monkeypatch):
    shared = {"run_dir": Path("run"), "model": config.model, "dtype": "bfloat16", "mesh": MeshConfig(data=1, fsdp=8)}
    sft = SFTConfig(**shared, data=DemonstrationConfig(dataset="rows.jsonl"), num_sequences=128, num_eval_prompts=0)
    pairs = PreferenceConfig(dataset="rows.jsonl")
    dpo = DPOConfig(**shared, data=pairs, num_pairs=128)
    scores = RewardModelConfig(**shared, data=pairs, num_pairs=128)
    rows = MICRO_BATCH_TOKENS // 2048 * 8, MICRO_BATCH_TOKENS // (2 * 1536) * 8
    assert [each.micro_batches for each in (sft, dpo, scores)] == [128 // rows[0], *[-(-128 // rows[1])] * 2]
    monkeypatch.setattr(memory, "device_bytes", lambda devices: V5E)
    for each in (sft, dpo, scores):
        assert each.micro_batches == 16  # one row a device at a time is the least
        memory.check_memory(each)
        with pytest.raises(ValueError, match=r"does not fit devices of 16.0 GB: weights and optimizer state take 22.8"):
            memory.check_memory(replace(each, mesh=MeshConfig(data=2, fsdp=4)))
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 13 * 10**9)
    memory.check_memory(sft)  # 11.4 GB, and no sampler
    with pytest.raises(ValueError, match=r"and the sampler's weights 3.8 GB \(mesh.rollout_tensor 4\)"):
        memory.check_memory(dpo)


def test_the_sampler_shares_float32_weights_that_lie_as_it_needs_them(config):
    need = memory.reckon(replace(config, dtype="float32"), DECODER, {"fsdp": 1, "tensor": 1})
    assert need.rollout_on({"data": 8, "fsdp": 1, "tensor": 1}, 1) == 0
    assert need.rollout_on({"data": 4, "fsdp": 2, "tensor": 1}, 1) == 4 * WEIGHTS
    assert need.rollout_on({"data": 4, "fsdp": 2, "tensor": 1}, 2) == 2 * WEIGHTS


@pytest.mark.parametrize(("remat", "fused"), [("none", True), ("block", True), ("block", False), ("offload", True)])
def test_activations_of_a_7b_model(remat, fused):
    count = activation_bytes(DECODER, length=1536, itemsize=2, remat=remat, fused_attention=fused, tensor=1)
    layer, inputs, scores = 2 * (4 * 3584 + 2 * 92 * 128 + 6 * 18_944) + 8 * 3584, 28 * 2 * 3584, 12 * 28 * 1536
    assert (
        count
        == {
            ("none", True): 28 * layer,
            ("block", True): layer + inputs,
            ("block", False): layer + inputs + scores,
            ("offload", True): layer,
        }[remat, fused]
    )


def test_micro_batches_follow_the_memory_of_the_devices(config, monkeypatch):
    assert config.micro_batches == 4  # of 8 rows on each of 8 devices: 12,288 tokens
    found = {}
    for limit in (V5E, H100, 10 * H100):
        monkeypatch.setattr(memory, "device_bytes", lambda devices, limit=limit: limit)
        found[limit] = config.micro_batches, memory.micro_batch_tokens(config)
    assert found[V5E] == (32, 0)  # one row a device at a time is the least
    assert found[H100][0] == 1
    state = memory.reckon(config, DECODER, {"fsdp": 1, "tensor": 1})
    assert found[H100][1] == int(0.9 * H100 - (state.state + state.update) // 8) // state.token
    assert replace(config, num_micro_batches=2).micro_batches == 2


def test_a_run_that_cannot_fit_is_refused_with_a_mesh_that_does(config, monkeypatch):
    memory.check_memory(config)  # no device says how much memory it has
    monkeypatch.setattr(memory, "device_bytes", lambda devices: V5E)
    with pytest.raises(ValueError, match=r"does not fit devices of 16.0 GB: .* take 11.4 GB on each \(mesh.fsdp 8 x"):
        memory.check_memory(replace(config, mesh=MeshConfig(data=1, fsdp=8, rollout_tensor=1)))
    with pytest.raises(
        ValueError, match=r"sampler's weights 15.2 GB \(mesh.rollout_tensor 1\); of the meshes of these"
    ):
        memory.check_memory(replace(config, mesh=MeshConfig(data=1, fsdp=8, rollout_tensor=1)))
    with pytest.raises(
        ValueError, match=r"take 91.4 GB on each .*of the meshes of these 8 devices, --mesh.fsdp 8 --mes"
    ):
        memory.check_memory(replace(config, mesh=MeshConfig()))
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 12 * 10**9)
    with pytest.raises(ValueError, match="no mesh of them does"):
        memory.check_memory(config)
    monkeypatch.setattr(memory, "device_bytes", lambda devices: H100)
    memory.check_memory(config)
    memory.check_memory(replace(config, model="org/unknown"))


def test_the_samplers_weights_are_sharded_as_far_as_they_must(config):
    axes = {"data": 1, "fsdp": 16, "tensor": 1}
    need = memory.reckon(config, DECODER, axes)
    devices = [memory.rollout_tensor(need, DECODER, axes, limit) for limit in (H100, 20 * 10**9, V5E, 10**9)]
    assert devices == [1, 2, 4, 4]  # at most the four KV heads


H100_RATES, V5P_RATES = Rates(989e12, 3352e9, 450e9, 3e-6, link=450e9), Rates(459e12, 2765e9, 270e9, 1e-6, 3, 90e9)


def decoding(rates, **changes):
    """Steps of 256 rows of 1,536 tokens on 16 devices."""
    found = Decoding(
        decoder=DECODER,
        rows=256,
        columns=28 * 1536,
        itemsize=2,
        cache_itemsize=2,
        cache_limit=0.2 * H100,
        devices=16,
        near=16,
        rates=rates,
    )
    return replace(found, **changes)


def test_the_samplers_weights_are_sharded_as_far_as_decoding_gains(config):
    axes = {"data": 1, "fsdp": 16, "tensor": 1}
    need = memory.reckon(config, DECODER, axes)

    def chosen(limit=H100, rates=V5P_RATES, **changes):
        return memory.rollout_tensor(need, DECODER, axes, limit, decoding(rates, **changes))

    assert chosen() == chosen(rates=H100_RATES) == 4
    assert chosen(rows=2**20, cache_limit=1e18) == 1  # products take longer than reading weights
    assert chosen(rates=V5P_RATES._replace(latency=1e-3)) == 1
    assert chosen(rates=V5P_RATES._replace(latency=1e-3), limit=20 * 10**9) == 2  # the fewest that fit
    assert chosen(limit=10**9) == 4  # as without
    two = replace(DECODER, num_kv_heads=2)
    tight = int((need.state_on(axes) + need.rollout_on(axes, 2) + 2 * decoding(V5P_RATES).cache_on(2)) / 0.9) + 1
    assert memory.rollout_tensor(need, two, axes, tight) == 4  # whose KV heads are repeated
    assert memory.rollout_tensor(need, two, axes, tight, decoding(V5P_RATES)) == 2  # the cache is small
    slow = H100_RATES._replace(wire=5e9, latency=1e-4)  # between hosts
    assert chosen(rates=slow, near=16) == 4
    assert chosen(rates=slow, near=2) == 2


def test_seconds_of_a_decode_step():
    steps = decoding(V5P_RATES)
    cache = 28 * 2 * 512 * 2 * 16 * 1536  # of 16 rows, bytes
    assert steps.cache_on(1) == steps.cache_on(4) == cache
    assert steps.cache_on(8) == 2 * cache  # of 4 KV heads, each on two devices
    assert steps.seconds(1, 15e9) == pytest.approx((15e9 + cache / 2) / 2765e9)
    halves = replace(steps, cache_limit=cache / 2)
    assert halves.seconds(1, 15e9) == pytest.approx((30e9 + cache / 2) / 2765e9)
    hops = 3 * (4 ** (1 / 3) - 1)
    sums = 57 * (2 * 64 * 3584 * 2 * 3 / 4 / 180e9 + 2 * 1e-6 * hops)  # 64 rows, over two links
    assert steps.seconds(4, 15e9 / 4) == pytest.approx((15e9 / 4 + cache / 2) / 2765e9 + sums)
    assert replace(steps, rows=10**6, cache_limit=1e18).seconds(1, 15e9) == pytest.approx(15e9 * 10**6 / 16 / 459e12)


def test_the_default_for_the_sampler_follows_the_speed_of_the_devices(config, monkeypatch):
    axes = {"data": 1, "fsdp": 8, "tensor": 1}
    monkeypatch.setattr(memory, "device_bytes", lambda devices: H100)
    assert memory.choose_rollout_tensor(config, DECODER, axes) == 1  # a speed that is not known
    steps = decoding_of(config, DECODER, limit=H100, share=0.2, rates=H100_RATES)
    assert (steps.rows, steps.columns) == (config.num_completions, 28 * (1024 + 512 / 8))
    windows = replace(DECODER, windows=(100,) * 21 + (None,) * 7)
    steps = decoding_of(config, windows, limit=H100, share=0.2, rates=H100_RATES)
    assert steps.columns == 21 * (2 * 128 + 128 / 8) + 7 * (1024 + 512 / 8)
    steps = decoding_of(config, DECODER, limit=H100, share=0.2, rates=H100_RATES)
    assert (steps.cache_limit, steps.cache_itemsize, steps.devices, steps.near) == (0.2 * H100, 2, 8, 8)
    small = replace(config, cache_bytes=800, cache_dtype="int8")
    steps = decoding_of(small, DECODER, limit=H100, share=0.2, rates=H100_RATES)
    assert (steps.cache_limit, steps.cache_itemsize) == (100, 1)
    monkeypatch.setattr(memory, "rates_of", lambda devices: H100_RATES)
    assert memory.choose_rollout_tensor(config, DECODER, axes) == 4
    monkeypatch.setattr(memory, "device_bytes", lambda devices: None)
    assert memory.choose_rollout_tensor(config, DECODER, axes) == 1


def test_offload_is_refused_before_a_run_begins(config, monkeypatch):
    memories = [SimpleNamespace(kind="device")]
    device = SimpleNamespace(device_kind="a device", addressable_memories=lambda: memories)
    mesh = SimpleNamespace(devices=np.array([device]))
    monkeypatch.setattr(MeshConfig, "build", lambda self: mesh)
    with pytest.raises(ValueError, match="remat is offload, which needs pinned_host memory; a device has device"):
        replace(config, remat="offload").check()
    with pytest.raises(ValueError, match="offload is optimizer, which needs pinned_host memory; a device has device"):
        replace(config, offload=("optimizer",)).check()


def test_the_number_of_devices_for_the_sampler_that_is_set_is_taken(config):
    axes = {"data": 1, "fsdp": 8, "tensor": 1}
    assert memory.choose_rollout_tensor(config, DECODER, axes) == 1
    for tensor in (0, 2, 8):  # rollout_mesh refuses 0; the 4 KV heads are repeated over 8 devices
        chosen = replace(config, mesh=MeshConfig(rollout_tensor=tensor))
        assert memory.choose_rollout_tensor(chosen, DECODER, axes) == tensor


def test_memory_of_weights_that_the_axes_do_not_divide(config):
    need = memory.reckon(config, DECODER, {"fsdp": 1, "tensor": 1})
    assert need.state_on({"fsdp": 5, "tensor": 1}) == need.state  # divides nothing
    assert need.state_on({"fsdp": 16, "tensor": 8}) == need.state // 128  # 4 KV heads: split along the width
    attention = 2 * 28 * 2 * 3584 * (3584 + 512)  # bytes; 28 heads are whole on each of the sampler's 8 devices
    wanted = (2 * WEIGHTS - attention) / 8 + attention
    assert need.rollout_on({"fsdp": 8, "tensor": 1}, 8) == pytest.approx(wanted, rel=1e-3)


def test_shards_narrower_than_a_tile_are_warned_of():
    with pytest.warns(UserWarning, match="leaves 56 of the model's 3584 columns .* --mesh.fsdp 16 --mesh.data 4 does"):
        memory.warn_of_narrow_shards(3584, {"data": 1, "fsdp": 64, "tensor": 1})


def test_shards_of_a_tile_are_not_warned_of(recwarn):
    memory.warn_of_narrow_shards(3584, {"data": 1, "fsdp": 28, "tensor": 1})
    memory.warn_of_narrow_shards(64, {"data": 8, "fsdp": 1, "tensor": 1})
    assert not recwarn.list


def test_a_bfloat16_reference_has_the_log_probs_of_the_float32_weights(tiny):
    from conftest import TINY

    from grpo_jax.models import build_model

    _, params = tiny
    model = build_model(from_hf_config(TINY), dtype=jnp.bfloat16)
    everywhere = replicated(make_mesh(data=1))
    state = init_state(params, optax.sgd(1.0), with_reference=True, replicated=everywhere, ref_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state.ref_params) if x.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.ref_params) if x.ndim == 1} == {jnp.dtype(jnp.float32)}
    ids = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)
    rows = Rows(ids, jnp.ones((2, 6), bool), ids, jnp.ones((2, 6), bool))
    score = quick_jit(lambda params: completion_log_probs(model, params, rows)[0])
    assert (score(state.ref_params) == score(params)).all()
    fresh = with_fresh_reference(state)
    assert {x.dtype for x in jax.tree.leaves(fresh.ref_params)} == {x.dtype for x in jax.tree.leaves(state.ref_params)}
