"""Speed of a mixture of experts on a CPU: against the dense MLP of equal active parameters, and against transformers.

The layer is router, choice and experts of Qwen3-MoE; the dense MLP is as wide as the experts of one token together.
Forward and backward pass of ``tokens`` random tokens, and the forward pass of ``decode_tokens`` as in a step of
sampling. With ``--transformers``, its layer in PyTorch does the same on as many threads. With ``--model``, a small
Qwen3-MoE computes log-probabilities of ``tokens`` tokens in sequences of 128 and their gradient, instead of the layer,
against a dense model of as many active parameters. The implementations alternate in one process, which should have one
core; ratios are of the medians of CPU seconds. Prints one JSON line.

    taskset -c 0 python experiments/bench/experts.py --transformers
    taskset -c 0 python experiments/bench/experts.py --model --tokens 2048 --transformers
    taskset -c 0 python experiments/bench/experts.py --width 128 --expert-width 64 --experts 16
    taskset -c 0 python experiments/bench/experts.py --width 2048 --expert-width 768 --experts 128 \
        --experts-per-token 8 --tokens 2048
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.loop.benchmark import SHAPES
from grpo_jax.loop.command import run_command
from grpo_jax.models import build_model, from_hf_config, init_params, save_pretrained
from grpo_jax.models.expert_blocks import ExpertParams
from grpo_jax.models.experts import expert_mlp, gated
from grpo_jax.models.routing import route

Phases = dict[str, dict[str, Callable[[], Any]]]
SILU = gated(jax.nn.silu)


@dataclass(frozen=True)
class Config:
    """Sizes of the layer."""

    tokens: int = 4096
    """Tokens of a forward and backward pass."""
    decode_tokens: int = 16
    """Tokens of a step of sampling."""
    width: int = 512
    """D, width of the residual stream."""
    expert_width: int = 256
    """F, width of an expert."""
    experts: int = 32
    """E, experts."""
    experts_per_token: int = 4
    """k, experts of a token."""
    model: bool = False
    """Measure a whole model, of sizes of its own."""
    transformers: bool = False
    """Also measure transformers' implementation."""
    repeats: int = 9
    """Measurements of each implementation."""
    seed: int = 0
    """Seed of parameters and tokens."""


def main(config: Config) -> None:
    phases = whole_model(config) if config.model else layer(config)
    names = ("tokens", "decode_tokens", "width", "expert_width", "experts", "experts_per_token")
    sizes = SHAPES["small-moe"] if config.model else {name: getattr(config, name) for name in names}
    result: dict[str, Any] = {"bench": "experts", "cores": len(os.sched_getaffinity(0)), **sizes}
    for phase, functions in phases.items():
        seconds = measured(functions, config.repeats)
        result[f"{phase}_milliseconds"] = {name: round(1000 * s, 3) for name, s in seconds.items()}
        for name in [n for n in seconds if n != "mixture"]:
            result[f"{phase}_speed_against_{name}"] = round(seconds[name] / seconds["mixture"], 2)
    print(json.dumps(result))


def layer(config: Config) -> Phases:
    """Functions of the layer, by phase and implementation."""
    rng = np.random.default_rng(config.seed)
    D, F, E, k = config.width, config.expert_width, config.experts, config.experts_per_token

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    router = normal(D, E, scale=D**-0.5)
    experts = ExpertParams(*(normal(E, *s, scale=s[0] ** -0.5) for s in ((D, F), (D, F), (F, D))))
    dense = [normal(*s, scale=s[0] ** -0.5) for s in ((D, k * F), (D, k * F), (k * F, D))]

    def mixture(params: Any, x: jax.Array) -> jax.Array:
        router, experts = params
        chosen, weights = route(x @ router, k)
        return expert_mlp(x, chosen, weights, experts, activation=SILU)

    def mlp(params: Any, x: jax.Array) -> jax.Array:
        gate, up, down = params
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    x, few = normal(config.tokens, D), normal(config.decode_tokens, D)
    train: dict[str, Callable[[], Any]] = {}
    decode: dict[str, Callable[[], Any]] = {}
    for name, function, params in (("mixture", mixture, (router, experts)), ("dense", mlp, dense)):
        step = jax.jit(jax.grad(lambda params, x, f=function: (f(params, x) ** 2).sum(), argnums=(0, 1)))
        train[name] = lambda step=step, params=params: jax.block_until_ready(step(params, x))
        forward = jax.jit(function)
        decode[name] = lambda f=forward, params=params: jax.block_until_ready(f(params, few))
    if config.transformers:
        train["transformers"], decode["transformers"] = torch_layer(config, router, experts, x, few)
    return {"train": train, "decode": decode}


def whole_model(config: Config) -> Phases:
    """Functions of the whole model, by implementation."""
    rng = np.random.default_rng(config.seed)
    ids = rng.integers(0, SHAPES["small-moe"]["vocab_size"], (config.tokens // 128, 128))
    token_ids = jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(128, dtype=jnp.int32), ids.shape)
    train: dict[str, Callable[[], Any]] = {}
    for name, shape in (("mixture", "small-moe"), ("dense", "small")):
        decoder = from_hf_config(SHAPES[shape] | {"max_position_embeddings": 128})
        model, params = build_model(decoder), init_params(decoder, jax.random.key(config.seed))

        def loss(params: Any, model: Any = model) -> jax.Array:
            hidden = model.apply(params, token_ids, positions)[0][:, :-1]
            return model.token_scores(params, hidden, token_ids[:, 1:], temperature=1.0, chunk_size=1024)[0].mean()

        step = jax.jit(jax.grad(loss))
        train[name] = lambda step=step, params=params: jax.block_until_ready(step(params))
        if config.transformers and name == "mixture":
            train["transformers"] = torch_model(params, ids)
    return {"train": train}


def measured(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of functions that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if turn:  # the first compiles
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def torch_layer(config: Config, router: jax.Array, experts: ExpertParams, x: jax.Array, few: jax.Array):
    """Training and decoding functions of transformers' layer with the same parameters."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hf_config = Qwen3MoeConfig(
        hidden_size=config.width,
        moe_intermediate_size=config.expert_width,
        num_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
    )
    hf_config._experts_implementation = "eager"
    layer = Qwen3MoeSparseMoeBlock(hf_config)
    both = np.concatenate([np.asarray(experts.gate), np.asarray(experts.up)], axis=2).transpose(0, 2, 1)
    tensors = {"gate.weight": np.asarray(router).T, "experts.gate_up_proj": both}
    tensors["experts.down_proj"] = np.asarray(experts.down).transpose(0, 2, 1)
    layer.load_state_dict({key: torch.tensor(np.ascontiguousarray(value)) for key, value in tensors.items()})
    many, few_ = torch.tensor(np.array(x))[None].requires_grad_(), torch.tensor(np.array(few))[None]

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        many.grad = None
        (layer(many) ** 2).sum().backward()

    def decode() -> None:
        with torch.no_grad():
            layer(few_)

    return train, decode


def torch_model(params: Any, ids: np.ndarray) -> Callable[[], Any]:
    """The training function of transformers' model with the same parameters."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = SHAPES["small-moe"] | {"max_position_embeddings": 128, "architectures": ["Qwen3MoeForCausalLM"]}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, params, hf_config=shape, tokenizer=None)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    tokens = torch.tensor(ids)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    return train


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
