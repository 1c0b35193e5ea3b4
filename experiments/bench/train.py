"""Training speed: useful tokens per second, MFU, peak memory and compilation of an update or a whole GRPO step.

Weights are random. Completions all have the maximum length, or geometric lengths (``--lengths long-tailed``), or
``--actual-completion-length``. Useful tokens are those of prompts and completions without padding, each prompt once for
each of its completions. MFU is the model FLOPs of the update (a prompt that packed rows share counts once) over its
best time and the best measured rate of a large matrix product. With ``--whole-step``, sampling and the reference's
log-probabilities come before the update.

With ``--against`` another implementation does the same work in turns, and ratios of tokens per second are reported:
``padded`` is the update of rows padded to the maximum lengths, with blocks recomputed and micro-batches of 16,384
tokens, as it was before rows were cut and packed, but with the present output layer; ``maxima`` is the same update with
other maximum lengths, ``trl`` TRL's GRPOTrainer in a process of its own, whose completions are made as long as ours.
Peak memory is that of the process (of the device, where it reports it) after two steps, before anything else runs in
it. Compilation is timed without the persistent cache. Prints one JSON line.

    python experiments/bench/train.py --lengths long-tailed --max-completion-length 256 --against padded
    python experiments/bench/train.py --lengths long-tailed --max-completion-length 256 --group-size 16 --against padded
    python experiments/bench/train.py --whole-step --kl-coef 0.04 --against trl --trl-python path/to/bin/python
    python experiments/bench/train.py --whole-step --kl-coef 0.04 --against trl --trl-python path/to/bin/python \
        --lengths long-tailed --max-completion-length 256
    python experiments/bench/train.py --num-prompts 2 --actual-prompt-length 16 --actual-completion-length 32 \
        --max-prompt-length 128 --max-completion-length 384 --against maxima
    python experiments/bench/train.py --model qwen2.5-0.5b --dtype bfloat16                     # on an accelerator
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from grpo_jax.config.memory import MICRO_BATCH_TOKENS
from grpo_jax.config.online import CPU_PACKED_TOKENS
from grpo_jax.config.run import require_at_least
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.loop.batch_layout import cut
from grpo_jax.loop.benchmark import SHAPES, Measured, Seconds, machine_limits, peak_memory, timed
from grpo_jax.loop.command import run_command
from grpo_jax.loop.trl_process import TrlProcess
from grpo_jax.models import build_model, from_hf_config, init_params, training_flops
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.remat import Remat
from grpo_jax.rollout import Sampler
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh, replicated
from grpo_jax.train import completion_log_probs, init_state, make_log_prob_fn, make_train_step, pack
from grpo_jax.types import Batch, Model, Params, Prompts, TrainState

Update = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
REPORTED = (
    *("model", "dtype", "packing", "num_prompts", "group_size", "max_prompt_length", "max_completion_length"),
    *("lengths", "remat", "num_micro_batches", "whole_step"),
)


@dataclass(frozen=True)
class Config:
    """Model, lengths and comparison."""

    model: Literal[tuple(SHAPES)] = "small"  # pyright: ignore[reportInvalidTypeForm]
    """Shapes of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights, gradients and optimizer moments are float32."""
    packing: Literal["none", "shared", "separate"] = "shared"
    """How the update lays out its rows: shared packs completions after one copy of their prompt, separate packs whole
    sequences, none pads them to a bucket of the longest."""
    micro_batch_tokens: int = CPU_PACKED_TOKENS
    """Tokens of a micro-batch of packed rows."""
    num_prompts: int = 8
    """Prompts per step."""
    group_size: int = 8
    """Completions per prompt."""
    max_prompt_length: int = 64
    """In tokens."""
    max_completion_length: int = 128
    """In tokens."""
    lengths: Literal["fixed", "long-tailed"] = "fixed"
    """Completions of the maximum length, or of geometric lengths up to it."""
    mean_length: float = 48
    """Approximate mean of long-tailed lengths."""
    min_prompt_length: int | None = None
    """Prompts have uniform lengths from this to the maximum. Default: all have the maximum."""
    actual_prompt_length: int | None = None
    """Length of all prompts. Default: by max_prompt_length and min_prompt_length."""
    actual_completion_length: int | None = None
    """Length of all completions. Default: by lengths."""
    whole_step: bool = False
    """Sample, and with kl_coef compute the reference's log-probabilities, before the update."""
    against: Literal["padded", "maxima", "trl"] | None = None
    """Implementation to compare with."""
    other_max_prompt_length: int = 32
    """Of the comparison with other maxima."""
    other_max_completion_length: int = 48
    """Of the comparison with other maxima."""
    trl_python: Path | None = None
    """Python interpreter that has trl. Default: this one."""
    remat: Remat = "none"
    """Activations that the backward pass recomputes; of TRL gradient_checkpointing, if not none."""
    num_micro_batches: int = 1
    """Parts of a padded batch whose gradients are accumulated, except TRL's."""
    policy: Annotated[PolicyLossConfig, tyro.conf.arg(name="")] = PolicyLossConfig()
    """Policy loss."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    """Optimizer; TRL's is AdamW."""
    repeats: int = 3
    """Measurements of each implementation, alternating."""
    seed: int = 0
    """Seed of weights, tokens, lengths and sampling."""

    def __post_init__(self):
        require_at_least(
            self, num_prompts=1, group_size=2, max_prompt_length=1, max_completion_length=1, min_prompt_length=1
        )
        require_at_least(self, actual_prompt_length=1, actual_completion_length=1, mean_length=1, repeats=1)
        require_at_least(
            self, num_micro_batches=1, micro_batch_tokens=1, other_max_prompt_length=1, other_max_completion_length=1
        )
        if self.rows % self.num_micro_batches:
            raise ValueError(
                f"num_micro_batches is {self.num_micro_batches}; it must divide num_prompts * group_size = {self.rows}"
            )
        prompt = max(filter(None, (self.actual_prompt_length, self.min_prompt_length)), default=1)
        for name, longest in (("max_prompt_length", prompt), ("max_completion_length", self.actual_completion_length)):
            if longest is not None and longest > getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; sequences of {longest} tokens do not fit in it")
        if self.actual_prompt_length and self.min_prompt_length:
            raise ValueError("actual_prompt_length and min_prompt_length are both set; give one of them")
        if self.actual_completion_length and (self.whole_step or self.lengths != "fixed"):
            raise ValueError(
                "actual_completion_length is set, but with whole_step completions are sampled, and with lengths "
                "long-tailed they have several lengths; leave it out"
            )
        others = (self.other_max_prompt_length, self.other_max_completion_length)
        actual = (self.actual_prompt_length or math.inf, self.actual_completion_length or math.inf)
        if self.against == "maxima" and (actual[0] > others[0] or actual[1] > others[1]):
            raise ValueError(
                "against is maxima: actual_prompt_length and actual_completion_length must be set, to lengths up to "
                f"other_max_prompt_length = {others[0]} and other_max_completion_length = {others[1]}"
            )

    def check(self) -> None:
        """Check that the interpreter of TRL exists."""
        if self.against == "trl" and self.trl_python is None and importlib.util.find_spec("trl") is None:
            raise ValueError("against is trl, but this interpreter has no trl; name one that has it with trl_python")
        if self.trl_python is not None and not self.trl_python.exists():
            raise ValueError(f"trl_python is {self.trl_python}, which does not exist")

    @property
    def rows(self) -> int:
        """Completions per step."""
        return self.num_prompts * self.group_size

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt."""
        most = self.actual_prompt_length or self.max_prompt_length
        least = self.min_prompt_length or most
        return np.random.default_rng([self.seed, 1]).integers(least, most + 1, self.num_prompts)

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens of each completion of an update; those of a whole step are sampled."""
        if self.lengths == "fixed":
            return np.full(self.rows, self.actual_completion_length or self.max_completion_length)
        drawn = np.random.default_rng([self.seed, 2]).geometric(1 / self.mean_length, self.rows)
        return np.minimum(drawn, self.max_completion_length)


