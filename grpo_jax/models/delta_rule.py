"""The gated delta rule and the short causal convolution before it: over whole sequences, and one token at a time.

A head's state is a matrix ``S [E, F]`` that each token decays, corrects and reads
(https://arxiv.org/abs/2412.06464):

    S' = exp(log_decay) S
    S  = S' + beta key (value - S'^T key)^T
    output = S^T query

Shapes: B sequences of S tokens, K heads of queries and keys of size E, H heads of values of size F, each G = H / K of
which share the queries and keys of one head. C channels of a convolution of width W.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.types import Segments

Mask = Bool[Array, "B S"] | Int[Array, "B S"] | Segments | None
"""As of ``Model.apply`` without a cache. The real tokens of a sequence, or of a segment, are adjacent."""

CHUNK_SIZE = 64
# Sampler and trainer compute the same sums in different orders: products in bfloat16 would set them apart.
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unit_vectors(x: Float[Array, "*shape E"]) -> Float[Array, "*shape E"]:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def recurrent_delta_rule_step(
    queries: Float[Array, "B K E"],
    keys: Float[Array, "B K E"],
    values: Float[Array, "B H F"],
    log_decays: Float[Array, "B H"],
    betas: Float[Array, "B H"],
    state: Float[Array, "B H E F"],
) -> tuple[Float[Array, "B H F"], Float[Array, "B H E F"]]:
    """The outputs of one token of each sequence, and the states after it; float32.

    Args:
        queries, keys: normalized, and the queries scaled.
        values: of the token.
        log_decays: at most 0.
        betas: how much of a value is written to the state, from 0 to 1.
        state: before the token.
    """
    G = values.shape[1] // keys.shape[1]
    queries, keys, values, log_decays, betas = _float32(queries, keys, values, log_decays, betas)
    queries, keys = (jnp.repeat(x, G, axis=1)[..., None] for x in (queries, keys))
    state = state * jnp.exp(log_decays)[..., None, None]
    corrections = betas[..., None] * (values - jnp.sum(state * keys, axis=2))
    state = state + keys * corrections[:, :, None, :]
    return jnp.sum(state * queries, axis=2), state


def chunked_delta_rule(
    queries: Float[Array, "B S K E"],
    keys: Float[Array, "B S K E"],
    values: Float[Array, "B S H F"],
    log_decays: Float[Array, "B S H"],
    betas: Float[Array, "B S H"],
    mask: Mask = None,
    *,
    initial_state: Float[Array, "B H E F"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B S H F"], Float[Array, "B H E F"]]:
    """``recurrent_delta_rule_step`` for all tokens, as matrix products over chunks of tokens; float32.

    Within a chunk, the corrections ``u`` of all tokens solve a triangular system (the WY form,
    https://arxiv.org/abs/2406.06484): ``(I + A) u = beta (value - decayed S^T key)`` with ``A_ij = beta_i
    key_i^T key_j exp(log decay from j to i)`` for the tokens ``j`` before ``i``. The loop over chunks computes their
    first states only. Memory grows with S, not with its square.

    Args:
        queries, keys: normalized, and the queries scaled.
        values: of the tokens.
        log_decays: at most 0.
        betas: how much of a value is written to the state, from 0 to 1.
        mask: padding leaves states as they are, and its outputs are finite. The state of a segment starts from zero, or
            from that at the end of the segment which it continues, if no other segment that continues none is between.
        initial_state: before the first token, for the sequence or segment of the first real token; None for zeros.
        chunk_size: L, tokens of a chunk, a power of two.

    Returns:
        The outputs, and the states after the last real token of each row.

    Raises:
        ValueError: ``chunk_size`` is not a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}; it must be a power of two")
    (B, S, K, E), (H, F) = keys.shape, values.shape[2:]
    L = min(chunk_size, 2 ** math.ceil(math.log2(S)))
    q, k, v, log_decay, beta = (_chunks(x, L, 1) for x in _float32(queries, keys, values, log_decays, betas))
    q, k = (jnp.repeat(x, H // K, axis=2) for x in (q, k))  # [N, B, H, L, E]
    c = _layout(mask, S, L)
    M = c.reads.shape[2]

    # Sums of log decays from each token to each later one on its path: differences of a running sum would cancel.
    on_path = jnp.where(c.path[:, :, None], log_decay[..., None, :], 0)
    between = einsum("nbhim,mj->nbhij", on_path, jnp.tril(jnp.ones((L, L)), -1))
    decay = jnp.where(c.path[:, :, None], jnp.exp(between), 0)
    reads = jnp.exp(jnp.sum(on_path, -1))[:, :, :, None] * c.reads[:, :, None]  # [N, B, H, M, L]

    products = einsum("nbhie,nbhje->nbhij", k, k)
    inverse = unit_lower_inverse(jnp.tril(products * decay * beta[..., None], -1))
    u = einsum("nbhij,nbhjf->nbhif", inverse, v * beta[..., None])
    w = einsum("nbhij,nbhjx->nbhix", inverse, _side_by_side(k, reads * beta[:, :, :, None]))
    written = _side_by_side(k, einsum("nbmi,nbhij->nbhmj", c.ends, decay))
    kept = einsum("nbmi,nbhpi->nbhmp", c.ends, reads) + c.kept[:, :, None]

    def chunk(states: Float[Array, "B H X F"], inputs):
        u, w, written, kept = inputs
        corrections = u - einsum("bhix,bhxf->bhif", w, states)
        carried = einsum("bhmp,bhpef->bhmef", kept, states.reshape(B, H, M, E, F)).reshape(states.shape)
        return carried + einsum("bhix,bhif->bhxf", written, corrections), (states, corrections)

    state = jnp.zeros((B, H, E, F)) if initial_state is None else initial_state.astype(jnp.float32)
    states = jnp.pad(state, ((0, 0), (0, 0), (0, (M - 1) * E), (0, 0)))
    last, (states, corrections) = jax.lax.scan(chunk, states, (u, w, written, kept))
    outputs = einsum("nbhix,nbhxf->nbhif", _side_by_side(q, reads), states)
    scores = einsum("nbhie,nbhje->nbhij", q, k) * decay
    outputs = outputs + einsum("nbhij,nbhjf->nbhif", scores, corrections)
    return outputs.transpose(1, 0, 3, 2, 4).reshape(B, -1, H, F)[:, :S], last[:, :, :E]


def unit_lower_inverse(lower: Float[Array, "*shape L L"]) -> Float[Array, "*shape L L"]:
    """``inverse(I + lower)`` of strictly lower triangular matrices, whose size is a power of two.

    Halves are inverted as one batch, so that there are ``log2(L)`` products one after the other. Powers of ``lower``
    would need as many, but with equal keys their entries grow to 10^18 and cancel.
    """
    L = lower.shape[-1]
    if L <= 2:
        return jnp.broadcast_to(jnp.eye(L), lower.shape) - lower
    h = L // 2
    top, bottom = unit_lower_inverse(jnp.stack([lower[..., :h, :h], lower[..., h:, h:]]))
    corner = -einsum("...ij,...jk,...kl->...il", bottom, lower[..., h:, :h], top)
    rows = [jnp.concatenate([top, jnp.zeros_like(top)], -1), jnp.concatenate([corner, bottom], -1)]
    return jnp.concatenate(rows, -2)


def causal_conv(
    x: Float[Array, "B S C"],
    weights: Float[Array, "C W"],
    bias: Float[Array, " C"] | None = None,
    mask: Mask = None,
    *,
    state: Float[Array, "B W-1 C"] | None = None,
) -> tuple[Float[Array, "B S C"], Float[Array, "B W-1 C"]]:
    """The depthwise causal convolution ``bias + sum_d weights[:, W - 1 - d] x[i - d]``; sums are in float32.

    Args:
        x: inputs.
        weights: of each channel, that of the token itself last.
        bias: added to each channel; None for none.
        mask: padding counts as zeros. A segment sees its own inputs, and before them the last ones of the segment that
            it continues.
        state: the last inputs before the first token, for the sequence or segment of the first real token; None for
            zeros.

    Returns:
        The outputs in the dtype of ``x``, and the last ``W - 1`` inputs up to the last real token of each row, zeros
        where its sequence or segment has fewer.
    """
    (B, S, C), W = x.shape, weights.shape[1]
    state = jnp.zeros((B, W - 1, C), x.dtype) if state is None else state.astype(x.dtype)
    inputs = jnp.concatenate([state, x], axis=1)
    ids, prefix_ids = _segments(mask, S)
    first = jnp.take_along_axis(ids, jnp.argmax(ids > 0, axis=1)[:, None], axis=1)
    ids = jnp.concatenate([jnp.repeat(first, W - 1, axis=1), ids], axis=1)
    parents = before = None
    if prefix_ids is not None:
        parents = _parents(ids, jnp.pad(prefix_ids, ((0, 0), (W - 1, 0))))
        before = jnp.broadcast_to(jnp.arange(W - 1, W - 1 + S)[None], x.shape[:2])
    factors = weights.astype(jnp.float32)[None, None]
    out = x.astype(jnp.float32) * factors[..., -1]
    for d in range(1, W):
        if parents is None or before is None:
            earlier = inputs[:, W - 1 - d : -d]
            is_seen = ids[:, W - 1 - d : -d] == ids[:, W - 1 :]
        else:
            before = jnp.where(before >= 0, jnp.take_along_axis(parents, before, axis=1, mode="clip"), -1)
            earlier = jnp.take_along_axis(inputs, before[:, :, None], axis=1, mode="clip")
            is_seen = before >= 0
        out = out + jnp.where(is_seen[:, :, None], earlier, 0).astype(jnp.float32) * factors[..., -1 - d]
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, None]
    out = out.astype(x.dtype)
    if mask is None:
        return out, inputs[:, S:]
    columns = jnp.arange(W - 1 + S)[None]
    last = jnp.max(jnp.where(ids > 0, columns, W - 2), axis=1, keepdims=True)
    kept = last + jnp.arange(2 - W, 1)[None]
    is_own = jnp.take_along_axis(ids, kept, axis=1) == jnp.take_along_axis(ids, last, axis=1)
    return out, jnp.where(is_own[:, :, None], jnp.take_along_axis(inputs, kept[:, :, None], axis=1), 0)


def _float32(*arrays: Array) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]


