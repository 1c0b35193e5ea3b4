"""The one decoder: from a config to the pure functions that the rest of the package calls."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.models.attention import AttentionInputs, KVSegment, allowed_slots
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.kernels import AttentionName, Kernel, choose_kernel
from grpo_jax.models.kv_cache import CacheEntry, empty_entry, joined_columns, some_columns
from grpo_jax.models.layers import Block, Embedding, Norm, ScalarHead
from grpo_jax.models.rope import Rotation, rotation
from grpo_jax.sharding import BATCH, constrain
from grpo_jax.types import Cache, Model, Params, PrefixCache

COMPUTE_DTYPES = (jnp.float32, jnp.bfloat16)
CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)
Rotations = dict[int, Rotation]
"""The rotation of each kind of layer, under the number of the first layer that has it."""


def all_rotations(config: DecoderConfig, positions: Int[Array, "B S"]) -> Rotations:
    """What every layer turns its queries and keys by."""
    return {config.ropes.index(rope): rotation(rope, config.head_dim, positions) for rope in config.ropes}


class Decoder(nn.Module):
    """Embedding, blocks and final norm. It never forms logits: the output embedding is only declared here.

    Parameters come from ``init_params`` or a checkpoint; what the modules' own initializers decide is shapes.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    kernel: Kernel | None = None
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        block = nn.remat(Block) if self.remat else Block
        kernels = {window: self.kernel and partial(self.kernel, window=window) for window in set(c.windows)}
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.param_dtype, self.mesh)
        self.layers = [block(c, self.dtype, self.param_dtype, kernels[window]) for window in c.windows]
        self.final_norm = Norm(c.norm_epsilon, c.norm_offset, self.param_dtype)
        if c.scalar_head:
            self.score = ScalarHead(c.hidden_size, self.param_dtype)
        elif not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size, self.param_dtype)

    def __call__(
        self,
        token_ids: Int[Array, "B S"],
        rotations: Rotations,
        mask: Bool[Array, "B C"] | Int[Array, "B C"] | None,
        cache: list[CacheEntry] | None,
        start: int | Int[Array, ""],
        prefixes: Sequence[PrefixCache] = (),
        block_bounds: Sequence[int] = (),
    ) -> tuple[Float[Array, "B S D"], list[CacheEntry]]:
        """See ``Model.apply``."""
        c = self.config
        S = token_ids.shape[1]
        columns = S if cache is None else cache[0]["values"].shape[2]
        x = self.embed(token_ids).astype(self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        x = constrain(x, self.mesh, BATCH)
        slots = start + jnp.arange(S)
        own_mask = None
        if self.kernel is not None and S > 1 and isinstance(start, int) and start == 0 and not prefixes:
            own_mask = jnp.ones(token_ids.shape, bool) if mask is None else mask[:, :S]
        allowed, allowed_of_contexts = {}, {}
        for window in set(c.windows):
            if own_mask is not None:
                allowed[window], allowed_of_contexts[window] = [], []
                continue
            allowed[window] = jnp.split(allowed_slots(mask, slots, 0, columns, window), block_bounds, axis=2)
            allowed_of_contexts[window] = [
                allowed_slots(context.mask, slots, context.start, context.cache[0]["values"].shape[2], window)
                for context in prefixes
            ]
        entries = []
        for i, layer in enumerate(self.layers):
            before = [
                KVSegment(context.cache[i], columns, context.gather_index, context.scatter_index)
                for context, columns in zip(prefixes, allowed_of_contexts[c.windows[i]], strict=True)
            ]
            view = AttentionInputs(rotations[c.ropes.index(c.ropes[i])], start, allowed[c.windows[i]], before, own_mask)
            x, entry = layer(x, view, None if cache is None else cache[i])
            x = constrain(x, self.mesh, BATCH)
            entries.append(entry)
        return self.final_norm(x), entries

    def declare(self, token_ids: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> None:
        """Touch every parameter, so that ``init`` creates them all."""
        self(token_ids, all_rotations(self.config, token_ids), mask, None, 0)
        if self.config.scalar_head:
            self.score.weights()
        elif not self.config.tie_word_embeddings:
            self.lm_head.table()


def build_model(
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
    attention: AttentionName = "plain",
    mesh: Mesh | None = None,
) -> Model:
    """The pure functions of a decoder; see ``Model`` for what they take and give.

    The cache is a list with ``{"keys", "values"}`` for each layer, ``[B, K, head_dim, C]`` and ``[B, K, C, head_dim]``
    in ``dtype`` unless ``init_cache`` is told another. Norms, rotations and softmax are computed in float32 whatever
    ``dtype`` is.

    Args:
        config: what the decoder is made of.
        dtype: the precision of matrix products and of the residual stream, float32 or bfloat16; parameters are cast
            to it where they are used and may be stored in another.
        remat: whether the backward pass computes each block again instead of keeping what it needs of it.
        attention: what computes the attention of a whole sequence to itself, in training and in reading prompts;
            see ``kernels.choose_kernel``.
        mesh: that sequences are split over; None for one device, or to leave it to the compiler, which then may have
            every device hold a part of every sequence.

    Raises:
        ValueError: for another ``dtype``, or a kernel that cannot compute this model; and by ``apply``, at trace time,
            if the mask's columns are not the cache's (the call's tokens, without a cache), or if the call has more
            tokens than the cache has columns.
    """
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype must be float32 or bfloat16, not {jnp.dtype(dtype).name}")
    module = Decoder(config, dtype, remat=remat, kernel=choose_kernel(attention, config, dtype, mesh), mesh=mesh)

    def apply(
        params: Params,
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"] | Rotations,
        mask: Bool[Array, "B C"] | Int[Array, "B C"] | None = None,
        cache: Cache = None,
        start: int | Int[Array, ""] = 0,
        prefixes: Sequence[PrefixCache] = (),
        block_bounds: Sequence[int] = (),
    ) -> tuple[Float[Array, "B S D"], Cache]:
        columns = token_ids.shape[1] if cache is None else cache[0]["values"].shape[2]
        if mask is not None and mask.shape[1] != columns:
            holder = "the call has tokens" if cache is None else "the cache"
            raise ValueError(f"the mask needs as many columns as {holder}: {columns}, not {mask.shape[1]}")
        if token_ids.shape[1] > columns:
            raise ValueError(f"{token_ids.shape[1]} tokens do not fit into a cache of {columns} columns")
        rotations = positions if isinstance(positions, dict) else rope(positions)
        return module.apply({"params": params}, token_ids, rotations, mask, cache, start, prefixes, block_bounds)  # pyright: ignore[reportReturnType]

    rope = partial(all_rotations, config)

    def head(params: Params) -> Float[Array, "V D"]:
        if config.scalar_head:
            return params["score"]["kernel"].T
        return params["embed" if config.tie_word_embeddings else "lm_head"]["embedding"]

    def init_cache(batch: int, length: int, cache_dtype: Any = None) -> Cache:
        names = {jnp.dtype(kept_in).name: kept_in for kept_in in CACHE_DTYPES}
        name = str(getattr(cache_dtype, "__name__", cache_dtype))
        kept_in = dtype if cache_dtype is None else names.get(name)
        if kept_in is None:
            raise ValueError(f"a cache is {', '.join(names)}, not {name}")
        return [empty_entry(config, batch, length, kept_in) for _ in range(config.num_layers)]

    def first_columns(cache: Cache, length: int) -> Cache:
        return [some_columns(entry, 0, length) for entry in cache]

    def join_columns(caches: Sequence[Cache]) -> Cache:
        return [joined_columns(entries) for entries in zip(*caches, strict=True)]

    return Model(
        apply,
        rope,
        head,
        init_cache,
        first_columns,
        join_columns,
        config.logit_softcap,
        max_length=config.max_position_embeddings,
        rope_switch_length=config.rope_switch_length,
    )


def init_params(config: DecoderConfig, key: Key[Array, ""], *, param_dtype: Any = jnp.float32) -> Params:
    """New parameters: weights normal with deviation ``initializer_range``, biases 0, norms neutral.

    Args:
        config: what the decoder is made of.
        key: decides the weights; each parameter's depend on it and on the parameter's path alone.
        param_dtype: what they are stored in.

    Returns:
        a nested dict such as ``{"embed": {"embedding": [V, D]}, "layers_0": {"attention": {"q": {"kernel":
        [D, H, head_dim]}, ...``; ``lm_head`` is there only where embeddings are untied, ``score`` in its place where
        the head is a scalar one.
    """

    def new(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        if kind == "scale":
            return jnp.full(leaf.shape, 1 - config.norm_offset, leaf.dtype)
        if kind == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return _normal(own_key, leaf.shape, leaf.dtype, config.initializer_range)

    return jax.tree.map_with_path(new, param_shapes(config, param_dtype))


@partial(jax.jit, static_argnames=("shape", "dtype", "deviation"))
def _normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any, deviation: float) -> Array:
    return (jax.random.normal(key, shape) * deviation).astype(dtype)


def param_shapes(config: DecoderConfig, param_dtype: Any = jnp.float32) -> Any:
    """The tree of ``init_params`` with a ``ShapeDtypeStruct`` for each array; nothing is computed."""
    first = replace(config, num_layers=min(config.num_layers, 1), windows=config.windows[:1], ropes=config.ropes[:1])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), _shapes_of_one_layer(first))
    layers = {f"layers_{i}": jax.tree.map(lambda leaf: leaf, shapes["layers_0"]) for i in range(config.num_layers)}
    return {**shapes, **layers}


@lru_cache(maxsize=8)
def _shapes_of_one_layer(config: DecoderConfig) -> Any:
    """The tree of a decoder with one layer, which is traced for all: they have the same parameters."""
    one_token = (jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool))
    init = partial(Decoder(config).init, method=Decoder.declare)
    return jax.eval_shape(init, jax.random.key(0), *one_token)["params"]
