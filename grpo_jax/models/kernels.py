"""Causal attention of a call's tokens to each other by a fused kernel, which never forms the scores in memory.

What a kernel computes is what ``layers.attend`` computes, up to rounding. Training and the reading of prompts go
through it; tokens drawn one by one do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.config import DecoderConfig
from grpo_jax.sharding import BATCH

AttentionName = Literal["auto", "plain", "cudnn", "splash"]
Kernel = Callable[..., Float[Array, "B S H E"]]
"""``(queries [B, S, H, E] already scaled, keys and values [B, S, K, E], mask [B, S], window=, softcap=)``. A token
attends to the unmasked ones up to itself, less than ``window`` before it; what a masked one gets is finite and means
nothing. A mask of integers numbers packed sequences, 0 for padding: a token attends to its own number alone."""

LANES = 128
LARGEST_BLOCK = 512


def choose_kernel(name: AttentionName, config: DecoderConfig, dtype: Any, mesh: Mesh | None) -> Kernel | None:
    """The kernel of that name; None for the plain path.

    Args:
        name: ``auto`` takes what the platform has for this model in bfloat16. In float32 it is the plain path, by which
            sampler and trainer agree to the last bits.
        config: of the model.
        dtype: of the computation.
        mesh: of the parameters; None for one device.

    Raises:
        ValueError: for a kernel that cannot compute this model; it says why.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    chosen = resolve_attention(name, config, dtype, hardware(device), 1 if mesh is None else mesh.shape["tensor"])
    kernels = {"cudnn": cudnn_attention, "splash": partial(splash_attention, mesh=mesh)}
    return kernels.get(chosen)


def hardware(device: Any) -> str:
    """``tpu``, ``cuda`` for NVIDIA's GPUs from Ampere on (which cuDNN's attention needs), or ``other``."""
    if device.platform == "tpu":
        return "tpu"
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # a ROCm device tells a name
    return "cuda" if device.platform == "gpu" and generation.isdigit() and int(generation) >= 8 else "other"


def resolve_attention(name: AttentionName, config: DecoderConfig, dtype: Any, kind: str, tensor: int) -> AttentionName:
    """What ``auto`` stands for on a kind of hardware, heads split over ``tensor`` devices; other names are themselves.

    Raises:
        ValueError: see ``choose_kernel``.
    """
    fastest: AttentionName = "cudnn" if kind == "cuda" else "splash" if kind == "tpu" else "plain"
    if name == "auto":
        fits = dtype == jnp.bfloat16 and obstacle(fastest, config, dtype, tensor) is None
        return fastest if fits else "plain"
    if name not in ("plain", fastest):
        raise ValueError(
            f"attention {name!r} does not run here: cuDNN's runs on NVIDIA's GPUs from Ampere on, splash attention on "
            f"TPUs; {fastest!r} would, and 'auto' takes what fits"
        )
    problem = obstacle(name, config, dtype, tensor)
    if problem is not None:
        raise ValueError(f"attention {name!r} {problem}; 'plain' computes every model, 'auto' takes what fits")
    return name


def obstacle(name: AttentionName, config: DecoderConfig, dtype: Any, tensor: int) -> str | None:
    """Why this kernel cannot compute this model, if it cannot."""
    if name == "cudnn":
        if dtype != jnp.bfloat16:
            return f"computes in bfloat16, not {jnp.dtype(dtype).name}"
        if config.attention_softcap is not None:
            return "has no soft cap, and this model has one"
        if config.head_dim % 8 or config.head_dim > 128:
            return f"takes heads of a multiple of 8 up to 128, not {config.head_dim}"
    if name == "splash" and config.num_kv_heads % tensor:
        return f"cannot split {config.num_kv_heads} heads of keys over tensor = {tensor} devices"
    return None


def cudnn_attention(
    queries: Float[Array, "B S H E"],
    keys: Float[Array, "B S K E"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "B S"] | Int[Array, "B S"],
    *,
    window: int | None,
    softcap: None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S H E"]:
    """By cuDNN, on GPUs. It knows padding on the right alone: so real tokens go first, and back to their places.

    With a window, distances are those between real tokens: the slots', as long as padding does not stand between them.
    Of packed sequences it is told who may attend to whom, which is an array of ``[B, S, S]``.

    Args:
        queries: scaled.
        keys: each head serves ``H / K`` query heads that follow each other.
        values: likewise.
        mask: False at columns that nobody may attend to, or the numbers of packed sequences.
        window: None sees all.
        softcap: there is none.
        implementation: "xla" does the same on any platform, for tests.
    """
    attention = partial(
        jax.nn.dot_product_attention,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    if mask.dtype != bool:
        with jax.numpy_dtype_promotion("standard"):
            return attention(queries, keys, values, mask=(mask[:, :, None] == mask[:, None, :])[:, None])
    order = jnp.argsort(~mask, axis=1, stable=True)
    lengths = jnp.maximum(mask.sum(1, dtype=jnp.int32), 1)
    queries, keys, values = (permuted(x, order) for x in (queries, keys, values))
    with jax.numpy_dtype_promotion("standard"):
        # Padding behind a window's reach would have nothing to attend to, were it not for the queries' lengths.
        out = attention(queries, keys, values, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return permuted(out, jnp.argsort(order, axis=1))


def permuted(x: Float[Array, "B S N E"], order: Int[Array, "B S"]) -> Float[Array, "B S N E"]:
    """Each row's tokens in an order of its own."""

    def row(x, order):
        return x.at[order].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(row)(x, order)


def splash_attention(
    queries: Float[Array, "B S H E"],
    keys: Float[Array, "B S K E"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "B S"] | Int[Array, "B S"],
    *,
    window: int | None,
    softcap: float | None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """By JAX's splash attention, on TPUs.

    Args:
        queries: scaled.
        keys: each head serves ``H / K`` query heads that follow each other.
        values: likewise.
        mask: False at columns that nobody may attend to, or the numbers of packed sequences.
        window: None sees all.
        softcap: ``c`` in ``c * tanh(score / c)``; None for none.
        mesh: sequences are split over ``data`` and ``fsdp``, heads over ``tensor``; each must divide. None for arrays
            on one device.
        interpret: run the kernel's operations one by one, on any platform: for tests.
    """
    on_device = partial(splash_on_device, window=window, softcap=softcap, interpret=interpret)
    if mesh is None:
        return on_device(queries, keys, values, mask)
    heads = P(*BATCH, None, "tensor", None)
    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(heads, heads, heads, BATCH),
        out_specs=heads,
        check_vma=False,  # a kernel does not say which axes its results vary over
    )
    return split(queries, keys, values, mask)


def splash_on_device(queries, keys, values, mask, *, window: int | None, softcap: float | None, interpret: bool):
    """``splash_attention`` of what lies on one device."""
    S, H = queries.shape[1:3]
    blocks = -(-S // LARGEST_BLOCK)
    block = -(-S // (blocks * LANES)) * LANES
    length = blocks * block

    def padded(x: Float[Array, "B S N E"]) -> Float[Array, "B N length E"]:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, length - S), (0, 0)))

    causal = splash_mask.LocalMask((length, length), (None if window is None else window - 1, 0), offset=0)
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([causal] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    # Real tokens attend to those of their own sequence and masked ones to masked ones, at least to themselves: a row
    # that may attend to nothing would be divided by zero.
    segments = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, length - S)))
    out: Array = jax.vmap(kernel)(padded(queries), padded(keys), padded(values), splash.SegmentIds(segments, segments))  # pyright: ignore[reportAssignmentType]
    return out[:, :, :S].transpose(0, 2, 1, 3)
