"""From a scored rollout to the batch of an update: rewards become advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import advantage, loss
from grpo_jax.config.functions import call_with
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.data.encoded import last_tokens
from grpo_jax.hosts import fetch
from grpo_jax.loop.experience import has_reward_variance
from grpo_jax.masked import masked_sum
from grpo_jax.rewards.compose import Scores
from grpo_jax.train import reference_params, without_experts
from grpo_jax.types import Batch, Rollout, TrainState


def old_and_ref_log_probs(
    config: GRPOConfig, rollout: Rollout, log_prob_fn: Callable, state: TrainState
) -> tuple[jax.Array | None, jax.Array | None]:
    """Log-probabilities of the policy at the start of the step and of the reference policy; None if not needed.

    Args:
        config: says which are needed.
        rollout: the completions.
        log_prob_fn: ``(params, rollout) -> log-probabilities [B, T]``.
        state: of the policy, before the step's updates.
    """
    # A single update is strictly on policy: its own forward pass gives the old log-probabilities.
    # So it does of stale samples, whose importance weights correct for the way from the sampling policy to it.
    old = None
    if config.old_log_probs == "sampler":
        old = jnp.asarray(rollout.rollout_log_probs)
    elif config.updates_per_step > 1 or config.kl_reward_coef:
        old = log_prob_fn(state.params, rollout)
    has_reference = config.has_reference
    return old, log_prob_fn(reference_params(state), without_experts(rollout)) if has_reference else None


def make_train_batch(
    config: GRPOConfig,
    rollout: Rollout,
    scores: Scores,
    *,
    reward_weights: Mapping[str, float],
    tokenizer: Any,
    old_log_probs: jax.Array | None,
    ref_log_probs: jax.Array | None,
) -> Batch:
    """The batch of a step, on the host.

    Args:
        config: the advantage and what is left out of the loss.
        rollout: B completions.
        scores: their rewards; completions without a reward are left out of the loss.
        reward_weights: the weight of each reward by name.
        tokenizer: finds the tokens at which reasoning steps end.
        old_log_probs: ``[B, T]`` of the policy before the step's updates, or that sampled; None if neither is needed.
        ref_log_probs: ``[B, T]`` of the reference policy; None without one.
    """
    # All processes compute the same on their own devices.
    rollout, old_log_probs, ref_log_probs = jax.tree.map(jnp.asarray, fetch((rollout, old_log_probs, ref_log_probs)))
    rewards = jnp.asarray(scores.total)
    if old_log_probs is not None and ref_log_probs is not None and config.kl_reward_coef:
        kl = loss.kl_k1(old_log_probs, ref_log_probs)
        rewards = advantage.kl_penalized(rewards, kl, rollout.completion_mask, kl_coef=config.kl_reward_coef)
    kept = ~jnp.isnan(rewards)
    if config.mask_truncated:
        kept &= ~rollout.truncated
    if config.max_draws > 1:  # dynamic sampling that found too few groups fills up with others
        kept &= jnp.repeat(jnp.asarray(has_reward_variance(scores.total, config.group_size)), config.group_size)
    inputs: dict[str, Any] = {"rewards": rewards, "group_size": config.group_size, "require_all": False}
    wanted = config.advantage_inputs
    if "reward_parts" in wanted or "reward_weights" in wanted:
        parts = jnp.stack([jnp.asarray(part) for part in scores.counted.values()])
        inputs["reward_parts"] = jnp.where(jnp.isnan(rewards), jnp.nan, parts)
        inputs["reward_weights"] = jnp.array([reward_weights[name] for name in scores.counted], jnp.float32)
    if "step_rewards" in wanted or "is_step_end" in wanted:
        step_rewards = rewards_of_steps(rollout, scores, tokenizer, with_outcome=True)
        inputs["step_rewards"] = step_rewards
        inputs["is_step_end"] = ~jnp.isnan(step_rewards) & ~jnp.isnan(rewards)[:, None]
    return Batch(
        prompt_ids=rollout.prompt_ids,
        prompt_mask=rollout.prompt_mask,
        completion_ids=rollout.completion_ids,
        completion_mask=rollout.completion_mask,
        loss_mask=rollout.completion_mask & kept[:, None],
        advantages=call_with(config.advantage_function, **inputs),
        rollout_log_probs=rollout.rollout_log_probs,
        old_log_probs=old_log_probs if config.has_old_log_probs else None,
        ref_log_probs=ref_log_probs,
    )


def with_old_log_probs(minibatch: Batch, old_log_probs: str, *, is_first: bool) -> Batch:
    """The minibatch of an update, for the choice of ``OnlineConfig.old_log_probs``.

    If they are the sampler's, the first update of a step takes its own log-probabilities, for the policy has not moved:
    so they can be compared with the sampler's. Later updates, and all of a stale batch, have nothing to compare.

    Args:
        minibatch: with ``old_log_probs`` and ``rollout_log_probs``.
        old_log_probs: ``recompute`` or ``sampler``.
        is_first: whether it is the first update of a step, of the policy that sampled.
    """
    if old_log_probs == "recompute":
        return minibatch
    return replace(minibatch, old_log_probs=None) if is_first else replace(minibatch, rollout_log_probs=None)


def rewards_of_steps(rollout: Rollout, scores: Scores, tokenizer: Any, *, with_outcome: bool = False) -> jax.Array:
    """``[B, T]`` float32: the reward of each reasoning step at its last token, NaN at other tokens.

    Args:
        rollout: B completions.
        scores: with the rewards of their steps.
        tokenizer: finds the tokens at which steps end.
        with_outcome: whether the reward of the whole completion is added at its last token.
    """
    rewards = np.full(rollout.completion_ids.shape, np.nan, np.float32)
    lengths = np.asarray(rollout.completion_mask).sum(1)
    for row, (ids, steps) in enumerate(zip(np.asarray(rollout.completion_ids), scores.steps, strict=True)):
        ends = last_tokens(tokenizer, ids[: lengths[row]].tolist(), [end for end, _ in steps])
        at_ends = [(end, reward) for end, (_, reward) in zip(ends, steps, strict=True)]
        outcome = scores.outcome[row] if with_outcome else np.nan
        for end, reward in [*at_ends, *([] if np.isnan(outcome) else [(lengths[row] - 1, outcome)])]:
            rewards[row, end] = np.nan_to_num(rewards[row, end]) + reward
    return jnp.asarray(rewards)


def select_rows(rollout: Rollout, rows: np.ndarray) -> Rollout:
    """Some rows of a rollout on the host.

    Args:
        rollout: B completions.
        rows: their numbers.
    """
    return jax.tree.map(lambda x: x[rows], rollout)


def per_completion(batch: Batch) -> np.ndarray:
    """``[B]``, the advantage of each completion; advantages of tokens are summed."""
    advantages = batch.advantages
    return np.asarray(advantages if advantages.ndim == 1 else masked_sum(advantages, batch.loss_mask, 1))
