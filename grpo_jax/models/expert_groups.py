"""Products of tokens with their experts' matrices on accelerators: all experts at once, in chunks of rows.

Choices are sorted by expert and their tokens gathered. All shapes are static, though an expert may be chosen by every
token. So a chunk has as many rows as are likely, and a loop, nearly always of one or a few turns, takes the rest:
memory is bounded and no choice is dropped. The backward pass computes the hidden units of a chunk again.

TPUs have kernels for products with consecutive groups of rows of any sizes (``ragged``): ``jax.lax.ragged_dot``, and
megablox's for the gradient of the matrices, for which XLA would multiply all rows for every expert. XLA does so for all
of these products on GPUs. There (``slots``), a chunk has the same number of rows of each expert, for a batched product.

Shapes: N tokens with k experts each, D and F the width of the residual stream and of an expert, C rows of a chunk.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.expert_blocks import ExpertParams, GatedActivation, sorted_rows

Layout = Literal["ragged", "slots"]
SPARE = 1.5
"""Rows of a chunk of consecutive rows, relative to the average number of a device that has a part of the experts."""
SLOTS = 256
"""Rows of an expert, with fewer of which a GPU takes longer to read its matrices than to multiply with them."""
TURNS = "likely_turns_"
"""Scope of a loop over chunks, with the turns that it takes if no expert has more than ``SPARE`` times the average."""
TILE = 128
"""Rows of a chunk are a multiple of it, where they are many."""


class Choices(NamedTuple):
    """All choices, by token and sorted by expert.

    Attributes:
        experts: of each token; those in ``[0, E)`` count.
        places: of each choice, in the order by expert.
        order: number of each choice, ``token * k + place``, in the order by expert.
        sizes: choices of each expert.
    """

    experts: Int[Array, "N k"]
    places: Int[Array, "N k"]
    order: Int[Array, " R"]
    sizes: Int[Array, " E"]


class Chunk(NamedTuple):
    """Some of the choices.

    Attributes:
        order: number of each row's choice.
        experts: of each row.
        is_used: False for rows of no choice.
        places: row of each choice, -1 if it has none here.
        sizes: rows of each expert.
    """

    order: Int[Array, " C"]
    experts: Int[Array, " C"]
    is_used: Bool[Array, "C 1"]
    places: Int[Array, "N k"]
    sizes: Int[Array, " E"]


def expert_groups(
    activation: GatedActivation,
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    params: ExpertParams,
    *,
    layout: Layout,
    share: float = 1.0,
) -> Float[Array, "N D"]:
    """``experts.expert_mlp`` on one device, by grouped products.

    Args:
        activation: of the hidden units.
        x: tokens, in the dtype of the parameters.
        experts: distinct for each token.
        weights, params: as in ``expert_mlp``.
        layout: of the rows.
        share: part of all experts that ``params`` has.
    """
    (N, k), E, turns = experts.shape, len(params.gate), 1
    rows = sorted_rows(experts, E)
    places = jnp.zeros(N * k, jnp.int32).at[rows.order].set(jnp.arange(N * k, dtype=jnp.int32), unique_indices=True)
    choices = Choices(experts.astype(jnp.int32), places.reshape(N, k), rows.order, rows.sizes)
    if layout == "slots":
        average = max(share * N * k / E, 1)
        size = _rounded(max(average / 2, min(4 * average, SLOTS)), 16)
        turns = math.ceil(SPARE * average / size)
    else:
        most = N * min(k, E)  # the other choices are not of these experts
        size = _rounded(min(SPARE * share * N * k, most), TILE)
        if size >= most:  # the one chunk there is: its hidden units are kept for the backward pass
            return _through(layout, activation, x, weights, params, _ragged(choices, 0, size)).astype(x.dtype)
    with jax.named_scope(f"{TURNS}{turns}"):
        out: Any = _in_chunks(layout, activation, size, x, weights, params, choices)
    return out.astype(x.dtype)


def _rounded(rows: float | int, least: int) -> int:
    """As many rows or more: a multiple of ``TILE``, or a power of two of at least ``least``."""
    power = max(least, 1 << (math.ceil(rows) - 1).bit_length())
    return power if power < TILE else TILE * math.ceil(rows / TILE)


def _ragged(choices: Choices, index: Array | int, size: int) -> Chunk:
    """The chunk ``index`` of ``size`` consecutive rows."""
    start, ends = jnp.asarray(index * size, jnp.int32), jnp.cumsum(choices.sizes)
    order = lax.dynamic_slice_in_dim(jnp.pad(choices.order, (0, size)), start, size)
    rows = start + jnp.arange(size, dtype=jnp.int32)
    experts = jnp.minimum(jnp.searchsorted(ends, rows, side="right"), len(ends) - 1).astype(jnp.int32)
    is_here = (choices.places >= start) & (choices.places < jnp.minimum(start + size, ends[-1]))
    sizes = jnp.clip(ends - start, 0, size) - jnp.clip(ends - choices.sizes - start, 0, size)
    return Chunk(order, experts, (rows < ends[-1])[:, None], jnp.where(is_here, choices.places - start, -1), sizes)


def _slots(choices: Choices, index: Array | int, size: int) -> Chunk:
    """The chunk ``index`` of up to ``size`` rows of each expert."""
    E = len(choices.sizes)
    starts = (jnp.cumsum(choices.sizes) - choices.sizes).astype(jnp.int32)
    ranks = (index * size + jnp.arange(size, dtype=jnp.int32))[None]  # of rows among their expert's
    sources = jnp.minimum(starts[:, None] + ranks, len(choices.order) - 1).reshape(-1)
    is_used = (ranks < choices.sizes[:, None]).reshape(-1, 1)
    experts = jnp.repeat(jnp.arange(E, dtype=jnp.int32), size)
    has_expert, expert = (choices.experts >= 0) & (choices.experts < E), jnp.clip(choices.experts, 0, E - 1)
    rank = choices.places - starts[expert] - index * size
    places = jnp.where(has_expert & (rank >= 0) & (rank < size), expert * size + rank, -1)
    return Chunk(choices.order[sources], experts, is_used, places, choices.sizes)


def _num_chunks(layout: Layout, choices: Choices, size: int) -> Array:
    rows = choices.sizes.max() if layout == "slots" else choices.sizes.sum(dtype=jnp.int32)
    return (rows + size - 1) // size


def _through(
    layout: Layout, activation: GatedActivation, x: Array, weights: Array, params: ExpertParams, chunk: Chunk
) -> Float[Array, "N D"]:
    """The sum over a chunk's rows, in float32."""

    def product(rows: Array, matrices: Array, bias: Array | None, weight: Array | None = None) -> Array:
        if layout == "slots":
            by_expert = rows.reshape(len(matrices), -1, rows.shape[1])
            out = lax.batch_matmul(by_expert, matrices).reshape(len(rows), -1)
        else:
            out = _ragged_dot(rows, matrices, chunk.sizes)
        if bias is not None:
            added = jnp.take(bias, chunk.experts, axis=0)
            out += added if weight is None else (added.astype(jnp.float32) * weight).astype(out.dtype)
        return jnp.where(chunk.is_used, out, 0)  # a kernel leaves anything in rows of no expert

    inputs = _dispatch(x, chunk)
    gate, up = product(inputs, params.gate, params.gate_bias), product(inputs, params.up, params.up_bias)
    weight = _dispatch(weights.reshape(-1, 1), chunk._replace(places=chunk.places.reshape(-1, 1)))
    hidden = (activation(gate, up).astype(jnp.float32) * weight).astype(x.dtype)
    return _combine(product(hidden, params.down, params.down_bias, weight), chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_chunks(layout: Layout, activation: GatedActivation, size: int, x, weights, params, choices: Choices):
    cut = _slots if layout == "slots" else _ragged

    def body(index: Array, out: Array) -> Array:
        return out + _through(layout, activation, x, weights, params, cut(choices, index, size))

    return lax.fori_loop(0, _num_chunks(layout, choices, size), body, jnp.zeros(x.shape, jnp.float32))


def _in_chunks_backward(layout, activation, size, residuals, grad):
    *inputs, choices = residuals
    cut = _slots if layout == "slots" else _ragged

    def body(index: Array, totals: Any) -> Any:
        chunk = cut(choices, index, size)
        _, pull = jax.vjp(lambda x, weights, params: _through(layout, activation, x, weights, params, chunk), *inputs)
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), totals, pull(grad))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(inputs))
    grads = lax.fori_loop(0, _num_chunks(layout, choices, size), body, zeros)
    return *jax.tree.map(lambda x, like: x.astype(like.dtype), grads, tuple(inputs)), None


