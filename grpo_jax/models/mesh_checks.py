"""Meshes that a decoder cannot be computed on, found before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax.sharding import Mesh

from grpo_jax.models.config import DecoderConfig
from grpo_jax.sharding import EXPERT_AXES


def check_mesh(config: DecoderConfig, mesh: Mesh | None) -> None:
    """Check that a mesh suits a decoder.

    Args:
        config: of the decoder.
        mesh: the devices; None for one.

    Raises:
        ValueError: experts do not divide over ``expert x tensor``, or ``context`` splits sequences for layers that do
            not support it.
    """
    if mesh is None:
        return
    if config.experts is not None:
        check_experts(config.experts.count, mesh.shape)
    context = mesh.shape.get("context", 1)
    whole = {
        "latent attention": config.latent is not None,
        "attention sinks": config.attention_sinks,
        "layers with the gated delta rule": config.delta is not None,
    }
    found = [part for part, has_part in whole.items() if has_part]
    if context > 1 and found:
        raise ValueError(
            f"mesh.context is {context}, and this model has {' and '.join(found)}, for which a sequence must be on one "
            "device; use mesh.data, mesh.fsdp, mesh.expert and mesh.tensor"
        )


def check_experts(num_experts: int, axes: Mapping[str, int]) -> None:
    """Check that experts divide over a mesh.

    Args:
        num_experts: of a layer.
        axes: sizes of the mesh's axes.

    Raises:
        ValueError: they do not.
    """
    expert, tensor = (axes.get(axis, 1) for axis in EXPERT_AXES)
    if num_experts % (expert * tensor):
        fitting = max(n for n in range(1, expert + 1) if num_experts % (n * math.gcd(tensor, num_experts)) == 0)
        raise ValueError(
            f"{num_experts} experts do not divide over mesh.expert {expert} x mesh.tensor {tensor} = "
            f"{expert * tensor} devices; mesh.expert {fitting} x mesh.tensor {math.gcd(tensor, num_experts)} does"
        )


def check_rollout_tensor(config: DecoderConfig, tensor: int) -> None:
    """Check that the sampler, which shards experts over ``tensor`` alone, can do so.

    Args:
        config: of the decoder.
        tensor: ``mesh.rollout_tensor``.

    Raises:
        ValueError: experts do not divide over it.
    """
    count = 0 if config.experts is None else config.experts.count
    if count % tensor:
        raise ValueError(
            f"{count} experts do not divide over mesh.rollout_tensor {tensor}; {math.gcd(count, tensor)} does"
        )
