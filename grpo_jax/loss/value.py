"""The loss of a critic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.loss.policy import token_mean
from grpo_jax.masked import mean_pair, zero_where_masked
from grpo_jax.types import Mean, Metrics


def value_loss(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    old_values: Float[Array, "B T"] | None = None,
    epsilon: float | None = None,
) -> tuple[Mean, Metrics]:
    """``max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2``, the mean over tokens: PPO's critic.

    The clip keeps an update from moving a value far from what it was when the advantages were taken (the
    implementation of arXiv 1707.06347; see arXiv 2403.17031).

    Args:
        values: the critic's now; the only argument through which gradients flow.
        returns: what it is to predict, as ``advantage.gae`` gives it.
        mask: True at the tokens learnt from.
        old_values: the critic's when the returns were taken; needed for epsilon.
        epsilon: the clip; None for the plain square.

    Returns:
        The loss, and metrics: ``value/mean``, ``value/error`` (the mean square), ``value/clip_ratio`` (share of tokens
        where the clipped side is the larger one).

    Raises:
        ValueError: at trace time, for shapes that differ, for an epsilon that is not above 0 or lacks old_values.
    """
    for name, x in (("returns", returns), ("mask", mask), ("old_values", old_values)):
        if x is not None and x.shape != values.shape:
            raise ValueError(f"{name} has the shape {x.shape}, and values {values.shape}; they must be the same")
    if epsilon is not None and (not epsilon > 0 or old_values is None):
        raise ValueError(f"epsilon is {epsilon}; it must be above 0, and needs old_values")
    values = zero_where_masked(values, mask)
    returns = jax.lax.stop_gradient(zero_where_masked(returns, mask))
    error = (values - returns) ** 2
    metrics: Metrics = {"value/mean": mean_pair(values, mask), "value/error": mean_pair(error, mask)}
    if epsilon is not None and old_values is not None:
        old = jax.lax.stop_gradient(zero_where_masked(old_values, mask))
        clipped = (jnp.clip(values, old - epsilon, old + epsilon) - returns) ** 2
        metrics["value/clip_ratio"] = mean_pair(clipped > error, mask)
        error = jnp.maximum(error, clipped)
    return token_mean(error / 2, mask), metrics
