"""Softmax attention over several segments of keys and values, each shared by a group of rows.

Shapes are those of ``layers``. Tokens and columns have slots, numbered from the first column of the call's own keys or
cache; columns of a prefix have negative slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.kv_cache import CacheEntry, ring_slots, slice_columns
from grpo_jax.models.rope import Rotation
from grpo_jax.sharding import take_rows
from grpo_jax.types import Segments

# Finite, so that the softmax of a row of masked scores and its gradient are finite.
MASKED_SCORE = -0.5 * float(np.finfo(np.float32).max)
QUERY_BLOCK = 128


def attention_mask(
    mask: Bool[Array, "N C"] | Int[Array, "N C"] | Segments | None,
    slots: Int[Array, " S"],
    first: int | Int[Array, ""],
    columns: int,
    window: int | None,
    length: int | Int[Array, ""] | None = None,
) -> Bool[Array, "M S {columns}"]:
    """True at columns that a token may attend to: not masked, not after its slot, less than ``window`` before it.

    Args:
        mask: False at columns that no token may attend to; None if there are none (M is 1 then, N otherwise). Or
            segment ids, 0 for padding: tokens attend within their segment. Or ``Segments`` of the call's own tokens;
            windows are then measured in positions.
        slots: slot of each token.
        first: slot of the first column.
        columns: C.
        window: size of the layer's sliding window; None for full attention.
        length: of a ring cache, the tokens that were written to it, and columns of a ``mask`` of bools; None if each
            column is the next slot.
    """
    held = jnp.arange(columns) if length is None else ring_slots(columns, length)
    distances = slots[:, None] - (first + held)[None, :]
    reachable = distances >= 0
    if length is not None:
        reachable &= held[None, :] >= 0
    if isinstance(mask, Segments):
        ids = mask.ids[:, None, :]
        joined = (mask.ids[:, slots, None] == ids) | (mask.prefix_ids[:, slots, None] == ids)
        if window is not None:
            joined &= mask.positions[:, slots, None] - mask.positions[:, None, :] < window
        return joined & (ids > 0) & reachable[None]
    if window is not None:
        reachable &= distances < window
    if mask is None:
        return reachable[None]
    if length is not None and mask.shape[1] > columns:
        mask = jnp.take(mask, held, axis=1, mode="clip")
    chex.assert_shape(mask, (None, columns))
    if mask.dtype != bool:
        return (mask[:, slots, None] == mask[:, None, :]) & (mask > 0)[:, None, :] & reachable[None]
    return mask[:, None, :] & reachable[None]


def is_packed_mask(mask: Bool[Array, "N C"] | Int[Array, "N C"] | Segments | None) -> bool:
    """Whether a mask describes packed sequences."""
    return isinstance(mask, Segments) or (mask is not None and mask.dtype != bool)


class KVSegment(NamedTuple):
    """Some of the keys and values that a call attends to: N entries, each shared by a group of rows.

    Attributes:
        entry: keys and values of C columns.
        mask: as returned by ``attention_mask``.
        gather_index: as in ``types.PrefixCache``.
        scatter_index: as in ``types.PrefixCache``.
    """

    entry: CacheEntry
    mask: Bool[Array, "M S C"]
    gather_index: Int[Array, "devices places"] | None = None
    scatter_index: Int[Array, "devices rows"] | None = None

    def group(self, x: Float[Array, "B K G S W"]) -> Float[Array, "N K M W"]:
        """A group's queries, over rows and heads, as the rows of one product with the group's keys."""
        x = x if self.gather_index is None else take_rows(x, self.gather_index)
        N = self.entry["keys"].shape[0]
        B, K, G, S, W = x.shape
        return x.reshape(N, B // N, K, G, S, W).transpose(0, 2, 1, 3, 4, 5).reshape(N, K, B // N * G * S, W)

    def ungroup(self, x: Float[Array, "N K M W"], heads: int, tokens: int) -> Float[Array, "B K G S W"]:
        """The inverse of ``group``.

        Args:
            x: rows in the order of ``group``.
            heads: G, query heads per KV head.
            tokens: S, tokens of the call.
        """
        (N, K, M, W), G, S = x.shape, heads, tokens
        R = M // (G * S)
        x = x.reshape(N, K, R, G, S, W).transpose(0, 2, 1, 3, 4, 5).reshape(N * R, K, G, S, W)
        return x if self.scatter_index is None else take_rows(x, self.scatter_index)


def segments_of(entry: CacheEntry, masks: Sequence[Bool[Array, "M S _"]]) -> list[KVSegment]:
    """A cache as a segment for each mask, over consecutive columns.

    Args:
        entry: the cache.
        masks: of each block of its columns.
    """
    segments, start = [], 0
    for mask in masks:
        end = start + mask.shape[2]
        segments.append(KVSegment(slice_columns(entry, start, end), mask))
        start = end
    return segments


def attend(
    queries: Float[Array, "B K G S E"],
    segments: Sequence[KVSegment],
    softcap: float | None,
    sinks: Float[Array, "K G"] | None = None,
    value_size: int | None = None,
) -> Float[Array, "B K G S W"]:
    """``softmax(queries @ keys.T) @ values`` over the columns of all segments; float32.

    Keys that a group of rows shares are read once for the group. A query that may attend to nothing gets the mean of
    all values, which is finite.

    Args:
        queries: scaled.
        segments: the keys and values, with their masks.
        softcap: ``c`` in ``c * tanh(score / c)``; None without.
        sinks: a score for each head that takes part in the softmax and has a value of 0; None without.
        value_size: if the entries have no values, how many of the first components of a key are its value.
    """
    G, S = queries.shape[2:4]
    all_scores = []
    for segment in segments:
        # On CPU, a product with two or more rows sums in the order of the trainer's, which has many rows; one with a
        # single row does not.
        grouped = segment.group(queries)
        keys = segment.entry["keys"].astype(queries.dtype)
        scores = jnp.einsum("nkme,nkec->nkmc", grouped, keys, preferred_element_type=jnp.float32)
        if "key_scales" in segment.entry:
            scores = scores * segment.entry["key_scales"][:, :, None, :]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        N, K, M, C = scores.shape
        split = scores.reshape(N, K, M // S, S, C)
        all_scores.append(jnp.where(segment.mask[:, None, None], split, MASKED_SCORE).reshape(N, K, M, C))
    peaks = [seg.ungroup(s.max(-1, keepdims=True), G, S) for seg, s in zip(segments, all_scores, strict=True)]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    by_head = None if sinks is None else sinks[None, :, :, None, None]
    if by_head is not None:
        peak = jnp.maximum(peak, jax.lax.stop_gradient(by_head))
    all_weights = [jnp.exp(s - seg.group(peak)) for seg, s in zip(segments, all_scores, strict=True)]
    totals = [seg.ungroup(w.sum(-1, keepdims=True), G, S) for seg, w in zip(segments, all_weights, strict=True)]
    total = functools.reduce(jnp.add, totals)
    if by_head is not None:
        total = total + jnp.exp(by_head - peak)
    # Weights are divided before the product, and segments are added without a factor. Otherwise XLA may fuse a product
    # and a sum into one rounding in the sampler's program and not in the trainer's.
    out = []
    for segment, weights in zip(segments, all_weights, strict=True):
        weights = weights / segment.group(total)
        values, value_scales = _values(segment.entry, value_size)
        if value_scales is not None:
            weights = weights * value_scales[:, :, None, :]
        values = values.astype(queries.dtype)
        weights = weights.astype(queries.dtype)
        product = jnp.einsum("nkmc,nkce->nkme", weights, values, preferred_element_type=jnp.float32)
        out.append(segment.ungroup(product, G, S))
    return functools.reduce(jnp.add, out)


def _values(entry: CacheEntry, size: int | None) -> tuple[Array, Array | None]:
    """The values of an entry ``[N, K, C, W]``, and their scales ``[N, K, C]``."""
    if size is None:
        return entry["values"], entry.get("value_scales")
    return entry["keys"][:, :, :size].swapaxes(2, 3), entry.get("key_scales")


def attend_in_blocks(
    queries: Float[Array, "B K G S E"],
    entry: CacheEntry,
    mask: Bool[Array, "B S S"],
    softcap: float | None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B K G S W"]:
    """``attend`` of a call's tokens among themselves, without the keys after each block of queries.

    Over long rows this saves up to half of the scores. It rounds differently than ``attend``, which sums over all keys.

    Args:
        queries: scaled.
        entry: the call's keys and values.
        mask: as returned by ``attention_mask``.
        softcap, sinks: as in ``attend``.
    """
    blocks = []
    for start in range(0, queries.shape[3], QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries.shape[3])
        seen = KVSegment(slice_columns(entry, 0, end), mask[:, start:end, :end])
        blocks.append(attend(queries[:, :, :, start:end], [seen], softcap, sinks))
    return jnp.concatenate(blocks, axis=3)


class AttentionInputs(NamedTuple):
    """The inputs of a layer's attention other than the residual stream.

    Attributes:
        rotation: rotary cosines and sines of the tokens; None for a layer without positions.
        start: the cache column at which the call's keys and values are written.
        masks: attention mask over each block of the cache's columns (without a cache, of the call's own keys).
        prefixes: the segments before the cache.
        packed_mask: if given, the call's tokens are packed sequences that attend among themselves; the mask over their
            keys, as returned by ``attention_mask``. ``masks`` and ``prefixes`` are empty then.
        kernel_mask: if given, the call attends only to its own tokens and a fused kernel may compute it; the kernel's
            mask or segment ids. ``masks`` and ``prefixes`` are empty then.
        token_mask: mask or segment ids of the call's own tokens, for layers that are recurrences; None if all are real.
    """

    rotation: Rotation | None
    start: int | Int[Array, ""]
    masks: Sequence[Bool[Array, "M S _"]]
    prefixes: Sequence[KVSegment]
    packed_mask: Bool[Array, "B S S"] | None = None
    kernel_mask: Bool[Array, "B S"] | Int[Array, "B S"] | Segments | None = None
    token_mask: Bool[Array, "B S"] | Int[Array, "B S"] | Segments | None = None