def main(config: Config) -> None:
    config.check()
    jax.config.update("jax_enable_compilation_cache", False)
    compiles: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    hf_config = SHAPES[config.model] | {"max_position_embeddings": 1 << 15}
    decoder = from_hf_config(hf_config)
    params = jax.device_get(jax.jit(partial(init_params, decoder))(jax.random.key(config.seed)))
    ours = JaxStep(config, decoder, params)
    before = len(compiles)
    first = ours()
    compile_count, compile_seconds = len(compiles) - before, sum(compiles[before:])
    ours()
    peak_bytes = peak_memory()
    measured: list[Measured] = []
    others: list[Measured] = []
    peak_rate = 0.0
    with contextlib.ExitStack() as stack:
        other = None
        if config.against == "trl":
            other = stack.enter_context(trl_process(config, hf_config, params))
        elif config.against is not None:
            other = JaxStep(counterpart(config), decoder, params, cuts_padding=config.against != "padded")
        if other is not None:
            other(first.lengths)
        for _ in range(config.repeats):
            measured.append(ours())
            if other is not None:
                others.append(other(measured[-1].lengths))
            # In every turn: other processes slow a single measurement by up to a half, which would raise the MFU.
            peak_rate = max(peak_rate, machine_limits(jnp.dtype(config.dtype).type)[0])
    if config.against == "trl" and not config.whole_step:
        others = [Measured({"update": each.phases["update"]}, each.lengths) for each in others]
    prompts = np.repeat(config.prompt_lengths, config.group_size)
    shared_by = config.group_size if config.packing == "shared" else 1
    flops = training_flops(decoder, prompts, measured[-1].lengths, group_size=shared_by)
    ours_summary = summary(config, measured)
    result = {
        "bench": "train",
        "device": jax.devices()[0].device_kind,
        **{name: getattr(config, name) for name in REPORTED},
        "kl_coef": config.policy.kl_coef,
        "optimizer": config.optimizer.optimizer,
        "mean_length": round(float(measured[-1].lengths.mean()), 1),
        **ours_summary,
        "mfu": round(flops / min(each.phases["update"].wall for each in measured) / peak_rate, 3),
        "machine_gflops": round(peak_rate / 1e9),
        "peak_memory_mib": round(peak_bytes / 2**20),
        "compile_count": compile_count,
        "compile_seconds": round(compile_seconds, 1),
    }
    if other is not None:
        name, theirs = config.against, summary(config, others)
        result |= {f"{name}_{key}": value for key, value in theirs.items()}
        if isinstance(other, TrlProcess):
            result["trl_peak_memory_mib"] = round(other.peak_bytes / 2**20)
        rates = {"": "tokens_per_second", "_cpu": "tokens_per_cpu_second", "_cpu_best": "best_tokens_per_cpu_second"}
        result |= {f"ratio_to_{name}{end}": round(ours_summary[rate] / theirs[rate], 3) for end, rate in rates.items()}
    print(json.dumps(result))


