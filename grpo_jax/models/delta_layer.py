"""The gated delta rule as a layer (Gated DeltaNet, https://arxiv.org/abs/2412.06464): projections, convolution, gates.

Shapes: B sequences, S tokens of the call, D the width of the residual stream; K heads of queries and keys of size E, H
heads of values of size F.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.attention import AttentionInputs
from grpo_jax.models.config import ACTIVATIONS, DecoderConfig, DeltaRule
from grpo_jax.models.delta_rule import causal_conv, chunked_delta_rule, recurrent_delta_rule_step, unit_vectors
from grpo_jax.models.kv_cache import CacheEntry
from grpo_jax.models.layers import Layer, Norm, as_tokens


class DeltaNet(Layer):
    """A linear recurrence over the tokens of a sequence in place of attention; its state has the same size throughout.

        o(norm(delta_rule(q, k, v, log_decay, beta)) * silu(z))

    ``q``, ``k`` and ``v`` are projections that pass a short causal convolution and the config's activation; ``q`` and
    ``k`` are normalized. ``log_decay = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], inputs: AttentionInputs, entry: CacheEntry | None
    ) -> tuple[Float[Array, "B S D"], CacheEntry]:
        """The output, and the state after the call's tokens.

        Args:
            x: the normalized residual stream.
            inputs: of which the mask of the call's own tokens is used.
            entry: the state before the call's tokens; empty or None to start from zeros.
        """
        assert self.config.delta is not None
        d, (B, S, D) = self.config.delta, x.shape
        tokens, mask, entry = as_tokens(x, self.mesh), inputs.token_mask, entry or {}
        sizes = {"q": (d.key_heads, d.key_dim), "k": (d.key_heads, d.key_dim), "v": (d.value_heads, d.value_dim)}

        def project(name: str, *features: int) -> Float[Array, "B S ..."]:
            return self.linear(name, features, bias=False)(tokens).reshape(B, S, *features)

        mixed, new = {}, {}
        for name, (heads, width) in sizes.items():
            weights = self.param(f"{name}_conv", nn.initializers.zeros, (heads, width, d.conv_size), self.param_dtype)
            before = entry.get(f"{name}_inputs")
            out, after = causal_conv(
                project(name, heads, width).reshape(B, S, -1),
                weights.reshape(-1, d.conv_size),
                mask=mask,
                state=None if before is None else before.transpose(0, 2, 1, 3).reshape(B, d.conv_size - 1, -1),
            )
            mixed[name] = ACTIVATIONS[self.config.activation](out).reshape(B, S, heads, width)
            # With heads before tokens, as keys and values, caches of all kinds of layers are sharded alike.
            new[f"{name}_inputs"] = after.reshape(B, -1, heads, width).transpose(0, 2, 1, 3)
        rates = self.param("A_log", nn.initializers.zeros, (d.value_heads,), self.param_dtype).astype(jnp.float32)
        bias = self.param("dt_bias", nn.initializers.zeros, (d.value_heads,), self.param_dtype).astype(jnp.float32)
        steps = jax.nn.softplus(project("a", d.value_heads).astype(jnp.float32) + bias[None, None])
        log_decays = -jnp.exp(rates)[None, None] * steps
        betas = jax.nn.sigmoid(project("b", d.value_heads).astype(jnp.float32))
        q, k, v = unit_vectors(mixed["q"]) * d.key_dim**-0.5, unit_vectors(mixed["k"]), mixed["v"]
        if S == 1 and mask is None and entry:
            out, new["state"] = recurrent_delta_rule_step(
                q[:, 0], k[:, 0], v[:, 0], log_decays[:, 0], betas[:, 0], entry["state"]
            )
            out = out[:, None]
        else:
            out, new["state"] = chunked_delta_rule(q, k, v, log_decays, betas, mask, initial_state=entry.get("state"))
        # No offset, whatever that of the config's other norms.
        out = Norm(self.config.norm_epsilon, 0.0, self.param_dtype, self.mesh, name="norm")(out)
        out = out * jax.nn.silu(project("z", d.value_heads, d.value_dim).astype(jnp.float32))
        out = out.astype(self.dtype).reshape(*tokens.shape[:-1], d.value_heads, d.value_dim)
        return self.linear("o", D, axis=(-2, -1), bias=False)(out).reshape(B, S, D), new


def init_states(config: DecoderConfig, dtype: Any, batch: int) -> list[CacheEntry]:
    """States of zeros, as ``types.Model.init_states``.

    Args:
        config: of the decoder.
        dtype: of the decoder's computations.
        batch: B.
    """
    return [init_state(config.delta, dtype, batch) if kind.mixer == "delta_rule" else {} for kind in config.kinds]


def init_state(delta: DeltaRule | None, dtype: Any, batch: int) -> CacheEntry:
    """The state of a layer before the first token: the last inputs of the convolutions, and the recurrence's.

    Args:
        delta: sizes of the layer.
        dtype: of the inputs; the recurrence is in float32.
        batch: B.
    """
    assert delta is not None
    keys, values = (delta.key_heads, delta.key_dim), (delta.value_heads, delta.value_dim)
    inputs = {
        f"{name}_inputs": jnp.zeros((batch, heads, delta.conv_size - 1, width), dtype)
        for name, (heads, width) in {"q": keys, "k": keys, "v": values}.items()
    }
    return {**inputs, "state": jnp.zeros((batch, delta.value_heads, delta.key_dim, delta.value_dim))}
