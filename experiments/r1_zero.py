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
from collections.abc import Callable
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
from grpo_jax.config.online import EXTENDABLE_FIELDS, RESUMABLE_FIELDS, OnlineConfig
from grpo_jax.config.run import require_at_least
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.data.encoded import last_tokens
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.checks import check_divides, check_finite
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.command import run_command
from grpo_jax.loop.experience import has_reward_variance
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.report import over_updates
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.masked import masked_sum
from grpo_jax.rewards.compose import Scores
from grpo_jax.sharding import replicated, shard_rows
from grpo_jax.train import (
    completion_log_probs,
    init_state,
    make_log_prob_fn,
    make_train_step,
    shuffled_minibatches,
    with_fresh_reference,
)
from grpo_jax.train.critic import Features, LightCritic
from grpo_jax.types import Batch, Rollout, TrainState

ADVANTAGES = {
    "group_relative": advantage.group_relative,
    "dr_grpo": advantage.dr_grpo,
    "rloo": advantage.rloo,
    "reinforce_plus_plus": lambda rewards, group_size: advantage.reinforce_plus_plus(rewards),
    "reinforce_plus_plus_baseline": advantage.reinforce_plus_plus_baseline,
}
GDPO, PROCESS, HYBRID = "gdpo", "process_supervised", "hybrid"
"""The advantages that take more than the sum of rewards: its parts, the steps of the reasoning, a critic's values."""


@dataclass(frozen=True, kw_only=True)
class Config(OnlineConfig):
    """What a run is. Fields are checked before anything is computed."""

    run_dir: Path = Path("runs/r1_zero")
    """The run's own folder: logs, checkpoints, curves, the trained model."""
    advantage: Literal[(*ADVANTAGES, GDPO, PROCESS, HYBRID)] | None = None  # pyright: ignore[reportInvalidTypeForm]
    """From rewards to advantages. gdpo normalises each part of the reward by itself; process_supervised takes the
    rewards of steps (steps_weight, or rewards of your own that give them); hybrid takes the values of a light head on
    the policy where a group's rewards are all the same. Default: dr_grpo with the loss of that name, group_relative
    with any other."""
    critic_epochs: int = 8
    """With hybrid, passes of the head over each step's completions."""
    critic_optimizer: OptimizerConfig = OptimizerConfig()
    """With hybrid, how the head's gradients become updates. Default learning rate: 3e-3."""
    max_draws: int = 1
    """How often a step may draw, each time for the next prompts, until there are num_prompts groups whose samples
    differ in what they are worth: DAPO's dynamic sampling, with a bound. 1 learns from what was drawn first."""
    mask_truncated: bool = False
    """Leave completions that were cut off out of the loss."""

    policy: Annotated[PolicyLossConfig, tyro.conf.arg(name="")] = PolicyLossConfig()
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
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""

    def __post_init__(self):
        OnlineConfig.__post_init__(self)
        require_at_least(
            self, num_epochs=1, num_minibatches=1, num_micro_batches=1, ref_refresh_every=1, kl_reward_coef=0
        )
        require_at_least(self, max_draws=1, critic_epochs=1)
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; an advantage needs at least 2 samples for each prompt")
        rows, micro_batches = self.num_prompts * self.group_size, self.num_micro_batches or 1
        if rows % (self.num_minibatches * micro_batches):
            raise ValueError(
                f"num_prompts x group_size = {self.num_prompts} x {self.group_size} = {rows} completions do not divide "
                f"into num_minibatches x num_micro_batches = {self.num_minibatches} x {micro_batches} parts"
            )
        if self.policy.kl_coef and self.kl_reward_coef:
            raise ValueError(
                f"kl_coef is {self.policy.kl_coef} and kl_reward_coef is {self.kl_reward_coef}: the KL belongs in the "
                "loss or in the reward, not in both; set one of them to 0"
            )
        clips = any(task.rewards.clip_reward for task in self.mixture)
        if self.advantage == GDPO and (self.kl_reward_coef or clips):
            raise ValueError("gdpo has no sum of rewards, which kl_reward_coef and clip_reward would change")
        if self.advantage == PROCESS and self.kl_reward_coef:
            raise ValueError("process_supervised has no sum of rewards, which kl_reward_coef would change")
        if self.advantage == PROCESS and not any(
            task.rewards.steps_weight or task.rewards.reward for task in self.mixture
        ):
            raise ValueError("process_supervised needs rewards of steps: set steps_weight, or name a reward of yours")
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
    return run_experiment(
        config, train, title="R1-Zero", resumable_fields=RESUMABLE_FIELDS, extendable_fields=EXTENDABLE_FIELDS
    )


def check(config: Config) -> None:
    """Find what the devices cannot divide, before anything is computed."""
    check_mesh(config, config.mesh.build())


