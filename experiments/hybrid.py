"""GRPO with a small critic for the groups that have no signal: an experiment, without a measured gain.

Where the rewards of a group differ, advantages are those of GRPO. Where they are all equal, they are the returns minus
the values of a small MLP on the policy's hidden states, which learns from every step. The policy has no gradient from
the critic.

    python experiments/hybrid.py
    python experiments/hybrid.py --model path/to/folder --dataset path/to/train.jsonl

The settings are those of grpo.py, without kl_reward_coef, max_draws and minibatches.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax import advantage
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.hosts import fetch
from grpo_jax.loop.bad_updates import check_updates
from grpo_jax.loop.batch_layout import BatchLayout
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.command import run_command
from grpo_jax.loop.estimators import make_train_batch, per_completion, rewards_of_steps
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.losses import policy_loss
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import policy_state
from grpo_jax.rewards.compose import Scores
from grpo_jax.sharding import shard_rows
from grpo_jax.train import completion_log_probs, reference_params, without_experts
from grpo_jax.train.critic import CriticBatch, MLPCritic
from grpo_jax.types import Batch, Rollout


@dataclass(frozen=True, kw_only=True)
class HybridConfig(GRPOConfig):
    """GRPO with a critic where a group's rewards are all equal."""

    run_dir: Path = Path("runs/hybrid")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    """Optimizer of the policy."""
    critic_epochs: int = 8
    """Passes of the critic over each step's completions."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3)
    """Optimizer of the critic."""

    def __post_init__(self):
        GRPOConfig.__post_init__(self)
        require_at_least(self, critic_epochs=1)
        fixed = {"advantage": "group_relative", "max_draws": 1, "staleness": 0, "num_epochs": 1, "num_minibatches": 1}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}; with a critic it must be {value}")
        if self.kl_reward_coef:
            raise ValueError("kl_reward_coef is set; with a critic the KL belongs in the loss: set kl_coef")


def toy() -> HybridConfig:
    """The toy preset."""
    grpo = preset("grpo")
    return HybridConfig(**{each.name: getattr(grpo, each.name) for each in fields(grpo) if each.name != "run_dir"})


PRESETS: dict[str, Preset[HybridConfig]] = {
    "toy": Preset(toy, "the toy preset of grpo.py with a critic", hardware="one CPU core"),
}


def main(config: HybridConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, train, title="hybrid")


def train(config: HybridConfig, run: Run) -> None:
    mesh = config.mesh.build()
    collector = Collector(config, run, mesh)
    model = collector.policy.model
    log_probs = partial(completion_log_probs, model, temperature=config.sampling.temperature)
    layout = BatchLayout(config, model, mesh)
    log_prob_fn = layout.make_log_prob_fn(log_probs)
    optimizer, schedule = config.optimizer.build(total_updates=config.num_steps)
    train_step = layout.make_train_step(policy_loss(config, model), optimizer, config.optimizer)
    critic = make_critic(config, collector, mesh)
    policy = policy_state(config, collector.take_params(), optimizer, mesh)
    first, states, saved = run.resume({"policy": policy, "critic": critic.initial_state})
    check_steps(run, first, config.num_steps, setting="num_steps", decay=config.optimizer.decay)
    collector.restore(saved)
    collector.evaluate_if_due(first, states["policy"].params)
    with run.progress.phase("hybrid", config.num_steps, start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, config.num_steps + 1):
            state, critic_state = states["policy"], states["critic"]
            experience = collector.sample(step, state.params)
            rollout = experience.rollout
            ref = log_prob_fn(reference_params(state), without_experts(rollout)) if config.has_reference else None
            hidden, values = critic.states_and_values(critic_state, state.params, shard_rows(rollout, mesh))
            scores = collector.score(experience)
            batch = make_train_batch(
                config,
                rollout,
                scores,
                reward_weights=collector.scorer.weights,
                tokenizer=collector.policy.tokenizer,
                old_log_probs=None,
                ref_log_probs=ref,
            )
            values = jnp.asarray(fetch(values))
            batch = with_hybrid_advantages(config, batch, rollout, scores, values, collector.policy.tokenizer)
            assert batch.returns is not None
            state, update = train_step(state, layout(replace(batch, returns=None)))
            critic_batch = CriticBatch(hidden, *shard_rows((batch.returns, batch.loss_mask), mesh))
            critic_state, critic_metrics = critic.update(critic_state, critic_batch)
            states = {"policy": state, "critic": critic_state}

            metrics = check_updates([update | critic_metrics], step, config, run)
            metrics["learning_rate"] = float(jnp.asarray(schedule(int(state.step) - 1)))
            passes = [collector.policy]
            is_shared = layout.packing == "shared"
            wants_checkpoint = collector.log_step(
                experience, scores, metrics, per_completion(batch), passes=passes, prompts_are_shared=is_shared
            )
            if collector.save_is_due(step, wants_checkpoint):
                run.save(step, states, collector.state_dict())
            run.stop_if_requested()
            metrics |= collector.evaluate_if_due(step, state.params)
            phase.update(step, metrics)
    params, step = exported_params(
        config,
        run,
        states,
        steps=config.num_steps,
        params_of=lambda states: states["policy"].params,
        start=collector.reload,
    )
    save_trained(
        run,
        params,
        collector.policy,
        steps=config.num_steps,
        summary={"seed": config.seed},
        prompt_format=collector.prompt_format,
        exported_step=step,
    )


def make_critic(config: HybridConfig, collector: Collector, mesh: Mesh) -> MLPCritic:
    optimizer, _ = config.critic_optimizer.build(total_updates=config.num_steps * config.critic_epochs)
    return MLPCritic(
        collector.policy.model,
        collector.policy.config.hidden_size,
        optimizer=optimizer,
        num_micro_batches=config.micro_batches,
        num_epochs=config.critic_epochs,
        skip_grad_norm=config.critic_optimizer.skip_grad_norm,
        seed=config.seed,
        mesh=mesh,
    )


def with_hybrid_advantages(
    config: HybridConfig, batch: Batch, rollout: Rollout, scores: Scores, values, tokenizer
) -> Batch:
    """``batch`` with the advantages and returns of ``advantage.hybrid``."""
    rewards, step_rewards = jnp.asarray(scores.total), None
    if any(scores.steps):
        rewards = jnp.where(jnp.isnan(rewards), jnp.nan, jnp.asarray(np.nan_to_num(scores.outcome)))
        step_rewards = jnp.nan_to_num(rewards_of_steps(rollout, scores, tokenizer))
    advantages, returns = advantage.hybrid(
        rewards, values, batch.loss_mask, group_size=config.group_size, step_rewards=step_rewards
    )
    return replace(batch, advantages=advantages, returns=returns)


if __name__ == "__main__":
    sys.exit(run_command(HybridConfig, main, presets=PRESETS, description=__doc__))
