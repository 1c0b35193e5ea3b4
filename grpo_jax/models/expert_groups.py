"""Products of tokens with their experts' matrices by ``jax.lax.ragged_dot``, for accelerators.

Choices are sorted by expert and their tokens gathered, so that each expert's rows are consecutive. All shapes are
static: an expert may be chosen by every token. A device with a part of the experts has few of the choices on average
and may have all; it takes them in chunks of ``SPARE`` times the average, nearly always one, so that memory is bounded
and no choice is dropped.

Shapes: N tokens with k experts each, D and F the width of the residual stream and of an expert, C rows of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from grpo_jax.models.expert_blocks import ExpertParams, GatedActivation, sorted_rows

SPARE = 1.5
"""Rows of a chunk, relative to the average number of a device."""


class Chunk(NamedTuple):
    """Consecutive rows.

    Attributes:
        order: number of each row's choice, ``token * k + place``.
        places: of each choice, its row in the chunk, or any other number.
        sizes: rows of each expert.
    """

    order: Int[Array, " C"]
    places: Int[Array, "N k"]
    sizes: Int[Array, " E"]

    def is_own(self) -> Array:
        """Whether each row is one of the experts'."""
        return jnp.arange(len(self.order), dtype=jnp.int32)[:, None] < self.sizes.sum(dtype=jnp.int32)


def expert_groups(
    activation: GatedActivation,
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    params: ExpertParams,
    *,
    share: float = 1.0,
) -> Float[Array, "N D"]:
    """``experts.expert_mlp`` on one device, by grouped products.

    Args:
        activation: of the hidden units.
        x: tokens, in the dtype of the parameters.
        experts: distinct for each token.
        weights, params: as in ``expert_mlp``.
        share: part of all experts that ``params`` has.
    """
    (N, k), E = experts.shape, len(params.gate)
    rows = sorted_rows(experts, E)
    most = N * min(k, E)  # the other choices are not of these experts, and last
    places = jnp.zeros(N * k, jnp.int32).at[rows.order].set(jnp.arange(N * k, dtype=jnp.int32), unique_indices=True)
    whole = Chunk(rows.order, places.reshape(N, k), rows.sizes)
    size = -(-int(SPARE * share * N * k) // 8) * 8
    if size >= most:
        out = _through(activation, x, weights, params, whole._replace(order=whole.order[:most]))
    else:
        out: Any = _in_chunks(activation, size, x, weights, params, whole)
    return out.astype(x.dtype)


def _through(activation: GatedActivation, x, weights, params: ExpertParams, chunk: Chunk) -> Float[Array, "N D"]:
    """The sum over a chunk's rows, in float32."""
    is_own, by_row = chunk.is_own(), partial(_biases, chunk)
    inputs = _dispatch(x, chunk)
    # Rows that are no expert's may hold anything.
    gate = jnp.where(is_own, lax.ragged_dot(inputs, params.gate, chunk.sizes) + by_row(params.gate_bias, x.dtype), 0)
    up = jnp.where(is_own, lax.ragged_dot(inputs, params.up, chunk.sizes) + by_row(params.up_bias, x.dtype), 0)
    weight = _dispatch(weights.reshape(-1, 1), chunk._replace(places=chunk.places.reshape(-1, 1)))
    hidden = (activation(gate, up).astype(jnp.float32) * weight).astype(x.dtype)
    out = lax.ragged_dot(hidden, params.down, chunk.sizes)
    if params.down_bias is not None:
        out += (by_row(params.down_bias, jnp.float32) * weight).astype(x.dtype)
    return _combine(out, chunk)


def _chunk(whole: Chunk, index: Array, size: int) -> Chunk:
    start, ends = index * size, jnp.cumsum(whole.sizes)
    order = lax.dynamic_slice_in_dim(jnp.pad(whole.order, (0, size)), start, size)
    sizes = jnp.clip(ends - start, 0, size) - jnp.clip(ends - whole.sizes - start, 0, size)
    return Chunk(order, whole.places - start, sizes)


def _num_chunks(whole: Chunk, size: int) -> Array:
    return (whole.sizes.sum(dtype=jnp.int32) + size - 1) // size


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(activation: GatedActivation, size: int, x, weights, params: ExpertParams, whole: Chunk):
    def body(index: Array, out: Array) -> Array:
        return out + _through(activation, x, weights, params, _chunk(whole, index, size))

    return lax.fori_loop(0, _num_chunks(whole, size), body, jnp.zeros(x.shape, jnp.float32))


def _in_chunks_backward(activation, size, residuals, grad):
    *inputs, whole = residuals

    def body(index: Array, totals: Any) -> Any:
        chunk = _chunk(whole, index, size)
        _, pull = jax.vjp(lambda x, weights, params: _through(activation, x, weights, params, chunk), *inputs)
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), totals, pull(grad))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(inputs))
    grads = lax.fori_loop(0, _num_chunks(whole, size), body, zeros)
    return *jax.tree.map(lambda x, like: x.astype(like.dtype), grads, tuple(inputs)), None


_in_chunks.defvjp(lambda activation, size, *args: (_in_chunks(activation, size, *args), args), _in_chunks_backward)


def _biases(chunk: Chunk, bias: Array | None, dtype: Any) -> Array:
    """The bias of each row's expert; 0 without one."""
    if bias is None:
        return jnp.zeros((), dtype)
    rows = jnp.arange(len(chunk.order), dtype=jnp.int32)
    expert = jnp.searchsorted(jnp.cumsum(chunk.sizes), rows, side="right")
    return jnp.take(bias, expert, axis=0, mode="clip").astype(dtype)


def _take_rows(x: Array, chunk: Chunk) -> Array:
    return jnp.where(chunk.is_own(), x.at[chunk.order // chunk.places.shape[1]].get(mode="promise_in_bounds"), 0)


def _sum_rows(y: Array, chunk: Chunk) -> Array:
    is_here = (chunk.places >= 0) & (chunk.places < chunk.sizes.sum(dtype=jnp.int32))
    taken = y.at[jnp.clip(chunk.places, 0, len(y) - 1)].get(mode="promise_in_bounds")
    return jnp.where(is_here[..., None], taken, 0).sum(1, dtype=jnp.float32)


@jax.custom_vjp
def _dispatch(x: Array, chunk: Chunk) -> Array:
    """Each row's token; 0 in rows that are no expert's. Both this and its transpose, ``_combine``, are gathers."""
    return _take_rows(x, chunk)


@jax.custom_vjp
def _combine(y: Array, chunk: Chunk) -> Array:
    """Sum of each token's rows, in float32."""
    return _sum_rows(y, chunk)


def _dispatch_backward(residuals, grad):
    like, chunk = residuals
    return _sum_rows(grad, chunk).astype(like.dtype), None


def _combine_backward(residuals, grad):
    like, chunk = residuals
    return _take_rows(grad.astype(like.dtype), chunk), None


_dispatch.defvjp(lambda x, chunk: (_take_rows(x, chunk), (jnp.zeros(0, x.dtype), chunk)), _dispatch_backward)
_combine.defvjp(lambda y, chunk: (_sum_rows(y, chunk), (jnp.zeros(0, y.dtype), chunk)), _combine_backward)
