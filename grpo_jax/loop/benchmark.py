"""Shapes of models and limits of the machine, for benchmarks."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "small-windows": {
        "model_type": "gemma3_text",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 128,
        "tie_word_embeddings": True,
    },
    "small-moe": {  # as many active parameters as small, as many experts as Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""Hugging Face configs by name, without the number of positions."""


class Seconds(NamedTuple):
    """CPU seconds, of all threads of a process, and wall seconds."""

    cpu: float
    wall: float


class Measured(NamedTuple):
    """A training step: seconds of its phases (sampling, reference, update), and the lengths of its completions."""

    phases: dict[str, Seconds]
    lengths: np.ndarray

    @property
    def total(self) -> Seconds:
        """Of all phases."""
        return Seconds(*(sum(times) for times in zip(*self.phases.values(), strict=True)))


def timed(phases: dict[str, Seconds], name: str, function: Callable[[], Any]) -> Any:
    """The output of a function, when its arrays are computed.

    Args:
        phases: the seconds that it took are put into it.
        name: of the phase.
        function: without arguments.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    output = jax.block_until_ready(function())
    phases[name] = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
    return output


def machine_limits(dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of reading memory; best of five."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    x = jnp.ones(2**27 if jax.default_backend() == "cpu" else 2**30, jnp.bfloat16 if dtype == jnp.bfloat16 else dtype)
    product, total = jax.jit(lambda a: a @ a), jax.jit(lambda x: x.sum())

    def best(function, argument) -> float:
        function(argument).block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            function(argument).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return 2 * n**3 / best(product, a), x.nbytes / best(total, x)


def peak_memory() -> int:
    """Peak memory in bytes: of the device if it reports it, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
