"""Attention over whole sequences: the platform's kernel against the plain implementation.

Measures the time of the forward and backward pass (ratio of medians, runs alternating in one process), temporary memory
by the compiler's analysis, and the largest difference of outputs and gradients relative to the largest value. Sequences
are padded on both sides by up to a quarter. There is no kernel for CPUs. Prints one JSON line.

    python experiments/bench/attention.py                                     # on a GPU or TPU: Qwen2.5-0.5B's heads
    python experiments/bench/attention.py --heads 28 --kv-heads 4 --head-dim 128 --length 4096 --rows 4
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.loop.command import run_command
from grpo_jax.models import from_hf_config
from grpo_jax.models.attention import KVSegment, attend, attention_mask
from grpo_jax.models.kernels import choose_kernel


@dataclass(frozen=True)
class Config:
    """Sizes of the attention."""

    rows: int = 8
    """Sequences."""
    length: int = 2048
    """Tokens per sequence, with padding."""
    heads: int = 14
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads."""
    head_dim: int = 64
    """Head dimension."""
    repeats: int = 5
    """Measurements of each implementation."""


def main(config: Config) -> None:
    shape = {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    decoder = from_hf_config({"model_type": "qwen3", "max_position_embeddings": config.length} | sizes | shape)
    kernel = choose_kernel("auto", decoder, jnp.bfloat16, None)
    if kernel is None:
        raise SystemExit(
            f"no kernel supports these heads on {jax.devices()[0].device_kind}; 'auto' selects the plain implementation"
        )
    rng = np.random.default_rng(0)
    B, S, E = config.rows, config.length, config.head_dim
    left, right = rng.integers(0, S // 4, (2, B, 1))
    slots = np.arange(S)[None]
    mask = jnp.asarray((slots >= left) & (slots < S - right))
    inputs = [
        jnp.asarray(rng.normal(size=(B, S, n, E)) * scale, jnp.bfloat16)
        for n, scale in ((config.heads, E**-0.5), (config.kv_heads, 1), (config.kv_heads, 1))
    ]
    programs = {
        name: jax.jit(jax.grad(partial(total, attention), has_aux=True)).lower(inputs, mask).compile()
        for name, attention in {"kernel": partial(kernel, window=None, softcap=None), "plain": plain}.items()
    }
    results = {name: program(inputs, mask) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(config.repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(inputs, mask))
            seconds[name].append(time.perf_counter() - started)
    memory = {name: temporary_bytes(program) for name, program in programs.items()}
    differences = [
        float(jnp.abs(as_float(x) - as_float(y)).max() / jnp.abs(as_float(y)).max())
        for x, y in zip(*(jax.tree.leaves(results[name]) for name in ("kernel", "plain")), strict=True)
    ]
    result = {
        "bench": "attention",
        "device": jax.devices()[0].device_kind,
        "kernel": getattr(getattr(kernel, "func", kernel), "__name__", "?"),
        "rows": B,
        "length": S,
        "heads": [config.heads, config.kv_heads, E],
        "time_ratio": round(statistics.median(seconds["plain"]) / statistics.median(seconds["kernel"]), 2),
        "temporary_mib_kernel": round(memory["kernel"] / 2**20, 1),
        "temporary_mib_plain": round(memory["plain"] / 2**20, 1),
        "largest_difference": float(f"{max(differences):.1e}"),
    }
    print(json.dumps(result))


def plain(queries, keys, values, mask):
    """``models.attention.attend`` over a whole sequence."""
    B, S, _, E = queries.shape
    part = KVSegment(
        {"keys": keys.transpose(0, 2, 3, 1), "values": values.transpose(0, 2, 1, 3)},
        attention_mask(mask, jnp.arange(S), 0, S, None),
    )
    grouped = queries.reshape(B, S, keys.shape[2], -1, E).transpose(0, 2, 3, 1, 4)
    return attend(grouped, [part], None).transpose(0, 3, 1, 2, 4).reshape(queries.shape)


def total(attention, inputs, mask):
    """Sum of squares over real tokens, to differentiate, and the outputs."""
    out = jnp.where(mask[:, :, None, None], attention(*inputs, mask).astype(jnp.float32), 0)
    return (out**2).sum(), out


def temporary_bytes(program: Any) -> int:
    """Memory that a compiled function takes, excluding its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def as_float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
