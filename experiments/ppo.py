"""PPO with a critic (RLHF): actor, critic, reference policy and reward model.

Without arguments it trains on the toy task errands on one CPU: first a reward model from preferences, then the actor
and a critic that starts from the reward model. For real models:

    python experiments/ppo.py
    python experiments/ppo.py --model runs/sft/model --reward-model runs/reward_model/model --dataset prompts.jsonl
    python experiments/ppo.py --model path/to/folder --dataset openai/gsm8k --accuracy-weight 1 --critic head

The reward is given at a completion's last token, the KL penalty at every token; advantages are by generalized
advantage estimation. After InstructGPT (arXiv 2203.02155) and arXiv 2403.17031.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import advantage, loss
from grpo_jax.config.pipeline import stage_config
from grpo_jax.config.ppo import PRESETS, PPOConfig
from grpo_jax.config.presets import preset
from grpo_jax.hosts import fetch
from grpo_jax.loop.bad_updates import check_updates
from grpo_jax.loop.batch_layout import BatchLayout
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.command import run_command
from grpo_jax.loop.estimators import with_old_log_probs
from grpo_jax.loop.experience import Experience
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.losses import critic_loss, policy_loss, shared_trunk_loss
from grpo_jax.loop.queue import RolloutQueue
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import load_model, policy_state
from grpo_jax.loop.stages import Stage
from grpo_jax.masked import masked_mean, masked_sum
from grpo_jax.models import Pretrained
from grpo_jax.rewards.compose import Scores
from grpo_jax.sharding import place, replicated
from grpo_jax.tasks.toy_config import TOY, TOY_FOLDER
from grpo_jax.train import (
    completion_log_probs,
    completion_values,
    init_state,
    policy_and_values,
    reference_params,
    shuffled_minibatches,
    with_value_head,
    without_experts,
)
from grpo_jax.types import Batch, PackedBatch, Params, Rollout, TrainState

SCRIPTS = Path(__file__).parent


def main(config: PPOConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    config.check()
    if not config.has_reward:
        folder = config.run_dir.with_name(f"{config.run_dir.name}_reward_model")
        training = Stage(SCRIPTS / "reward_model.py", stage_config(preset("reward_model"), config, folder, None))
        status = training.run()
        if status:
            return status
        rewards = replace(config.rewards, reward_model=str(folder / "model"))
        model = str(folder / TOY_FOLDER) if config.model == TOY else config.model
        config = replace(config, rewards=rewards, model=model)
    return run_experiment(config, train, title="PPO")


def train(config: PPOConfig, run: Run) -> None:
    mesh = config.mesh.build()
    collector = Collector(config, run, mesh)
    learner = (OwnCritic if config.critic == "model" else SharedTrunk)(config, collector, mesh)
    queue = RolloutQueue(config, collector, run)
    run.describe(
        {
            "loss": f"{config.policy.loss}, critic {config.critic}, KL coefficient {config.kl_reward_coef:g}",
            **queue.facts,
            "updates": f"{config.updates_per_step} a step; {learner.layout.description}; "
            + config.optimizer.description,
        }
    )
    first, states_and_queue, position = run.resume(queue.with_state(learner.states))
    check_steps(run, first, config.num_steps, setting="num_steps", decay=config.optimizer.decay)
    collector.restore(position)
    states = queue.restore(states_and_queue, position)
    kl_coef = position.get("kl_coef", config.kl_reward_coef)
    collector.evaluate_if_due(first, learner.actor(states))
    with run.progress.phase("PPO", config.num_steps, start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, config.num_steps + 1):
            experience = queue.next(step, learner.actor(states))
            # Dispatched before the host scores, so that both run in parallel. Of stale samples, too, values are those
            # of the present critic, and so are the advantages.
            old, ref, values = learner.before(states, experience.rollout)
            scores = collector.score(experience)
            batch, kl, token_kl = learner.batch(experience, scores, old, ref, values, kl_coef)

            updates, critic_alone = [], step <= config.critic_warmup_steps
            for epoch in range(config.num_epochs):
                key = jax.random.fold_in(jax.random.fold_in(collector.shuffle, step), epoch)
                for minibatch in shuffled_minibatches(batch, key, config.num_minibatches):
                    is_first = not updates and not config.staleness
                    minibatch = with_old_log_probs(minibatch, config.old_log_probs, is_first=is_first)
                    states, update = learner.update(states, learner.layout(minibatch), critic_alone=critic_alone)
                    updates.append(update)

            metrics = check_updates(updates, step, config, run)
            if config.kl_reward_coef:
                metrics |= {"kl": token_kl, "kl_completion": kl, "kl_reward_coef": kl_coef}
            metrics["learning_rate"] = learner.learning_rate(states)
            if config.kl_target is not None:
                kl_coef = float(
                    advantage.adapted_kl_coef(
                        jnp.float32(kl_coef),
                        jnp.float32(kl),
                        target=config.kl_target,
                        horizon=config.kl_horizon,
                        num_samples=len(experience.completions),
                    )
                )
            per_completion = np.asarray(masked_sum(batch.advantages, batch.loss_mask, 1))
            passes = config.num_epochs * learner.trained(critic_alone=critic_alone)
            is_shared = learner.layout.packing == "shared"
            wants_checkpoint = collector.log_step(
                experience, scores, metrics, per_completion, passes=passes, prompts_are_shared=is_shared
            )
            if collector.save_is_due(step, wants_checkpoint):
                saved = queue.with_state(states)
                run.save(step, saved, {**collector.state_dict(), **queue.state_dict(), "kl_coef": kl_coef})
            run.stop_if_requested()
            metrics |= collector.evaluate_if_due(step, learner.actor(states))
            phase.update(step, metrics)
    params, step = exported_params(
        config,
        run,
        queue.with_state(states),
        steps=config.num_steps,
        params_of=lambda saved: learner.actor(queue.state_of(saved)),
        start=collector.reload,
    )
    summary = {"seed": config.seed}
    save_trained(
        run,
        params,
        collector.policy,
        steps=config.num_steps,
        summary=summary,
        prompt_format=collector.prompt_format,
        exported_step=step,
    )


class Learner:
    """Actor and critic: train states, batches from completions, updates.

    Attributes:
        states: initial train states.
    """

    states: dict[str, TrainState]

    _log_probs: Callable
    _values: Callable

    def __init__(self, config: PPOConfig, collector: Collector, mesh: Mesh, *, num_steps: int):
        self.config, self.model, self.mesh = config, collector.policy.model, mesh
        self.policy = collector.policy
        self.layout = BatchLayout(config, self.model, mesh)
        self.optimizer, self.schedule = config.optimizer.build(
            total_updates=max(num_steps, 1) * config.updates_per_step,
        )
        self.advantages = jax.jit(partial(token_advantages, gamma=config.gamma, lam=config.lam, scale=config.whiten))

    def init(self, params: Params) -> TrainState:
        return policy_state(self.config, params, self.optimizer, self.mesh)

    def actor(self, states: dict[str, TrainState]) -> Params:
        """Parameters of the policy to sample from."""
        return states["actor"].params

    def trained(self, *, critic_alone: bool) -> list[Pretrained]:
        """The models that an update trains."""
        return [] if critic_alone else [self.policy]

    def critic(self, states: dict[str, TrainState]) -> Params:
        """Parameters of the value function."""
        return states["actor"].params

    def before(self, states: dict[str, TrainState], rollout: Rollout) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Log-probabilities of the actor and the reference, and values, before the update."""
        actor = states["actor"]
        own = without_experts(rollout)
        ref = None if actor.ref_params is None else self._log_probs(reference_params(actor), own)
        from_sampler = self.config.old_log_probs == "sampler"
        old = rollout.rollout_log_probs if from_sampler else self._log_probs(actor.params, rollout)
        return old, ref, self._values(self.critic(states), rollout)

    def learning_rate(self, states: dict[str, TrainState]) -> float:
        return float(jnp.asarray(self.schedule(max(int(states["actor"].step) - 1, 0))))

    def batch(
        self,
        experience: Experience,
        scores: Scores,
        old: jax.Array,
        ref: jax.Array | None,
        values: jax.Array,
        kl_coef: float,
    ) -> tuple[Batch, float, float]:
        """Training batch, and the mean KL to the reference in nats per completion and per token."""
        # All processes compute the same on their own devices.
        rollout, old, ref, values = jax.tree.map(jnp.asarray, fetch((experience.rollout, old, ref, values)))
        rewards = jnp.asarray(scores.total)
        mask = rollout.completion_mask & ~jnp.isnan(rewards)[:, None]
        advantages, returns, *kl = self.advantages(rewards, old, ref, values, mask, jnp.float32(kl_coef))
        batch = Batch(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            completion_ids=rollout.completion_ids,
            completion_mask=rollout.completion_mask,
            loss_mask=mask,
            advantages=advantages,
            rollout_log_probs=rollout.rollout_log_probs,
            old_log_probs=old,
            old_values=values,
            returns=returns,
            prompt_experts=rollout.prompt_experts,
            completion_experts=rollout.completion_experts,
        )
        return batch, float(kl[0]), float(kl[1])


