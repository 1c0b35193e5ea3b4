"""Estimates of device memory from a model's sizes, before anything is loaded."""

from __future__ import annotations

from grpo_jax.models.config import DecoderConfig, LayerKind
from grpo_jax.models.delta_rule import CHUNK_SIZE
from grpo_jax.models.expert_groups import SPARE
from grpo_jax.models.remat import Remat
from grpo_jax.models.sizes import expert_size


def activation_bytes(
    config: DecoderConfig,
    *,
    length: int,
    itemsize: int,
    remat: Remat,
    fused_attention: bool,
    tensor: int,
    expert: int = 1,
) -> int:
    """Device memory of a train step for each token of its micro-batch, in bytes; an estimate.

    With ``D`` the width, ``F`` that of the MLP, ``H`` query and ``K`` key heads of size ``E``, a layer in its backward
    pass holds its norms, projections, MLP and their gradients,

        itemsize (4 D + (2 (3 H + 2 K) E + 6 F) / tensor) + 8 D

    and ``12 H length / tensor`` for the scores of attention that is not fused. An MLP without a gate has ``4 F``; in
    latent attention, keys and queries have ``key_dim + rope_dim`` components and values ``value_dim``, in all heads.

    A layer with experts of width ``F`` has, in the place of the MLP, that of all tokens, if there is one, and

        itemsize r (4 D + 6 F) + g (itemsize 2 D + 8 D)

    with ``r`` rows of a token's experts on the device: its ``k`` experts, or ``SPARE k / tensor`` if devices have parts
    of the experts, which gather the tokens of ``g = expert`` of them. A layer with the gated delta rule has ``itemsize
    (6 K E + 10 H F)`` in place of attention's projections, with its own heads, and ``10 H (4 E + 3 F + 6 L + E F / L)``
    for its chunks of ``L`` tokens, which are in float32.

    ``block`` holds the largest layer at a time and the input of each, ``itemsize D``; ``offload`` only the layer;
    ``none`` all layers.

    Args:
        config: sizes of the model.
        length: of the sequences, in tokens.
        itemsize: of the compute dtype, in bytes.
        remat: of the step.
        fused_attention: whether an attention kernel computes without materializing scores.
        tensor, expert: sizes of the mesh's axes.
    """
    D = config.hidden_size
    scores = 0 if fused_attention else 12 * config.num_heads * length

    def of_layer(kind: LayerKind) -> float:
        mixer = _delta_bytes(config, itemsize) if kind.mixer == "delta_rule" else _heads(config) * itemsize + scores
        return itemsize * 4 * D + mixer / tensor + _mlp_bytes(config, kind, itemsize, tensor, expert) + 8 * D

    layers = [of_layer(kind) for kind in config.kinds]
    held = {"none": sum(layers), "block": max(layers) + len(layers) * itemsize * D, "offload": max(layers)}
    return int(held[remat])


def _heads(config: DecoderConfig) -> int:
    H, latent = config.num_heads, config.latent
    if latent is not None:
        return 2 * H * (3 * (latent.key_dim + latent.rope_dim) + 2 * latent.value_dim)
    return 2 * ((3 + 2 * config.attention_gate) * H + 2 * config.num_kv_heads) * config.head_dim


def _delta_bytes(config: DecoderConfig, itemsize: int) -> int:
    assert config.delta is not None
    d, L = config.delta, CHUNK_SIZE
    K, E, H, F = d.key_heads, d.key_dim, d.value_heads, d.value_dim
    return itemsize * (6 * K * E + 10 * H * F) + 10 * H * (4 * E + 3 * F + 6 * L + E * F // L)


def _mlp_bytes(config: DecoderConfig, kind: LayerKind, itemsize: int, tensor: int, expert: int) -> float:
    e, D, of_width = config.experts, config.hidden_size, itemsize * (6 if config.gated_mlp else 4)
    if not kind.sparse or e is None:
        return of_width * config.intermediate_size / tensor
    is_split = expert * tensor > 1
    rows = e.per_token * (SPARE / tensor if is_split else 1)
    of_rows = itemsize * rows * (4 * D + 6 * e.intermediate_size)
    return of_rows + expert * (2 * itemsize + 8) * D + of_width * e.shared_size / tensor


def experts_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Device memory of the experts of one layer in its backward pass, if one device has them all; an estimate.

    They are gathered over ``fsdp`` in the compute dtype; their gradients are summed in float32 over chunks of rows.

    Args:
        config: sizes of the model.
        itemsize: of the compute dtype, in bytes.
    """
    return 0 if config.experts is None else config.experts.count * expert_size(config) * (2 * itemsize + 4)
