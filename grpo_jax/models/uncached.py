"""A model from a function of whole sequences, without a KV cache: every decode step recomputes its sequences."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.masked import positions as positions_of
from grpo_jax.models.output_head import make_token_scores
from grpo_jax.sharding import take_rows
from grpo_jax.types import Cache, Model, Params, PrefixCache

ApplyFn = Callable[[Params, Int[Array, "B S"], Int[Array, "B S"], Bool[Array, "B S"]], Float[Array, "B S W"]]
"""``(params, ids, positions, mask) -> logits [B, S, V] or hidden states [B, S, D]``."""


def from_apply(
    apply: ApplyFn,
    *,
    vocab_size: int,
    head: Callable[[Params], Float[Array, "V D"]] | None = None,
    max_length: int | None = None,
) -> Model:
    """A ``Model`` from ``(params, ids, positions, mask) -> logits or hidden states``, of any framework.

    In place of keys and values, the cache holds token ids and positions: each decode step recomputes its whole
    sequences and keeps the last outputs. A completion of T tokens costs T forward passes over up to P + T columns (T
    rounded up to 64s), O(T^2), as a warning says; training costs as much as with any model. ``Sampler`` counts in
    ``cache_bytes`` ids and positions, not the activations of a forward pass: limit its batches by ``max_rows``. On a
    mesh, rows are sharded; ``params`` may be replicated, or sharded in any way that ``apply`` can be compiled for.

    Args:
        apply: must be causal: the output at a column, from which the next token is predicted, depends on the ids up to
            it. Each row of ``ids`` holds its tokens from column 0 on, whatever their padding in prompt and completion,
            then zeros; ``positions`` are 0, 1, 2, ... and ``mask`` is True at the tokens. A causal function may
            therefore ignore ``mask``. It is traced for several lengths, and must work for all of them.
        vocab_size: V.
        head: ``params -> [V, D]``, the output embedding, for an ``apply`` that returns hidden states [B, S, D]: logits
            are then computed for few tokens at a time. None if it returns logits [B, S, V]: these exist for the whole
            batch in training, and for all tokens of all rows in every decode step.
        max_length: longest sequence that ``apply`` supports, in tokens: it gets no more columns, and outputs of later
            tokens are NaN. None for no limit.

    Returns:
        The model, for ``rollout`` and ``train``; with logits, the hidden states of these are the logits. It refuses
        packed sequences and a ``cache_dtype``.

    Raises:
        TypeError: ``apply`` does not take four positional arguments.
        ValueError: ``vocab_size`` or ``max_length`` below 1; at trace time, outputs or a head of another shape.
    """
    _check_arguments(apply, vocab_size, max_length)
    warnings.warn(
        "from_apply: this model has no KV cache, and every sampled token costs a forward pass over its whole sequence, "
        "so that T tokens cost O(T^2)",
        stacklevel=2,
    )

    def output_embedding(params: Params) -> Float[Array, "V D"] | None:
        if head is None:
            return None
        table = head(params)
        if getattr(table, "ndim", None) != 2 or table.shape[0] != vocab_size:
            hint = "; transpose it" * (getattr(table, "shape", ())[1:] == (vocab_size,))
            raise ValueError(f"head returned {_kind(table)}; it must return [V, D] with V = {vocab_size}{hint}")
        return table

    def apply_with_cache(
        params: Params,
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        mask: Bool[Array, "B C"] | Int[Array, "B C"] | None = None,
        cache: Cache = None,
        start: int | Int[Array, ""] = 0,
        prefixes: Sequence[PrefixCache] = (),
        block_bounds: Sequence[int] = (),
    ) -> tuple[Float[Array, "B S W"], Cache]:
        if mask is not None and mask.dtype != bool:
            raise ValueError("a model of from_apply has no attention within segments; train it on unpacked sequences")
        B, S = token_ids.shape
        new = {"ids": token_ids, "positions": positions}
        cache = _write(_init_cache(B, S) if cache is None else cache, new, start)
        tokens, real, first = _sequences(cache, mask, start, S, prefixes)
        # Real tokens first; zeros in padding, where ids may be outside the vocabulary.
        order = jnp.argsort(~real, axis=1, stable=True)[:, :max_length]
        is_token = jnp.take_along_axis(real, order, axis=1)
        aligned = {name: jnp.where(is_token, jnp.take_along_axis(x, order, axis=1), 0) for name, x in tokens.items()}
        outputs = apply(params, aligned["ids"], aligned["positions"], is_token)
        _check_outputs(outputs, is_token.shape, vocab_size, jax.eval_shape(output_embedding, params))
        columns = jax.lax.dynamic_slice_in_dim(positions_of(real), first, S, axis=1)
        return jnp.take_along_axis(outputs, columns[:, :, None], axis=1), cache

    return Model(
        apply_with_cache,
        rope=lambda positions: positions,
        head=output_embedding,
        token_scores=make_token_scores(output_embedding, logit_softcap=None, mesh=None),
        init_cache=_init_cache,
        first_columns=lambda cache, length: jax.tree.map(lambda x: x[:, :length], cache),
        join_columns=lambda caches, starts, length: jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *caches),
        vocab_size=vocab_size,
        max_length=max_length,
    )


def _init_cache(batch: int, length: int, cache_dtype: Any = None, *, ring: bool = False) -> Cache:
    del ring  # sequences are recomputed as a whole, so that all columns are kept
    if cache_dtype is not None:
        raise ValueError(f"cache_dtype is {cache_dtype}, but a model of from_apply stores no keys and values; leave it")
    return {name: jnp.zeros((batch, length), jnp.int32) for name in ("ids", "positions")}


def _write(cache: Cache, new: Cache, start: int | Int[Array, ""]) -> Cache:
    def written(old, x):
        return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, axis=1)

    return jax.tree.map(written, cache, new)


def _sequences(
    cache: Cache,
    mask: Bool[Array, "B C"] | None,
    start: int | Int[Array, ""],
    count: int,
    prefixes: Sequence[PrefixCache],
) -> tuple[Cache, Bool[Array, "B _"], int | Int[Array, ""]]:
    """The whole sequences of a call of ``count`` tokens, True at real tokens, and the column of its first token."""
    B, C = cache["ids"].shape
    real = jnp.broadcast_to(jnp.arange(C)[None, :] < start + count, (B, C))
    own = (cache, real if mask is None else real & mask)
    if isinstance(start, int):
        own = jax.tree.map(lambda x: x[:, : start + count], own)
    parts = [*(_expanded(prefix, B) for prefix in prefixes), own]
    tokens, real = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)
    return tokens, real, real.shape[1] - own[1].shape[1] + start


def _expanded(prefix: PrefixCache, rows: int) -> tuple[Cache, Bool[Array, "B C"]]:
    """The tokens of a prefix, and True at real ones, for each of the rows that share its entries."""
    N, C = prefix.cache["ids"].shape
    entries = (prefix.cache, jnp.ones((N, C), bool) if prefix.mask is None else prefix.mask)
    if prefix.gather_index is None or prefix.scatter_index is None:
        return jax.tree.map(lambda x: jnp.repeat(x, rows // N, axis=0), entries)
    devices, places = prefix.gather_index.shape
    entry_of_row = prefix.scatter_index // (places // (N // devices))
    return jax.tree.map(lambda x: take_rows(x, entry_of_row), entries)


def _check_arguments(apply: Any, vocab_size: int, max_length: int | None) -> None:
    for name, size in (("vocab_size", vocab_size), ("max_length", max_length)):
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    try:
        signature = inspect.signature(apply)
    except ValueError:  # some callables of extension modules have none
        return
    try:
        signature.bind(*range(4))
    except TypeError:
        raise TypeError(
            f"apply takes {signature}; it must take (params, ids, positions, mask), such as "
            "lambda params, ids, positions, mask: your_function(params, ids)"
        ) from None


def _check_outputs(outputs: Any, tokens: tuple[int, ...], vocab_size: int, table: Any) -> None:
    shape = (*tokens, vocab_size if table is None else table.shape[1])
    if getattr(outputs, "shape", None) == shape and jnp.issubdtype(outputs.dtype, jnp.floating):
        return
    wanted = "logits [B, S, V]" if table is None else "hidden states [B, S, D] as wide as the head's"
    hint = ""
    if table is None and getattr(outputs, "shape", ())[:-1] == tokens:
        hint = "; if these are hidden states, pass head=, and if they are logits, vocab_size is not theirs"
    raise ValueError(f"apply returned {_kind(outputs)}; it must return {wanted}, a floating-point {list(shape)}{hint}")


def _kind(x: Any) -> str:
    if not hasattr(x, "shape"):
        return f"a {type(x).__name__}"
    return f"an array {list(x.shape)} of {x.dtype}"
