"""JAX's splash attention kernel for causal masks, with sizes of blocks that fit any length."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import numpy as np

LANES = 128
LARGEST_BLOCK = 512


def block_of(length: int) -> int:
    """Tokens of a block for the fewest blocks over a length that is padded, a multiple of ``LANES``."""
    blocks = -(-length // LARGEST_BLOCK)
    return -(-length // (blocks * LANES)) * LANES


def even_block_of(length: int) -> int:
    """Tokens of the largest block that divides a length, a multiple of ``LANES``."""
    return next(block for block in range(LARGEST_BLOCK, 0, -LANES) if length % block == 0)


def best_block_of(length: int) -> int:
    """The block size with the least work, counting both padding and the overhead of small blocks."""
    sizes = range(LARGEST_BLOCK, 0, -LANES)
    return min(sizes, key=lambda block: -(-length // block) * block * (1 + LANES / (4 * block)))


def dealt_slots(length: int, shards: int) -> np.ndarray:
    """Slots of the tokens that each of some devices has, one device after the other.

    Device ``i`` of ``N`` has blocks ``i`` and ``2 N - 1 - i`` of ``2 N``: causal attention is equal work for all.

    Args:
        length: tokens of the sequence, a multiple of ``2 * shards``.
        shards: N.
    """
    blocks = np.arange(length, dtype=np.int32).reshape(2, shards, -1)
    return np.stack([blocks[0], blocks[1, ::-1]], axis=1).reshape(-1)


@lru_cache(maxsize=16)
def splash_kernel(
    length: int, heads: int, block: int, *, window: int | None, softcap: float | None, shards: int, interpret: bool
) -> Any:
    """The kernel of causal attention; a pytree of NumPy arrays.

    Args:
        length: tokens of the sequence, a multiple of ``block``.
        heads: query heads.
        block: tokens of a block of queries and of keys.
        window: sliding window; None for full attention.
        softcap: ``c`` in ``c * tanh(score / c)``; None without.
        shards: devices over which the queries are split, as ``dealt_slots``.
        interpret: interpret the kernel on any platform, for tests.
    """
    # Imported late: other attention needs nothing of Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    causal = splash_mask.LocalMask((length, length), (None if window is None else window - 1, 0), offset=0)
    if shards > 1:
        causal.q_sequence = dealt_slots(length, shards)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([causal] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            head_shards=1,
            q_seq_shards=shards,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)
