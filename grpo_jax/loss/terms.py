"""The parts of a policy loss: importance ratios, surrogates, KL estimators, aggregations, sampler correction."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.masked import masked_count, masked_mean, masked_sum, mean_pair, zero_where_masked
from grpo_jax.types import Mean

Tokens = Float[Array, "B T"]
Mask = Bool[Array, "B T"]

MAX_LOG_RATIO = 20.0
"""Bound on exponents: far outside any clip, and far inside float32, so that products of ratios stay finite."""

# Importance ratios ---------------------------------------------------------------------------------------------------


def token_log_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Mask) -> Tokens:
    """``log pi - log pi_old`` of each token; 0 where masked.

    Args:
        log_probs: of the current policy.
        old_log_probs: of the policy that the ratio is taken to.
        mask: True at completion tokens.
    """
    return zero_where_masked(log_probs - old_log_probs, mask)


def bounded_ratio(log_ratio: Tokens) -> Tokens:
    """``exp(clip(log_ratio, -20, 20))``: an infinite ratio would turn a zero advantage or gradient into NaN."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_log_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Mask) -> Tokens:
    """Mean of the token log-ratios of each sequence, repeated at its tokens; 0 where masked.

    Its exponential is the length-normalized sequence ratio of GSPO (arXiv 2507.18071, eq. 7): 100 tokens with a
    log-ratio of 0.012 each have the ratio exp(0.012), not exp(1.2).

    Args:
        log_probs: of the current policy.
        old_log_probs: of the policy that the ratio is taken to.
        mask: True at completion tokens.
    """
    mean = masked_mean(log_probs - old_log_probs, mask, 1)
    return jnp.where(mask, mean[:, None], 0)


# Surrogates: (ratio, advantages, log_probs, epsilon_low, epsilon_high) -> loss per token -----------------------------


def clipped_surrogate(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_probs: Float[Array, "*shape"] | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*shape"]:
    """``-min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)``: PPO (arXiv 1707.06347, eq. 7).

    Args:
        ratio: ``pi / pi_old``.
        advantages: of the same shape.
        log_probs: not used; accepted so that surrogates are interchangeable.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1; larger than epsilon_low is DAPO's "clip higher" (arXiv 2503.14476, eq. 10).
        dual_clip: ``c`` > 1 caps the loss at ``c |A|`` where A < 0 (arXiv 1912.09729); None for no cap.

    Raises:
        ValueError: dual_clip not above 1.
    """
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio of a negative advantage and must be above 1")
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def cispo(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_probs: Float[Array, "*shape"],
    *,
    epsilon_low: float = 1.0,
    epsilon_high: float = 4.0,
) -> Float[Array, "*shape"]:
    """``-stop_gradient(clip(ratio, 1 - epsilon_low, 1 + epsilon_high)) A log pi``: CISPO (arXiv 2506.13585).

    The clipped ratio is a weight without gradient, so every token keeps the gradient of its log-probability.

    Args:
        ratio: ``pi / pi_old``.
        advantages: of the same shape.
        log_probs: of the current policy.
        epsilon_low: the weight is at least ``1 - epsilon_low``; 1 for no lower bound.
        epsilon_high: the weight is at most ``1 + epsilon_high``.
    """
    weight = jax.lax.stop_gradient(jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high))
    return -weight * advantages * log_probs


