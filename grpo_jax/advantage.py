"""From rewards (and values) to advantages.

Rewards come as ``[B]``, the ``group_size`` samples of a prompt adjacent (TRL: ``num_generations``). A NaN reward is
absent: statistics are taken over those present, and the advantage of the absent one is 0. So that it does not count
in a mean either, leave its tokens out of the loss's mask (``~isnan(rewards)``).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.masked import is_last, masked_mean, masked_sum, masked_variance, whiten, zero_where_masked

Scale = Literal["group", "batch", "none"]
Scalar = Float[Array, ""]


def group_relative(
    rewards: Float[Array, " B"], *, group_size: int, scale: Scale = "group", ddof: int = 1, epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """``(reward - group mean) / (standard deviation + epsilon)``: the advantage of GRPO.

    Equal rewards give exactly 0, whatever their value and number.

    Args:
        rewards: one for each completion; NaN where absent.
        group_size: samples for each prompt.
        scale: ``"group"``: the standard deviation is that of the group (GRPO, arXiv 2402.03300, section 4.1.2);
            ``"batch"``: that of all rewards in the batch; ``"none"``: no division (Dr.GRPO, arXiv 2503.20783).
        ddof: degrees of freedom taken off in the standard deviation: 1 for the sample's, 0 for the population's.
        epsilon: added to the standard deviation.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B, when scale is none of the three, or
            ddof neither 0 nor 1.
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
    parts: Float[Array, "K B"],
    weights: Float[Array, " K"],
    *,
    group_size: int,
    epsilon: float = 1e-6,
    require_all: bool = True,
) -> Float[Array, " B"]:
    """``standardize(sum_k weights_k group_relative(parts_k))``: each reward normalised within its groups, then summed.

    Summed first and normalised then, as GRPO does, different combinations of rewards that have one sum get one
    advantage, and a reward that varies much drowns one that varies little. The sum is standardized over the batch
    (GDPO, arXiv 2601.05242, section 3).

    Args:
        parts: K rewards for each completion, NaN where absent.
        weights: what each normalised reward counts.
        group_size: samples for each prompt.
        epsilon: added to the standard deviations.
        require_all: whether a completion that lacks one of the rewards is left out of all statistics, with an advantage
            of 0. If not, it is compared in those that it has, and only one without any is left out.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    absent = jnp.isnan(parts)
    present = ~(absent.any(0) if require_all else absent.all(0))
    whole = jnp.where(present[None, :], parts, jnp.nan)  # group_relative gives 0 where a part is absent
    normalised = jax.vmap(lambda part: group_relative(part, group_size=group_size, epsilon=epsilon))(whole)
    return _standardize((weights[:, None] * normalised).sum(0), present, epsilon)


def rloo(rewards: Float[Array, " B"], *, group_size: int) -> Float[Array, " B"]:
    """``reward - mean of the group's other rewards``: REINFORCE leave-one-out (arXiv 2402.14740).

    A sample that is alone in being present has nothing to be compared with; its advantage is 0.

    Args:
        rewards: one for each completion; NaN where absent.
        group_size: samples for each prompt.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    count = present.sum(1, keepdims=True)
    # With the group's mean m, r - (n m - r) / (n - 1) is (r - m) n / (n - 1).
    return (centred * (count / jnp.maximum(count - 1, 1)).astype(centred.dtype)).reshape(-1)


def reinforce_plus_plus(rewards: Float[Array, " B"], *, epsilon: float = 1e-6) -> Float[Array, " B"]:
    """``(reward - batch mean) / (batch standard deviation + epsilon)``: REINFORCE++ for whole sequences.

    The paper (arXiv 2501.03262) standardizes over tokens after a KL penalty for each; here one reward stands for a
    sequence, and the standard deviation is the sample's (ddof 1).

    Args:
        rewards: one for each completion; NaN where absent. A KL penalty belongs in them (``kl_penalized``).
        epsilon: added to the standard deviation.
    """
    present = ~jnp.isnan(rewards)
    return _standardize(_above_smallest(rewards, present), present, epsilon)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, " B"], *, group_size: int, epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """REINFORCE++ with the group's mean as baseline: ``reward - group mean``, then standardized over the batch.

    Args:
        rewards: one for each completion; NaN where absent.
        group_size: samples for each prompt.
        epsilon: added to the standard deviation.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    return _standardize(centred.reshape(-1), present.reshape(-1), epsilon)


def dr_grpo(rewards: Float[Array, " B"], *, group_size: int) -> Float[Array, " B"]:
    """``reward - group mean``: GRPO without the division that favours easy and hard prompts (arXiv 2503.20783).

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    return group_relative(rewards, group_size=group_size, scale="none")


