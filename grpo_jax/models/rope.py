"""Rotary position embeddings: frequencies with their scalings, and the rotation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import Rope

Rotation = tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]]


def rope_frequencies(rope: Rope, head_dim: int, length: Float[Array, ""] | None = None) -> np.ndarray | Array:
    """Radians per position for each pair of components, float32 ``[head_dim / 2]``.

    Computed in float32 throughout, as in the models' reference code: at position 100,000 rounding is visible.

    Args:
        rope: base and scaling of the frequencies.
        head_dim: components of a head.
        length: tokens of the sequence, float32, for scalings that depend on it; None for the original length.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.float32(rope.theta) ** exponents
    frequencies = np.float32(1) / periods
    if rope.kind == "dynamic" and length is not None:
        ratio = length / rope.original_max_positions
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
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
    kept = _kept_by_yarn(rope, head_dim) if rope.kind == "yarn" else _kept_by_llama3(rope, frequencies)
    return kept * frequencies + (1 - kept) * scaled


def _kept_by_llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """The fraction of each frequency that is left unscaled, from 0 to 1, by wavelength."""
    waves_per_length = np.float32(rope.original_max_positions / (2 * np.pi)) * frequencies
    kept = (waves_per_length - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(kept, 0, 1).astype(np.float32)


def _kept_by_yarn(rope: Rope, head_dim: int) -> np.ndarray:
    """The fraction of each frequency that is left unscaled, from 0 to 1, by turns over the original length."""
    first, last = (
        head_dim * np.log(rope.original_max_positions / (turns * 2 * np.pi)) / (2 * np.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / width, 0, 1).astype(np.float32)


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B S"]) -> Rotation:
    """Cosine and sine of the angle at each position, times ``attention_factor``; float32, with a heads axis.

    Args:
        rope: base and scaling of the frequencies.
        head_dim: components of a head.
        positions: of each token, from 0.
    """
    length = (jnp.max(positions) + 1).astype(jnp.float32) if rope.depends_on_length else None
    angles = (
        positions.astype(jnp.float32)[:, :, None, None] * rope_frequencies(rope, head_dim, length)[None, None, None]
    )
    if rope.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x: Float[Array, "B S N E"], rotation: Rotation) -> Float[Array, "B S N E"]:
    """Rotate the pairs ``(x[i], x[i + E/2])`` by their angles, in float32.

    Args:
        x: queries or keys.
        rotation: as returned by ``rotation``, with ``half = E / 2``.
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