def sapo(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_probs: Float[Array, "*shape"] | None = None,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Float[Array, "*shape"]:
    """``-(4 / tau) sigmoid(tau (ratio - 1)) A``: SAPO's soft gate instead of a clip (arXiv 2511.20347).

    Args:
        ratio: ``pi / pi_old``.
        advantages: of the same shape.
        log_probs, epsilon_low, epsilon_high: not used; accepted so that surrogates are interchangeable.
        temperature_positive: ``tau`` where A > 0.
        temperature_negative: ``tau`` elsewhere; a larger one attenuates off-policy tokens faster.

    Raises:
        ValueError: a temperature not above 0.
    """
    if not min(temperature_positive, temperature_negative) > 0:
        raise ValueError(f"SAPO's temperatures must be above 0, not {temperature_positive} and {temperature_negative}")
    tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    return -jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


# KL to a reference ---------------------------------------------------------------------------------------------------


def kl_k1(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``d = log pi - log pi_ref``: unbiased, of either sign (joschu.net/blog/kl-approx.html).

    Use it in the reward: as a loss, its gradient does not depend on the reference.

    Args:
        log_probs: of the current policy.
        ref_log_probs: of the reference policy.
    """
    return log_probs - ref_log_probs


def kl_k2(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``d^2 / 2`` with ``d = log pi - log pi_ref``: biased, never negative; its gradient ``d`` is that of the KL.

    Args:
        log_probs: of the current policy.
        ref_log_probs: of the reference policy.
    """
    return (log_probs - ref_log_probs) ** 2 / 2


def kl_k3(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``exp(-d) - 1 + d`` with ``d = log pi - log pi_ref``: unbiased, never negative (arXiv 2402.03300, eq. 4).

    Its gradient is ``1 - exp(-d)``; weighted by the ratio (``kl_correction`` of ``grpo_loss``) it is ``d`` on policy.
    Below ``d = -20`` the exponential continues as its tangent, so that value and gradient stay finite and the gradient
    keeps its sign.

    Args:
        log_probs: of the current policy.
        ref_log_probs: of the reference policy.
    """
    d = log_probs - ref_log_probs
    bounded = jnp.minimum(-d, MAX_LOG_RATIO)
    tangent = jax.lax.stop_gradient(jnp.exp(bounded)) * (-d - bounded)
    return jnp.expm1(bounded) + tangent + d


# Aggregations: (loss per token, mask) -> Mean ------------------------------------------------------------------------


def token_mean(x: Tokens, mask: Mask) -> Mean:
    """Mean over all unmasked tokens of the batch: long completions weigh more (DAPO, arXiv 2503.14476, eq. 12).

    Args:
        x: per token.
        mask: True at the tokens to average.
    """
    return mean_pair(x, mask)


def sequence_mean(x: Tokens, mask: Mask) -> Mean:
    """Mean over sequences of the mean over each sequence's unmasked tokens (GRPO); empty sequences do not count.

    Args:
        x: per token.
        mask: True at the tokens to average.
    """
    return mean_pair(masked_mean(x, mask, 1), mask.any(1))


def constant_length(x: Tokens, mask: Mask, *, length: int) -> Mean:
    """Mean over sequences of ``sum over unmasked tokens / length`` (Dr.GRPO, arXiv 2503.20783).

    Args:
        x: per token.
        mask: True at the tokens to sum; empty sequences do not count.
        length: the constant divisor in tokens, usually the maximum completion length.

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it counts tokens, at least 1")
    return Mean(sum=masked_sum(x, mask), count=length * masked_count(mask.any(1)))


# Correction for a sampler that differs from the policy ---------------------------------------------------------------


def truncated_importance(
    old_log_probs: Tokens,
    rollout_log_probs: Tokens,
    mask: Mask,
    *,
    cap: float,
    log_ratio: Callable[[Tokens, Tokens, Mask], Tokens] = token_log_ratio,
) -> Tokens:
    """``min(pi_old / pi_rollout, cap)`` per token, without gradient; 1 where masked.

    Truncated importance sampling: the weight of each token's loss where the sampler's distribution differs from the
    policy's (other precision, other kernels, tokens removed by top-p).

    Args:
        old_log_probs: the trainer's log-probabilities of the policy that sampled.
        rollout_log_probs: the sampler's own.
        mask: True at completion tokens.
        cap: largest weight.
        log_ratio: ``token_log_ratio``, or ``sequence_log_ratio`` for one weight per sequence.

    Raises:
        ValueError: cap not above 0.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it bounds a weight and must be above 0")
    weight = jnp.minimum(jnp.exp(log_ratio(old_log_probs, rollout_log_probs, mask)), cap)
    return jax.lax.stop_gradient(jnp.where(mask, weight, 1))
