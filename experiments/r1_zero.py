"""R1-Zero: reinforcement learning straight from a base model, with GRPO and rule-based rewards.

Without arguments it runs the embedded default on one CPU in a few minutes: it trains a small base model that can work
sums out but mostly blurts an answer, and lets GRPO find out that working them out pays. With arguments it is the real
thing:

    python experiments/r1_zero.py
    python experiments/r1_zero.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --run-dir runs/gsm8k
    python experiments/r1_zero.py --model path/to/folder --dataset path/to/train.jsonl --mesh.fsdp 8 --loss dapo

Running the same command again goes on where it stopped. After R1-Zero (DeepSeek-AI, arXiv 2501.12948, section 2.2).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax import advantage, evaluate, loss, models
from grpo_jax.data.encoded import EncodedProblems, decode_completions, decode_one
from grpo_jax.data.iterator import ProblemIterator
from grpo_jax.data.prompts import R1_ZERO
from grpo_jax.data.sources import Problem, reward_columns
from grpo_jax.data.tasks import PLAIN
from grpo_jax.experiment import (
    PolicySettings,
    RunSettings,
    at_least,
    check_divides,
    check_finite,
    over_updates,
    run_experiment,
    save_trained,
    small_base,
)
from grpo_jax.monitor.alarms import Alarms, AlarmSettings
from grpo_jax.monitor.metrics import read_jsonl
from grpo_jax.monitor.rollouts import completion_metrics, reward_metrics
from grpo_jax.monitor.samples import Sample
from grpo_jax.monitor.signals import text_metrics
from grpo_jax.monitor.spot_checks import spot_checks
from grpo_jax.reward_settings import RewardSettings
from grpo_jax.rewards.compose import Scores
from grpo_jax.run import Run, count_compilations
from grpo_jax.settings import DataSettings, OptimizerSettings, PolicyLossSettings
from grpo_jax.sharding import (
    ROLLOUT_RULES,
    bytes_on_devices,
    make_reshard,
    param_shardings,
    replicated,
    shard_rows,
)
from grpo_jax.train import (
    completion_log_probs,
    init_state,
    make_scorer,
    make_train_step,
    shuffled_minibatches,
    with_fresh_reference,
)
from grpo_jax.types import Batch, Rollout, TrainState

ADVANTAGES = {
    "group_relative": advantage.group_relative,
    "dr_grpo": advantage.dr_grpo,
    "rloo": advantage.rloo,
    "reinforce_plus_plus": lambda rewards, group_size: advantage.reinforce_plus_plus(rewards),
    "reinforce_plus_plus_baseline": advantage.reinforce_plus_plus_baseline,
}
GDPO = "gdpo"
"""The advantage that takes the parts of the reward instead of their sum."""
MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings, PolicySettings):
    """What a run is. Fields are checked before anything is computed."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")] = DataSettings()
    """What is asked."""
    run_dir: Path = Path("runs/r1_zero")
    """The run's own folder: logs, checkpoints, curves, the trained model."""

    num_steps: int = 60
    """Rollouts with the updates that follow each."""
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 16
    """Samples for each prompt."""

    rewards: Annotated[RewardSettings, tyro.conf.arg(name="")] = RewardSettings()
    """What is paid for."""
    alarms: AlarmSettings = AlarmSettings()
    """What is watched for."""
    advantage: Literal[(*ADVANTAGES, GDPO)] | None = None  # pyright: ignore[reportInvalidTypeForm]
    """From rewards to advantages; gdpo normalises each part of the reward by itself. Default: dr_grpo with the loss of
    that name, group_relative with any other."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss."""

    policy: Annotated[PolicyLossSettings, tyro.conf.arg(name="")] = PolicyLossSettings()
    """What is minimized."""
    kl_reward_coef: float = 0.0
    """Weight in the reward of the KL to the reference policy, instead of kl_coef; with both at 0, none is held."""
    ref_refresh_every: int | None = None
    """Steps after which the policy becomes its own reference; None keeps the base."""

    num_epochs: int = 1
    """Passes over each step's completions."""
    num_minibatches: int = 1
    """Updates a pass."""
    num_micro_batches: int | None = None
    """Parts each update is computed in, to save memory; the result is the same. Default: parts of at most 16,384
    tokens with --model, one without."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How gradients become updates."""

    eval_every: int = 10
    """Steps between evaluations; there is one before the first and one after the last. 0 for these two alone."""
    eval_samples: int | None = None
    """Samples for each held-out problem, from which pass@1 and the majority vote are taken. Default: 4 with --model,
    16 without."""
    samples_every: int = 10
    """Steps between tables of sample completions."""

    def __post_init__(self):
        RunSettings.__post_init__(self)
        PolicySettings.__post_init__(self)
        at_least(self, num_steps=1, num_prompts=1, num_epochs=1, num_minibatches=1, num_micro_batches=1)
        at_least(self, ref_refresh_every=1, kl_reward_coef=0, eval_every=0, eval_samples=1, samples_every=1)
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; an advantage needs at least 2 samples for each prompt")
        rows, micro_batches = self.num_prompts * self.group_size, self.num_micro_batches or 1
        if rows % (self.num_minibatches * micro_batches):
            raise ValueError(
                f"{self.num_prompts} prompts x {self.group_size} samples = {rows} completions do not divide into "
                f"{self.num_minibatches} minibatches of {micro_batches} micro-batches"
            )
        if self.policy.kl_coef and self.kl_reward_coef:
            raise ValueError(
                f"kl_coef is {self.policy.kl_coef} and kl_reward_coef is {self.kl_reward_coef}: the KL belongs in the "
                "loss or in the reward, not in both; set one of them to 0"
            )
        if self.model is None and (self.data.dataset or self.data.template or self.data.chat_template):
            raise ValueError("the embedded base knows its own sums only; with a dataset or template, name a model too")
        if self.advantage == GDPO and (self.kl_reward_coef or self.rewards.clip_reward):
            raise ValueError("gdpo has no sum of rewards, which kl_reward_coef and clip_reward would change")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy samples of a group are all alike and teach nothing")
        if self.ref_refresh_every is not None and not self.has_reference:
            raise ValueError("ref_refresh_every is set, but kl_coef and kl_reward_coef are 0, so there is no reference")

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is held."""
        return bool(self.policy.kl_coef or self.kl_reward_coef)

    @property
    def advantage_name(self) -> str:
        """The advantage in effect."""
        return self.advantage or ("dr_grpo" if self.policy.loss == "dr_grpo" else "group_relative")

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates that follow each rollout."""
        return self.num_epochs * self.num_minibatches

    @property
    def micro_batches(self) -> int:
        """The parts of an update in effect: the fewest of equal size and, by default, of few enough tokens."""
        if self.num_micro_batches is not None or self.model is None:
            return self.num_micro_batches or 1
        rows = self.num_prompts * self.group_size // self.num_minibatches
        parts = self.mesh.build().shape
        devices = parts["data"] * parts["fsdp"]
        most = max(devices, devices * MICRO_BATCH_TOKENS // (self.prompt_length + self.completion_length))
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most and rows // n % devices == 0]
        return min(fitting, default=1)

    @property
    def num_eval_samples(self) -> int:
        """The samples of an evaluation in effect."""
        return self.eval_samples or (4 if self.model else 16)


MAY_CHANGE = ("num_micro_batches", "cache_bytes", "samples_every", "eval_every", "alarms")
"""Settings that a resumed run may have other values of, besides those of every experiment."""


def main(config: Config) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop."""
    return run_experiment(config, train, title="R1-Zero", may_change=MAY_CHANGE)


def train(config: Config, run: Run) -> None:
    compilations = count_compilations()
    mesh = config.mesh.build()
    check_mesh(config, mesh)
    problems, held_out, accuracy, held_out_accuracy = config.data.load(config.seed)
    scoring = run.enter(
        config.rewards.open(
            accuracy,
            held_out_accuracy,
            max_completion_length=config.completion_length,
            needs_pool=config.data.dataset is not None,
            mesh=mesh,
            dtype=config.compute_dtype,
        )
    )
    scoring.probe(*(first_row(each) for each in (problems, held_out)))

    start = config.model or small_base(run, replace(config.base, seed=config.seed))
    policy = config.as_sampled(config.load(start, mesh))
    problems, held_out = encode(problems, policy, config, run), encode(held_out, policy, config, run)
    batches = ProblemIterator(problems.problems, num_prompts=config.num_prompts, seed=config.seed)

    # The pieces: a sampler, a scorer and a train step, each a function of arrays.
    group_sizes = {config.group_size, config.num_eval_samples}
    samplers = {size: config.sampler(policy, mesh, size) for size in group_sizes}
    to_rollout = make_reshard(param_shardings(policy.params, mesh, ROLLOUT_RULES), config.compute_dtype)
    log_probs = partial(completion_log_probs, policy.model, temperature=config.sampling.temperature)
    scorer = make_scorer(log_probs, num_micro_batches=config.num_minibatches * config.micro_batches)
    optimizer, schedule = config.optimizer.build(
        total_updates=config.num_steps * config.updates_per_step,
        default_learning_rate=1e-6 if config.model else 2.5e-4,
    )
    policy_loss = config.policy.build(
        log_probs, max_completion_length=config.completion_length, sampler_alters_policy=config.sampling.alters_policy
    )
    train_step = make_train_step(policy_loss, optimizer, num_micro_batches=config.micro_batches)

    state = init_state(policy.params, optimizer, with_reference=config.has_reference, replicated=replicated(mesh))
    policy = replace(policy, params=None)  # the state's from here on
    first, state, position = run.resume(state)
    if position:
        batches.set_state(position["batches"])
    num_tokens = position.get("num_tokens", 0)
    noise, shuffle, evaluation = jax.random.split(jax.random.key(config.seed), 3)

    decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
    decode_ids = partial(decode_one, policy.tokenizer, eos_ids=policy.eos_ids)

    def evaluated(step: int) -> dict[str, float]:
        key = jax.random.fold_in(evaluation, step)
        params = to_rollout(state.params)
        with run.progress.phase("evaluation", len(held_out)) as phase:

            def report(done: int) -> None:
                phase.update(done)
                run.stop_if_requested()

            every = [held_out.padded(range(len(held_out)))]
            drawn = samplers[config.num_eval_samples].stream(params, every, key, num_prompts=config.num_prompts)
            metrics = evaluate.held_out(
                held_out,
                drawn,
                decode,
                scoring.held_out,
                group_size=config.num_eval_samples,
                report=report,
            )
        run.log_faults(step, scoring.take_faults())
        run.log({"step": step, **metrics})
        return metrics

    def evaluation_is_due(step: int) -> bool:
        return step in (0, config.num_steps) or bool(config.eval_every and step % config.eval_every == 0)

    fired_before = {row["alarm"] for row in read_jsonl(run.alarms_log.path)}
    alarms = Alarms(config.alarms, read_jsonl(run.metrics_log.path), fired_before)
    if evaluation_is_due(first) and not run.has_row(first, "eval/pass@1"):
        evaluated(first)
    with run.progress.phase("GRPO", config.num_steps, start=first) as phase:
        for step in range(first + 1, config.num_steps + 1):
            started = time.monotonic()
            index, chosen = next(batches)
            prompts = shard_rows(problems.padded(index), mesh)
            params = jax.block_until_ready(to_rollout(state.params))
            moved = time.monotonic()
            texts = [problems.texts[i] for i in index for _ in range(config.group_size)]
            columns = reward_columns(chosen, group_size=config.group_size)
            watch = scoring.as_drawn(
                texts,
                columns,
                decode_ids,
                eos_ids=policy.eos_ids,
                max_completion_length=config.completion_length,
            )
            rollout = samplers[config.group_size](params, prompts, jax.random.fold_in(noise, step), watch=watch)
            drawn = time.monotonic()
            reshard_bytes = 0 if params is state.params else bytes_on_devices(params)
            del params  # not in memory beside the update

            lengths, truncated = np.asarray(rollout.completion_mask.sum(1)), np.asarray(rollout.truncated)
            completions = decode(rollout)
            # Sent off before the host scores: the devices work on it meanwhile.
            old, ref = earlier_policies(config, rollout, scorer, state)
            columns |= {"completion_length": lengths.tolist(), "truncated": truncated.tolist()}
            scores = scoring.score(texts, completions, **columns)
            batch = learn_from(config, rollout, scores, scoring.weights, old, ref, mesh)

            updates = []
            for epoch in range(config.num_epochs):
                key = jax.random.fold_in(jax.random.fold_in(shuffle, step), epoch)
                for minibatch in shuffled_minibatches(batch, key, config.num_minibatches):
                    state, update = train_step(state, shard_rows(minibatch, mesh))
                    updates.append(update)
            if config.ref_refresh_every and step % config.ref_refresh_every == 0:
                state = with_fresh_reference(state)

            metrics = over_updates(updates)
            check_finite(metrics, step, run)
            seconds = time.monotonic() - started
            num_tokens += int(lengths.sum() + rollout.prompt_mask.sum())
            metrics |= reward_metrics(scores.total, scores.parts, group_size=config.group_size)
            metrics |= completion_metrics(lengths, truncated)
            metrics |= text_metrics(
                texts,
                completions,
                group_size=config.group_size,
                answers=columns["answer"],
                tests=columns.get("tests", ()),
            )
            if scoring.judge is not None:
                metrics["judge"] = metrics.get(f"rewards/{scoring.judge}/mean", math.nan)
            metrics |= {
                "pass_rate": metrics.get("rewards/accuracy/mean", math.nan),
                "learning_rate": float(jnp.asarray(schedule(int(state.step) - 1))),
                "num_tokens": num_tokens,
                "tokens_per_second": float(lengths.sum() / seconds),
                "rollout_time": drawn - moved,
                "rollout_tokens_per_second": float(lengths.sum() / (drawn - moved)),
                "reshard_time": moved - started,
                "reshard_bytes": reshard_bytes,
                "step_time": seconds,
                "compilations": compilations(),
            }
            run.log({"step": step, **metrics})
            run.log_faults(step, scoring.take_faults())
            wants_checkpoint = run.raise_alarms(alarms.update({"step": step, **metrics}))
            if step % config.samples_every == 0:
                samples = as_samples(texts, completions, chosen, scores, batch)
                shown = spot_checks(samples, group_size=config.group_size, seed=step)
                run.log_samples(step, samples, shown=shown)
            is_due = step == config.num_steps or step % config.save_every == 0
            if is_due or wants_checkpoint or run.stop_requested:
                run.save(step, state, {"batches": batches.get_state(), "num_tokens": num_tokens})
            run.stop_if_requested()
            if evaluation_is_due(step):
                metrics |= evaluated(step)
            phase.update(step, metrics)
    gap = "sampling/sampling_logp_difference/max"
    gaps = [row[gap] for row in read_jsonl(run.metrics_log.path) if gap in row]
    summary = {"max_sampler_trainer_gap": max(gaps, default=None), "seed": config.seed}
    save_trained(run, state.params, policy, steps=config.num_steps, summary=summary)


def check_mesh(config: Config, mesh: Mesh) -> None:
    rows = config.num_prompts * config.group_size // (config.num_minibatches * config.micro_batches)
    check_divides(config.num_prompts, mesh, "num_prompts")
    check_divides(rows, mesh, "the completions of a micro-batch")


def encode(problems: list[Problem], policy: models.Pretrained, config: Config, run: Run) -> EncodedProblems:
    encoded = config.data.encode(
        problems,
        policy.tokenizer,
        pad_id=policy.pad_id,
        max_prompt_length=config.prompt_length,
        default_template=R1_ZERO if config.model else PLAIN,
    )
    if encoded.dropped:
        run.say(f"{encoded.dropped} of {len(problems)} prompts dropped: over {config.prompt_length} tokens")
    return encoded


def first_row(problems: list[Problem]) -> dict[str, Any]:
    return {name: values[0] for name, values in reward_columns(problems[:1]).items()}


def earlier_policies(
    config: Config, rollout: Rollout, scorer: Callable, state: TrainState
) -> tuple[jax.Array | None, jax.Array | None]:
    """Log-probabilities of the policy at the start of the step and of the reference, each where it is needed."""
    # A single update is strictly on policy: its own forward pass gives the old log-probabilities.
    old = scorer(state.params, rollout) if config.updates_per_step > 1 or config.kl_reward_coef else None
    return old, scorer(state.ref_params, rollout) if config.has_reference else None


def learn_from(
    config: Config,
    rollout: Rollout,
    scores: Scores,
    weights: Mapping[str, float],
    old: jax.Array | None,
    ref: jax.Array | None,
    mesh: Mesh,
) -> Batch:
    """The step's batch: rewards become advantages."""
    rewards = jnp.asarray(scores.total)
    if old is not None and ref is not None and config.kl_reward_coef:
        kl = loss.kl_k1(old, ref)
        rewards = advantage.kl_penalized(rewards, kl, rollout.completion_mask, kl_coef=config.kl_reward_coef)
    learnt = ~jnp.isnan(rewards)
    if config.mask_truncated:
        learnt &= ~rollout.truncated
    if config.advantage_name == GDPO:
        parts = jnp.stack([jnp.asarray(part) for part in scores.counted.values()])
        of_parts = jnp.array([weights[name] for name in scores.counted], jnp.float32)
        advantages = advantage.gdpo(parts, of_parts, group_size=config.group_size)
    else:
        advantages = ADVANTAGES[config.advantage_name](rewards, group_size=config.group_size)
    batch = Batch(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        completion_ids=rollout.completion_ids,
        completion_mask=rollout.completion_mask,
        loss_mask=rollout.completion_mask & learnt[:, None],
        advantages=advantages,
        rollout_log_probs=rollout.rollout_log_probs,
        old_log_probs=old if config.updates_per_step > 1 else None,
        ref_log_probs=ref,
    )
    return shard_rows(batch, mesh)


def as_samples(
    texts: list[str], completions: list[str], chosen: list[Problem], scores: Scores, batch: Batch
) -> list[Sample]:
    return [
        Sample(
            prompt=texts[i],
            completion=completions[i],
            rewards={name: float(part[i]) for name, part in scores.parts.items()},
            reward=float(scores.total[i]),
            advantage=float(batch.advantages[i]),
            answer=chosen[i * len(chosen) // len(completions)].answer,
            note=scores.notes[i],
        )
        for i in range(len(completions))
    ]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
