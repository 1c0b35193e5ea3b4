"""The KV cache of a layer: initialization, writes, and slices and concatenation along columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import DecoderConfig

CacheEntry = dict[str, Array]
"""A layer's ``keys [B, K, E, C]`` and ``values [B, K, C, E]``; in int8 with ``key_scales`` and ``value_scales``
``[B, K, C]``, their factors. Of latent attention ``keys`` alone, with K = 1."""
COLUMN_AXES = {"keys": 3, "values": 2, "key_scales": 2, "value_scales": 2}


def init_entry(config: DecoderConfig, batch: int, columns: int, dtype: Any) -> CacheEntry:
    """The cache of a layer, filled with zeros.

    Args:
        config: of the decoder.
        batch: B.
        columns: C.
        dtype: of keys and values.
    """
    K, E, latent = config.num_kv_heads, config.head_dim, config.latent
    if latent is not None:
        K, E = 1, latent.rank + latent.rope_dim
    entry = {"keys": jnp.zeros((batch, K, E, columns), dtype)}
    if latent is None:
        entry["values"] = jnp.zeros((batch, K, columns, E), dtype)
    if dtype == jnp.int8:
        scales = {"keys": "key_scales", "values": "value_scales"}
        entry |= {scales[name]: jnp.zeros((batch, K, columns), jnp.float32) for name in entry}
    return entry


def num_columns(cache: Sequence[CacheEntry]) -> int:
    """C, the columns of a cache.

    Args:
        cache: an entry for each layer.
    """
    return next(entry["keys"].shape[3] for entry in cache if "keys" in entry)


def write(entry: CacheEntry, new: CacheEntry, start: int | Int[Array, ""]) -> CacheEntry:
    """The cache with new columns.

    Args:
        entry: the cache; its dtype is kept.
        new: keys and values of a call's tokens, in floating point.
        start: the column of the first token.
    """
    if "key_scales" in entry:
        whole = {}
        for name, axis in (("keys", 2), ("values", 3)):
            if name in new:
                whole[name], whole[f"{name[:-1]}_scales"] = quantize(new[name], axis=axis)
        new = whole
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            entry[name], x.astype(entry[name].dtype), start, axis=COLUMN_AXES[name]
        )
        for name, x in new.items()
    }


def quantize(x: Float[Array, "B K _ _"], axis: int) -> tuple[Int[Array, "B K _ _"], Float[Array, "B K _"]]:
    """``x`` as int8 times a scale for each vector, whose largest entry becomes 127.

    Args:
        x: keys or values.
        axis: axis of the vectors: 2 for keys, 3 for values.

    Returns:
        The int8 entries, and the scales in float32 without ``axis``.
    """
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis, keepdims=True) / 127
    # A vector of zeros has scale 0, which must not be divided by.
    whole = jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scales, axis)


def slice_columns(entry: CacheEntry, start: int, end: int) -> CacheEntry:
    """Consecutive columns of a cache.

    Args:
        entry: the cache.
        start: the first column.
        end: the column after the last.
    """
    return {name: jax.lax.slice_in_dim(x, start, end, axis=COLUMN_AXES[name]) for name, x in entry.items()}


def concatenate_columns(entries: Sequence[CacheEntry]) -> CacheEntry:
    """Caches of the same rows, concatenated along columns."""
    return {name: jnp.concatenate([entry[name] for entry in entries], COLUMN_AXES[name]) for name in entries[0]}
