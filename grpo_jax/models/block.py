"""A layer of the decoder: a mixer of tokens and an MLP or experts, each added to the residual stream."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from grpo_jax.models.attention import AttentionInputs
from grpo_jax.models.config import LayerKind
from grpo_jax.models.delta_layer import DeltaNet
from grpo_jax.models.expert_layer import ExpertsMLP, Routed, RoutingInputs
from grpo_jax.models.kernels import Kernel
from grpo_jax.models.kv_cache import CacheEntry
from grpo_jax.models.latent import LatentAttention
from grpo_jax.models.layers import MLP, Attention, Layer
from grpo_jax.models.remat import BLOCK_INPUT


class Block(Layer):
    """Mixer and MLP, each with the norms before and after it that the config has.

    Attributes:
        kind: of the layer.
        kernel: of its attention.
    """

    kind: LayerKind = LayerKind(None, None, "attention", False)
    kernel: Kernel | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        inputs: AttentionInputs,
        entry: CacheEntry | None,
        routing: RoutingInputs = RoutingInputs(),  # noqa: B008
    ) -> tuple[Float[Array, "B S D"], CacheEntry, Routed | None]:
        """Apply the layer.

        Args:
            x: the residual stream.
            inputs, entry: as in ``layers.Attention``.
            routing: as in ``expert_layer.ExpertsMLP``.
        """
        x = checkpoint_name(x, BLOCK_INPUT)
        settings: list[Any] = [self.config, self.dtype, self.param_dtype, self.mesh]
        if self.kind.mixer == "delta_rule":
            mixer: Any = DeltaNet(*settings, name="delta")
        elif self.config.latent is not None:
            mixer = LatentAttention(*settings, name="attention")
        else:
            mixer = Attention(*settings, kernel=self.kernel, name="attention")
        out, new = mixer(self._before("attention_norm", x), inputs, entry)
        x = x + self._after("post_attention_norm", out)
        normalized, routed = self._before("mlp_norm", x), None
        if self.kind.sparse:
            out, routed = ExpertsMLP(*settings, name="mlp")(normalized, routing)
        else:
            out = MLP(*settings, name="mlp")(normalized)
        return x + self._after("post_mlp_norm", out), new, routed

    def _before(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.norm(name)(x) if self.config.pre_norms else x

    def _after(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = self.norm(name)(x) if self.config.post_norms else x
        scale = self.config.residual_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)