def summary(config: Config, measured: list[Measured]) -> dict[str, Any]:
    """Rates of useful tokens, and the median of the seconds of each phase."""
    prompt_tokens = int(config.prompt_lengths.sum()) * config.group_size
    tokens = [prompt_tokens + int(each.lengths.sum()) for each in measured]
    by_wall = [count / each.total.wall for count, each in zip(tokens, measured, strict=True)]
    by_cpu = [count / each.total.cpu for count, each in zip(tokens, measured, strict=True)]

    def medians(which: str) -> dict[str, float]:
        phases = {name: [getattr(each.phases[name], which) for each in measured] for name in measured[0].phases}
        return {name: round(statistics.median(seconds), 3) for name, seconds in phases.items()}

    return {
        "tokens_per_second": round(statistics.median(by_wall)),
        "tokens_per_cpu_second": round(statistics.median(by_cpu)),
        "best_tokens_per_cpu_second": round(max(by_cpu)),
        "cpu_seconds": medians("cpu"),
        "wall_seconds": medians("wall"),
    }


def counterpart(config: Config) -> Config:
    """The update to compare with: of padded rows, or with other maximum lengths for the same sequences."""
    if config.against == "padded":
        parts = math.ceil(config.rows * (config.max_prompt_length + config.max_completion_length) / MICRO_BATCH_TOKENS)
        parts = next(n for n in range(parts, config.rows + 1) if config.rows % n == 0)
        return replace(config, packing="none", remat="block", num_micro_batches=parts)
    return replace(
        config,
        against=None,
        max_prompt_length=config.other_max_prompt_length,
        max_completion_length=config.other_max_completion_length,
    )


def make_update(config: Config, model: Model) -> Update:
    """The update of a batch that is laid out already."""
    optimizer, _ = config.optimizer.build(total_updates=1_000_000)
    loss_fn = config.policy.build(
        partial(completion_log_probs, model),
        max_completion_length=config.max_completion_length,
        sampler_alters_policy=False,
    )
    return make_train_step(
        loss_fn, optimizer, num_micro_batches=config.num_micro_batches, preparation=model.preparation
    )