class OwnCritic(Learner):
    """A separate critic model, initialized from the reward model, or else from the actor's initial model."""

    def __init__(self, config: PPOConfig, collector: Collector, mesh: Mesh):
        # The actor is not updated during the critic's warm-up.
        super().__init__(config, collector, mesh, num_steps=config.num_steps - config.critic_warmup_steps)
        start = config.rewards.reward_model or collector.start
        critic = load_model(config, start, mesh, scalar_head=True)
        check_same_tokens(critic, collector.policy)
        self.critic_model = replace(critic, params={})  # the train step donates them
        critic_optimizer, _ = config.critic_optimizer.build(
            total_updates=config.num_steps * config.updates_per_step,
        )
        log_probs = partial(completion_log_probs, self.model, temperature=config.sampling.temperature)
        values = partial(completion_values, critic.model)

        critic_preparation = critic.model.preparation
        layout = self.layout
        self._log_probs = layout.make_log_prob_fn(log_probs)
        self._values = layout.make_log_prob_fn(lambda *args: (values(*args), None), critic_preparation)
        self._actor_step = layout.make_train_step(policy_loss(config, self.model), self.optimizer, config.optimizer)
        self._critic_step = layout.make_train_step(
            critic_loss(config, critic.model), critic_optimizer, config.critic_optimizer, critic_preparation
        )
        on_mesh = replicated(mesh)
        self.states = {
            "actor": self.init(collector.take_params()),
            "critic": init_state(
                critic.params, critic_optimizer, with_reference=False, replicated=on_mesh, offload=config.offload
            ),
        }

    def trained(self, *, critic_alone: bool) -> list[Pretrained]:
        return [self.critic_model, *super().trained(critic_alone=critic_alone)]

    def critic(self, states: dict[str, TrainState]) -> Params:
        return states["critic"].params

    def update(
        self, states: dict[str, TrainState], batch: Batch | PackedBatch, *, critic_alone: bool
    ) -> tuple[dict[str, TrainState], dict[str, jax.Array]]:
        """One update of the critic, and of the actor unless ``critic_alone``."""
        critic, metrics = self._critic_step(states["critic"], batch)
        metrics |= {f"value/{name}": metrics[name] for name in ("loss", "grad_norm", "skipped_updates")}
        if critic_alone:
            return {**states, "critic": critic}, metrics
        actor, actor_metrics = self._actor_step(states["actor"], batch)
        return {"actor": actor, "critic": critic}, metrics | actor_metrics


