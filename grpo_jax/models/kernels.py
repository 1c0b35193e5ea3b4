"""Fused attention kernels for a call's tokens among themselves, which do not materialize the scores.

They compute ``attention.attend`` up to rounding, in training and prefill; decode steps do not use them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import attention_mask
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.context import ContextAttention
from grpo_jax.models.splash import block_of, splash_kernel
from grpo_jax.sharding import BATCH
from grpo_jax.types import Segments

AttentionName = Literal["auto", "plain", "cudnn", "splash"]
Kernel = Callable[..., Float[Array, "B S H E"]]
"""``(queries [B, S, H, E] already scaled, keys and values [B, S, K, E], mask [B, S], window=, softcap=)``. A token
attends to unmasked tokens up to itself and less than ``window`` before it; the output of a masked one is finite and
meaningless. An integer mask holds segment ids, 0 for padding: tokens attend within their segment."""


def choose_kernel(name: AttentionName, config: DecoderConfig, dtype: Any, mesh: Mesh | None) -> Kernel | None:
    """The attention kernel of a name; None for the plain path of a mesh without ``context``.

    Args:
        name: ``auto`` selects the platform's kernel if it supports the model in bfloat16. In float32 it is the plain
            path, with which sampler and trainer agree to the last bits.
        config: sizes and switches of the decoder.
        dtype: compute dtype.
        mesh: mesh of the parameters; None for one device.

    Raises:
        ValueError: the kernel does not support this model or this hardware; the message gives the reason.
    """
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    chosen = resolve_attention(name, config, dtype, hardware(device))
    if mesh is not None and mesh.shape["context"] > 1:
        return ContextAttention(chosen, mesh)  # pyright: ignore[reportArgumentType]
    kernels = {"cudnn": cudnn_attention, "splash": partial(splash_attention, mesh=mesh)}
    return kernels.get(chosen)


def hardware(device: Any) -> str:
    """``tpu``, ``cuda`` for NVIDIA GPUs from Ampere on (which cuDNN attention requires), or ``other``."""
    if device.platform == "tpu":
        return "tpu"
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # a name on ROCm
    return "cuda" if device.platform == "gpu" and generation.isdigit() and int(generation) >= 8 else "other"


def resolve_attention(name: AttentionName, config: DecoderConfig, dtype: Any, kind: str) -> AttentionName:
    """The name of the kernel that ``auto`` selects; other names are checked and returned.

    Args:
        name: of a kernel, or ``auto``.
        config: sizes and switches of the decoder.
        dtype: compute dtype.
        kind: hardware, as returned by ``hardware``.

    Raises:
        ValueError: as ``choose_kernel``.
    """
    fastest: AttentionName = "cudnn" if kind == "cuda" else "splash" if kind == "tpu" else "plain"
    if name == "auto":
        fits = dtype == jnp.bfloat16 and _unsupported(fastest, config, dtype) is None
        return fastest if fits else "plain"
    if name not in ("plain", fastest):
        raise ValueError(
            f"attention {name!r} does not run here: 'cudnn' runs on NVIDIA GPUs from Ampere on, 'splash' on TPUs; use "
            f"{fastest!r}, or 'auto' to select by hardware and model"
        )
    problem = _unsupported(name, config, dtype)
    if problem is not None:
        raise ValueError(f"attention {name!r} {problem}; use 'plain', which supports every model, or 'auto'")
    return name


def _unsupported(name: AttentionName, config: DecoderConfig, dtype: Any) -> str | None:
    """The reason why a kernel does not support a model; None if it does."""
    if name != "plain" and config.latent is not None:
        return "has keys and values of one size, and latent attention has two"
    if name != "plain" and config.attention_sinks:
        return "has no attention sinks, which this model needs"
    if name == "cudnn":
        if dtype != jnp.bfloat16:
            return f"computes in bfloat16, not {jnp.dtype(dtype).name}"
        if config.attention_softcap is not None:
            return "has no soft cap, which this model needs"
        if config.head_dim % 8 or config.head_dim > 128:
            return f"needs a head_dim that is a multiple of 8 up to 128, not {config.head_dim}"
    return None


def takes_segments(kernel: Kernel | None) -> bool:
    """Whether a kernel's mask may be ``types.Segments``."""
    return kernel is cudnn_attention or (isinstance(kernel, ContextAttention) and kernel.takes_segments)


def cudnn_attention(
    queries: Float[Array, "B S H E"],
    keys: Float[Array, "B S K E"],
    values: Float[Array, "B S K E"],
    mask: Bool[Array, "B S"] | Int[Array, "B S"] | Segments,
    *,
    window: int | None,
    softcap: None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S H E"]:
    """Attention by cuDNN, on GPUs. It supports padding on the right only: real tokens are moved first, and back after.

    With a window, distances are counted in real tokens: the same as in slots unless padding is between them. Packed
    sequences take a mask of ``[B, S, S]``.

    Args:
        queries: scaled.
        keys: each head serves ``H / K`` adjacent query heads.
        values: likewise.
        mask: False at columns that no token may attend to, or segment ids, 0 for padding, or ``Segments``.
        window: sliding window; None for full attention.
        softcap: not supported.
        implementation: "xla" computes the same on any platform, for tests.
    """
    if isinstance(mask, Segments):
        S = queries.shape[1]
        # A token of padding attends to itself: a row that attends to nothing would be NaN.
        seen = attention_mask(mask, jnp.arange(S), 0, S, window) | jnp.eye(S, dtype=bool)[None]
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                queries, keys, values, mask=seen[:, None], scale=1.0, implementation=implementation
            )
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
    queries, keys, values = (_permute(x, order) for x in (queries, keys, values))
    with jax.numpy_dtype_promotion("standard"):
        # With query lengths, because padding beyond the window's reach would attend to nothing and be NaN.
        out = attention(queries, keys, values, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return _permute(out, jnp.argsort(order, axis=1))


def _permute(x: Float[Array, "B S N E"], order: Int[Array, "B S"]) -> Float[Array, "B S N E"]:
    """The tokens of each row in the order of ``order``."""

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
    """Attention by JAX's splash attention kernel, on TPUs.

    Args:
        queries: scaled.
        keys: each head serves ``H / K`` adjacent query heads.
        values: likewise.
        mask: False at columns that no token may attend to, or segment ids, 0 for padding.
        window: sliding window; None for full attention.
        softcap: ``c`` in ``c * tanh(score / c)``; None without.
        mesh: sequences are sharded over ``data`` and ``fsdp``, heads over ``tensor``; they must divide, as those of
            ``head_layout`` do. None for arrays on one device.
        interpret: interpret the kernel on any platform, for tests.
    """
    on_device = partial(_splash_on_device, window=window, softcap=softcap, interpret=interpret)
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


def _splash_on_device(queries, keys, values, mask, *, window: int | None, softcap: float | None, interpret: bool):
    """``splash_attention`` on one device's shard."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # late, as in splash_kernel

    S, H = queries.shape[1:3]
    block = block_of(S)
    length = -(-S // block) * block

    def padded(x: Float[Array, "B S N E"]) -> Float[Array, "B N length E"]:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, length - S), (0, 0)))

    kernel = splash_kernel(length, H, block, window=window, softcap=softcap, shards=1, interpret=interpret)
    # Masked tokens are a segment of their own and attend at least to themselves: a row that attends to nothing would be
    # divided by zero.
    segments = jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, length - S)))
    out: Array = jax.vmap(kernel)(padded(queries), padded(keys), padded(values), SegmentIds(segments, segments))
    return out[:, :, :S].transpose(0, 2, 1, 3)
