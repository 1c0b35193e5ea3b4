"""Sizes and switches of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (RoPE): frequencies ``theta ** (-2 i / head_dim)`` and their scaling.

    Attributes:
        theta: base of the frequencies.
        kind: ``default`` does not scale; ``linear`` divides all frequencies by ``factor``; ``llama3`` divides the low
            ones by ``factor``, keeps the high ones and interpolates in between, by wavelength; ``yarn`` does so by the
            number of turns over the original length (https://arxiv.org/abs/2309.00071). Two kinds depend on the length
            of the sequence, which is the largest position of the call plus 1, as in transformers: beyond the original
            length ``dynamic`` (NTK) raises the base, and ``longrope`` divides by ``long_factor`` instead of
            ``short_factor`` (https://arxiv.org/abs/2402.13753).
        factor: ratio of the longest sequence to the original length.
        low_freq_factor, high_freq_factor: wavelengths above ``original_max_positions / low_freq_factor`` are low
            frequencies, those below ``original_max_positions / high_freq_factor`` high ones (``llama3`` only).
        original_max_positions: longest sequence in training before scaling, in tokens.
        attention_factor: factor of cosines and sines; attention scores are multiplied by its square (``yarn``,
            ``longrope``).
        beta_fast, beta_slow: frequencies of more than ``beta_fast`` turns over the original length are high, those of
            fewer than ``beta_slow`` turns low (``yarn`` only).
        truncate: whether the bounds between high and low are rounded to whole components (``yarn`` only).
        short_factor, long_factor: a divisor for each pair of components (``longrope`` only).
    """

    theta: float
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether sequences longer than ``original_max_positions`` have other frequencies."""
        return self.kind == "dynamic" or (self.kind == "longrope" and self.short_factor != self.long_factor)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of the decoder; two models with equal configs have the same parameter tree.

    Attributes:
        vocab_size, hidden_size, intermediate_size: rows of the embedding, width of the residual stream and of the MLP.
        num_layers, num_heads, num_kv_heads, head_dim: ``num_heads / num_kv_heads`` query heads share a key head.
        max_position_embeddings: longest sequence that the model supports, in tokens; not enforced here.
        windows: sliding window of each layer, in slots, the query's own included; None for full attention.
        ropes: rotary frequencies of each layer.
        query_scale: factor of the queries.
        activation: of the gated MLP, a key of ``ACTIVATIONS``.
        qkv_bias, output_bias, mlp_bias: whether these projections add a bias.
        qk_norm: whether queries and keys are normalized over ``head_dim``.
        post_norms: whether the outputs of attention and MLP are normalized too, before the residual is added.
        norm_epsilon: added to the mean square in every norm.
        norm_offset: added to a norm's stored scale (1 in Gemma).
        embedding_scale: factor of the embeddings, rounded to the compute dtype.
        attention_softcap, logit_softcap: ``c`` in ``c * tanh(x / c)`` on attention scores and output logits; or None.
        tie_word_embeddings: whether the output embedding is the input embedding.
        initializer_range: standard deviation of new weights.
        scalar_head: whether the output is a scalar for each position, as in reward models, instead of logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    query_scale: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    norm_epsilon: float
    norm_offset: float
    embedding_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    tie_word_embeddings: bool
    initializer_range: float
    scalar_head: bool = False

    @property
    def rope_switch_length(self) -> int | None:
        """The longest sequence with unchanged rotary frequencies, in tokens; None if they are fixed."""
        lengths = [rope.original_max_positions for rope in self.ropes if rope.depends_on_length]
        return int(min(lengths)) if lengths else None


def with_rope_length(config: DecoderConfig, length: int) -> DecoderConfig:
    """The decoder with rotary frequencies fixed to those of sequences of ``length`` tokens.

    Sampler and trainer then use the same frequencies whatever the lengths of their sequences.

    Args:
        config: with frequencies that depend on the length.
        length: in tokens; becomes ``max_position_embeddings`` too.

    Raises:
        ValueError: frequencies do not depend on the length, or ``length`` is below 1.
    """
    if config.rope_switch_length is None:
        raise ValueError(
            f"rope_length={length} applies to longrope and dynamic rope scaling, and this model has neither"
        )
    if length < 1:
        raise ValueError(f"rope_length must be at least 1, not {length}")
    ropes = tuple(_fixed(rope, length, config.head_dim) for rope in config.ropes)
    return replace(config, ropes=ropes, max_position_embeddings=length)


def _fixed(rope: Rope, length: int, head_dim: int) -> Rope:
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_positions else rope.short_factor
        return replace(rope, short_factor=factors, long_factor=factors)
    if rope.kind == "dynamic":
        ratio = max(length / rope.original_max_positions, 1.0)
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        return Rope(theta=theta)
    return rope
