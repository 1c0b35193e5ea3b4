"""Checks of the arguments that a decoder is built and called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.kv_cache import columns_by_window, ring_columns
from grpo_jax.types import Cache, PrefixCache, Segments

COMPUTE_DTYPES = (jnp.float32, jnp.bfloat16)


def check_dtype(dtype: Any) -> None:
    """Check the compute dtype of a decoder.

    Args:
        dtype: of its computations.

    Raises:
        ValueError: it is neither float32 nor bfloat16.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype must be float32 or bfloat16, not {jnp.dtype(dtype).name}")


def check_call(
    config: DecoderConfig,
    token_ids: Array,
    mask: Array | Segments | None,
    cache: Cache,
    start: int | Array,
    prefixes: Sequence[PrefixCache],
    *,
    is_stacked: bool,
) -> None:
    """Check that a call's tokens and mask fit the columns, and that a call which continues others has their states.

    Args:
        config: of the decoder.
        token_ids, mask, cache, start, prefixes: as in ``types.Model.apply``.
        is_stacked: whether the parameters have stacked layers, which take whole sequences only.

    Raises:
        ValueError: at trace time, if not.
    """
    _check_columns(config, token_ids, mask, cache, start)
    if prefixes or not isinstance(start, int) or start:
        if is_stacked:
            raise ValueError("parameters with stacked layers are for whole sequences: start must be 0, no prefixes")
        _check_states(config, cache)


def _check_columns(
    config: DecoderConfig, token_ids: Array, mask: Array | Segments | None, cache: Cache, start: int | Array
) -> None:
    S = token_ids.shape[1]
    by_window = {None: S} if cache is None else columns_by_window(config.windows, cache)
    columns = min(by_window.values())
    if mask is not None and columns < max(by_window.values()):
        raise ValueError("a ring cache takes no mask, since a column has one token after the other")
    mask_columns = columns if mask is None else (mask.ids if isinstance(mask, Segments) else mask).shape[1]
    if mask_columns != columns:
        holder = "the call has tokens" if cache is None else "the cache"
        raise ValueError(f"the mask must have as many columns as {holder}: {columns}, not {mask_columns}")
    if isinstance(mask, Segments) and cache is not None:
        raise ValueError("Segments are a mask of the call's own tokens: call without a cache")
    if columns < S:
        raise ValueError(f"{S} tokens do not fit into a cache of {columns} columns")
    if cache is None or S == 1 or isinstance(start, int):
        return
    if any(ring_columns(window, n + 1) == n for window, n in by_window.items()):
        raise ValueError(f"{S} tokens at a traced slot of a ring cache, which takes one token at a time")


def _check_states(config: DecoderConfig, cache: Cache) -> None:
    recurrent = [layer for layer, kind in enumerate(config.kinds) if kind.mixer == "delta_rule"]
    if recurrent and (cache is None or not all("state" in cache[layer] for layer in recurrent)):
        raise ValueError(
            "a call on tokens after the first needs the states of the layers with the gated delta rule: add those that "
            "an earlier call returned (Model.init_states) to the cache"
        )
