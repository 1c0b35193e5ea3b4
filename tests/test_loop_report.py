"""Speed of a step's updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL

from grpo_jax.data.conversations import Example
from grpo_jax.data.encoded import Texts
from grpo_jax.data.packing import packed_rows
from grpo_jax.loop.experience import Experience
from grpo_jax.loop.offline import packed_lengths, pair_lengths
from grpo_jax.loop.report import expert_metrics, update_metrics
from grpo_jax.models import Pretrained, build_model, from_hf_config, training_flops
from grpo_jax.monitor.devices import PEAK_FLOPS
from grpo_jax.sharding import make_mesh
from grpo_jax.types import Pairs, Rollout

LLAMA = from_hf_config({"model_type": "llama", **SMALL})


def right_padded(lengths, length):
    return jnp.asarray(np.arange(length) < np.array(lengths)[..., None])


def experience_of(prompt_mask, completion_mask, **more):
    rows, length = completion_mask.shape
    rollout = Rollout(
        prompt_ids=jnp.zeros(prompt_mask.shape, jnp.int32),
        prompt_mask=prompt_mask,
        completion_ids=jnp.zeros((rows, length), jnp.int32),
        completion_mask=completion_mask,
        rollout_log_probs=jnp.zeros((rows, length)),
        truncated=jnp.zeros(rows, bool),
        **more,
    )
    return Experience(1, [], [], [], {}, rollout, Texts([], list), np.asarray(completion_mask.sum(1)), 0.0)


def test_updates_count_what_was_trained_on_in_every_pass(monkeypatch):
    experience = experience_of(right_padded([2, 2, 4], 4), right_padded([3, 5, 1], 6))
    model = Pretrained(build_model(LLAMA), {}, LLAMA, {}, None, None, (), 0)
    rows, mesh = np.array([True, False, True]), make_mesh(data=1, devices=jax.devices()[:1])
    assert update_metrics(experience, rows, [model, model], 0.5, mesh) == {"update_tokens_per_second": 2 * 10 / 0.5}
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 1e9)
    flops = training_flops(LLAMA, np.array([2, 4]), np.array([3, 1]))
    assert update_metrics(experience, rows, [model, model], 0.5, mesh)["mfu"] == pytest.approx(2 * flops / 1e9 / 0.5)
    both = np.array([True, True, False])
    shared = update_metrics(experience, both, [model], 0.5, mesh, group_size=2)["mfu"]
    once = training_flops(LLAMA, np.array([2, 2]), np.array([3, 5]), group_size=2)
    assert shared == pytest.approx(once / 1e9 / 0.5)
    assert update_metrics(experience, rows, [], 0.5, mesh) == {"update_tokens_per_second": 0}
    assert update_metrics(experience, rows, [model], 0.0, mesh) == {}  # no rate


def test_the_use_of_experts_is_reported_if_it_is_recorded():
    sizes = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = build_model(from_hf_config({"model_type": "qwen3_moe", **SMALL, **sizes}))
    masks = right_padded([2], 2), right_padded([2], 3)
    experts = jnp.asarray([[[[0]], [[1]], [[2]]]], jnp.int32)  # the last is no token
    found = expert_metrics(experience_of(*masks, completion_experts=experts), model)
    assert found == {"router/dead_experts": 0.5, "router/max_load": 2.0}
    assert expert_metrics(experience_of(*masks), model) == {}
    assert expert_metrics(experience_of(*masks, completion_experts=experts), build_model(LLAMA)) == {}


def test_lengths_of_packed_rows_and_of_pairs():
    examples = [Example([5] * length, [True] * length, 0) for length in (3, 2, 4)]
    packed = packed_rows([examples[:2], examples[2:]], num_sequences=3, length=6, pad_id=0)
    prompts, lengths = packed_lengths(packed)
    assert (prompts, lengths.tolist()) == (0, [3, 2, 4])
    pairs = Pairs(
        prompt_ids=jnp.zeros((2, 4), jnp.int32),
        prompt_mask=right_padded([1, 3], 4),
        completion_ids=jnp.zeros((2, 2, 5), jnp.int32),
        completion_mask=right_padded([[1, 2], [4, 5]], 5),
    )
    prompts, lengths = pair_lengths(pairs)
    assert (prompts.tolist(), lengths.tolist()) == ([[1], [3]], [[1, 2], [4, 5]])
