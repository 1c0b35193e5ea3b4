"""Attention heads over devices that do not divide them: KV heads are repeated, groups of query heads padded.

The ``tensor`` axis splits KV heads and the query heads that they serve. Where it does not divide them, each KV head is
repeated until it does, and its query heads are dealt out to the copies; the last copy's are padded with zeros, whose
outputs are dropped. Padding never costs a device more than replicating all heads would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grpo_jax.models.config import DecoderConfig
from grpo_jax.sharding import TOKENS, constrain


@dataclass(frozen=True)
class HeadLayout:
    """The heads that attention computes with.

    Attributes:
        num_kv_heads: K of the model.
        group: G, query heads of each KV head.
        repeats: copies of each KV head.
        mesh: the devices; None for one.
    """

    num_kv_heads: int
    group: int
    repeats: int = 1
    mesh: Mesh | None = None

    @property
    def kv_heads(self) -> int:
        """KV heads in attention and in the cache, copies included."""
        return self.num_kv_heads * self.repeats

    @property
    def padded_group(self) -> int:
        """Query heads of all copies of a KV head, padding included."""
        return -(-self.group // self.repeats) * self.repeats

    @property
    def description(self) -> str:
        """Repetition and padding in a few words; empty without."""
        if self.repeats == 1:
            return ""
        padded = f", {self.num_kv_heads * self.group} query heads padded to {self.num_kv_heads * self.padded_group}"
        return f"{self.num_kv_heads} KV heads repeated {self.repeats} times" + padded * (self.padded_group > self.group)

    def queries(self, x: Float[Array, "B S H E"]) -> Float[Array, "B S padded E"]:
        """Query heads in the order of the copies that serve them."""
        if self.repeats == 1:
            return x
        B, S, _, E = x.shape
        grouped = x.reshape(B, S, self.num_kv_heads, self.group, E)
        padding = [(0, 0)] * 3 + [(0, self.padded_group - self.group), (0, 0)]
        return self._over_devices(jnp.pad(grouped, padding).reshape(B, S, -1, E))

    def keys(self, x: Float[Array, "B S K E"]) -> Float[Array, "B S repeated E"]:
        """Keys, or values, with each head repeated."""
        return x if self.repeats == 1 else self._over_devices(jnp.repeat(x, self.repeats, axis=2))

    def restored(self, x: Float[Array, "B S padded E"]) -> Float[Array, "B S H E"]:
        """The outputs of the model's own query heads."""
        if self.repeats == 1:
            return x
        B, S, _, E = x.shape
        grouped = x.reshape(B, S, self.num_kv_heads, self.padded_group, E)
        return grouped[:, :, :, : self.group].reshape(B, S, -1, E)

    def _over_devices(self, x: Float[Array, "B S N E"]) -> Float[Array, "B S N E"]:
        return constrain(x, self.mesh, P(*TOKENS, "tensor"))


def head_layout(config: DecoderConfig, mesh: Mesh | None) -> HeadLayout:
    """The heads of a decoder on a mesh, with the fewest copies that its ``tensor`` axis divides.

    Args:
        config: sizes of the decoder.
        mesh: the devices; None for one.
    """
    K, tensor = config.num_kv_heads, 1 if mesh is None else mesh.shape["tensor"]
    return HeadLayout(K, config.num_heads // K, tensor // math.gcd(K, tensor), mesh)
