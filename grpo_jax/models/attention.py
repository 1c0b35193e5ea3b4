"""Softmax attention over several segments of keys and values, each shared by a group of rows.

Shapes are those of ``layers``. Tokens and keys have slots, numbered from the first column of the call's own keys or
cache; earlier columns have negative slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.kv_cache import CacheEntry
from grpo_jax.models.rope import Rotation
from grpo_jax.sharding import take_rows

# Finite, so that a row in which every score is this one has a softmax and a gradient.
MASKED_SCORE = -0.5 * float(np.finfo(np.float32).max)


def allowed_slots(
    mask: Bool[Array, "N C"] | Int[Array, "N C"] | None,
    slots: Int[Array, " S"],
    first: int | Int[Array, ""],
    columns: int,
    window: int | None,
) -> Bool[Array, "M S {columns}"]:
    """Which columns each token may attend to: unmasked, not after its own slot, and less than ``window`` before it.

    Args:
        mask: False at columns that nobody may attend to; None for none of them (M is 1 then, N otherwise). Or the
            number of each slot's sequence, 0 for none: tokens then attend to columns of their own number alone.
        slots: where the tokens stand.
        first: the slot of the first column.
        columns: how many there are.
        window: of the layer; None sees all.
    """
    distances = slots[:, None] - (first + jnp.arange(columns))[None, :]
    reachable = distances >= 0
    if window is not None:
        reachable &= distances < window
    if mask is None:
        return reachable[None]
    if mask.dtype != bool:
        return (mask[:, slots, None] == mask[:, None, :]) & (mask > 0)[:, None, :] & reachable[None]
    return mask[:, None, :] & reachable[None]


class KVSegment(NamedTuple):
    """A part of the keys and values that a call's tokens attend to: N entries, each shared by a group of rows.

    ``gather`` and ``place`` are those of ``types.PrefixCache``.
    """

    entry: CacheEntry
    allowed: Bool[Array, "M S C"]
    gather: Int[Array, "devices places"] | None = None
    place: Int[Array, "devices rows"] | None = None

    def grouped(self, x: Float[Array, "B K G S W"]) -> Float[Array, "N K M W"]:
        """A group's queries, over rows and heads, as rows of one product with the group's keys."""
        x = x if self.gather is None else take_rows(x, self.gather)
        N = self.entry["keys"].shape[0]
        B, K, G, S, W = x.shape
        return x.reshape(N, B // N, K, G, S, W).transpose(0, 2, 1, 3, 4, 5).reshape(N, K, B // N * G * S, W)

    def apart(self, x: Float[Array, "N K M W"], heads: int, tokens: int) -> Float[Array, "B K G S W"]:
        """The reverse, for so many heads of a group and tokens of the call."""
        (N, K, M, W), G, S = x.shape, heads, tokens
        R = M // (G * S)
        x = x.reshape(N, K, R, G, S, W).transpose(0, 2, 1, 3, 4, 5).reshape(N * R, K, G, S, W)
        return x if self.place is None else take_rows(x, self.place)


def attend(
    queries: Float[Array, "B K G S E"], parts: Sequence[KVSegment], softcap: float | None
) -> Float[Array, "B K G S E"]:
    """Softmax attention to all parts together, in float32.

    Keys shared by a group of rows are read once for it. A query that may attend to nothing gets the mean of all values,
    which is finite.
    """
    G, S = queries.shape[2:4]
    all_scores = []
    for part in parts:
        # On CPU a product with two rows or more sums in the order of the trainer's, which has many; one with a single
        # row does not.
        grouped = part.grouped(queries)
        keys = part.entry["keys"].astype(queries.dtype)
        scores = jnp.einsum("nkme,nkec->nkmc", grouped, keys, preferred_element_type=jnp.float32)
        if "key_scales" in part.entry:
            scores = scores * part.entry["key_scales"][:, :, None, :]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        N, K, M, C = scores.shape
        split = scores.reshape(N, K, M // S, S, C)
        all_scores.append(jnp.where(part.allowed[:, None, None], split, MASKED_SCORE).reshape(N, K, M, C))
    peaks = [part.apart(s.max(-1, keepdims=True), G, S) for part, s in zip(parts, all_scores, strict=True)]
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
    all_weights = [jnp.exp(s - part.grouped(peak)) for part, s in zip(parts, all_scores, strict=True)]
    totals = [part.apart(w.sum(-1, keepdims=True), G, S) for part, w in zip(parts, all_weights, strict=True)]
    total = functools.reduce(jnp.add, totals)
    # Weights are divided before the product, and parts are added without a factor: so that no product and sum are fused
    # into one rounding in the sampler's program and into two in the trainer's.
    out = []
    for part, weights in zip(parts, all_weights, strict=True):
        weights = weights / part.grouped(total)
        if "value_scales" in part.entry:
            weights = weights * part.entry["value_scales"][:, :, None, :]
        values = part.entry["values"].astype(queries.dtype)
        weights = weights.astype(queries.dtype)
        product = jnp.einsum("nkmc,nkce->nkme", weights, values, preferred_element_type=jnp.float32)
        out.append(part.apart(product, G, S))
    return functools.reduce(jnp.add, out)


class AttentionInputs(NamedTuple):
    """What the tokens of a call may look at in one layer.

    Attributes:
        rotation: of their positions.
        start: the column of the cache where the first of them is written.
        allowed: which columns of the cache (of the call's own keys, without one) each may attend to, for each of the
            parts that they are cut into.
        prefixes: what comes before the cache.
        own_mask: where it is given, the call's own tokens are all there is to look at, and a kernel may compute it:
            which of them nobody may attend to, or whose they are. ``allowed`` and ``prefixes`` are empty then.
    """

    rotation: Rotation
    start: int | Int[Array, ""]
    allowed: Sequence[Bool[Array, "M S _"]]
    prefixes: Sequence[KVSegment]
    own_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None
