"""Estimates of device memory from a model's sizes, before anything is loaded."""

from __future__ import annotations

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.remat import Remat


def activation_bytes(
    config: DecoderConfig, *, length: int, itemsize: int, remat: Remat, fused_attention: bool, tensor: int
) -> int:
    """Device memory of a train step for each token of its micro-batch, in bytes; an estimate.

    With ``D`` the width, ``F`` that of the MLP, ``H`` query and ``K`` key heads of size ``E``, a layer in its backward
    pass holds its norms, projections, MLP and their gradients,

        itemsize (4 D + (2 (3 H + 2 K) E + 6 F) / tensor) + 8 D

    and ``12 H length / tensor`` for the scores of attention that is not fused. ``block`` holds one layer at a time and
    its input, ``itemsize D``, for each; ``offload`` only the layer; ``none`` all layers.

    Args:
        config: sizes of the model.
        length: of the sequences, in tokens.
        itemsize: of the compute dtype, in bytes.
        remat: of the step.
        fused_attention: whether an attention kernel computes without materializing scores.
        tensor: size of the mesh's axis.
    """
    D, F, L = config.hidden_size, config.intermediate_size, config.num_layers
    heads = (3 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = itemsize * (4 * D + (2 * heads + 6 * F) / tensor) + 8 * D
    if not fused_attention:
        layer += 12 * config.num_heads * length / tensor
    return int({"none": L * layer, "block": layer + L * itemsize * D, "offload": layer}[remat])
