"""The modules of a decoder: embedding, norms, attention, MLP and block.

Shapes: B sequences, S tokens of the call, C columns that can be attended to, D the width of the residual stream,
H query heads in K groups of G (H = K * G), each of size E.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import AttentionInputs, KVSegment, attend
from grpo_jax.models.config import ACTIVATIONS, DecoderConfig
from grpo_jax.models.kernels import Kernel
from grpo_jax.models.kv_cache import CacheEntry, some_columns, written
from grpo_jax.models.rope import rotate
from grpo_jax.sharding import constrain


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
        table = constrain(self.embedding, self.mesh, P("tensor"))
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


class Attention(Layer):
    """Causal attention with grouped heads and rotary positions to prefixes, a cache, and the call's own tokens."""

    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], view: AttentionInputs, entry: CacheEntry | None
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
                parts.append(KVSegment(some_columns(entry, first, last), allowed))
                first = last
            out = attend(queries, [*view.prefixes, *parts], c.attention_softcap).astype(self.dtype)
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
        self, x: Float[Array, "B S D"], view: AttentionInputs, entry: CacheEntry | None
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