def _segments(mask: Mask, tokens: int) -> tuple[Int[Array, "b S"], Int[Array, "b S"] | None]:
    """Segment ids, 0 for padding, and prefix ids if some segments continue another."""
    if mask is None:
        return jnp.ones((1, tokens), jnp.int32), None
    if isinstance(mask, Segments):
        return mask.ids, mask.prefix_ids
    return mask.astype(jnp.int32), None


def _latest(is_marked: Bool[Array, "b S"]) -> Int[Array, "b S"]:
    """The last marked column up to each column; -1 if there is none."""
    columns = jnp.arange(is_marked.shape[1])[None]
    return jax.lax.cummax(jnp.where(is_marked, columns, -1), axis=1)


def _parents(ids: Int[Array, "B C"], prefix_ids: Int[Array, "B C"]) -> Int[Array, "B C"]:
    """The column of the token before each one, in its own segment or at the end of its prefix; -1 if there is none."""
    columns = jnp.arange(ids.shape[1])[None]
    prefix_end = _latest((ids > 0) & (prefix_ids == 0))
    continues = (prefix_ids > 0) & (jnp.take_along_axis(ids, prefix_end, axis=1, mode="clip") == prefix_ids)
    is_own = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(is_own, columns - 1, jnp.where(continues, prefix_end, -1))


