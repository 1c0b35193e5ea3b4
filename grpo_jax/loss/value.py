"""The loss of a critic."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.loss.checks import check_shapes
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

    The clip keeps an update from moving values far from those that the advantages were computed with (the
    implementation of arXiv 1707.06347; see arXiv 2403.17031).

    Args:
        values: the critic's predictions; gradients flow only through these.
        returns: their targets, as ``advantage.gae`` gives them.
        mask: True at the tokens to train on.
        old_values: the critic's predictions when the returns were computed; needed for epsilon.
        epsilon: clip range; None for the plain squared error.

    Returns:
        The loss, and metrics: ``value/mean``, ``value/error`` (mean squared error), ``value/clip_ratio`` (share of
        tokens whose clipped error is the larger one).

    Raises:
        AssertionError: at trace time, for an array whose shape is not that of values, or a mask that is not bool.
        ValueError: at trace time, for an epsilon that is not above 0 or given without old_values.
    """
    chex.assert_type(mask, bool, custom_message="mask")
    check_shapes(values.shape, returns=returns, mask=mask, old_values=old_values)
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
    return mean_pair(error / 2, mask), metrics
