"""A mixture of experts in a decoder's layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.config import ACTIVATIONS, Experts
from grpo_jax.models.expert_blocks import ExpertParams
from grpo_jax.models.experts import clamped_swiglu, expert_mlp, gated
from grpo_jax.models.layers import MLP, Layer, as_tokens
from grpo_jax.models.routing import route


@partial(jax.tree_util.register_dataclass, data_fields=("mask", "chosen"), meta_fields=("with_logits",))
@dataclass(frozen=True)
class RoutingInputs:
    """Inputs of a layer's router other than the residual stream.

    Attributes:
        mask: False at padding, which no expert computes; None if there is none.
        chosen: experts recorded earlier, to be used again, as in ``routing.route``; None to choose.
        with_logits: whether the router's logits are returned.
    """

    mask: Bool[Array, "B S"] | None = None
    chosen: Int[Array, "B S k"] | None = None
    with_logits: bool = False


class Routed(NamedTuple):
    """The experts of each token, and the router's logits in float32 if they were asked for."""

    experts: Int[Array, "B S k"]
    logits: Float[Array, "B S E"] | None


class ExpertParameters(nn.Module):
    """The parameters of a layer's experts."""

    settings: Experts
    hidden_size: int
    param_dtype: Any

    @nn.compact
    def __call__(self) -> ExpertParams:
        """The parameters themselves."""
        E, D, F = self.settings.count, self.hidden_size, self.settings.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        if self.settings.bias:
            shapes |= {f"{name}_bias": (E, shape[2]) for name, shape in shapes.items()}
        zeros = nn.initializers.zeros
        return ExpertParams(
            **{name: self.param(name, zeros, shape, self.param_dtype) for name, shape in shapes.items()}
        )


class ExpertsMLP(Layer):
    """``sum_e w_e MLP_e(x)`` over a token's experts, and the output of an MLP of all tokens if there is one."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], inputs: RoutingInputs) -> tuple[Float[Array, "B S D"], Routed]:
        """The output, and the experts of each token.

        Args:
            x: the normalized residual stream.
            inputs: mask and replayed choices.
        """
        c, e = self.config, self.config.experts
        assert e is not None
        # In float32: routing that differs between sampler and trainer changes a token's output altogether.
        router = nn.Dense(e.count, use_bias=e.router_bias, dtype=jnp.float32, param_dtype=self.param_dtype)
        logits = router.copy(name="router")(as_tokens(x, self.mesh).astype(jnp.float32)).reshape(*x.shape[:2], -1)
        bias = None
        if e.selection_bias:
            bias = self.param("selection_bias", nn.initializers.zeros, (e.count,), self.param_dtype)
        experts, weights = route(
            logits,
            e.per_token,
            scoring=e.scoring,
            normalize=e.normalized,
            scale=e.scale,
            bias=bias,
            groups=e.groups,
            kept_groups=e.groups_per_token,
            chosen=inputs.chosen,
        )
        used = experts if inputs.mask is None else jnp.where(inputs.mask[:, :, None], experts, e.count)
        params = ExpertParameters(e, c.hidden_size, self.param_dtype, name="experts")()
        activation = gated(ACTIVATIONS[c.activation])
        if e.clamp is not None:
            activation = partial(clamped_swiglu, limit=e.clamp)
        out = expert_mlp(x, used, weights, params, activation=activation, mesh=self.mesh)
        if e.shared_size:
            settings = (self.config, self.dtype, self.param_dtype, self.mesh)
            shared = MLP(*settings, width=e.shared_size, name="shared")(x)
            if e.shared_gate:
                shared = shared * jax.nn.sigmoid(self.linear("shared_gate", 1, bias=False)(x))
            out = out + shared
        return out, Routed(experts, logits if inputs.with_logits else None)
