"""From log-probabilities and advantages to a loss.

A policy loss is a composition: importance ratio, then a surrogate (clip or weight), then KL and entropy, then an
aggregation over tokens. Each is a small function; ``grpo_loss`` puts them together, and a new algorithm is a new
function passed to it. What stands at a masked position, NaN included, reaches neither a loss nor its gradient.

Losses are ``Mean`` pairs: parts computed on micro-batches are merged by adding sums and counts. ``.value`` divides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.masked import masked_count, masked_mean, masked_sum, max_pair, mean_pair, zero_where_masked
from grpo_jax.types import Mean, Metrics

Tokens = Float[Array, "B T"]
Mask = Bool[Array, "B T"]

MAX_LOG_RATIO = 20.0
"""The bound on exponents: far outside any clip, and far inside float32, so that products of ratios stay finite."""

# Importance ratio ----------------------------------------------------------------------------------------------------


def token_log_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Mask) -> Tokens:
    """``log pi - log pi_old`` for each token; 0 where masked."""
    return zero_where_masked(log_probs - old_log_probs, mask)


def bounded_ratio(log_ratio: Tokens) -> Tokens:
    """``exp(clip(log_ratio, -20, 20))``: an infinite ratio would turn a zero advantage or gradient into NaN."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_log_ratio(log_probs: Tokens, old_log_probs: Tokens, mask: Mask) -> Tokens:
    """The mean of the token log-ratios over each sequence, at each of its tokens; 0 where masked.

    Its exponential is the length-normalized sequence ratio of GSPO (arXiv 2507.18071, eq. 7): 100 tokens with a
    log-ratio of 0.012 each have the ratio exp(0.012), not exp(1.2).
    """
    mean = masked_mean(log_probs - old_log_probs, mask, 1)
    return jnp.where(mask, mean[:, None], 0)


# Surrogates: (ratio, advantages, log_probs, epsilon_low, epsilon_high) -> loss for each token -----------------------


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
        advantages: the same shape.
        log_probs: not used; accepted so that surrogates can take one another's place.
        epsilon_low: how far below 1 the ratio counts.
        epsilon_high: how far above 1; larger than epsilon_low is DAPO's "clip higher" (arXiv 2503.14476, eq. 10).
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

    The clipped ratio is a weight and carries no gradient; every token keeps the gradient of its log-probability.

    Args:
        ratio: ``pi / pi_old``.
        advantages: the same shape.
        log_probs: the current policy's.
        epsilon_low: 1 leaves the weight unbounded below.
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
    """``-(4 / tau) sigmoid(tau (ratio - 1)) A``: the soft gate of SAPO in the place of a clip (arXiv 2511.20347).

    Args:
        ratio: ``pi / pi_old``.
        advantages: the same shape.
        log_probs, epsilon_low, epsilon_high: not used; accepted so that surrogates can take one another's place.
        temperature_positive: ``tau`` where A > 0.
        temperature_negative: ``tau`` elsewhere; a larger one lets off-policy tokens fade faster.

    Raises:
        ValueError: a temperature not above 0.
    """
    if not min(temperature_positive, temperature_negative) > 0:
        raise ValueError(f"SAPO's temperatures must be above 0, not {temperature_positive} and {temperature_negative}")
    tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    return -jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


# KL to a reference ---------------------------------------------------------------------------------------------------


