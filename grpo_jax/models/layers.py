"""The layers of the decoder.

Shapes: B sequences, S tokens of the call, C columns that can be attended to, D the width of the residual stream,
H query heads in K groups of G (H = K * G), each of size E.

Tokens and keys stand in slots, numbered from the first column of the call's own keys or cache; what came before it has
slots below 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.config import ACTIVATIONS, DecoderConfig, Rope
from grpo_jax.models.kernels import Kernel
from grpo_jax.sharding import pinned, take_rows

Rotation = tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]]
CacheEntry = dict[str, Array]
"""A layer's ``keys [B, K, E, C]`` and ``values [B, K, C, E]``; in int8 with the ``key_scales`` and ``value_scales``
``[B, K, C]`` that they are multiplied by."""

COLUMN_AXES = {"keys": 3, "values": 2, "key_scales": 2, "value_scales": 2}

# Finite, so that a row in which every score is this one has a softmax and a gradient.
MASKED_SCORE = -0.5 * float(np.finfo(np.float32).max)


def rope_frequencies(rope: Rope, head_dim: int, length: Float[Array, ""] | None = None) -> np.ndarray | Array:
    """Radians per position for each pair of components, float32 ``[head_dim / 2]``; see ``Rope``.

    Computed in float32 throughout, as the models' own code does: at position 100,000 a rounding shows.

    Args:
        rope: their kind.
        head_dim: components of a head.
        length: tokens of the sequence, float32, for the kinds that depend on it; None is the original length.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.float32(rope.theta) ** exponents
    frequencies = np.float32(1) / periods
    if rope.kind == "dynamic" and length is not None:
        ratio = length / rope.original_max_positions
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        return jnp.where(length > rope.original_max_positions, 1 / theta**exponents, frequencies)
    if rope.kind == "longrope":
        short, long = (
            np.float32(1) / (np.asarray(factors, np.float32) * periods)
            for factors in (rope.short_factor, rope.long_factor)
        )
        return short if length is None else jnp.where(length > rope.original_max_positions, long, short)
    if rope.kind in ("default", "dynamic"):
        return frequencies
    scaled = frequencies / np.float32(rope.factor)
    if rope.kind == "linear":
        return scaled
    kept = _kept_by_yarn(rope, head_dim) if rope.kind == "yarn" else _kept_by_llama3(rope, frequencies)
    return kept * frequencies + (1 - kept) * scaled