def train(config: Config, run: Run) -> None:
    check(config)
    mesh = config.mesh.build()
    collector = Collector(config, run, mesh)

    # The pieces: a scorer and a train step, each a function of arrays.
    model = collector.policy.model
    log_probs = partial(completion_log_probs, model, temperature=config.sampling.temperature)
    scorer = make_log_prob_fn(log_probs, num_micro_batches=config.num_minibatches * config.micro_batches)
    optimizer, schedule = config.optimizer.build(
        total_updates=config.num_steps * config.updates_per_step,
        default_learning_rate=1e-6 if config.model else 2.5e-4,
    )
    policy_loss = config.policy.build(
        log_probs, max_completion_length=config.completion_length, sampler_alters_policy=config.sampling.alters_policy
    )
    train_step = make_train_step(policy_loss, optimizer, num_micro_batches=config.micro_batches)

    run.describe(
        {
            "loss": f"{config.policy.loss}, advantages {config.advantage_name}, "
            f"KL coefficient {config.policy.kl_coef or config.kl_reward_coef:g}",
            "updates": f"{config.updates_per_step} a step, {config.micro_batches} micro-batches each; "
            + config.optimizer.described(1e-6 if config.model else 2.5e-4),
        }
    )
    critic = light_critic(config, collector, mesh) if config.advantage == HYBRID else None
    state = init_state(
        collector.take_params(), optimizer, with_reference=config.has_reference, replicated=replicated(mesh)
    )
    first, states, position = run.resume(states_of(state, None if critic is None else critic.start))
    state, value_state = states["policy"], states.get("critic")
    check_steps(run, first, config.num_steps, setting="num_steps", decay=config.optimizer.decay)
    collector.restore(position)
    collector.evaluate_if_due(first, state.params)
    with run.progress.phase("GRPO", config.num_steps, start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, config.num_steps + 1):
            if config.max_draws == 1:
                drawn, scores = collector.draw(step, state.params), None
                rollout, rows = drawn.rollout, slice(None)
            else:
                drawn, scores, rows = collector.sample_dynamically(step, state.params, most=config.max_draws)
                rollout = rows_of(drawn.rollout, rows, mesh)
            # Sent off before the host scores: the devices work on it meanwhile.
            old, ref = old_and_ref_log_probs(config, rollout, scorer, state)
            hidden, values = (None, None) if critic is None else critic.read(value_state, state.params, rollout)
            scores = collector.score(drawn) if scores is None else scores
            batch = make_train_batch(config, rollout, scores.at(rows), collector, old, ref, values)

            updates = []
            for epoch in range(config.num_epochs):
                key = jax.random.fold_in(jax.random.fold_in(collector.shuffle, step), epoch)
                for minibatch in shuffled_minibatches(batch, key, config.num_minibatches):
                    state, update = train_step(state, shard_rows(minibatch, mesh))
                    updates.append(update)
            if config.ref_refresh_every and step % config.ref_refresh_every == 0:
                state = with_fresh_reference(state)

            metrics = over_updates(updates)
            if critic is not None and hidden is not None and batch.returns is not None:
                value_state, of_critic = critic.learn(value_state, Features(hidden, batch.returns, batch.loss_mask))
                metrics |= of_critic
            check_finite(metrics, step, run)
            metrics["learning_rate"] = float(jnp.asarray(schedule(int(state.step) - 1)))
            advantages = np.full(len(drawn.completions), np.nan, np.float32)
            advantages[rows] = per_completion(batch)
            wants_checkpoint = collector.log_step(drawn, scores, metrics, advantages)
            if collector.save_is_due(step, wants_checkpoint):
                run.save(step, states_of(state, value_state), collector.position)
            run.stop_if_requested()
            metrics |= collector.evaluate_if_due(step, state.params)
            phase.update(step, metrics)
    gap = "sampling/sampling_logp_difference/max"
    gaps = [row[gap] for row in read_jsonl(run.metrics_log.path) if gap in row]
    summary = {"max_sampler_trainer_gap": max(gaps, default=None), "seed": config.seed}
    params, step = exported_params(
        config,
        run,
        states_of(state, value_state),
        steps=config.num_steps,
        params_of=lambda states: states["policy"].params,
        start=collector.reload,
    )
    save_trained(
        run,
        params,
        collector.policy,
        steps=config.num_steps,
        summary=summary,
        prompt_format=collector.prompt_format,
        exported_step=step,
    )


def check_mesh(config: Config, mesh: Mesh) -> None:
    rows = config.num_prompts * config.group_size // (config.num_minibatches * config.micro_batches)
    check_divides(config.num_prompts, mesh, "num_prompts")
    check_divides(rows, mesh, "the completions of a micro-batch")


def old_and_ref_log_probs(
    config: Config, rollout: Rollout, scorer: Callable, state: TrainState
) -> tuple[jax.Array | None, jax.Array | None]:
    """Log-probabilities of the policy at the start of the step and of the reference, each where it is needed."""
    # A single update is strictly on policy: its own forward pass gives the old log-probabilities.
    old = scorer(state.params, rollout) if config.updates_per_step > 1 or config.kl_reward_coef else None
    return old, scorer(state.ref_params, rollout) if config.has_reference else None


