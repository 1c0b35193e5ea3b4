"""Sums, means and variances under a mask, and the one rule for an empty mask: the result is 0.

Every function drops masked entries *before* it computes with them, so a NaN or an infinity at a masked position
reaches neither the result nor its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.types import Max, Mean


def zero_where_masked(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` with 0 at masked entries, and a zero gradient there even if ``x`` is NaN."""
    return jnp.where(mask, x, 0)


def masked_sum(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*reduced"]:
    """Sum of the unmasked entries along ``axis`` (all axes by default); 0 where there are none."""
    return zero_where_masked(x, mask).sum(axis)


def masked_count(mask: Bool[Array, "*shape"], axis: int | None = None) -> Float[Array, "*reduced"]:
    """How many entries are unmasked along ``axis``, as float32."""
    return mask.sum(axis, dtype=jnp.float32)


def mean_pair(x: Float[Array, "*shape"] | Bool[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Mean:
    """Mean of the unmasked entries over all axes, as a pair that can be merged with others."""
    return Mean(masked_sum(x.astype(jnp.float32), mask), masked_count(mask))


def max_pair(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Max:
    """Maximum of the unmasked entries over all axes, in a form that can be merged with others."""
    return Max(jnp.where(mask, x.astype(jnp.float32), -jnp.inf).max())


def masked_mean(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*reduced"]:
    """Mean of the unmasked entries along ``axis`` (all axes by default); 0 where there are none."""
    return masked_sum(x, mask, axis) / jnp.maximum(masked_count(mask, axis), 1).astype(x.dtype)


def masked_variance(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], ddof: int = 0) -> Float[Array, ""]:
    """Variance of the unmasked entries over all axes; 0 where there are not more than ``ddof`` of them."""
    degrees = masked_count(mask) - ddof
    squares = (_centred(x, mask) ** 2).sum()
    return jnp.where(degrees > 0, squares / jnp.maximum(degrees, 1).astype(x.dtype), 0)


def whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """Scale the unmasked entries to variance 1 and, if ``shift_mean``, to mean 0; masked entries become 0.

    Args:
        x: any shape.
        mask: same shape; True counts. Mean and variance are taken over these entries only.
        shift_mean: whether the mean is removed; if not, the result keeps the mean of ``x``.
        epsilon: added to the variance.
    """
    whitened = _centred(x, mask) * jax.lax.rsqrt(masked_variance(x, mask) + epsilon)
    return whitened if shift_mean else zero_where_masked(whitened + masked_mean(x, mask), mask)


def _centred(x, mask):
    """``x`` less its mean; 0 where masked."""
    # Taken relative to the smallest, equal entries are exactly 0 before any rounding of a mean.
    smallest = jax.lax.stop_gradient(jnp.min(jnp.where(mask, x, jnp.inf)))
    shifted = jnp.where(mask, x - smallest, 0)
    return zero_where_masked(shifted - masked_mean(shifted, mask), mask)


def positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """The position of each token among the unmasked tokens of its row, from 0; 0 in left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def is_last(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last unmasked position of each row, and nowhere else; nowhere in a row that is all masked."""
    return mask & (jnp.cumsum(mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] == 1)


def last_unmasked(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """The entry of each row at its last unmasked position, as a reward model reads its score; 0 if there is none."""
    return masked_sum(x, is_last(mask), 1)
