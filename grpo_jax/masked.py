"""Sums, means and variances under a mask; the result for an empty mask is 0.

Masked entries are replaced *before* anything is computed from them, so NaN or infinity at a masked position reaches
neither a result nor its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.types import Max, Mean


def zero_where_masked(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` with 0 at masked entries, and a zero gradient there even if ``x`` is NaN.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to keep.
    """
    return jnp.where(mask, x, 0)


def masked_sum(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*reduced"]:
    """Sum of the unmasked entries; 0 where there are none.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to sum.
        axis: to sum over; None for all axes.
    """
    return zero_where_masked(x, mask).sum(axis)


def masked_count(mask: Bool[Array, "*shape"], axis: int | None = None) -> Float[Array, "*reduced"]:
    """Number of unmasked entries, as float32.

    Args:
        mask: True at entries to count.
        axis: to count over; None for all axes.
    """
    return mask.sum(axis, dtype=jnp.float32)


def mean_pair(x: Float[Array, "*shape"] | Bool[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Mean:
    """Mean of the unmasked entries over all axes, as a (sum, count) pair that can be merged with others.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to average.
    """
    return Mean(sum=masked_sum(x.astype(jnp.float32), mask), count=masked_count(mask))


def max_pair(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Max:
    """Maximum of the unmasked entries over all axes, in a form that can be merged with others.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to compare.
    """
    return Max(max=jnp.where(mask, x.astype(jnp.float32), -jnp.inf).max())


def masked_mean(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "*reduced"]:
    """Mean of the unmasked entries; 0 where there are none.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to average.
        axis: to average over; None for all axes.
    """
    return masked_sum(x, mask, axis) / jnp.maximum(masked_count(mask, axis), 1).astype(x.dtype)


def masked_variance(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], ddof: int = 0) -> Float[Array, ""]:
    """Variance of the unmasked entries over all axes; 0 where there are not more than ``ddof`` of them.

    Args:
        x: any shape.
        mask: of the same shape; True at entries to include.
        ddof: degrees of freedom subtracted from the count: 1 for the sample variance.
    """
    degrees = masked_count(mask) - ddof
    squares = (_centred(x, mask) ** 2).sum()
    return jnp.where(degrees > 0, squares / jnp.maximum(degrees, 1).astype(x.dtype), 0)


def whiten(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Array, "*shape"]:
    """Scale the unmasked entries to variance 1 and, if ``shift_mean``, to mean 0; masked entries become 0.

    Args:
        x: any shape.
        mask: of the same shape; mean and variance are taken over entries where it is True.
        shift_mean: whether to subtract the mean; if not, the result keeps the mean of ``x``.
        epsilon: added to the variance.
    """
    whitened = _centred(x, mask) * jax.lax.rsqrt(masked_variance(x, mask) + epsilon)
    return whitened if shift_mean else zero_where_masked(whitened + masked_mean(x, mask), mask)


def _centred(x, mask):
    """``x`` minus its mean; 0 where masked."""
    # Relative to the smallest entry, equal entries are exactly 0 before the mean is rounded.
    smallest = jax.lax.stop_gradient(jnp.min(jnp.where(mask, x, jnp.inf)))
    shifted = jnp.where(mask, x - smallest, 0)
    return zero_where_masked(shifted - masked_mean(shifted, mask), mask)


def positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of each token among the unmasked tokens of its row, from 0; 0 in left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def is_last(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last unmasked position of each row only; False throughout a row that is all masked."""
    return mask & (jnp.cumsum(mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1] == 1)


def last_unmasked(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Entry of each row at its last unmasked position, such as a reward model's score; 0 if there is none.

    Args:
        x: per token.
        mask: True at real tokens.
    """
    return masked_sum(x, is_last(mask), 1)