_in_chunks.defvjp(
    lambda layout, activation, size, *args: (_in_chunks(layout, activation, size, *args), args), _in_chunks_backward
)


@jax.custom_vjp
def _ragged_dot(x: Float[Array, "C D"], matrices: Float[Array, "E D F"], sizes: Int[Array, " E"]) -> Array:
    return lax.ragged_dot(x, matrices, sizes)


def _ragged_dot_backward(residuals, grad):
    x, matrices, sizes = residuals
    d_x = lax.ragged_dot(grad, matrices.swapaxes(1, 2), sizes)
    return d_x, lax.platform_dependent(x, grad, sizes, tpu=_outer_on_tpu, default=_outer), None


_ragged_dot.defvjp(lambda *args: (_ragged_dot(*args), args), _ragged_dot_backward)


def _outer(x: Array, grad: Array, sizes: Array) -> Float[Array, "E D F"]:
    """``x[rows].T @ grad[rows]`` for the rows of each expert."""
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(x, grad, sizes, dims)


def _outer_on_tpu(x: Array, grad: Array, sizes: Array, interpret: bool = False) -> Float[Array, "E D F"]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # late: only where it is used

    rows = next(size for size in (512, 256, TILE) if len(x) % size == 0)
    tiles = (rows, *(min(512, -(-width // 128) * 128) for width in (x.shape[1], grad.shape[1])))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tgmm(x.T, grad, sizes, x.dtype, tiles, interpret=interpret)


def _take_rows(x: Array, chunk: Chunk) -> Array:
    return jnp.where(chunk.is_used, x.at[chunk.order // chunk.places.shape[1]].get(mode="promise_in_bounds"), 0)


def _sum_rows(y: Array, chunk: Chunk) -> Array:
    taken = y.at[jnp.maximum(chunk.places, 0)].get(mode="promise_in_bounds")
    return jnp.where((chunk.places >= 0)[..., None], taken, 0).sum(1, dtype=jnp.float32)


@jax.custom_vjp
def _dispatch(x: Array, chunk: Chunk) -> Array:
    """Each row's token; 0 in rows of no choice. Both this and its transpose, ``_combine``, are gathers."""
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