def of_value_head(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of a policy with a value head that changes the head alone; weight decay would change the policy too.

    Args:
        optimizer: of both.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params)
        return {**updates, "policy": jax.tree.map(jnp.zeros_like, updates["policy"])}, state

    return optax.GradientTransformation(optimizer.init, update)


class SharedTrunk(Learner):
    """A value head on the actor's trunk: one update of the sum of policy loss and weighted value loss."""

    def __init__(self, config: PPOConfig, collector: Collector, mesh: Mesh):
        super().__init__(config, collector, mesh, num_steps=config.num_steps)
        outputs = partial(policy_and_values, self.model, temperature=config.sampling.temperature)

        preparation = self.model.preparation.under("policy")
        layout = self.layout
        self._log_probs = layout.make_log_prob_fn(lambda params, rollout: outputs(params, rollout)[:2], preparation)
        self._values = layout.make_log_prob_fn(lambda params, rollout: (outputs(params, rollout)[2], None), preparation)
        self._steps = {
            alone: layout.make_train_step(
                shared_trunk_loss(config, self.model, critic_alone=alone),
                of_value_head(self.optimizer) if alone else self.optimizer,
                config.optimizer,
                preparation,
            )
            for alone in (False, True)
        }
        policy = collector.take_params()
        params = with_value_head(policy, jax.eval_shape(self.model.head, policy).shape[1])
        params["value"] = place(params["value"], replicated(mesh))
        self.states = {"actor": self.init(params)}

    def actor(self, states: dict[str, TrainState]) -> Params:
        return states["actor"].params["policy"]

    def update(
        self, states: dict[str, TrainState], batch: Batch | PackedBatch, *, critic_alone: bool
    ) -> tuple[dict[str, TrainState], dict[str, jax.Array]]:
        """One update of both losses, or of the value head if ``critic_alone``."""
        actor, metrics = self._steps[critic_alone](states["actor"], batch)
        return {"actor": actor}, metrics


def token_advantages(rewards, old, ref, values, mask, kl_coef, *, gamma: float, lam: float, scale: bool):
    """Advantages and returns per token; mean KL to the reference in nats per completion and per token."""
    kl = jnp.zeros_like(old) if ref is None else loss.kl_k1(old, ref)
    per_token = advantage.token_rewards(rewards, kl, mask, kl_coef=kl_coef)
    advantages, returns = advantage.gae(per_token, values, mask, gamma=gamma, lam=lam)
    advantages = advantage.whitened(advantages, mask) if scale else advantages
    return advantages, returns, masked_mean(masked_sum(kl, mask, 1), mask.any(1)), masked_mean(kl, mask)


def check_same_tokens(critic: Pretrained, policy: Pretrained) -> None:
    """Check that critic and policy have the same tokenizer.

    Raises:
        ValueError: the tokenizers differ, or the critic's embedding lacks rows for some of the policy's tokens.
    """
    assert critic.tokenizer is not None
    assert policy.tokenizer is not None
    vocabulary = policy.tokenizer.get_vocab()
    if critic.tokenizer.get_vocab() != vocabulary:
        raise ValueError(
            "the tokenizers of reward_model and model differ, so the critic cannot start from the reward model"
        )
    rows = range(critic.config.vocab_size, policy.config.vocab_size)
    lacking = sum(number in rows for number in vocabulary.values())
    if lacking:
        raise ValueError(
            f"the reward model's embedding has {critic.config.vocab_size} rows and lacks {lacking} of the policy's "
            "tokens, so the critic cannot start from it"
        )


if __name__ == "__main__":
    sys.exit(run_command(PPOConfig, main, presets=PRESETS, description=__doc__))
