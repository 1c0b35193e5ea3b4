"""Policy losses from log-probabilities and advantages.

``grpo_loss`` composes an importance ratio, a surrogate (clip or weight), KL and entropy terms and an aggregation over
tokens (``loss.terms``); a new algorithm is a new function passed to it. ``loss.named`` has those of the literature.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.loss.checks import Scalar, check_shapes, is_zero, require
from grpo_jax.loss.terms import (
    Mask,
    Tokens,
    bounded_ratio,
    clipped_surrogate,
    kl_k3,
    sequence_mean,
    token_log_ratio,
    token_mean,
    truncated_importance,
)
from grpo_jax.masked import max_pair, mean_pair, zero_where_masked
from grpo_jax.types import Mean, Metrics

Advantages = Float[Array, " B"] | Tokens


def grpo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    old_log_probs: Tokens | None = None,
    ref_log_probs: Tokens | None = None,
    rollout_log_probs: Tokens | None = None,
    entropy: Tokens | None = None,
    log_ratio: Callable[[Tokens, Tokens, Mask], Tokens] = token_log_ratio,
    surrogate: Callable[..., Tokens] = clipped_surrogate,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    kl: Callable[[Tokens, Tokens], Tokens] = kl_k3,
    kl_coef: Scalar = 0.0,
    kl_correction: bool = False,
    entropy_coef: Scalar = 0.0,
    auxiliary: Tokens | None = None,
    importance_cap: float | None = None,
    aggregate: Callable[[Tokens, Mask], Mean] = sequence_mean,
) -> tuple[Mean, Metrics]:
    """``aggregate(weight * surrogate + kl_coef * KL - entropy_coef * entropy)``: GRPO (arXiv 2402.03300, eq. 3).

    The defaults are GRPO's own except that the KL is off. Ratios are kept within exp(-20) and exp(20), far outside any
    clip, so that none is infinite. ``kl_coef`` and ``entropy_coef`` may be traced arrays; as a Python 0 they leave
    their term out of the program.

    Args:
        log_probs: of the current policy; gradients flow only through these and ``entropy``.
        advantages: per sequence or per token.
        mask: True at the completion tokens to train on.
        old_log_probs: of the policy at the start of the update; None for the first, strictly on-policy pass, which
            uses ``log_probs`` without gradient, so that every ratio is 1.
        ref_log_probs: of the reference policy; needed for kl_coef, and logged as ``kl`` when given.
        rollout_log_probs: the sampler's own; needed for importance_cap, and compared with the trainer's in the metrics.
        entropy: of the policy at each token, in nats; needed for entropy_coef, and logged when given.
        log_ratio: ``token_log_ratio`` or ``sequence_log_ratio``.
        surrogate: ``(ratio, advantages, log_probs, epsilon_low=, epsilon_high=) -> loss per token``.
        epsilon_low: the clip's lower bound is ``1 - epsilon_low``.
        epsilon_high: its upper bound is ``1 + epsilon_high``.
        kl: estimator of the KL to the reference, ``(log_probs, ref_log_probs) -> KL per token``.
        kl_coef: weight of the KL in the loss (TRL: ``beta``).
        kl_correction: weight each token's KL by its token ratio, which makes the gradient that of the KL.
        entropy_coef: weight of the entropy bonus.
        auxiliary: added to the loss of each token, such as weighted losses of a router; None for nothing.
        importance_cap: if given, each token's policy term is weighted by ``truncated_importance`` with this cap.
        aggregate: ``token_mean``, ``sequence_mean`` or a ``partial`` of ``constant_length``.

    Returns:
        The loss, and metrics: ``kl``, ``entropy``, ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` and
        ``clip_ratio/region_mean`` (shares of tokens whose ratio is out of range on the side where PPO's clip acts),
        ``sampling/sampling_logp_difference/mean`` and ``/max``.

    Raises:
        AssertionError: at trace time, for an array whose shape is not that of log_probs, or a mask that is not bool.
        ValueError: at trace time, for advantages of neither shape, an importance_cap not above 0, or a coefficient
            (or importance_cap) without the array that it needs.
    """
    chex.assert_rank(log_probs, 2, custom_message="log_probs")
    chex.assert_type(mask, bool, custom_message="mask")
    check_shapes(log_probs.shape, mask=mask, old_log_probs=old_log_probs, ref_log_probs=ref_log_probs)
    check_shapes(log_probs.shape, rollout_log_probs=rollout_log_probs, entropy=entropy, auxiliary=auxiliary)
    require("kl_coef", kl_coef, ref_log_probs=ref_log_probs)
    require("entropy_coef", entropy_coef, entropy=entropy)
    if importance_cap is not None and not importance_cap > 0:
        raise ValueError(f"importance_cap is {importance_cap}; it bounds a weight and must be above 0")
    require("importance_cap", importance_cap, rollout_log_probs=rollout_log_probs)

    log_probs = zero_where_masked(log_probs, mask)
    old_log_probs = log_probs if old_log_probs is None else zero_where_masked(old_log_probs, mask)
    old_log_probs = jax.lax.stop_gradient(old_log_probs)
    advantages = jax.lax.stop_gradient(_per_token(advantages, mask))

    ratio = bounded_ratio(log_ratio(log_probs, old_log_probs, mask))
    loss = surrogate(ratio, advantages, log_probs, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    metrics = _clip_metrics(ratio, advantages, mask, 1 - epsilon_low, 1 + epsilon_high)
    if rollout_log_probs is not None:
        metrics |= _sampling_metrics(old_log_probs, rollout_log_probs, mask)
        if importance_cap is not None:
            loss = loss * truncated_importance(old_log_probs, rollout_log_probs, mask, cap=importance_cap)
    if ref_log_probs is not None:
        divergence = kl(log_probs, jax.lax.stop_gradient(zero_where_masked(ref_log_probs, mask)))
        metrics["kl"] = mean_pair(divergence, mask)
        if kl_correction:
            divergence = divergence * bounded_ratio(token_log_ratio(log_probs, old_log_probs, mask))
        if not is_zero(kl_coef):
            loss = loss + kl_coef * divergence
    if entropy is not None:
        entropy = zero_where_masked(entropy, mask)
        metrics["entropy"] = mean_pair(entropy, mask)
        if not is_zero(entropy_coef):
            loss = loss - entropy_coef * entropy
    if auxiliary is not None:
        loss = loss + zero_where_masked(auxiliary, mask)
    return aggregate(loss, mask), metrics


def supervised_loss(log_probs: Tokens, mask: Mask) -> Mean:
    """``-log pi``, the mean over all unmasked tokens: cross-entropy in nats.

    Args:
        log_probs: of the current policy.
        mask: True at the tokens to train on.
    """
    return token_mean(-zero_where_masked(log_probs, mask), mask)


def _per_token(advantages, mask):
    """Advantages at each token; 0 where masked."""
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantages has the shape {advantages.shape}; one per sequence is {mask.shape[:1]}, "
            f"one per token {mask.shape}"
        )
    return jnp.where(mask, advantages[:, None] if advantages.ndim == 1 else advantages, 0)


def _clip_metrics(ratio, advantages, mask, lower, upper) -> Metrics:
    low = (ratio < lower) & (advantages < 0)
    high = (ratio > upper) & (advantages > 0)
    return {
        "clip_ratio/low_mean": mean_pair(low, mask),
        "clip_ratio/high_mean": mean_pair(high, mask),
        "clip_ratio/region_mean": mean_pair(low | high, mask),
    }


def _sampling_metrics(old_log_probs, rollout_log_probs, mask) -> Metrics:
    gap = jnp.abs(token_log_ratio(old_log_probs, rollout_log_probs, mask))
    return {
        "sampling/sampling_logp_difference/mean": mean_pair(gap, mask),
        "sampling/sampling_logp_difference/max": max_pair(gap, mask),
    }