class _Layout(NamedTuple):
    """The tokens and states that each token of a chunk depends on; b is B, or 1 without a mask.

    M states are carried from chunk to chunk: that after the last token, and with ``Segments`` also that after the last
    token of a segment that continues none.

    Attributes:
        path: True at the tokens ``j`` of the chunk that token ``i`` depends on, itself included.
        reads: 1 for the state that a token depends on, if its sequence or its prefix began before the chunk.
        ends: 1 at the token after which each state is carried on, if it is in the chunk.
        kept: the identity matrix at states without such a token.
    """

    path: Bool[Array, "N b L L"]
    reads: Float[Array, "N b M L"]
    ends: Float[Array, "N b M L"]
    kept: Float[Array, "N b M M"]


def _layout(mask: Mask, tokens: int, chunk_size: int) -> _Layout:
    """The structure of the chunks of ``chunk_size`` tokens."""
    ids, prefix_ids = _segments(mask, tokens)
    is_real = ids > 0
    marks = [is_real] if prefix_ids is None else [is_real, is_real & (prefix_ids == 0)]
    i = _chunks(ids, chunk_size, 0)
    path = i[..., :, None] == i[..., None, :]
    # The segments that the carried states belong to; the initial state belongs to the first one.
    first = jnp.take_along_axis(ids, jnp.argmax(is_real, axis=1)[:, None], axis=1)
    reads = [(i > 0) & (i == _carried_ids(ids, marks[0], first, chunk_size))]
    if prefix_ids is not None:
        p = _chunks(prefix_ids, chunk_size, 0)
        path |= p[..., :, None] == i[..., None, :]
        reads.append(~reads[0] & (p > 0) & (p == _carried_ids(ids, marks[1], 0 * first, chunk_size)))
    path &= (i > 0)[..., None, :] & jnp.tril(jnp.ones((chunk_size,) * 2, bool))[None, None]
    marked = jnp.stack([_chunks(is_marked, chunk_size, 0) for is_marked in marks], axis=2)
    places = jnp.where(marked, jnp.arange(chunk_size)[None, None, None], -1)
    ends = marked & (places == jnp.max(places, axis=-1, keepdims=True))
    kept = ~jnp.any(marked, axis=-1)[..., None] & jnp.eye(len(marks), dtype=bool)[None, None]
    return _Layout(path, *(x.astype(jnp.float32) for x in (jnp.stack(reads, axis=2), ends, kept)))