def states_of(policy: TrainState, critic: TrainState | None) -> dict[str, TrainState]:
    """What a checkpoint holds."""
    return {"policy": policy} | ({} if critic is None else {"critic": critic})


def rows_of(rollout: Rollout, rows: np.ndarray, mesh: Mesh) -> Rollout:
    return shard_rows(jax.tree.map(lambda x: np.asarray(x)[rows], rollout), mesh)


def light_critic(config: Config, collector: Collector, mesh: Mesh) -> LightCritic:
    total_updates = config.num_steps * config.critic_epochs
    optimizer, _ = config.critic_optimizer.build(total_updates=total_updates, default_learning_rate=3e-3)
    return LightCritic(
        collector.policy.model,
        collector.policy.config.hidden_size,
        optimizer=optimizer,
        num_micro_batches=config.num_minibatches * config.micro_batches,
        num_epochs=config.critic_epochs,
        seed=config.seed,
        mesh=mesh,
    )


def make_train_batch(
    config: Config,
    rollout: Rollout,
    scores: Scores,
    collector: Collector,
    old: jax.Array | None,
    ref: jax.Array | None,
    values: jax.Array | None = None,
) -> Batch:
    """The step's batch: rewards become advantages."""
    rewards = jnp.asarray(scores.total)
    inside = any(scores.steps) if config.advantage_name == HYBRID else False
    if inside:  # what steps are worth stands at their ends
        rewards = jnp.where(jnp.isnan(rewards), jnp.nan, jnp.nan_to_num(scores.outcome))
    if old is not None and ref is not None and config.kl_reward_coef:
        kl = loss.kl_k1(old, ref)
        rewards = advantage.kl_penalized(rewards, kl, rollout.completion_mask, kl_coef=config.kl_reward_coef)
    learnt = ~jnp.isnan(rewards)
    if config.mask_truncated:
        learnt &= ~rollout.truncated
    if config.max_draws > 1:  # what fills a step up that found too few
        learnt &= jnp.repeat(jnp.asarray(has_reward_variance(scores.total, config.group_size)), config.group_size)
    mask = rollout.completion_mask & learnt[:, None]
    returns, group_size = None, config.group_size
    if config.advantage_name == GDPO:
        parts = jnp.stack([jnp.asarray(part) for part in scores.counted.values()])
        weights = jnp.array([collector.scoring.weights[name] for name in scores.counted], jnp.float32)
        parts = jnp.where(jnp.isnan(rewards), jnp.nan, parts)
        advantages = advantage.gdpo(parts, weights, group_size=group_size, require_all=False)
    elif config.advantage_name == PROCESS:
        step_rewards = rewards_of_steps(rollout, scores, collector, with_outcome=True)
        is_step_end = ~jnp.isnan(step_rewards) & ~jnp.isnan(rewards)[:, None]
        advantages = advantage.process_supervised(step_rewards, is_step_end, group_size=group_size)
    elif config.advantage_name == HYBRID:
        assert values is not None
        step_rewards = jnp.nan_to_num(rewards_of_steps(rollout, scores, collector)) if inside else None
        advantages, returns = advantage.hybrid(rewards, values, mask, group_size=group_size, step_rewards=step_rewards)
    else:
        advantages = ADVANTAGES[config.advantage_name](rewards, group_size=group_size)
    batch = Batch(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        completion_ids=rollout.completion_ids,
        completion_mask=rollout.completion_mask,
        loss_mask=mask,
        advantages=advantages,
        rollout_log_probs=rollout.rollout_log_probs,
        old_log_probs=old if config.updates_per_step > 1 else None,
        ref_log_probs=ref,
        returns=returns,
    )
    return shard_rows(batch, collector.mesh)


def rewards_of_steps(
    rollout: Rollout, scores: Scores, collector: Collector, *, with_outcome: bool = False
) -> jax.Array:
    """``[B, T]``, the rewards of steps at their last tokens, NaN elsewhere; with the outcome's at the last token."""
    rewards = np.full(rollout.completion_ids.shape, np.nan, np.float32)
    lengths = np.asarray(rollout.completion_mask).sum(1)
    for row, (ids, steps) in enumerate(zip(np.asarray(rollout.completion_ids), scores.steps, strict=True)):
        ends = last_tokens(collector.policy.tokenizer, ids[: lengths[row]].tolist(), [end for end, _ in steps])
        inside = [(end, reward) for end, (_, reward) in zip(ends, steps, strict=True)]
        outcome = scores.outcome[row] if with_outcome else np.nan
        for end, reward in [*inside, *([] if np.isnan(outcome) else [(lengths[row] - 1, outcome)])]:
            rewards[row, end] = np.nan_to_num(rewards[row, end]) + reward
    return jnp.asarray(rewards)


def per_completion(batch: Batch) -> np.ndarray:
    """``[B]``, the advantage of each completion, summed over its tokens where these have their own."""
    advantages = batch.advantages
    return np.asarray(advantages if advantages.ndim == 1 else masked_sum(advantages, batch.loss_mask, 1))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
