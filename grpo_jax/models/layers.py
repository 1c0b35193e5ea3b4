"""The modules of a decoder: embedding, norms, attention and MLP.

Shapes: B sequences, S tokens of the call, C columns of keys, D the width of the residual stream, H query heads in K
groups of G (H = K * G), each of size E.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import AttentionInputs, attend, attend_in_blocks, segments_of
from grpo_jax.models.config import ACTIVATIONS, DecoderConfig
from grpo_jax.models.head_layout import head_layout
from grpo_jax.models.kernels import Kernel
from grpo_jax.models.kv_cache import CacheEntry, write
from grpo_jax.models.lookup import lookup, lookup_divides, sharded_lookup
from grpo_jax.models.rope import rotate
from grpo_jax.sharding import constrain


def as_tokens(x: Float[Array, "*shape D"], mesh: Mesh | None) -> Float[Array, "*tokens D"]:
    """One axis for all tokens, unless ``context`` splits those of each sequence: two split axes cannot be merged.

    Args:
        x: an activation.
        mesh: the devices; None for one.
    """
    return x if mesh is not None and mesh.shape["context"] > 1 else x.reshape(-1, x.shape[-1])


class Embedding(nn.Module):
    """An embedding table with a row for each token."""

    vocab_size: int
    hidden_size: int
    param_dtype: Any
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Declare the table."""
        shape = (self.vocab_size, self.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.zeros, shape, self.param_dtype)

    def __call__(self, token_ids: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
        """The rows of the tokens. Ids outside the vocabulary are clipped to it, so that padding may hold any id.

        Args:
            token_ids: of B sequences.
            dtype: of the result.
        """
        if self.mesh is not None and lookup_divides(token_ids, self.embedding, self.mesh):
            return sharded_lookup(self.embedding, token_ids, self.mesh, dtype)
        # Gathered over fsdp, or the result would be sharded like the rows and have to be resharded.
        divides = self.mesh is not None and self.vocab_size % self.mesh.shape["tensor"] == 0
        table = constrain(self.embedding, self.mesh, P("tensor") if divides else P())
        return lookup(table, token_ids).astype(dtype)

    def table(self) -> Float[Array, "V D"]:
        """The table itself."""
        return self.embedding


class ScalarHead(nn.Module):
    """The weights of a scalar output for each position, as of reward models and critics."""

    hidden_size: int
    param_dtype: Any

    def setup(self) -> None:
        """Declare the weights."""
        self.kernel = self.param("kernel", nn.initializers.zeros, (self.hidden_size, 1), self.param_dtype)

    def weights(self) -> Float[Array, "D 1"]:
        """The weights themselves."""
        return self.kernel


class Norm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (offset + scale)`` over the last axis, in float32.

    With the kind ``layer``, ``x`` less its mean takes the place of ``x``, and a bias is added.
    """

    epsilon: float
    offset: float
    param_dtype: Any
    mesh: Mesh | None = None
    kind: Literal["rms", "layer"] = "rms"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """Normalize; the result has the dtype of ``x``."""
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        scale = scale.astype(jnp.float32) + self.offset
        # One axis for all tokens, no mean and no rsqrt: so that the sampler's call on one token and the trainer's call
        # on all tokens give the same bits. XLA fuses a mean with the epsilon in one of them and not in the other, and
        # computes the rsqrt of a vector differently from that of a scalar.
        D = x.shape[-1]
        tokens = as_tokens(x.astype(jnp.float32), self.mesh)
        if self.kind == "layer":
            tokens = tokens - jnp.sum(tokens, axis=-1, keepdims=True) / D
        sizes = jnp.sqrt(D / (jnp.sum(tokens**2, axis=-1, keepdims=True) + D * self.epsilon))
        by_token = (1,) * (tokens.ndim - 1) + (D,)
        out = tokens * sizes * scale.reshape(by_token)
        if self.kind == "layer":
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
            out = out + bias.astype(jnp.float32).reshape(by_token)
        return out.astype(x.dtype).reshape(x.shape)


class Layer(nn.Module):
    """Base class of the modules with a config: constructors of norms and linear maps."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None = None

    def norm(self, name: str) -> Norm:
        """A norm with the config's settings."""
        c = self.config
        return Norm(c.norm_epsilon, c.norm_offset, self.param_dtype, self.mesh, c.norm, name=name)

    def linear(self, name: str, features: int | tuple[int, ...], *, axis: Any = -1, bias: bool) -> nn.DenseGeneral:
        """A linear map.

        Args:
            name: of its parameters in the tree.
            features: sizes of the output axes.
            axis: input axes.
            bias: whether it has a bias.
        """
        return nn.DenseGeneral(features, axis, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class Attention(Layer):
    """Causal grouped-query attention with rotary positions, to prefixes, a cache, and the call's own tokens."""

    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], inputs: AttentionInputs, entry: CacheEntry | None
    ) -> tuple[Float[Array, "B S D"], CacheEntry]:
        """The output, and the cache with the call's keys and values written to it.

        Args:
            x: the normalized residual stream.
            inputs: rotation, masks and prefixes.
            entry: the layer's cache; None returns the call's own keys and values as the cache.
        """
        c = self.config
        B, S, D = x.shape
        tokens = as_tokens(x, self.mesh)

        def project(name: str, heads: int, bias: bool) -> Float[Array, "B S heads E"]:
            return self.linear(name, (heads, c.head_dim), bias=bias)(tokens).reshape(B, S, heads, -1)

        queries = project("q", c.num_heads, c.qkv_bias)
        keys, values = (project(name, c.num_kv_heads, c.qkv_bias) for name in "kv")
        if c.qk_norm is not None:
            queries, keys = self._normalized("q_norm", queries), self._normalized("k_norm", keys)
        heads = head_layout(c, self.mesh)
        turn = partial(rotate, rotation=inputs.rotation, interleaved=c.rope_interleaved)
        queries = turn(queries) * c.query_scale
        if inputs.rotation is not None and inputs.rotation.query_scale is not None:
            queries = queries * inputs.rotation.query_scale
        queries = heads.queries(queries.astype(self.dtype))
        keys, values = heads.keys(turn(keys).astype(self.dtype)), heads.keys(values)
        sinks = None
        if c.attention_sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,), self.param_dtype).astype(jnp.float32)
            sinks = heads.queries(sinks.reshape(1, 1, -1, 1)).reshape(-1)
        # With columns last, the product of a few queries with all keys reads the keys in memory order.
        new = {"keys": keys.transpose(0, 2, 3, 1), "values": values.transpose(0, 2, 1, 3)}
        entry = new if entry is None else write(entry, new, inputs.start)
        if self.kernel is not None and inputs.kernel_mask is not None:
            options = {} if sinks is None else {"sinks": sinks}
            out = self.kernel(queries, keys, values, inputs.kernel_mask, softcap=c.attention_softcap, **options)
        else:
            queries = queries.reshape(B, S, heads.kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
            sinks = None if sinks is None else sinks.reshape(heads.kv_heads, -1)
            if inputs.packed_mask is not None:
                out = attend_in_blocks(queries, entry, inputs.packed_mask, c.attention_softcap, sinks)
            else:
                segments = [*inputs.prefixes, *segments_of(entry, inputs.masks)]
                out = attend(queries, segments, c.attention_softcap, sinks)
            out = out.astype(self.dtype).transpose(0, 3, 1, 2, 4).reshape(B, S, -1, c.head_dim)
        out = heads.restored(out)
        if c.attention_gate:
            out = out * jax.nn.sigmoid(project("out_gate", c.num_heads, False))
        out = out.reshape(*tokens.shape[:-1], c.num_heads, c.head_dim)
        out = self.linear("o", D, axis=(-2, -1), bias=c.output_bias)(out).reshape(B, S, D)
        return out, entry

    def _normalized(self, name: str, x: Float[Array, "B S N E"]) -> Float[Array, "B S N E"]:
        if self.config.qk_norm == "head":
            return self.norm(name)(x)
        return self.norm(name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class MLP(Layer):
    """``down(activation(gate(x)) * up(x))``, or without a gate ``down(activation(up(x)))``.

    Attributes:
        width: of the MLP; None for that of the config.
    """

    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Apply the MLP."""
        c, width = self.config, self.width or self.config.intermediate_size
        # One axis for all tokens: on CPU the gradient of a product with two axes takes almost twice as long.
        tokens = as_tokens(x, self.mesh)
        activation = ACTIVATIONS[c.activation]
        if c.gated_mlp:
            gate = self.linear("gate", width, bias=c.mlp_bias)(tokens)
            hidden = activation(gate) * self.linear("up", width, bias=c.mlp_bias)(tokens)
        else:
            hidden = activation(self.linear("up", width, bias=c.mlp_bias)(tokens))
        out = self.linear("down", c.hidden_size, bias=c.mlp_bias)(hidden)
        return out.reshape(x.shape)
