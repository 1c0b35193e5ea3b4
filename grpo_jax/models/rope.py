"""Rotary position embeddings: frequencies with their scalings, and the rotation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of components, and a factor of the queries; float32."""

    cos: Float[Array, "B S 1 half"]
    sin: Float[Array, "B S 1 half"]
    query_scale: Float[Array, "B S 1 1"] | None = None


def rope_frequencies(rope: Rope, head_dim: int, length: Float[Array, ""] | None = None) -> np.ndarray | Array:
    """Radians per position for each pair of rotated components, float32.

    Computed in float32 throughout, as in the models' reference code: at position 100,000 rounding is visible.

    Args:
        rope: base and scaling of the frequencies.
        head_dim: components of a head.
        length: tokens of the sequence, float32, for scalings that depend on it; None for the original length.
    """
    dims = rope.dims or head_dim
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    periods = np.float32(rope.theta) ** exponents
    frequencies = np.float32(1) / periods
    if rope.kind == "dynamic" and length is not None:
        ratio = length / rope.original_max_positions
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (dims / (dims - 2))
        return jnp.where(length > rope.original_max_positions, 1 / theta**exponents, frequencies)
    if rope.kind == "longrope":
        short, long = (
            np.float32(1) / (np.asarray(factors, np.float32) * periods)
            for factors in (rope.short_factor, rope.long_factor)
        )
        return short if length is None else jnp.where(length > rope.original_max_positions, long, short)
    if rope.kind in ("default", "dynamic"):
        return frequencies
    scaled = frequencies / np.float32(rope.factor)
    if rope.kind == "linear":
        return scaled
    kept = _kept_by_yarn(rope, dims) if rope.kind == "yarn" else _kept_by_llama3(rope, frequencies)
    return kept * frequencies + (1 - kept) * scaled


def _kept_by_llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """The fraction of each frequency that is left unscaled, from 0 to 1, by wavelength."""
    waves_per_length = np.float32(rope.original_max_positions / (2 * np.pi)) * frequencies
    kept = (waves_per_length - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(kept, 0, 1).astype(np.float32)


def _kept_by_yarn(rope: Rope, dims: int) -> np.ndarray:
    """The fraction of each frequency that is left unscaled, from 0 to 1, by turns over the original length."""
    first, last = (
        dims * np.log(rope.original_max_positions / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(dims // 2, dtype=np.float32) - first) / width, 0, 1).astype(np.float32)


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B S"]) -> Rotation:
    """Cosine and sine of the angle at each position, times ``attention_factor``, with a heads axis.

    Args:
        rope: base and scaling of the frequencies.
        head_dim: components of a head.
        positions: of each token, from 0.
    """
    length = (jnp.max(positions) + 1).astype(jnp.float32) if rope.depends_on_length else None
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * rope_frequencies(rope, head_dim, length)[None, None, None]
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    if not rope.query_beta:
        return Rotation(cos, sin)
    periods = jnp.floor(positions.astype(jnp.float32) / rope.original_max_positions)
    return Rotation(cos, sin, (1 + rope.query_beta * jnp.log1p(periods))[:, :, None, None])


def rotate(
    x: Float[Array, "B S N E"], rotation: Rotation | None, *, interleaved: bool = False
) -> Float[Array, "B S N E"]:
    """Rotate pairs of components by their angles, in float32.

    Args:
        x: queries or keys.
        rotation: of the first ``2 * half`` components; the others are unchanged. None leaves all unchanged.
        interleaved: whether ``(x[2 i], x[2 i + 1])`` are the pairs, and not ``(x[i], x[i + half])``.
    """
    x = x.astype(jnp.float32)
    if rotation is None:
        return x
    cos, sin = rotation.cos, rotation.sin
    dims = 2 * cos.shape[-1]
    turned = x[..., :dims]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        rotated = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated if dims == x.shape[-1] else jnp.concatenate([rotated, x[..., dims:]], axis=-1)
