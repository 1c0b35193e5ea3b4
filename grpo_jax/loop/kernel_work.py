"""Floating-point operations of fused attention kernels, which the text of a program does not show."""

from __future__ import annotations

from jax.sharding import Mesh

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.context import ContextAttention
from grpo_jax.models.kernels import AttentionName, hardware, resolve_attention
from grpo_jax.models.remat import Remat
from grpo_jax.models.splash import block_of, even_block_of

FUSED = ("cudnn", "splash")
BACKWARD = {"cudnn": 5, "splash": 7}
"""Products of the backward pass. Splash attention computes scores and their gradients twice: once for the gradient of
the queries, once for those of keys and values."""
CUDNN_BLOCK = 128
"""Tokens of a block of queries and of keys."""


def kernel_of(name: AttentionName, config: DecoderConfig, dtype: object, mesh: Mesh) -> AttentionName | None:
    """The kernel that computes the attention of whole sequences; None if it is not fused.

    Args:
        name: of a kernel, or ``auto``.
        config: sizes of the model.
        dtype: of the computation.
        mesh: the devices.
    """
    found = resolve_attention(name, config, dtype, hardware(mesh.devices.flat[0]))
    return found if found in FUSED else None


def kernel_flops(
    kernel: AttentionName | None,
    config: DecoderConfig,
    mesh: Mesh,
    *,
    rows: int,
    length: int,
    remat: Remat | None,
    prompts_are_shared: bool = False,
) -> float:
    """Floating-point operations of a fused kernel on each device.

    A product takes ``2 H E`` for each pair of a query and a key in the blocks that are computed. There are two products
    forward, once more if they are recomputed, and those of ``BACKWARD``.

    Args:
        kernel: of ``kernel_of``.
        config: sizes of the model.
        mesh: the devices, over which rows, tokens and heads are split evenly.
        rows: sequences.
        length: tokens of each.
        remat: of the train step; None for a forward pass alone.
        prompts_are_shared: whether a row has a prompt once for several completions, so that cuDNN is given a mask of
            all pairs.
    """
    if kernel is None:
        return 0.0
    products = 2 if remat is None else 2 * (1 if remat == "none" else 2) + BACKWARD[kernel]
    windows = [kind.window for kind in config.kinds if kind.mixer == "attention"]
    pairs = sum(computed_pairs(kernel, length, window, mesh, is_masked=prompts_are_shared) for window in windows)
    return float(products * 2 * config.num_heads * config.head_dim * pairs * rows / mesh.size)


def computed_pairs(kernel: AttentionName, length: int, window: int | None, mesh: Mesh, *, is_masked: bool) -> int:
    """Pairs of a query and a key whose scores a kernel computes: those of whole blocks, padding included.

    Args:
        kernel: ``cudnn`` or ``splash``.
        length: of the sequence, in tokens.
        window: sliding window; None for full attention.
        mesh: the devices; over ``context``, cuDNN is given a mask of all pairs.
        is_masked: whether cuDNN is given one anyway.
    """
    context = mesh.shape["context"]
    if kernel == "cudnn":
        if is_masked or context > 1:
            return length**2
        block = CUDNN_BLOCK
    elif context > 1:
        length = ContextAttention("splash", mesh).padded_length(length)
        block = even_block_of(length // (2 * context))
    else:
        block = block_of(length)
    blocks = -(-length // block)
    reach = blocks if window is None else 1 + -(-(window - 1) // block)  # blocks of keys that a block of queries sees
    seen = min(blocks, reach)
    return (seen * (seen + 1) // 2 + (blocks - seen) * seen) * block**2