def kl_k1(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``d = log pi - log pi_ref``: unbiased, of either sign.

    Its place is the reward: as a loss its gradient says nothing of the reference. (joschu.net/blog/kl-approx.html)
    """
    return log_probs - ref_log_probs


def kl_k2(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``d^2 / 2`` with ``d = log pi - log pi_ref``: biased, never negative; its gradient is ``d``, that of the KL."""
    return (log_probs - ref_log_probs) ** 2 / 2


def kl_k3(log_probs: Float[Array, "*shape"], ref_log_probs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``exp(-d) - 1 + d`` with ``d = log pi - log pi_ref``: unbiased, never negative (arXiv 2402.03300, eq. 4).

    Its gradient is ``1 - exp(-d)``; weighted by the ratio (``kl_correction`` of ``grpo_loss``) it is ``d`` on policy.
    Below ``d = -20`` the exponential continues as its tangent, so that value and gradient stay finite and the gradient
    keeps its sign.
    """
    d = log_probs - ref_log_probs
    bounded = jnp.minimum(-d, MAX_LOG_RATIO)
    tangent = jax.lax.stop_gradient(jnp.exp(bounded)) * (-d - bounded)
    return jnp.expm1(bounded) + tangent + d


# Aggregations: (per-token loss, mask) -> Mean ------------------------------------------------------------------------


def token_mean(x: Tokens, mask: Mask) -> Mean:
    """The mean over all unmasked tokens of the batch: long completions weigh more (DAPO, arXiv 2503.14476)."""
    return mean_pair(x, mask)


def sequence_mean(x: Tokens, mask: Mask) -> Mean:
    """The mean over sequences of each one's mean over its unmasked tokens (GRPO); empty sequences do not count."""
    return mean_pair(masked_mean(x, mask, 1), mask.any(1))


def constant_length(x: Tokens, mask: Mask, *, length: int) -> Mean:
    """The mean over sequences of each one's sum over unmasked tokens, over a constant (Dr.GRPO, arXiv 2503.20783).

    Args:
        x: for each token.
        mask: True counts; empty sequences do not.
        length: the constant, usually the longest completion allowed.

    Raises:
        ValueError: length below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it counts tokens, at least 1")
    return Mean(masked_sum(x, mask), length * masked_count(mask.any(1)))


# Correction of a sampler that is not the policy ----------------------------------------------------------------------


def truncated_importance(
    old_log_probs: Tokens, rollout_log_probs: Tokens, mask: Mask, *, cap: float, log_ratio=token_log_ratio
) -> Tokens:
    """``min(pi_old / pi_rollout, cap)`` for each token, without gradient; 1 where masked.

    Where the sampler's distribution is not quite the policy's (other precision, other kernels, tokens removed by
    top-p), the loss of each token is weighted by it (truncated importance sampling).

    Args:
        old_log_probs: the trainer's log-probabilities of the policy that sampled.
        rollout_log_probs: the sampler's own.
        mask: True at the tokens learnt from.
        cap: the largest weight.
        log_ratio: ``token_log_ratio``, or ``sequence_log_ratio`` for one weight a sequence.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it bounds a weight and must be above 0")
    weight = jnp.minimum(jnp.exp(log_ratio(old_log_probs, rollout_log_probs, mask)), cap)
    return jax.lax.stop_gradient(jnp.where(mask, weight, 1))


# Compositions --------------------------------------------------------------------------------------------------------


def grpo_loss(
    log_probs: Tokens,
    advantages: Float[Array, " B"] | Tokens,
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
    kl_coef: float = 0.0,
    kl_correction: bool = False,
    entropy_coef: float = 0.0,
    importance_cap: float | None = None,
    aggregate: Callable[[Tokens, Mask], Mean] = sequence_mean,
) -> tuple[Mean, Metrics]:
    """``aggregate(weight * surrogate + kl_coef * KL - entropy_coef * entropy)``: GRPO (arXiv 2402.03300, eq. 3).

    The defaults are GRPO's own but for the KL, which is off; every part is replaced by passing another function.
    Ratios are held within exp(-20) and exp(20), far outside any clip, so that none is infinite.

    Args:
        log_probs: of the current policy; the only argument through which gradients flow, with ``entropy``.
        advantages: one for each sequence, or for each token.
        mask: True at the completion tokens learnt from.
        old_log_probs: of the policy at the start of the update; None says that this is its first, strictly on-policy
            pass: ``log_probs`` without gradient is taken, and every ratio is 1.
        ref_log_probs: of the reference policy; needed if kl_coef is not 0, and logged as ``kl`` when given.
        rollout_log_probs: the sampler's own; needed for importance_cap, and compared with the trainer's in the metrics.
        entropy: of the policy at each token, in nats; needed if entropy_coef is not 0, and logged when given.
        log_ratio: ``token_log_ratio`` or ``sequence_log_ratio``.
        surrogate: ``(ratio, advantages, log_probs, epsilon_low=, epsilon_high=) -> loss for each token``.
        epsilon_low: the ratio counts down to ``1 - epsilon_low``.
        epsilon_high: the ratio counts up to ``1 + epsilon_high``.
        kl: estimator of the KL to the reference. (TRL calls kl_coef ``beta``.)
        kl_coef: weight of the KL in the loss.
        kl_correction: weight each token's KL by its token ratio, which makes the gradient that of the KL.
        entropy_coef: weight of the entropy bonus.
        importance_cap: if given, each token's policy term is weighted by ``truncated_importance`` with this cap.
        aggregate: ``token_mean``, ``sequence_mean`` or a ``partial`` of ``constant_length``.

    Returns:
        The loss, and metrics: ``kl``, ``entropy``, ``clip_ratio/low_mean``, ``clip_ratio/high_mean`` and
        ``clip_ratio/region_mean`` (shares of tokens whose ratio is out of range on the side where PPO's clip acts),
        ``sampling/sampling_logp_difference/mean`` and ``/max``.

    Raises:
        ValueError: at trace time, for arrays whose shapes do not fit; and when a coefficient is not 0 (or
            importance_cap is set) and what it weighs is missing.
    """
    _check_shapes(
        log_probs,
        mask=mask,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        rollout_log_probs=rollout_log_probs,
        entropy=entropy,
    )
    if advantages.shape not in (log_probs.shape, log_probs.shape[:1]):
        raise ValueError(
            f"advantages has the shape {advantages.shape}; one for each sequence is {log_probs.shape[:1]}, "
            f"one for each token {log_probs.shape}"
        )
    _require(kl_coef, "kl_coef", ref_log_probs, "ref_log_probs")
    _require(entropy_coef, "entropy_coef", entropy, "entropy")
    if importance_cap is not None and not importance_cap > 0:
        raise ValueError(f"importance_cap is {importance_cap}; it bounds a weight and must be above 0")
    _require(importance_cap, "importance_cap", rollout_log_probs, "rollout_log_probs")

    log_probs = zero_where_masked(log_probs, mask)
    old_log_probs = jax.lax.stop_gradient(
        log_probs if old_log_probs is None else zero_where_masked(old_log_probs, mask)
    )
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0))

    ratio = bounded_ratio(log_ratio(log_probs, old_log_probs, mask))
    loss = surrogate(ratio, advantages, log_probs, epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    metrics: Metrics = {
        "clip_ratio/low_mean": mean_pair(low, mask),
        "clip_ratio/high_mean": mean_pair(high, mask),
        "clip_ratio/region_mean": mean_pair(low | high, mask),
    }
    if rollout_log_probs is not None:
        gap = jnp.abs(token_log_ratio(old_log_probs, rollout_log_probs, mask))
        metrics["sampling/sampling_logp_difference/mean"] = mean_pair(gap, mask)
        metrics["sampling/sampling_logp_difference/max"] = max_pair(gap, mask)
        if importance_cap is not None:
            loss = loss * truncated_importance(old_log_probs, rollout_log_probs, mask, cap=importance_cap)
    if ref_log_probs is not None:
        divergence = kl(log_probs, jax.lax.stop_gradient(zero_where_masked(ref_log_probs, mask)))
        metrics["kl"] = mean_pair(divergence, mask)
        if kl_correction:
            divergence = divergence * bounded_ratio(token_log_ratio(log_probs, old_log_probs, mask))
        if kl_coef:
            loss = loss + kl_coef * divergence
    if entropy is not None:
        entropy = zero_where_masked(entropy, mask)
        metrics["entropy"] = mean_pair(entropy, mask)
        if entropy_coef:
            loss = loss - entropy_coef * entropy
    return aggregate(loss, mask), metrics


def dr_grpo_loss(*args, max_completion_length: int, **kwargs) -> tuple[Mean, Metrics]:
    """``grpo_loss`` summed over tokens, over a constant; goes with ``advantage.dr_grpo`` (arXiv 2503.20783)."""
    return grpo_loss(*args, aggregate=partial(constant_length, length=max_completion_length), **kwargs)


ppo_loss = partial(grpo_loss, aggregate=token_mean)
"""``grpo_loss`` as the mean over tokens, each with an advantage of its own: PPO (arXiv 1707.06347, eq. 7)."""

dapo_loss = partial(grpo_loss, epsilon_high=0.28, aggregate=token_mean)
"""``grpo_loss`` with clip higher and the mean over tokens (arXiv 2503.14476)."""

gspo_loss = partial(grpo_loss, log_ratio=sequence_log_ratio, epsilon_low=3e-4, epsilon_high=4e-4)
"""``grpo_loss`` with one ratio a sequence, and the narrow clip that goes with it (arXiv 2507.18071)."""

cispo_loss = partial(grpo_loss, surrogate=cispo, epsilon_low=1.0, epsilon_high=4.0, aggregate=token_mean)
"""``grpo_loss`` with weights capped at 5 and without a floor in the place of clipped ratios (arXiv 2506.13585)."""

sapo_loss = partial(grpo_loss, surrogate=sapo)
"""``grpo_loss`` with a soft gate in the place of the clip (arXiv 2511.20347); epsilons only set what metrics count."""


# Losses without rewards ----------------------------------------------------------------------------------------------


def supervised_loss(log_probs: Tokens, mask: Mask) -> Mean:
    """``-log pi``, the mean over all unmasked tokens: cross-entropy in nats."""
    return token_mean(-zero_where_masked(log_probs, mask), mask)


def _require(coefficient: float | None, coefficient_name: str, value, name: str):
    if coefficient not in (None, 0) and value is None:
        raise ValueError(f"{coefficient_name} is {coefficient}, which needs {name}; pass them or leave it out")


def _check_shapes(log_probs, **others):
    for name, x in others.items():
        if x is not None and x.shape != log_probs.shape:
            raise ValueError(f"{name} has the shape {x.shape}, and log_probs {log_probs.shape}; they must be the same")
