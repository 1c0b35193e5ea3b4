"""Keys and values of a layer: empty, written to, cut and joined by columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import DecoderConfig

CacheEntry = dict[str, Array]
"""A layer's ``keys [B, K, E, C]`` and ``values [B, K, C, E]``; in int8 with the ``key_scales`` and ``value_scales``
``[B, K, C]`` that they are multiplied by."""
COLUMN_AXES = {"keys": 3, "values": 2, "key_scales": 2, "value_scales": 2}


def empty_entry(config: DecoderConfig, batch: int, columns: int, dtype: Any) -> CacheEntry:
    """The cache of a layer."""
    K, E = config.num_kv_heads, config.head_dim
    entry = {"keys": jnp.zeros((batch, K, E, columns), dtype), "values": jnp.zeros((batch, K, columns, E), dtype)}
    if dtype == jnp.int8:
        entry |= {name: jnp.zeros((batch, K, columns), jnp.float32) for name in ("key_scales", "value_scales")}
    return entry


def written(entry: CacheEntry, own: CacheEntry, start: int | Int[Array, ""]) -> CacheEntry:
    """The entry with a call's own keys and values in it, from column ``start`` on, in the entry's precision."""
    if "key_scales" in entry:
        keys, key_scales = quantized(own["keys"], axis=2)
        values, value_scales = quantized(own["values"], axis=3)
        own = {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            entry[name], new.astype(entry[name].dtype), start, axis=COLUMN_AXES[name]
        )
        for name, new in own.items()
    }


def quantized(x: Float[Array, "B K _ _"], axis: int) -> tuple[Int[Array, "B K _ _"], Float[Array, "B K _"]]:
    """``x`` as int8 and what that is multiplied by: ``axis`` has one scale, by which its largest entry is 127."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis, keepdims=True) / 127
    # Of a vector of zeros any multiple is right; the scale must only not be divided by.
    whole = jnp.round(x / jnp.where(scales > 0, scales, 1)).astype(jnp.int8)
    return whole, jnp.squeeze(scales, axis)


def some_columns(entry: CacheEntry, first: int, last: int) -> CacheEntry:
    """Columns from ``first`` to before ``last``."""
    return {name: jax.lax.slice_in_dim(x, first, last, axis=COLUMN_AXES[name]) for name, x in entry.items()}


def joined_columns(entries: Sequence[CacheEntry]) -> CacheEntry:
    """Entries of the same rows, their columns one after the other."""
    return {name: jnp.concatenate([entry[name] for entry in entries], COLUMN_AXES[name]) for name in entries[0]}
