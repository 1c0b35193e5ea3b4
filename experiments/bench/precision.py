"""What precision does to exactness: how far the sampler's log-probabilities are from the trainer's, and from float32's.

For each precision of computation and of the keys and values, completions are drawn and scored: by the trainer in the
same precision of computation (``gap``: what importance ratios are off by), and by one in float32 (``error``: what was
lost of the model). ``kl`` is the mean of ``exp(d) - 1 - d``, the estimate of the divergence from the sampler to that
trainer, in nats a token. In float32 what the ``Sampler`` draws is also compared with what ``generate`` draws in one
program: ``draws_differing`` counts completions in which any token differs. Prints one JSON line.

    python experiments/bench/precision.py                                     # the embedded base, trained first
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
    """What is measured."""

    model: str | None = None
    """Hugging Face id or local folder. Default: the embedded base, trained first."""
    prompts: int = 256
    """Sums that are asked."""
    group_size: int = 16
    """Completions of each."""
    max_completion_length: int = 48
    """In tokens."""
    temperature: float = 1.0
    """Of sampling and scoring."""
    seed: int = 0
    """Of sums and noise."""


def main(config: Config) -> None:
    enable_compilation_cache()
    with tempfile.TemporaryDirectory() as folder:
        if config.model is None:
            make_toy_model(folder, ToyConfig(seed=config.seed))
        measure(config, config.model or folder)


def measure(config: Config, folder: str) -> None:
    """Measure the model of a folder, and print."""
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
        "model": config.model or "the embedded base",
        "temperature": config.temperature,
        "seed": config.seed,
        "completions": config.prompts * config.group_size,
    }
    for dtype, cache_dtype in PRECISIONS:
        sampler = Sampler(computed[dtype], sampling, **lengths, **ends, cache_dtype=cache_dtype)
        with exactly(dtype):
            drawn = sampler(policy.params, prompts, key)
        mask = np.asarray(drawn.completion_mask)
        found = np.asarray(drawn.rollout_log_probs)[mask]
        own, exact = (scored(scorers, name, policy.params, drawn)[mask] for name in (dtype, "float32"))
        difference = (own - found).astype(np.float64)  # in float32 the estimate of a small divergence is all rounding
        result[f"{dtype}, cache {cache_dtype}"] = {
            "tokens": int(mask.sum()),
            "gap_mean": rounded(np.abs(found - own).mean()),
            "gap_max": rounded(np.abs(found - own).max()),
            "kl": rounded((np.expm1(difference) - difference).mean()),
            "error_mean": rounded(np.abs(found - exact).mean()),
            "error_max": rounded(np.abs(found - exact).max()),
        }
        if dtype == cache_dtype == "float32":
            whole = jax.jit(partial(generate, computed[dtype], sampling=sampling, **lengths, **ends))
            with exactly(dtype):
                wanted = whole(policy.params, prompts, key)
            differ = (np.asarray(drawn.completion_ids) != np.asarray(wanted.completion_ids)).any(1)
            result["draws_differing"] = int(differ.sum())
    print(json.dumps(result))


def exactly(dtype: str) -> AbstractContextManager:
    """What is called float32 is computed in float32, on a GPU or TPU too."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def scored(scorers: dict[str, Any], name: str, params: Params, drawn: Rollout) -> np.ndarray:
    """The log-probabilities of a trainer in this precision."""
    with exactly(name):
        return np.asarray(scorers[name](params, drawn))


def rounded(x: np.floating) -> float:
    """Two digits, for people."""
    return float(f"{x:.1e}")


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
