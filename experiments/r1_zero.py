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

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax import advantage, loss
from grpo_jax.experiment import at_least, check_divides, check_finite, over_updates, run_experiment, save_trained
from grpo_jax.monitor.metrics import read_jsonl
from grpo_jax.rewards.compose import Scores
from grpo_jax.rounds import MAY_CHANGE, Rounds, RoundSettings
from grpo_jax.run import Run
from grpo_jax.settings import OptimizerSettings, PolicyLossSettings
from grpo_jax.sharding import replicated, shard_rows
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


@dataclass(frozen=True, kw_only=True)
class Config(RoundSettings):
    """What a run is. Fields are checked before anything is computed."""

    run_dir: Path = Path("runs/r1_zero")
    """The run's own folder: logs, checkpoints, curves, the trained model."""
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

    def __post_init__(self):
        RoundSettings.__post_init__(self)
        at_least(self, num_epochs=1, num_minibatches=1, num_micro_batches=1, ref_refresh_every=1, kl_reward_coef=0)
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
        if self.advantage == GDPO and (self.kl_reward_coef or self.rewards.clip_reward):
            raise ValueError("gdpo has no sum of rewards, which kl_reward_coef and clip_reward would change")
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
        return self.micro_batches_of(self.num_prompts * self.group_size // self.num_minibatches)


def main(config: Config) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop."""
    return run_experiment(config, train, title="R1-Zero", may_change=(*MAY_CHANGE, "num_micro_batches"))


def train(config: Config, run: Run) -> None:
    mesh = config.mesh.build()
    check_mesh(config, mesh)
    rounds = Rounds(config, run, mesh)

    # The pieces: a scorer and a train step, each a function of arrays.
    log_probs = partial(completion_log_probs, rounds.policy.model, temperature=config.sampling.temperature)
    scorer = make_scorer(log_probs, num_micro_batches=config.num_minibatches * config.micro_batches)
    optimizer, schedule = config.optimizer.build(
        total_updates=config.num_steps * config.updates_per_step,
        default_learning_rate=1e-6 if config.model else 2.5e-4,
    )
    policy_loss = config.policy.build(
        log_probs, max_completion_length=config.completion_length, sampler_alters_policy=config.sampling.alters_policy
    )
    train_step = make_train_step(policy_loss, optimizer, num_micro_batches=config.micro_batches)

    state = init_state(
        rounds.take_params(), optimizer, with_reference=config.has_reference, replicated=replicated(mesh)
    )
    first, state, position = run.resume(state)
    rounds.begin(position)
    rounds.evaluate_if_due(first, state.params)
    with run.progress.phase("GRPO", config.num_steps, start=first) as phase:
        for step in range(first + 1, config.num_steps + 1):
            drawn = rounds.draw(step, state.params)
            # Sent off before the host scores: the devices work on it meanwhile.
            old, ref = earlier_policies(config, drawn.rollout, scorer, state)
            scores = rounds.score(drawn)
            batch = learn_from(config, drawn.rollout, scores, rounds.scoring.weights, old, ref, mesh)

            updates = []
            for epoch in range(config.num_epochs):
                key = jax.random.fold_in(jax.random.fold_in(rounds.shuffle, step), epoch)
                for minibatch in shuffled_minibatches(batch, key, config.num_minibatches):
                    state, update = train_step(state, shard_rows(minibatch, mesh))
                    updates.append(update)
            if config.ref_refresh_every and step % config.ref_refresh_every == 0:
                state = with_fresh_reference(state)

            metrics = over_updates(updates)
            check_finite(metrics, step, run)
            metrics["learning_rate"] = float(jnp.asarray(schedule(int(state.step) - 1)))
            wants_checkpoint = rounds.tell(drawn, scores, metrics, np.asarray(batch.advantages))
            if rounds.save_is_due(step, wants_checkpoint):
                run.save(step, state, rounds.position)
            run.stop_if_requested()
            metrics |= rounds.evaluate_if_due(step, state.params)
            phase.update(step, metrics)
    gap = "sampling/sampling_logp_difference/max"
    gaps = [row[gap] for row in read_jsonl(run.metrics_log.path) if gap in row]
    summary = {"max_sampler_trainer_gap": max(gaps, default=None), "seed": config.seed}
    save_trained(run, state.params, rounds.policy, steps=config.num_steps, summary=summary)


def check_mesh(config: Config, mesh: Mesh) -> None:
    rows = config.num_prompts * config.group_size // (config.num_minibatches * config.micro_batches)
    check_divides(config.num_prompts, mesh, "num_prompts")
    check_divides(rows, mesh, "the completions of a micro-batch")


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


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