class JaxStep:
    """A step of this package; ``cuts_padding`` is of rows that are not packed."""

    def __init__(self, config: Config, decoder: DecoderConfig, params: Params, *, cuts_padding: bool = True):
        self.config = config
        self.cuts_padding = cuts_padding
        model = build_model(decoder, dtype=jnp.dtype(config.dtype).type, remat=config.remat, attention="auto")
        self.pack = partial(pack, attention_length=model.attention_length)
        optimizer, _ = config.optimizer.build(total_updates=1_000_000)
        mesh = make_mesh(devices=jax.devices()[:1])
        self.samples_with_reference = config.whole_step and config.policy.kl_coef > 0
        self.state = init_state(
            jax.device_put(params, replicated(mesh)),
            optimizer,
            with_reference=self.samples_with_reference,
            replicated=replicated(mesh),
        )
        self.update = make_update(config, model)
        self.log_probs = make_log_prob_fn(
            partial(completion_log_probs, model),
            num_micro_batches=config.num_micro_batches,
            preparation=model.preparation,
        )
        self.prompts = padded_prompts(config, decoder.vocab_size)
        V, T = decoder.vocab_size, config.max_completion_length
        fixed = config.lengths == "fixed"
        self.sampler = Sampler(
            model,
            Sampling(min_length=T) if fixed else Sampling(),
            group_size=config.group_size,
            max_completion_length=T,
            eos_ids=(V - 1,) if fixed else tuple(range(round(V / config.mean_length))),
            pad_id=0,
        )
        self.batch = None if config.whole_step else given_batch(config, self.prompts, V)

    def __call__(self, lengths: np.ndarray | None = None) -> Measured:
        """Take a step; ``lengths`` are those of the batch, or sampled."""
        phases: dict[str, Seconds] = {}
        if (batch := self.batch) is None:
            key = jax.random.key(self.config.seed)
            rollout = timed(phases, "sampling", lambda: self.sampler(self.state.params, self.prompts, key))
            ref = None
            if self.samples_with_reference:
                ref = timed(phases, "reference", lambda: self.log_probs(self.state.ref_params, self.laid_out(rollout)))
            batch = Batch.from_rollout(rollout, advantages(self.config), ref_log_probs=ref)
        self.state, _ = timed(phases, "update", lambda: self.update(self.state, self.laid_out(batch)))
        return Measured(phases, np.asarray(batch.completion_mask.sum(1)))

    def laid_out(self, sequences: Any) -> Any:
        """Sequences as the update takes them."""
        if self.config.packing == "none":
            return cut(sequences) if self.cuts_padding else sequences
        return self.pack(sequences, self.config.packing, micro_batch_tokens=self.config.micro_batch_tokens)


def padded_prompts(config: Config, vocab_size: int) -> Prompts:
    """Random prompts, left-padded to the maximum length; the last two tokens are TRL's EOS and padding."""
    ids = np.random.default_rng([config.seed, 3]).integers(
        0, vocab_size - 2, (config.num_prompts, config.prompt_lengths.max())
    )
    P = config.max_prompt_length
    mask = np.arange(P) >= P - config.prompt_lengths[:, None]
    ids = np.pad(ids, ((0, 0), (P - ids.shape[1], 0)))
    return Prompts(jnp.asarray(ids, jnp.int32), jnp.asarray(mask), jnp.arange(config.num_prompts))


def given_batch(config: Config, prompts: Prompts, vocab_size: int) -> Batch:
    """Random completions of the lengths in question, right-padded to the maximum length."""
    lengths, T = config.completion_lengths, config.max_completion_length
    ids = np.random.default_rng([config.seed, 4]).integers(0, vocab_size, (config.rows, lengths.max()))
    mask = jnp.asarray(np.arange(T) < lengths[:, None])
    log_probs = jnp.full(mask.shape, -math.log(vocab_size))  # those of a uniform policy
    return Batch(
        prompt_ids=jnp.repeat(prompts.ids, config.group_size, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, config.group_size, axis=0),
        completion_ids=jnp.asarray(np.pad(ids, ((0, 0), (0, T - ids.shape[1]))), jnp.int32),
        completion_mask=mask,
        loss_mask=mask,
        advantages=advantages(config),
        rollout_log_probs=log_probs,
        ref_log_probs=log_probs if config.policy.kl_coef else None,
    )


def advantages(config: Config) -> jax.Array:
    return jnp.asarray(np.random.default_rng([config.seed, 5]).normal(size=config.rows), jnp.float32)


def trl_process(config: Config, hf_config: Mapping[str, Any], params: Params) -> TrlProcess:
    return TrlProcess(
        config.trl_python,
        jax.device_put(params),
        padded_prompts(config, hf_config["vocab_size"]),
        hf_config=hf_config,
        group_size=config.group_size,
        max_completion_length=config.max_completion_length,
        kl_coef=config.policy.kl_coef,
        learning_rate=config.optimizer.learning_rate,
        dtype=config.dtype,
        gradient_checkpointing=config.remat != "none",
    )


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
