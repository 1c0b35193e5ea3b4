"""Peak memory of log-probabilities and their gradient: chunked, against materializing all logits.

Compiles both for the given shape and reads the compiler's memory analysis; with ``--run`` it also measures their times.
Prints one JSON line.

    python experiments/bench/log_probs.py                          # Qwen2.5's vocabulary, 16,384 tokens, width 896
"""

import json
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from grpo_jax.log_probs import chunked_log_probs, output_logits, token_entropy, token_log_probs
from grpo_jax.loop.command import run_command


@dataclass(frozen=True)
class Config:
    """Sizes."""

    vocab_size: int = 151_936
    """V, vocabulary size."""
    width: int = 896
    """D, embedding dimension."""
    sequences: int = 16
    """B, sequences."""
    length: int = 1024
    """T, tokens per sequence."""
    chunk_size: int = 1024
    """Tokens per chunk."""
    run: bool = False
    """Also run both, alternating, and report the ratio of their times (best of three)."""


def main(config: Config) -> None:
    hidden = jax.ShapeDtypeStruct((config.sequences, config.length, config.width), jnp.float32)
    head = jax.ShapeDtypeStruct((config.vocab_size, config.width), jnp.float32)
    ids = jax.ShapeDtypeStruct((config.sequences, config.length), jnp.int32)

    def chunked(hidden, head, ids):
        log_probs, entropy = chunked_log_probs(hidden, head, ids, chunk_size=config.chunk_size)
        return log_probs.sum(), entropy.mean()

    def formed(hidden, head, ids):
        logits = output_logits(hidden, head)
        return token_log_probs(logits, ids).sum(), token_entropy(logits).mean()

    compiled = {
        function.__name__: jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
        .lower(hidden, head, ids)
        .compile()
        for function in (chunked, formed)
    }
    peak = {name: temporary_bytes(program) for name, program in compiled.items()}
    result = {
        "bench": "log_probs",
        "device": jax.devices()[0].device_kind,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "tokens": config.sequences * config.length,
        "chunk_size": config.chunk_size,
        "temporary_mib_chunked": round(peak["chunked"] / 2**20, 1),
        "temporary_mib_logits_formed": round(peak["formed"] / 2**20, 1),
        "memory_ratio": round(peak["formed"] / peak["chunked"], 2),
    }
    if config.run:
        arrays = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((hidden, head))]
        inputs = (*arrays, jnp.zeros(ids.shape, ids.dtype))
        seconds = {name: [] for name in compiled}
        for _ in range(3):
            for name, program in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*inputs))
                seconds[name].append(time.perf_counter() - start)
        result["time_ratio"] = round(min(seconds["formed"]) / min(seconds["chunked"]), 2)
    print(json.dumps(result))


def temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the compiler for {jax.default_backend()} gives no memory analysis")
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
