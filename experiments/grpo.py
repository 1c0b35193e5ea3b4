"""GRPO and its relatives without a critic (Dr.GRPO, RLOO, DAPO, REINFORCE++), with rule-based or learned rewards.

R1-Zero (DeepSeek-AI, arXiv 2501.12948, section 2.2) is this, started from a base model. The toy preset does it in
minutes on one CPU: a toy model that can work sums out but mostly guesses learns by reward alone to work them out.

    python experiments/grpo.py
    python experiments/grpo.py r1-zero-gsm8k
    python experiments/grpo.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --run-dir runs/gsm8k
    python experiments/grpo.py --model path/to/folder --dataset path/to/train.jsonl --mesh.fsdp 8 --loss dapo

The same command resumes a run that was stopped.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.grpo import PRESETS, GRPOConfig
from grpo_jax.loop.bad_updates import check_updates
from grpo_jax.loop.batch_layout import BatchLayout
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.command import run_command
from grpo_jax.loop.estimators import (
    make_train_batch,
    old_and_ref_log_probs,
    per_completion,
    select_rows,
    with_old_log_probs,
)
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.losses import policy_loss
from grpo_jax.loop.queue import RolloutQueue
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import policy_state
from grpo_jax.train import (
    completion_log_probs,
    shuffled_minibatches,
    with_fresh_reference,
)


def main(config: GRPOConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, train, title="GRPO")


def train(config: GRPOConfig, run: Run) -> None:
    mesh = config.mesh.build()
    collector = Collector(config, run, mesh, config.sampling_mesh())
    model = collector.policy.model
    log_probs = partial(completion_log_probs, model, temperature=config.sampling.temperature)
    layout = BatchLayout(config, model, mesh)
    log_prob_fn = layout.make_log_prob_fn(log_probs)
    optimizer, schedule = config.optimizer.build(total_updates=config.num_steps * config.updates_per_step)
    train_step = layout.make_train_step(policy_loss(config, model), optimizer, config.optimizer)
    queue = RolloutQueue(config, collector, run)
    run.describe(
        {
            "loss": f"{config.policy.loss}, advantages {config.advantage}, "
            + (f"KL {config.policy.kl}, " if config.policy.kl_coef else "")
            + f"KL coefficient {config.policy.kl_coef or config.kl_reward_coef:g}",
            **queue.facts,
            "updates": f"{config.updates_per_step} a step; {layout.description}; " + config.optimizer.description,
        }
    )
    state = policy_state(config, collector.take_params(), optimizer, mesh)
    first, state_and_queue, saved = run.resume(queue.with_state(state))
    check_steps(run, first, config.num_steps, setting="num_steps", decay=config.optimizer.decay)
    collector.restore(saved)
    state = queue.restore(state_and_queue, saved)
    collector.evaluate_if_due(first, state.params)
    with run.progress.phase("GRPO", config.num_steps, start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, config.num_steps + 1):
            if config.max_draws == 1:
                experience, scores = queue.next(step, state.params), None
                rollout, rows = experience.rollout, slice(None)
            else:
                experience, scores, rows = collector.sample_dynamically(step, state.params, most=config.max_draws)
                rollout = select_rows(experience.rollout, rows)
            # Dispatched before the host scores: the devices compute meanwhile.
            old, ref = old_and_ref_log_probs(config, rollout, log_prob_fn, state)
            scores = collector.score(experience) if scores is None else scores
            batch = make_train_batch(
                config,
                rollout,
                scores.at(rows),
                reward_weights=collector.scorer.weights,
                tokenizer=collector.policy.tokenizer,
                old_log_probs=old,
                ref_log_probs=ref,
            )

            updates = []
            for epoch in range(config.num_epochs):
                key = jax.random.fold_in(jax.random.fold_in(collector.shuffle, step), epoch)
                for minibatch in shuffled_minibatches(batch, key, config.num_minibatches):
                    is_first = not updates and not config.staleness
                    minibatch = with_old_log_probs(minibatch, config.old_log_probs, is_first=is_first)
                    state, update = train_step(state, layout(minibatch))
                    updates.append(update)
            if config.ref_refresh_every and step % config.ref_refresh_every == 0:
                state = with_fresh_reference(state)

            metrics = check_updates(updates, step, config, run)
            metrics["learning_rate"] = float(jnp.asarray(schedule(int(state.step) - 1)))
            advantages = np.full(len(experience.completions), np.nan, np.float32)
            advantages[rows] = per_completion(batch)
            passes = [collector.policy] * config.num_epochs
            is_shared = layout.packing == "shared"
            wants_checkpoint = collector.log_step(
                experience, scores, metrics, advantages, passes=passes, prompts_are_shared=is_shared
            )
            if collector.save_is_due(step, wants_checkpoint):
                run.save(step, queue.with_state(state), {**collector.state_dict(), **queue.state_dict()})
            run.stop_if_requested()
            metrics |= collector.evaluate_if_due(step, state.params)
            phase.update(step, metrics)
    gap = "sampling/sampling_logp_difference/max"
    gaps = [row[gap] for row in run.rows() if gap in row]
    params, step = exported_params(
        config,
        run,
        queue.with_state(state),
        steps=config.num_steps,
        params_of=lambda saved: queue.state_of(saved).params,
        start=collector.reload,
    )
    save_trained(
        run,
        params,
        collector.policy,
        steps=config.num_steps,
        summary={"max_sampler_trainer_gap": max(gaps, default=None), "seed": config.seed},
        prompt_format=collector.prompt_format,
        exported_step=step,
    )


if __name__ == "__main__":
    sys.exit(run_command(GRPOConfig, main, presets=PRESETS, description=__doc__))
