"""Effect of precision: difference of the sampler's log-probabilities from the trainer's, and from those in float32.

For each precision of the computation and of the KV cache, completions are sampled, and their log-probabilities computed
by a trainer in the same precision (``gap``: the error of importance ratios) and in float32 (``error``). ``kl`` is the
mean of ``exp(d) - 1 - d``, an estimate of the KL divergence from sampler to trainer in nats per token. In float32 the
completions of ``Sampler`` are also compared with those of ``generate``: ``draws_differing`` counts completions with a
different token. Prints one JSON line.

    python experiments/bench/precision.py                                     # the toy model, trained first
    python experiments/bench/precision.py --model runs/r1_zero/model
    python experiments/bench/precision.py --model Qwen/Qwen2.5-0.5B --prompts 16 --max-completion-length 256
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import models
from grpo_jax.data.prompts import pad_prompts
from grpo_jax.loop.command import run_command
from grpo_jax.loop.compilation import enable_compilation_cache
from grpo_jax.rollout import Sampler, generate
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.sums import sample_sums, sum_problems
from grpo_jax.tasks.toy_config import ToyConfig
from grpo_jax.tasks.toy_model import make_toy_model
from grpo_jax.train import completion_log_probs, make_log_prob_fn
from grpo_jax.types import Params, Rollout

PRECISIONS = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
)


@dataclass(frozen=True)
class Config:
    """Model and completions."""

    model: str | None = None
    """Hugging Face id or local folder. Default: the toy model, trained first."""
    prompts: int = 256
    """Number of sums used as prompts."""
    group_size: int = 16
    """Completions per prompt."""
    max_completion_length: int = 48
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Temperature of sampling and log-probabilities."""
    seed: int = 0
    """Seed of the toy model, prompts and sampling."""


def main(config: Config) -> None:
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as folder:
        if config.model is None:
            make_toy_model(folder, ToyConfig(seed=config.seed))
        measure(config, config.model or folder)


def measure(config: Config, folder: str) -> None:
    """Measure the model in ``folder`` and print the result."""
    policy = models.from_pretrained(folder)
    if policy.tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer; a folder with weights needs tokenizer.json beside them")
    sums = sum_problems(sample_sums(np.random.default_rng(config.seed), config.prompts, held_out=False))
    ids = policy.tokenizer([problem.prompt for problem in sums])["input_ids"]
    prompts = pad_prompts(ids, max_prompt_length=max(map(len, ids)), pad_id=policy.pad_id, index=range(config.prompts))
    key, sampling = jax.random.key(config.seed), Sampling(temperature=config.temperature)
    lengths = {"group_size": config.group_size, "max_completion_length": config.max_completion_length}
    ends = {"eos_ids": policy.eos_ids, "pad_id": policy.pad_id}
    computed = {
        name: models.build_model(policy.config, dtype=jnp.dtype(name).type, attention="auto")
        for name in ("float32", "bfloat16")
    }
    scorers = {
        name: make_log_prob_fn(
            partial(completion_log_probs, model, temperature=config.temperature),
            num_micro_batches=math.gcd(config.prompts * config.group_size, 8),
        )
        for name, model in computed.items()
    }
    result = {
        "bench": "precision",
        "device": jax.devices()[0].device_kind,
        "model": config.model or "toy",
        "temperature": config.temperature,
        "seed": config.seed,
        "completions": config.prompts * config.group_size,
    }
    for dtype, cache_dtype in PRECISIONS:
        sampler = Sampler(computed[dtype], sampling, **lengths, **ends, cache_dtype=cache_dtype)
        with exactly(dtype):
            rollout = sampler(policy.params, prompts, key)
        mask = np.asarray(rollout.completion_mask)
        sampled = np.asarray(rollout.rollout_log_probs)[mask]
        trained, exact = (log_probs(scorers, name, policy.params, rollout)[mask] for name in (dtype, "float32"))
        difference = (trained - sampled).astype(np.float64)  # float32 would round a small divergence away
        result[f"{dtype}, cache {cache_dtype}"] = {
            "tokens": int(mask.sum()),
            "gap_mean": rounded(np.abs(sampled - trained).mean()),
            "gap_max": rounded(np.abs(sampled - trained).max()),
            "kl": rounded((np.expm1(difference) - difference).mean()),
            "error_mean": rounded(np.abs(sampled - exact).mean()),
            "error_max": rounded(np.abs(sampled - exact).max()),
        }
        if dtype == cache_dtype == "float32":
            generate_all = jax.jit(partial(generate, computed[dtype], sampling=sampling, **lengths, **ends))
            with exactly(dtype):
                expected = generate_all(policy.params, prompts, key)
            differ = (np.asarray(rollout.completion_ids) != np.asarray(expected.completion_ids)).any(1)
            result["draws_differing"] = int(differ.sum())
    print(json.dumps(result))


def exactly(dtype: str) -> AbstractContextManager:
    """A context in which float32 is computed in full precision, on a GPU or TPU too."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def log_probs(scorers: dict[str, Any], name: str, params: Params, rollout: Rollout) -> np.ndarray:
    """The trainer's log-probabilities in the precision ``name``."""
    with exactly(name):
        return np.asarray(scorers[name](params, rollout))


def rounded(x: np.floating) -> float:
    """``x`` with two significant digits."""
    return float(f"{x:.1e}")


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