def kl_penalized(
    rewards: Float[Array, " B"], kl: Float[Array, "B T"], mask: Bool[Array, "B T"], *, kl_coef: float
) -> Float[Array, " B"]:
    """``reward - kl_coef * sum of the completion's KL``: the KL penalty in the reward instead of the loss.

    Args:
        rewards: one for each completion.
        kl: an estimate for each token (``loss.kl_k1`` is unbiased); it must not carry a gradient.
        mask: True at the completion's tokens.
        kl_coef: nats to reward.
    """
    return rewards - kl_coef * masked_sum(kl, mask, 1)


def token_rewards(
    rewards: Float[Array, " B"],
    kl: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Scalar = 0.0,
) -> Float[Array, "B T"]:
    """``-kl_coef KL_t`` at each token, and the completion's reward at its last one: the rewards of RLHF's PPO.

    After InstructGPT (arXiv 2203.02155, eq. 2) as it is commonly built (arXiv 2403.17031).

    Args:
        rewards: one for each completion; NaN where absent, which leaves its penalties alone. An empty completion has
            no token for its reward.
        kl: an estimate for each token (``loss.kl_k1``), without gradient; None for no penalty.
        mask: True at the completion's tokens.
        kl_coef: nats to reward.
    """
    terminal = jnp.where(is_last(mask) & ~jnp.isnan(rewards)[:, None], rewards[:, None], 0)
    return terminal if kl is None else terminal - kl_coef * zero_where_masked(kl, mask)