def _carried_ids(
    ids: Int[Array, "b S"], is_marked: Bool[Array, "b S"], first: Int[Array, "b 1"], chunk_size: int
) -> Array:
    """The segment of the last marked token before each chunk, ``first`` if there is none, ``[N, b, 1]``."""
    latest = _latest(is_marked)
    there = jnp.where(latest >= 0, jnp.take_along_axis(ids, latest, axis=1, mode="clip"), first)
    return jnp.concatenate([first, there[:, chunk_size - 1 : -1 : chunk_size]], axis=1).T[:, :, None]


def _chunks(x: Array, size: int, heads: int) -> Array:
    """``[B, S, *heads, ...]`` as ``[N, B, *heads, L, ...]``, padded with zeros.

    Args:
        x: over all tokens.
        size: L, tokens of a chunk.
        heads: number of axes of heads.
    """
    B, S = x.shape[:2]
    padded = jnp.pad(x, ((0, 0), (0, -S % size)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(B, -1, size, *x.shape[2:]), (1, 2), (0, 2 + heads))


def _side_by_side(x: Float[Array, "N B H L E"], factors: Float[Array, "N B H M L"]) -> Float[Array, "N B H L _"]:
    """``x`` times each of M factors, along the last axis."""
    return jnp.concatenate([x * factors[:, :, :, m, :, None] for m in range(factors.shape[3])], axis=-1)
