"""Advantages from rewards, and from values of a critic.

Rewards are ``[B]``, with the ``group_size`` samples of a prompt adjacent (TRL: ``num_generations``). A NaN reward is
missing: statistics are taken over the others, and its advantage is 0. To leave its completion out of the loss's mean as
well, remove its tokens from the mask (``~isnan(rewards)``).

Every function raises a TypeError for rewards that are not an array, and an AssertionError for rewards of another rank.
"""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.masked import is_last, masked_mean, masked_sum, masked_variance, whiten, zero_where_masked

Scale = Literal["group", "batch", "none"]
Scalar = float | Float[Array, ""]


def group_relative(
    rewards: Float[Array, " B"], *, group_size: int, scale: Scale = "group", ddof: int = 1, epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """``(reward - group mean) / (standard deviation + epsilon)``: the advantage of GRPO.

    The advantage of equal rewards is exactly 0, for any value and group size.

    Args:
        rewards: of each completion; NaN where missing.
        group_size: samples per prompt.
        scale: standard deviation to divide by: ``"group"``: of the group (GRPO, arXiv 2402.03300, section 4.1.2);
            ``"batch"``: of all rewards in the batch; ``"none"``: no division (Dr.GRPO, arXiv 2503.20783).
        ddof: degrees of freedom subtracted in the standard deviation: 1 for the sample's, 0 for the population's.
        epsilon: added to the standard deviation.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B, for an unknown scale, or for a ddof
            other than 0 and 1.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; it is 1 (of a sample) or 0 (of a population)")
    present, centred = _centre(rewards, group_size)
    if scale == "none":
        return centred.reshape(-1)
    if scale == "batch":
        flat, rewards_present = rewards - jnp.nanmin(rewards), present.reshape(-1)
        deviation = jnp.sqrt(masked_variance(flat, rewards_present, ddof))
        return _divide(centred, deviation + epsilon).reshape(-1)
    if scale == "group":
        squares = (centred**2).sum(1, keepdims=True)
        degrees = jnp.maximum(present.sum(1, keepdims=True) - ddof, 1).astype(centred.dtype)
        return _divide(centred, jnp.sqrt(squares / degrees) + epsilon).reshape(-1)
    raise ValueError(f"scale is {scale!r}; it is one of 'group', 'batch', 'none'")


def gdpo(
    reward_parts: Float[Array, "K B"],
    reward_weights: Float[Array, " K"],
    *,
    group_size: int,
    epsilon: float = 1e-6,
    require_all: bool = True,
) -> Float[Array, " B"]:
    """``standardize(sum_k reward_weights_k group_relative(reward_parts_k))``: GDPO (arXiv 2601.05242, section 3).

    Every reward is normalised within its groups before the weighted sum, which is then standardized over the batch.
    GRPO normalises the sum instead: combinations of rewards with equal sums then have equal advantages, and a reward of
    large variance dominates one of small variance.

    Args:
        reward_parts: K rewards of each completion; NaN where missing.
        reward_weights: of the normalised rewards.
        group_size: samples per prompt.
        epsilon: added to the standard deviations.
        require_all: whether a completion with a missing reward is left out of all statistics, with an advantage of 0.
            If not, its other rewards are used, and only a completion without any reward is left out.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    _check_rewards(reward_parts, 2)
    chex.assert_shape(reward_weights, reward_parts.shape[:1], custom_message="reward_weights: one per reward")
    missing = jnp.isnan(reward_parts)
    present = ~(missing.any(0) if require_all else missing.all(0))
    kept = jnp.where(present[None, :], reward_parts, jnp.nan)  # group_relative gives 0 where a part is missing
    normalised = jax.vmap(lambda part: group_relative(part, group_size=group_size, epsilon=epsilon))(kept)
    return _standardize((reward_weights[:, None] * normalised).sum(0), present, epsilon)


def rloo(rewards: Float[Array, " B"], *, group_size: int) -> Float[Array, " B"]:
    """``reward - mean of the group's other rewards``: REINFORCE leave-one-out (arXiv 2402.14740).

    The advantage of a group's only reward that is not missing is 0.

    Args:
        rewards: of each completion; NaN where missing.
        group_size: samples per prompt.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    count = present.sum(1, keepdims=True)
    # With the group's mean m, r - (n m - r) / (n - 1) is (r - m) n / (n - 1).
    return (centred * (count / jnp.maximum(count - 1, 1)).astype(centred.dtype)).reshape(-1)


def reinforce_plus_plus(rewards: Float[Array, " B"], *, epsilon: float = 1e-6) -> Float[Array, " B"]:
    """``(reward - batch mean) / (batch standard deviation + epsilon)``: REINFORCE++ for whole sequences.

    The paper (arXiv 2501.03262) standardizes over tokens, after a KL penalty per token; here over sequences with one
    reward each, by the sample standard deviation (ddof 1).

    Args:
        rewards: of each completion, KL penalty included (``kl_penalized``); NaN where missing.
        epsilon: added to the standard deviation.
    """
    _check_rewards(rewards)
    present = ~jnp.isnan(rewards)
    return _standardize(_above_smallest(rewards, present), present, epsilon)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, " B"], *, group_size: int, epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """REINFORCE++ with a group baseline: ``reward - group mean``, standardized over the batch (arXiv 2501.03262).

    Args:
        rewards: of each completion; NaN where missing.
        group_size: samples per prompt.
        epsilon: added to the standard deviation.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    return _standardize(centred.reshape(-1), present.reshape(-1), epsilon)


def dr_grpo(rewards: Float[Array, " B"], *, group_size: int) -> Float[Array, " B"]:
    """``reward - group mean``: GRPO without the division that favours easy and hard prompts (arXiv 2503.20783).

    Args:
        rewards: of each completion; NaN where missing.
        group_size: samples per prompt.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    return group_relative(rewards, group_size=group_size, scale="none")


def kl_penalized(
    rewards: Float[Array, " B"], kl: Float[Array, "B T"], mask: Bool[Array, "B T"], *, kl_coef: Scalar
) -> Float[Array, " B"]:
    """``reward - kl_coef * sum_t KL_t``: the KL penalty in the reward instead of the loss.

    Args:
        rewards: of each completion.
        kl: estimate per token in nats, without gradient (``loss.kl_k1`` is unbiased).
        mask: True at completion tokens.
        kl_coef: reward per nat.
    """
    _check_rewards(rewards)
    return rewards - kl_coef * masked_sum(kl, mask, 1)


def token_rewards(
    rewards: Float[Array, " B"],
    kl: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
    *,
    kl_coef: Scalar = 0.0,
) -> Float[Array, "B T"]:
    """``-kl_coef KL_t``, plus the completion's reward at its last token: the rewards of RLHF's PPO.

    After InstructGPT (arXiv 2203.02155, eq. 2) as commonly implemented (arXiv 2403.17031).

    Args:
        rewards: of each completion; where NaN, only the penalties remain. The reward of an empty completion is dropped.
        kl: estimate per token in nats, without gradient (``loss.kl_k1``); None for no penalty.
        mask: True at completion tokens.
        kl_coef: reward per nat.
    """
    _check_rewards(rewards)
    terminal = jnp.where(is_last(mask) & ~jnp.isnan(rewards)[:, None], rewards[:, None], 0)
    return terminal if kl is None else terminal - kl_coef * zero_where_masked(kl, mask)


def process_supervised(
    step_rewards: Float[Array, "B T"],
    is_step_end: Bool[Array, "B T"],
    *,
    group_size: int,
    ddof: int = 1,
    epsilon: float = 1e-6,
) -> Float[Array, "B T"]:
    """``A_t = sum of the normalised rewards of steps that end at t or later``: GRPO with process supervision.

    Step rewards are normalised to ``(reward - mean) / (standard deviation + epsilon)`` over all steps of the group's
    completions (arXiv 2402.03300, section 4.1.3).

    Args:
        step_rewards: of reasoning steps, at their last tokens; a step whose reward is NaN is left out.
        is_step_end: True at the last token of a step; ``step_rewards`` is ignored elsewhere. The last step may end with
            the answer and have the outcome as its reward.
        group_size: samples per prompt.
        ddof: degrees of freedom subtracted in the standard deviation.
        epsilon: added to the standard deviation.

    Returns:
        Advantages per token; 0 after the last step.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    _check_rewards(step_rewards, 2)
    chex.assert_shape(is_step_end, step_rewards.shape, custom_message="is_step_end")
    _check_groups(step_rewards.shape[0], group_size)
    present = is_step_end & ~jnp.isnan(step_rewards)
    groups = (x.reshape(step_rewards.shape[0] // group_size, -1) for x in (step_rewards, present))
    normalised = jax.vmap(lambda x, mask: _standardize(_above_smallest(x, mask), mask, epsilon, ddof))(*groups)
    return jnp.cumsum(normalised.reshape(step_rewards.shape)[:, ::-1], axis=1)[:, ::-1]


def hybrid(
    rewards: Float[Array, " B"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    group_size: int,
    step_rewards: Float[Array, "B T"] | None = None,
    lam: float = 1.0,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """``group_relative`` where the rewards of a group differ, ``gae`` of a critic's values where they are all equal.

    A group of equal rewards (all right, all wrong) has a group-relative advantage of 0 and would not contribute to the
    gradient; the critic still assigns credit to its tokens. ``gae`` is also used for groups with step rewards, which a
    group mean over completions does not see.

    Args:
        rewards: of each completion; its advantages are 0 where NaN.
        values: the critic's, per token.
        mask: True at completion tokens.
        group_size: samples per prompt.
        step_rewards: additional rewards at the tokens where steps end; 0 elsewhere.
        lam: lambda of ``gae``.
        epsilon: added to the standard deviation of a group's rewards.

    Returns:
        Advantages, and returns as the critic's targets; both 0 for completions without a reward.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    has_signal = jnp.repeat((centred != 0).any(1), group_size)
    mask = mask & present.reshape(-1)[:, None]
    per_token = token_rewards(rewards, None, mask)
    if step_rewards is not None:
        has_steps = (step_rewards != 0).reshape(-1, group_size * mask.shape[1]).any(1)
        has_signal &= ~jnp.repeat(has_steps, group_size)
        per_token += zero_where_masked(step_rewards, mask)
    critic_advantages, returns = gae(per_token, values, mask, lam=lam)
    group_advantages = group_relative(rewards, group_size=group_size, epsilon=epsilon)[:, None]
    return zero_where_masked(jnp.where(has_signal[:, None], group_advantages, critic_advantages), mask), returns


def adapted_kl_coef(kl_coef: Scalar, kl: Scalar, *, target: float, horizon: float, num_samples: int) -> Scalar:
    """``kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)``: the adaptive KL penalty of RLHF.

    After arXiv 1909.08593, section 2.2, whose constant is ``num_samples / horizon`` in its authors' code.

    Args:
        kl_coef: current coefficient.
        kl: measured, in nats per completion.
        target: of ``kl``, in nats per completion.
        horizon: number of samples over which the coefficient changes by at most 20 %.
        num_samples: completions that ``kl`` was measured on.
    """
    return kl_coef * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * (num_samples / horizon))


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalized advantage estimation: ``A_t = r_t + gamma V_u - V_t + gamma lam A_u`` (arXiv 1506.02438, eq. 16).

    ``u`` is the next unmasked position after ``t``; beyond the last one, value and advantage are 0. Masked positions
    (padding, tool output between two spans) are skipped, and their rewards and values ignored.

    Args:
        rewards: per token.
        values: the critic's, per token.
        mask: True at the policy's own tokens.
        gamma: discount per token.
        lam: lambda; 0 for one-step, 1 for Monte Carlo estimates.

    Returns:
        Advantages, and returns (``advantages + values``); both 0 at masked positions.

    Raises:
        AssertionError: at trace time, for values or a mask whose shape is not that of rewards.
    """
    _check_rewards(rewards, 2)
    chex.assert_shape(values, rewards.shape, custom_message="values")
    chex.assert_shape(mask, rewards.shape, custom_message="mask")
    rewards, values = zero_where_masked(rewards, mask), zero_where_masked(values, mask)

    def step(carry, column):
        next_value, next_advantage = carry
        reward, value, unmasked = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = (jnp.where(unmasked, value, next_value), jnp.where(unmasked, advantage, next_advantage))
        return carry, jnp.where(unmasked, advantage, 0)

    start = (jnp.zeros_like(rewards[:, 0]), jnp.zeros_like(rewards[:, 0]))
    _, advantages = jax.lax.scan(step, start, (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, zero_where_masked(advantages.T + values, mask)


def whitened(advantages: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Advantages with mean 0 and variance 1 over the unmasked tokens, as in PPO; 0 at masked ones.

    Args:
        advantages: per token.
        mask: True at completion tokens.
    """
    return whiten(advantages, mask)


def _standardize(shifted, present, epsilon, ddof=1):
    deviation = jnp.sqrt(masked_variance(shifted, present, ddof))
    return zero_where_masked(_divide(shifted - masked_mean(shifted, present), deviation + epsilon), present)


def _divide(x, divisor):
    """``x / divisor``; 0 where the divisor is 0."""
    return jnp.where(divisor > 0, x / jnp.where(divisor > 0, divisor, 1), 0)


def _above_smallest(x, present, axis=None):
    """``x`` minus its smallest present entry, so that equal entries are exactly 0 before a mean is rounded."""
    smallest = jnp.min(jnp.where(present, x, jnp.inf), axis=axis, keepdims=axis is not None)
    return jnp.where(present, x - smallest, 0)


def _check_rewards(rewards, rank: int = 1):
    if not hasattr(rewards, "shape"):
        raise TypeError(f"rewards is a {type(rewards).__name__}; pass an array, such as jnp.asarray(rewards)")
    chex.assert_rank(rewards, rank, custom_message="rewards")


def _check_groups(rows: int, group_size: int):
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; statistics of a group need at least 2 samples per prompt")
    if rows % group_size:
        raise ValueError(f"{rows} rewards do not form groups of {group_size}; pass group_size samples of every prompt")


def _centre(rewards, group_size: int):
    """Presence [N, G] and ``reward - group mean`` [N, G]; 0 where missing."""
    _check_rewards(rewards)
    _check_groups(rewards.shape[0], group_size)
    groups = rewards.reshape(-1, group_size)
    present = ~jnp.isnan(groups)
    shifted = _above_smallest(groups, present, axis=1)
    mean = shifted.sum(1, keepdims=True) / jnp.maximum(present.sum(1, keepdims=True), 1).astype(shifted.dtype)
    return present, jnp.where(present, shifted - mean, 0)
