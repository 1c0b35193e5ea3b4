"""Memory and time of log-probabilities and their gradient: in chunks, against other ways to compute them.

``formed`` materializes all logits; ``recompute`` has chunks too, but leaves the backward pass to automatic
differentiation with recomputation. Compiles for the given shape and reads the compiler's memory analysis; with
``--run`` both are run in turns, and the ratios of their times are printed too. Prints one JSON line.

    python experiments/bench/log_probs.py                          # Qwen2.5's vocabulary, 16,384 tokens, width 896
    python experiments/bench/log_probs.py --against recompute --run
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Literal

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
    against: Literal["formed", "recompute"] = "formed"
    """Baseline."""
    run: bool = False
    """Also run both, alternating, and report the ratios of their times (best of three)."""


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

    def recompute(hidden, head, ids):
        log_probs, entropy = recomputed_log_probs(hidden, head, ids, chunk_size=config.chunk_size)
        return log_probs.sum(), entropy.mean()

    baseline = {"formed": formed, "recompute": recompute}[config.against]
    compiled = {
        name: jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True)).lower(hidden, head, ids).compile()
        for name, function in (("chunked", chunked), (config.against, baseline))
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
        "against": config.against,
        "temporary_mib_against": round(peak[config.against] / 2**20, 1),
        "memory_ratio": round(peak[config.against] / peak["chunked"], 2),
    }
    if config.run:
        arrays = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((hidden, head))]
        inputs = (*arrays, jnp.zeros(ids.shape, ids.dtype))
        seconds = {clock: {name: [] for name in compiled} for clock in ("time", "cpu_time")}
        for _ in range(3):
            for name, program in compiled.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                jax.block_until_ready(program(*inputs))
                seconds["time"][name].append(time.perf_counter() - start)
                seconds["cpu_time"][name].append(time.process_time() - cpu_start)
        for clock, times in seconds.items():
            result[f"{clock}_chunked"] = round(min(times["chunked"]), 2)
            result[f"{clock}_ratio"] = round(min(times[config.against]) / min(times["chunked"]), 2)
    print(json.dumps(result))


def recomputed_log_probs(hidden, head, ids, *, chunk_size: int):
    """``chunked_log_probs`` by a scan whose chunks are recomputed and differentiated automatically."""
    B, T, D = hidden.shape
    width = max(1, chunk_size // B)
    if T % width:
        raise ValueError(f"length {T} does not divide into chunks of {width}; choose another chunk_size")

    @jax.checkpoint
    def score(_, chunk):
        logits = output_logits(chunk[0], head)
        return None, (token_log_probs(logits, chunk[1]), token_entropy(logits))

    states = jnp.moveaxis(hidden.reshape(B, T // width, width, D), 1, 0)
    _, outputs = jax.lax.scan(score, None, (states, jnp.moveaxis(ids.reshape(B, T // width, width), 1, 0)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T) for x in outputs)


def temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the compiler for {jax.default_backend()} gives no memory analysis")
    return analysis.temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
