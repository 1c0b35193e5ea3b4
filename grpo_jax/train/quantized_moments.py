"""Adam with both moments in 8 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Integer, Key

BLOCK = 128
SMALLEST = 4096
"""Moments of smaller parameters stay in float32, as in the paper."""
OCTAVES = {jnp.int8: 16, jnp.uint8: 32}
"""Range of the levels of a block in powers of two: of first moments, and of second ones, which are squares."""


class QuantizedAdamState(NamedTuple):
    """State of ``scale_by_quantized_adam``; trees like the parameters.

    Attributes:
        count: number of updates.
        mu: first moments: int8 levels in the parameter's shape; float32 for small parameters.
        nu: second moments: uint8 levels in the parameter's shape; float32 for small parameters.
        mu_scales, nu_scales: the largest magnitude of each block, float32; no leaf where a parameter is small.
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    mu_scales: Any
    nu_scales: Any


def scale_by_quantized_adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` whose state takes two bytes per parameter and 1/16 for scales, instead of eight.

    Moments are quantized in blocks of 128 along the last axis of a parameter, so that levels have its layout on a mesh,
    with a float32 scale for each block (Dettmers et al., arXiv 2110.02861, section 2). The levels are logarithmic, 9 %
    apart. They are chosen by stochastic rounding: with ``b2`` = 0.999 an update changes a second moment by far less
    than 9 %, which rounding to nearest would discard every time. A second moment above zero is never rounded to zero.
    The random numbers are a function of the update's number and the parameter's position in the tree.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    def init(params: Any) -> QuantizedAdamState:
        def levels(dtype):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype if _is_large(x) else jnp.float32), params)

        def scales():
            return jax.tree.map(
                lambda x: jnp.zeros(_scales_shape(x.shape)) if _is_large(x) else optax.MaskedNode(), params
            )

        return QuantizedAdamState(jnp.int32(0), levels(jnp.int8), levels(jnp.uint8), scales(), scales())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, QuantizedAdamState]:
        del params
        grads, count = updates, jnp.asarray(optax.safe_increment(state.count))
        key = jax.random.fold_in(jax.random.key(0), count)
        leaves, treedef = jax.tree.flatten(grads)
        old = [treedef.flatten_up_to(tree) for tree in state[1:]]
        new = []
        for number, (grad, mu, nu, mu_scale, nu_scale) in enumerate(zip(leaves, *old, strict=True)):
            g = grad.astype(jnp.float32)
            is_large = _is_large(grad)
            m = b1 * (dequantized(mu, mu_scale) if is_large else mu) + (1 - b1) * g
            v = b2 * (dequantized(nu, nu_scale) if is_large else nu) + (1 - b2) * g**2
            t = count.astype(jnp.float32)
            step = m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)
            if is_large:
                of_mu, of_nu = jax.random.split(jax.random.fold_in(key, number))
                (m, mu_scale), (v, nu_scale) = quantized(m, of_mu, jnp.int8), quantized(v, of_nu, jnp.uint8)
            new.append((step.astype(grad.dtype), m, v, mu_scale, nu_scale))
        step, *moments = (treedef.unflatten(column) for column in zip(*new, strict=True))
        return step, QuantizedAdamState(count, *moments)

    return optax.GradientTransformation(init, update)


def quantized(
    x: Float[Array, "*shape"], key: Key[Array, ""], dtype: Any
) -> tuple[Integer[Array, "*shape"], Float[Array, "*blocks"]]:
    """Levels and scales of an array, by stochastic rounding: the mean over keys of ``dequantized`` is the array.

    Level ``n`` from 1 to L (127, or 255 of uint8) is ``scale * 2^(octaves (n - L) / (L - 1))``. Magnitudes below that
    of level 1 are rounded to it or to zero in int8, and to it in uint8, where that makes them larger.

    Args:
        x: at least one axis.
        key: random key.
        dtype: int8, whose levels have signs, or uint8 for an array without negative numbers.
    """
    blocks = _in_blocks(jnp.abs(x))
    scale = blocks.max(-1)
    share = blocks / jnp.where(scale > 0, scale, 1.0)[..., None]
    L = jnp.iinfo(dtype).max
    below = jnp.floor(L + jnp.log2(jnp.maximum(share, 1e-30)) * ((L - 1) / OCTAVES[dtype]))
    below = jnp.clip(below, 0, L - 1)
    low, high = (_magnitude(level, dtype) for level in (below, below + 1))
    noise = _in_blocks(jax.random.uniform(key, x.shape))
    level = below + (noise * (high - low) < share - low).astype(jnp.float32)
    if dtype == jnp.uint8:
        level = jnp.maximum(level, (share > 0).astype(level.dtype))
    level = level.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return (level if dtype == jnp.uint8 else jnp.sign(x) * level).astype(dtype), scale


def dequantized(levels: Integer[Array, "*shape"], scales: Float[Array, "*blocks"]) -> Float[Array, "*shape"]:
    """The array of levels and scales, float32.

    Args:
        levels: int8 or uint8, as ``quantized`` returns them.
        scales: of its blocks.
    """
    dtype = jnp.uint8 if levels.dtype == jnp.uint8 else jnp.int8
    signed = levels.astype(jnp.float32)
    blocks = _in_blocks(jnp.sign(signed) * _magnitude(jnp.abs(signed), dtype)) * scales[..., None]
    return blocks.reshape(*levels.shape[:-1], -1)[..., : levels.shape[-1]]


def _magnitude(level: Array, dtype: Any) -> Array:
    L = jnp.iinfo(dtype).max
    return jnp.where(level > 0, jnp.exp2((level - L) * (OCTAVES[dtype] / (L - 1))), 0.0)


def _in_blocks(x: Array) -> Array:
    """``[..., n] -> [..., blocks, size]``; the last block is filled with zeros."""
    blocks, size = _blocks(x.shape[-1])
    padding = [(0, 0)] * (x.ndim - 1) + [(0, blocks * size - x.shape[-1])]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], blocks, size)


def _blocks(length: int) -> tuple[int, int]:
    size = min(length, BLOCK)
    return -(-length // size), size


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], _blocks(shape[-1])[0])


def _is_large(x: Any) -> bool:
    return x.size >= SMALLEST
