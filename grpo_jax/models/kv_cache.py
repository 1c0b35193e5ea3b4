"""The KV cache of a layer: initialization, writes, and slices and concatenation along columns.

A layer with a sliding window may have a ring cache, of fewer columns than tokens: of C columns, the token of slot ``s``
is in column ``s % C``, where it replaces an earlier one. With as many columns as tokens, that is column ``s``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import DecoderConfig
from grpo_jax.types import Cache, cache_columns

CacheEntry = dict[str, Array]
"""A layer's ``keys [B, K, E, C]`` and ``values [B, K, C, E]``; in int8 with ``key_scales`` and ``value_scales``
``[B, K, C]``, their factors. Of latent attention ``keys`` alone, with K = 1."""
CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)
COLUMN_AXES = {"keys": 3, "values": 2, "key_scales": 2, "value_scales": 2}


def init_cache(
    config: DecoderConfig, dtype: Any, batch: int, length: int, cache_dtype: Any = None, *, ring: bool = False
) -> Cache:
    """The cache of a decoder, a list of its layers' caches.

    Args:
        config: of the decoder.
        dtype: of the decoder's computations.
        batch, length, cache_dtype, ring: as in ``types.Model.init_cache``.

    Raises:
        ValueError: for another ``cache_dtype``.
    """
    supported = {jnp.dtype(each).name: each for each in CACHE_DTYPES}
    name = str(getattr(cache_dtype, "__name__", cache_dtype))
    entry_dtype = dtype if cache_dtype is None else supported.get(name)
    if entry_dtype is None:
        raise ValueError(f"cache_dtype must be one of {', '.join(supported)}, not {name}")
    columns = [ring_columns(window, length) if ring else length for window in config.windows]
    layers = zip(config.kinds, columns, strict=True)
    return [init_entry(config, batch, C, entry_dtype) if kind.mixer == "attention" else {} for kind, C in layers]


def first_columns(windows: Sequence[int | None], cache: Cache, length: int) -> Cache:
    """As ``types.Model.first_columns``.

    Args:
        windows: of each layer.
        cache, length: as there.
    """
    layers = zip(cache, windows, strict=True)
    return [last_columns(entry, length, ring_columns(window, length)) for entry, window in layers]


def join_columns(
    windows: Sequence[int | None], caches: Sequence[Cache], starts: Int[Array, " written"], length: Int[Array, ""]
) -> Cache:
    """As ``types.Model.join_columns``.

    Args:
        windows: of each layer.
        caches, starts, length: as there.
    """
    layers = zip(*caches, strict=True)
    return [join_rings(entries, window, starts, length) for entries, window in zip(layers, windows, strict=True)]


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


def num_columns(entry: CacheEntry) -> int:
    """C, the columns of a layer's cache."""
    return entry["keys"].shape[3]


def columns_by_window(windows: Sequence[int | None], cache: Cache) -> dict[int | None, int]:
    """The columns of the layers of each window, which are the same.

    Args:
        windows: of each layer.
        cache: of a decoder.
    """
    layers = zip(windows, cache, strict=True)
    return {window: num_columns(entry) for window, entry in layers if "keys" in entry}


def ring_columns(window: int | None, length: int) -> int:
    """Columns of a layer's ring cache: of the tokens that it sees, with the window rounded up to whole tiles.

    Args:
        window: of the layer; None for full attention, which sees all tokens.
        length: tokens that are written to the cache, at most.
    """
    return length if window is None else min(length, cache_columns(window))


def ring_slots(columns: int, length: int | Int[Array, ""]) -> Int[Array, " {columns}"]:
    """The slot of the token in each column of a ring cache; negative for columns that are empty.

    Args:
        columns: C.
        length: tokens that were written, to slots 0, 1, 2, ...
    """
    last = length - 1
    return last - (last - jnp.arange(columns)) % columns


def write(entry: CacheEntry, new: CacheEntry, start: int | Int[Array, ""]) -> CacheEntry:
    """The cache with new columns.

    Args:
        entry: the cache; its dtype is kept.
        new: keys and values of a call's tokens, in floating point.
        start: slot of the first token; several tokens must be in consecutive columns.
    """
    if num_columns(new) == 1:
        start = start % num_columns(entry)
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
    """Consecutive columns of a cache, without the states of a layer that is a recurrence.

    Args:
        entry: the cache.
        start: the first column.
        end: the column after the last.
    """
    columns = {name: x for name, x in entry.items() if name in COLUMN_AXES}
    return {name: jax.lax.slice_in_dim(x, start, end, axis=COLUMN_AXES[name]) for name, x in columns.items()}


def last_columns(entry: CacheEntry, length: int, columns: int) -> CacheEntry:
    """A ring cache of the last of some tokens.

    Args:
        entry: a cache with the tokens in its first columns.
        length: tokens.
        columns: of the ring; at most ``length``.
    """
    last = slice_columns(entry, length - columns, length)
    if length == columns:
        return last
    return {name: jnp.roll(x, length % columns, COLUMN_AXES[name]) for name, x in last.items()}


def join_rings(
    entries: Sequence[CacheEntry], window: int | None, starts: Int[Array, " written"], length: Int[Array, ""]
) -> CacheEntry:
    """One ring cache of several of a layer that were written one after the other.

    Args:
        entries: caches of the same rows, with ``ring_columns`` each.
        window: of the layer.
        starts: slot of the first token of each cache that was written to; the others come last.
        length: tokens that were written to all of them.
    """
    joined = concatenate_columns(entries)
    if window is None:
        return joined
    columns = ring_columns(window, num_columns(joined))
    if columns == num_columns(joined):
        return joined
    slots, first = ring_slots(columns, length), 0
    index = jnp.zeros(columns, jnp.int32)
    for entry, start in zip(entries, starts, strict=False):
        index = jnp.where(slots >= start, first + (slots - start) % num_columns(entry), index)
        first += num_columns(entry)
    return {name: jnp.take(x, index, axis=COLUMN_AXES[name], mode="clip") for name, x in joined.items()}


def concatenate_columns(entries: Sequence[CacheEntry]) -> CacheEntry:
    """Caches of the same rows, concatenated along columns."""
    return {name: jnp.concatenate([entry[name] for entry in entries], COLUMN_AXES[name]) for name in entries[0]}