def _kept_by_llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """How much of each frequency is left unscaled, from 0 to 1."""
    waves_per_length = np.float32(rope.original_max_positions / (2 * np.pi)) * frequencies
    kept = (waves_per_length - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(kept, 0, 1).astype(np.float32)


def _kept_by_yarn(rope: Rope, head_dim: int) -> np.ndarray:
    """How much of each frequency is left unscaled, from 0 to 1."""
    first, last = (
        head_dim * np.log(rope.original_max_positions / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0, 1).astype(np.float32)


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B S"]) -> Rotation:
    """Cosine and sine of the angle at each position, float32, with an axis for the heads."""
    length = (jnp.max(positions) + 1).astype(jnp.float32) if rope.depends_on_length else None
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * rope_frequencies(rope, head_dim, length)[None, None, None]
    )
    if rope.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Float[Array, "B S N E"], rotation: Rotation) -> Float[Array, "B S N E"]:
    """Turn the pairs ``(x[i], x[i + E/2])`` by their angles, in float32."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


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


class Part(NamedTuple):
    """A part of the keys and values that a call's tokens attend to: N entries, each shared by a group of rows.

    ``members`` and ``place`` are those of ``types.Context``.
    """

    entry: CacheEntry
    allowed: Bool[Array, "M S C"]
    members: Int[Array, "devices places"] | None = None
    place: Int[Array, "devices rows"] | None = None

    def grouped(self, x: Float[Array, "B K G S W"]) -> Float[Array, "N K M W"]:
        """A group's queries, over rows and heads, as rows of one product with the group's keys."""
        x = x if self.members is None else take_rows(x, self.members)
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
    queries: Float[Array, "B K G S E"], parts: Sequence[Part], softcap: float | None
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


class Embedding(nn.Module):
    """A table with a row for each token."""

    vocab_size: int
    hidden_size: int
    param_dtype: Any
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Declare the table."""
        shape = (self.vocab_size, self.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.zeros, shape, self.param_dtype)

    def __call__(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """The rows of the tokens; an id outside the vocabulary gets the nearest row, so that padding may hold any."""
        # Whole rows of the table, or the result would be split as they are and have to be laid out anew.
        table = pinned(self.embedding, self.mesh, P("tensor"))
        return jnp.take(table, token_ids, axis=0, mode="clip")

    def table(self) -> Float[Array, "V D"]:
        """The whole table."""
        return self.embedding


class ScalarHead(nn.Module):
    """The weights that make one number of a position's hidden state."""

    hidden_size: int
    param_dtype: Any

    def setup(self) -> None:
        """Declare the weights."""
        self.kernel = self.param("kernel", nn.initializers.zeros, (self.hidden_size, 1), self.param_dtype)

    def weights(self) -> Float[Array, "D 1"]:
        """All of them."""
        return self.kernel


class Norm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (offset + scale)`` over the last axis, in float32."""

    epsilon: float
    offset: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """Normalize; the result has the dtype of ``x``."""
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        scale = scale.astype(jnp.float32) + self.offset
        # One axis for all tokens, no mean and no rsqrt: so that a token comes out of the sampler's call on one token
        # with the same bits as out of the trainer's call on all (a mean is fused with the epsilon in one and not in the
        # other, and a vector's rsqrt is not a scalar's).
        D = x.shape[-1]
        tokens = x.astype(jnp.float32).reshape(-1, D)
        sizes = jnp.sqrt(D / (jnp.sum(tokens**2, axis=-1, keepdims=True) + D * self.epsilon))
        return (tokens * sizes * scale[None, :]).astype(x.dtype).reshape(x.shape)


class Layer(nn.Module):
    """What the layers with a config share: how they make norms and linear maps."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any

    def norm(self, name: str) -> Norm:
        """A norm as the config wants it."""
        return Norm(self.config.norm_epsilon, self.config.norm_offset, self.param_dtype, name=name)

    def linear(self, name: str, features: int | tuple[int, ...], *, axis: Any = -1, bias: bool) -> nn.DenseGeneral:
        """A linear map over ``axis``."""
        return nn.DenseGeneral(features, axis, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class View(NamedTuple):
    """What the tokens of a call may look at in one layer.

    Attributes:
        rotation: of their positions.
        start: the column of the cache where the first of them is written.
        allowed: which columns of the cache (of the call's own keys, without one) each may attend to, for each of the
            parts that they are cut into.
        contexts: what comes before the cache.
        own_mask: where it is given, the call's own tokens are all there is to look at, and a kernel may compute it:
            which of them nobody may attend to, or whose they are. ``allowed`` and ``contexts`` are empty then.
    """

    rotation: Rotation
    start: int | Int[Array, ""]
    allowed: Sequence[Bool[Array, "M S _"]]
    contexts: Sequence[Part]
    own_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None


class Attention(Layer):
    """Causal attention with grouped heads and rotary positions to contexts, a cache, and the call's own tokens."""

    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], view: View, entry: CacheEntry | None
    ) -> tuple[Float[Array, "B S D"], CacheEntry]:
        """Attend; gives back the cache entry with the call's keys and values written in, or these alone."""
        c = self.config
        B, S, D = x.shape
        tokens = x.reshape(-1, D)
        queries = self.linear("q", (c.num_heads, c.head_dim), bias=c.qkv_bias)(tokens).reshape(B, S, c.num_heads, -1)
        keys = self.linear("k", (c.num_kv_heads, c.head_dim), bias=c.qkv_bias)(tokens).reshape(B, S, c.num_kv_heads, -1)
        values = self.linear("v", (c.num_kv_heads, c.head_dim), bias=c.qkv_bias)(tokens).reshape(
            B, S, c.num_kv_heads, -1
        )
        if c.qk_norm:
            queries, keys = self.norm("q_norm")(queries), self.norm("k_norm")(keys)
        queries = (rotate(queries, view.rotation) * c.query_scale).astype(self.dtype)
        keys = rotate(keys, view.rotation).astype(self.dtype)
        # With its columns last, a chunk of keys is read in order by the product of a few queries with all of them.
        own = {"keys": keys.transpose(0, 2, 3, 1), "values": values.transpose(0, 2, 1, 3)}
        entry = own if entry is None else written(entry, own, view.start)
        if self.kernel is not None and view.own_mask is not None:
            out = self.kernel(queries, keys, values, view.own_mask, softcap=c.attention_softcap)
        else:
            queries = queries.reshape(B, S, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
            parts, first = [], 0
            for allowed in view.allowed:
                last = first + allowed.shape[2]
                parts.append(Part(some_columns(entry, first, last), allowed))
                first = last
            out = attend(queries, [*view.contexts, *parts], c.attention_softcap).astype(self.dtype)
            out = out.transpose(0, 3, 1, 2, 4)
        out = out.reshape(-1, c.num_heads, c.head_dim)
        out = self.linear("o", D, axis=(-2, -1), bias=c.output_bias)(out).reshape(B, S, D)
        return out, entry


class MLP(Layer):
    """``down(activation(gate(x)) * up(x))``."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply the three maps."""
        c = self.config
        # With one axis for all tokens: on CPU the gradient of a product with two takes almost twice as long.
        tokens = x.reshape(-1, c.hidden_size)
        gate = self.linear("gate", c.intermediate_size, bias=c.mlp_bias)(tokens)
        up = self.linear("up", c.intermediate_size, bias=c.mlp_bias)(tokens)
        out = self.linear("down", c.hidden_size, bias=c.mlp_bias)(ACTIVATIONS[c.activation](gate) * up)
        return out.reshape(x.shape)


class Block(Layer):
    """Attention and MLP, each normalized at its start (and end, with ``post_norms``) and added to the residual."""

    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], view: View, entry: CacheEntry | None
    ) -> tuple[Float[Array, "B S D"], CacheEntry]:
        """Apply the block; arguments as in ``Attention``."""
        attention = Attention(self.config, self.dtype, self.param_dtype, self.kernel, name="attention")
        out, entry = attention(self.norm("attention_norm")(x), view, entry)
        if self.config.post_norms:
            out = self.norm("post_attention_norm")(out)
        x = x + out
        out = MLP(self.config, self.dtype, self.param_dtype, name="mlp")(self.norm("mlp_norm")(x))
        if self.config.post_norms:
            out = self.norm("post_mlp_norm")(out)
        return x + out, entry
