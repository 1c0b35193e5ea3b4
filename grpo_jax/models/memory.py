"""Estimates of device memory from a model's sizes, before anything is loaded."""

from __future__ import annotations

from grpo_jax.models.config import DecoderConfig, DeltaRule
from grpo_jax.models.delta_rule import CHUNK_SIZE
from grpo_jax.models.remat import Remat


def activation_bytes(
    config: DecoderConfig, *, length: int, itemsize: int, remat: Remat, fused_attention: bool, tensor: int
) -> int:
    """Device memory of a train step for each token of its micro-batch, in bytes; an estimate.

    With ``D`` the width, ``F`` that of the MLP, ``H`` query and ``K`` key heads of size ``E``, a layer in its backward
    pass holds its norms, projections, MLP and their gradients,

        itemsize (4 D + (2 (3 H + 2 K) E + 6 F) / tensor) + 8 D

    and ``12 H length / tensor`` for the scores of attention that is not fused. A layer with the gated delta rule has
    ``itemsize (6 K E + 10 H F)`` in place of attention's projections, with its own heads, and ``10 H (4 E + 3 F + 6 L +
    E F / L)`` for its chunks of ``L`` tokens, which are in float32. ``block`` holds the largest layer at a time and the
    input of each, ``itemsize D``; ``offload`` only the layer; ``none`` all layers.

    Args:
        config: sizes of the model.
        length: of the sequences, in tokens.
        itemsize: of the compute dtype, in bytes.
        remat: of the step.
        fused_attention: whether an attention kernel computes without materializing scores.
        tensor: size of the mesh's axis.
    """
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    attention = 2 * itemsize * (3 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if not fused_attention:
        attention += 12 * config.num_heads * length
    mixers = {"attention": attention, "delta_rule": _delta_bytes(config.delta, itemsize)}
    layers = [itemsize * (4 * D + 6 * F / tensor) + mixers[kind.mixer] / tensor + 8 * D for kind in config.kinds]
    return int({"none": sum(layers), "block": max(layers) + L * itemsize * D, "offload": max(layers)}[remat])


def _delta_bytes(delta: DeltaRule | None, itemsize: int) -> int:
    if delta is None:
        return 0
    K, E, H, F, L = delta.key_heads, delta.key_dim, delta.value_heads, delta.value_dim, CHUNK_SIZE
    return itemsize * (6 * K * E + 10 * H * F) + 10 * H * (4 * E + 3 * F + 6 * L + E * F // L)