def process_supervised(
    rewards: Float[Array, "B T"],
    is_step_end: Bool[Array, "B T"],
    *,
    group_size: int,
    ddof: int = 1,
    epsilon: float = 1e-6,
) -> Float[Array, "B T"]:
    """The sum of the normalised rewards of the steps that end at a token or after it: GRPO with process supervision.

    Every step of the reasoning has a reward, which stands at its last token. Normalised is
    ``(reward - mean) / (standard deviation + epsilon)``, over all steps of the group's completions (arXiv 2402.03300,
    section 4.1.3).

    Args:
        rewards: of steps, at their last tokens; NaN where absent, which leaves that step out.
        is_step_end: True at the last token of a step; elsewhere ``rewards`` is not looked at. A completion's last step
            may end with the answer, so that its reward is that of the outcome.
        group_size: samples for each prompt.
        ddof: degrees of freedom taken off in the standard deviation.
        epsilon: added to it.

    Returns:
        An advantage for each token; 0 after the last step, so mask padding as ever.

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    _check_groups(rewards.shape[0], group_size)
    present = is_step_end & ~jnp.isnan(rewards)
    of_groups = (x.reshape(rewards.shape[0] // group_size, -1) for x in (rewards, present))
    normalised = jax.vmap(lambda x, mask: _standardize(_above_smallest(x, mask), mask, epsilon, ddof))(*of_groups)
    return jnp.cumsum(normalised.reshape(rewards.shape)[:, ::-1], axis=1)[:, ::-1]


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
    """The group's mean as baseline where the group carries signal, a critic's values where it does not.

    Where the samples of a prompt differ in reward, each token has the advantage of ``group_relative``. Where they are
    all alike (all right, all wrong) that is 0 everywhere, and nothing is learnt from the prompt; here its tokens have
    the advantage of ``gae`` instead: which of them made success likelier, by the critic's account. So do those of
    prompts with rewards inside of their completions, which a mean over completions says nothing of.

    Args:
        rewards: one for each completion; NaN where absent: its advantages are 0.
        values: the critic's, at each token.
        mask: True at the completion's tokens.
        group_size: samples for each prompt.
        step_rewards: rewards besides, at the tokens where steps end; 0 elsewhere.
        lam: of ``gae``.
        epsilon: added to the standard deviation of a group's rewards.

    Returns:
        Advantages, and the returns that the critic learns from (of every completion that has a reward).

    Raises:
        ValueError: at trace time, when group_size is below 2 or does not divide B.
    """
    present, centred = _centre(rewards, group_size)
    has_signal = jnp.repeat((centred != 0).any(1), group_size)
    mask = mask & present.reshape(-1)[:, None]
    of_tokens = token_rewards(rewards, None, mask)
    if step_rewards is not None:
        has_steps = (step_rewards != 0).reshape(-1, group_size * mask.shape[1]).any(1)
        has_signal &= ~jnp.repeat(has_steps, group_size)
        of_tokens += zero_where_masked(step_rewards, mask)
    of_critic, returns = gae(of_tokens, values, mask, lam=lam)
    of_group = group_relative(rewards, group_size=group_size, epsilon=epsilon)
    return zero_where_masked(jnp.where(has_signal[:, None], of_group[:, None], of_critic), mask), returns


def adapted_kl_coef(kl_coef: Scalar, kl: Scalar, *, target: float, horizon: float, num_samples: int) -> Scalar:
    """``kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)``: the adaptive penalty of RLHF.

    Args:
        kl_coef: in effect until now.
        kl: measured, in nats for each completion.
        target: where it is to be.
        horizon: samples over which the coefficient may change by a fifth.
        num_samples: completions that ``kl`` was measured on.

    After arXiv 1909.08593, section 2.2, whose constant is ``num_samples / horizon`` in its authors' code.
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

    ``u`` is the next unmasked position after ``t``; after the last there is none, and its value and advantage are 0.
    Masked positions (padding, a tool's output between two spans) are stepped over: nothing leaks from them.

    Args:
        rewards: at each token.
        values: the critic's, at each token.
        mask: True at the policy's own tokens.
        gamma: discount for each token.
        lam: the mixing of estimators; 0 is one-step, 1 is Monte Carlo.

    Returns:
        Advantages, and returns (``advantages + values``); both 0 at masked positions.
    """
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
    """Advantages with mean 0 and variance 1 over the unmasked tokens, as PPO uses them; 0 at masked ones."""
    return whiten(advantages, mask)


def _standardize(shifted, present, epsilon, ddof=1):
    deviation = jnp.sqrt(masked_variance(shifted, present, ddof))
    return zero_where_masked(_divide(shifted - masked_mean(shifted, present), deviation + epsilon), present)


def _divide(x, divisor):
    """``x / divisor``; 0 where the divisor is 0."""
    return jnp.where(divisor > 0, x / jnp.where(divisor > 0, divisor, 1), 0)


def _above_smallest(x, present, axis=None):
    """``x`` less its smallest present entry, so that equal ones are exactly 0 before any rounding of a mean."""
    smallest = jnp.min(jnp.where(present, x, jnp.inf), axis=axis, keepdims=axis is not None)
    return jnp.where(present, x - smallest, 0)


def _check_groups(rows: int, group_size: int):
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}; a statistic of the group needs at least 2 samples for each prompt"
        )
    if rows % group_size:
        raise ValueError(f"{rows} rewards do not form groups of {group_size}")


def _centre(rewards, group_size: int):
    """Presence [N, G] and ``reward - group mean`` [N, G]; 0 where absent."""
    _check_groups(rewards.shape[0], group_size)
    groups = rewards.reshape(-1, group_size)
    present = ~jnp.isnan(groups)
    shifted = _above_smallest(groups, present, axis=1)
    mean = shifted.sum(1, keepdims=True) / jnp.maximum(present.sum(1, keepdims=True), 1).astype(shifted.dtype)
    return present, jnp.where(present, shifted - mean, 0)
