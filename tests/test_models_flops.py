"""Model FLOPs by hand, and as the compiler counts them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL
from published import PUBLISHED, shrunk

from grpo_jax.models import LoRA, build_model, from_hf_config, param_shapes, training_flops
from grpo_jax.models.config import Latent
from grpo_jax.models.sizes import pair_size
from grpo_jax.train import packed_log_probs
from grpo_jax.types import Packed

LLAMA = from_hf_config({"model_type": "llama", **SMALL})
V, D, L = LLAMA.vocab_size, LLAMA.hidden_size, LLAMA.num_layers
HEADS = LLAMA.num_heads * LLAMA.head_dim
BODY = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(LLAMA))) - 2 * V * D


def test_one_token():
    weights = 6 * (BODY + V * D)
    assert training_flops(LLAMA, 0, np.array([1])) == weights + 12 * L * HEADS
    assert training_flops(LLAMA, np.array([1]), np.array([0])) == 6 * BODY + 12 * L * HEADS


def test_sequences_add_up_and_attention_is_causal():
    one = [training_flops(LLAMA, np.array([p]), np.array([c])) for p, c in ((3, 4), (3, 2))]
    both = training_flops(LLAMA, np.array([[3]]), np.array([[4, 2]]))
    assert both == sum(one)
    assert one[0] == 6 * (7 * BODY + 4 * V * D) + 12 * L * HEADS * (1 + 2 + 3 + 4 + 5 + 6 + 7)


def test_a_window_limits_the_pairs():
    windowed = dataclasses.replace(LLAMA, windows=(3, None, 9))
    fewer = training_flops(LLAMA, 0, np.array([6])) - training_flops(windowed, 0, np.array([6]))
    assert fewer == 12 * HEADS * (1 + 2 + 3)  # the keys out of reach of the 4th, 5th and 6th query, in one layer


def test_the_embedding_counts_where_it_is_multiplied():
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    assert training_flops(tied, 0, np.array([5])) == training_flops(LLAMA, 0, np.array([5]))
    scalar = dataclasses.replace(LLAMA, scalar_head=True)
    less = training_flops(LLAMA, 0, np.array([5])) - training_flops(scalar, 0, np.array([5]))
    assert less == 6 * 5 * (V * D - D)


def test_frozen_weights_have_no_gradient():
    lora = LoRA(rank=2, targets=("attention/q", "mlp/up"))
    F, prompt = LLAMA.intermediate_size, np.array([3])
    adapters = 2 * L * (D + HEADS + D + F)
    attention = 12 * L * HEADS * sum(range(1, 9))
    found = training_flops(LLAMA, prompt, np.array([5]), lora=lora)
    assert found == 4 * (8 * BODY + 5 * V * D) + 6 * 8 * adapters + attention
    assert training_flops(LLAMA, prompt, np.array([5]), lora=LoRA()) == training_flops(LLAMA, prompt, np.array([5]))


def test_a_token_passes_the_experts_that_it_is_sent_to():
    """As many operations as with an MLP of their widths together, and those of the router."""
    config = from_hf_config(shrunk(PUBLISHED["Qwen3-30B-A3B"]))
    e, tokens = config.experts, np.array([5])
    assert e.count > e.per_token > 1
    width = e.per_token * e.intermediate_size
    dense = dataclasses.replace(config, sparse=(), experts=None, intermediate_size=width)
    router = config.num_layers * config.hidden_size * e.count
    assert training_flops(config, 0, tokens) - training_flops(dense, 0, tokens) == 6 * 5 * router


def test_all_tokens_pass_dense_layers_and_shared_experts():
    config = from_hf_config(shrunk(PUBLISHED["GLM-4.5-Air"]))
    alone = dataclasses.replace(config, experts=dataclasses.replace(config.experts, shared_size=0))
    assert 0 < config.num_sparse() < config.num_layers
    shared = config.num_sparse() * 3 * config.hidden_size * config.experts.shared_size
    tokens = np.array([4, 3])
    assert training_flops(config, 0, tokens) - training_flops(alone, 0, tokens) == 6 * 7 * shared
    wider = dataclasses.replace(config, intermediate_size=config.intermediate_size + 8)
    of_dense = (config.num_layers - config.num_sparse()) * 3 * config.hidden_size * 8
    assert training_flops(wider, 0, tokens) - training_flops(config, 0, tokens) == 6 * 7 * of_dense


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("Qwen3-30B-A3B", 30.5, 3.3), ("DeepSeek-V3", 671, 37), ("OLMoE-1B-7B", 6.9, 1.3)],
)
def test_active_parameters_of_published_models(name, total, active):
    """In billions, as published; with the output embedding, and Qwen's and OLMoE's with the input embedding."""
    config = from_hf_config(PUBLISHED[name])
    shapes = param_shapes(config)
    attention = 6 * config.num_layers * pair_size(config)
    found = (training_flops(config, 0, np.array([1])) - attention) / 6e9
    if name in ("Qwen3-30B-A3B", "OLMoE-1B-7B"):
        found += config.vocab_size * config.hidden_size / 1e9
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(total, rel=0.01)
    assert found == pytest.approx(active, rel=0.05)


def test_layers_with_a_state_pay_for_tokens_and_not_for_pairs():
    config = from_hf_config(shrunk(PUBLISHED["Qwen3-Next-80B-A3B"]))
    delta, layers = config.delta, config.num_layers - config.num_attention_layers
    assert 0 < layers < config.num_layers
    one, two = (training_flops(config, 0, np.array([n])) for n in (1, 2))
    assert two - 2 * one == 6 * config.num_attention_layers * pair_size(config)
    wider = dataclasses.replace(config, mixers=("attention",) * config.num_layers)
    bodies = [6 * sum(leaf.size for leaf in jax.tree.leaves(param_shapes(each))) for each in (config, wider)]
    states = 18 * layers * delta.value_heads * delta.key_dim * delta.value_dim
    pairs = 6 * layers * pair_size(config)
    assert one - training_flops(wider, 0, np.array([1])) == bodies[0] - bodies[1] + states - pairs


def test_heads_of_latent_attention_have_two_sizes():
    config = from_hf_config(shrunk(PUBLISHED["DeepSeek-V3"]))
    sizes = config.latent
    one, two = (training_flops(config, 0, np.array([n])) for n in (1, 2))
    head = sizes.key_dim + sizes.rope_dim + sizes.value_dim
    assert head != 2 * config.head_dim
    assert two - 2 * one == 6 * config.num_layers * config.num_heads * head  # the second token and the first key


@pytest.mark.parametrize("name", ["llama", "latent", "no gate"])
def test_the_compiler_counts_about_as_many(name):
    wide = {**SMALL, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
    config = from_hf_config({"model_type": "llama", **wide})
    if name == "latent":
        config = dataclasses.replace(config, latent=Latent(64, 32, rope_dim=16, key_dim=64, value_dim=48))
    elif name == "no gate":
        config = dataclasses.replace(config, gated_mlp=False)
    model, length = build_model(config), 16
    shape = jax.ShapeDtypeStruct((2, length), jnp.int32)
    packed = Packed(shape, shape, shape, jax.ShapeDtypeStruct((2, length), bool))
    gradient = jax.jit(jax.grad(lambda params, packed: packed_log_probs(model, params, packed).sum()))
    counted = gradient.lower(param_shapes(config), packed).compile().cost_analysis()["flops"]
    assert training_flops(config, 0, np.array([length, length])) == pytest.approx(counted, rel=0.1)
