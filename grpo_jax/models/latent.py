"""Multi-head latent attention: keys and values of all heads are computed from one small vector for each token."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.attention import AttentionInputs, attend, attend_in_blocks, segments_of
from grpo_jax.models.kv_cache import CacheEntry, write
from grpo_jax.models.layers import Layer, Norm, as_tokens
from grpo_jax.models.rope import rotate

LATENT_NORM_EPSILON = 1e-6
"""Of the norms of compressed queries and latents, whatever the config says of others."""


class LatentAttention(Layer):
    """Causal multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434, equations 37 to 47).

    The cache holds a token's latent vector and its rotated key, which all heads share. In decoding, the matrices that
    would compute keys and values of a head from the latents are multiplied with its query and its output instead: the
    latents are then the keys and the values of one head that serves all queries.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], inputs: AttentionInputs, entry: CacheEntry | None
    ) -> tuple[Float[Array, "B S D"], CacheEntry]:
        """As ``layers.Attention``; entries have ``keys`` alone, whose first components are the latents."""
        c, sizes = self.config, self.config.latent
        assert sizes is not None
        B, S, D = x.shape
        H, rank = c.num_heads, sizes.rank
        tokens = as_tokens(x, self.mesh)
        turn = partial(rotate, rotation=inputs.rotation, interleaved=c.rope_interleaved)
        compressed = tokens
        if sizes.query_rank is not None:
            compressed = self._latent_norm("q_a_norm")(self.linear("q_a", sizes.query_rank, bias=c.qkv_bias)(tokens))
        name = "q" if sizes.query_rank is None else "q_b"
        queries = self.linear(name, (H, sizes.key_dim + sizes.rope_dim), bias=False)(compressed).reshape(B, S, H, -1)
        plain = queries[..., : sizes.key_dim] * jnp.asarray(c.query_scale, self.dtype)
        turned = (turn(queries[..., sizes.key_dim :]) * c.query_scale).astype(self.dtype)
        shared = self.linear("kv_a", rank + sizes.rope_dim, bias=c.qkv_bias)(tokens).reshape(B, S, -1)
        latents = self._latent_norm("kv_a_norm")(shared[..., :rank])
        rotated = turn(shared[:, :, None, rank:])[:, :, 0].astype(self.dtype)
        new: CacheEntry = {"keys": jnp.concatenate([latents, rotated], axis=-1).transpose(0, 2, 1)[:, None]}
        entry = new if entry is None else write(entry, new, inputs.start)
        up = [
            self.param(name, nn.initializers.zeros, (rank, H, size), self.param_dtype).astype(self.dtype)
            for name, size in (("k_b", sizes.key_dim), ("v_b", sizes.value_dim))
        ]
        if inputs.prefixes or S == 1:
            out = self._from_latents(plain, turned, entry, inputs, *up)
        else:
            out = self._from_heads(jnp.concatenate([plain, turned], axis=-1), entry, inputs, *up)
        out = out.reshape(*tokens.shape[:-1], H, sizes.value_dim)
        return self.linear("o", D, axis=(-2, -1), bias=c.output_bias)(out).reshape(B, S, D), entry

    def _latent_norm(self, name: str) -> Norm:
        return Norm(LATENT_NORM_EPSILON, self.config.norm_offset, self.param_dtype, self.mesh, name=name)

    def _from_latents(
        self,
        plain: Float[Array, "B S H key"],
        turned: Float[Array, "B S H rope"],
        entry: CacheEntry,
        inputs: AttentionInputs,
        key_up: Float[Array, "rank H key"],
        value_up: Float[Array, "rank H value"],
    ) -> Float[Array, "B S H value"]:
        """Attention to the latents themselves, by queries that are brought to their space."""
        queries = jnp.concatenate([jnp.einsum("bshk,rhk->bshr", plain, key_up), turned], axis=-1)
        segments = [*inputs.prefixes, *segments_of(entry, inputs.masks)]
        out = attend(queries.transpose(0, 2, 1, 3)[:, None], segments, None, value_size=key_up.shape[0])
        return jnp.einsum("bhsr,rhv->bshv", out[:, 0].astype(self.dtype), value_up)

    def _from_heads(
        self,
        queries: Float[Array, "B S H E"],
        entry: CacheEntry,
        inputs: AttentionInputs,
        key_up: Float[Array, "rank H key"],
        value_up: Float[Array, "rank H value"],
    ) -> Float[Array, "B S H value"]:
        """Attention to the keys and values of each head, which is less work for many queries."""
        columns = entry["keys"][:, 0].transpose(0, 2, 1).astype(self.dtype)
        if "key_scales" in entry:
            columns = (columns * entry["key_scales"][:, 0, :, None]).astype(self.dtype)
        latents, shared = columns[..., : key_up.shape[0]], columns[..., key_up.shape[0] :]
        keys = jnp.einsum("bcr,rhk->bchk", latents, key_up)
        shared = jnp.broadcast_to(shared[:, :, None], (*keys.shape[:3], shared.shape[-1]))
        keys = jnp.concatenate([keys, shared], axis=-1).transpose(0, 2, 3, 1)
        of_heads: CacheEntry = {"keys": keys, "values": jnp.einsum("bcr,rhv->bhcv", latents, value_up)}
        queries = queries.transpose(0, 2, 1, 3)[:, :, None]
        if inputs.packed_mask is not None:
            out = attend_in_blocks(queries, of_heads, inputs.packed_mask, None)
        else:
            out = attend(queries, segments_of(of_heads, inputs.masks), None)
        return out[:, :, 0].transpose(0, 2, 1, 3).astype(self.dtype)
