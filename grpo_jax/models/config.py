"""What a decoder is made of."""

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
    """Rotary frequencies ``theta ** (-2 i / head_dim)``, scaled.

    Attributes:
        theta: the base.
        kind: ``default`` leaves the frequencies alone; ``linear`` divides them by ``factor``; ``llama3`` divides the
            low ones by ``factor``, leaves the high ones alone and blends in between, by wavelength; ``yarn`` does so
            by the number of turns over the original length (https://arxiv.org/abs/2309.00071). Two kinds depend on the
            length of the sequence, which is the largest position of the call plus 1, as in transformers: beyond the
            original length ``dynamic`` (NTK) raises the base, and ``longrope`` divides by ``long_factor`` instead of
            ``short_factor`` (https://arxiv.org/abs/2402.13753).
        factor: how much longer sequences may become.
        low_freq_factor, high_freq_factor: waves longer than ``original_max_positions / low_freq_factor`` are low,
            those shorter than ``original_max_positions / high_freq_factor`` high (``llama3`` only).
        original_max_positions: the length that was trained on before scaling, in tokens.
        attention_factor: multiplies cosines and sines, so attention scores by its square (``yarn``, ``longrope``).
        beta_fast, beta_slow: frequencies of more than ``beta_fast`` turns over the original length are high, those of
            fewer than ``beta_slow`` low (``yarn`` only).
        truncate: whether the limits between them are rounded to whole components (``yarn`` only).
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
        """Whether a sequence longer than ``original_max_positions`` is rotated by other frequencies."""
        return self.kind == "dynamic" or (self.kind == "longrope" and self.short_factor != self.long_factor)


@dataclass(frozen=True)
class DecoderConfig:
    """The one decoder's sizes and switches; two models with equal configs have the same parameter tree.

    Attributes:
        vocab_size, hidden_size, intermediate_size: rows of the embedding, width of the residual stream and of the MLP.
        num_layers, num_heads, num_kv_heads, head_dim: ``num_heads / num_kv_heads`` query heads share a key head.
        max_position_embeddings: the longest sequence the model was made for, in tokens; nothing here enforces it.
        windows: for each layer how many slots back a query sees, its own included; None sees all.
        ropes: for each layer its rotary frequencies.
        query_scale: what queries are multiplied by before they meet the keys.
        activation: of the gated MLP, a key of ``ACTIVATIONS``.
        qkv_bias, output_bias, mlp_bias: whether these projections add a bias.
        qk_norm: whether queries and keys are normalized over ``head_dim``.
        post_norms: whether attention and MLP are normalized at their end as well, before the residual is added.
        norm_epsilon: added to the mean square in every norm.
        norm_offset: what is added to a norm's stored scale (1 in Gemma).
        embedding_scale: what embeddings are multiplied by, rounded to the computing precision first.
        attention_softcap, logit_softcap: ``c`` in ``c * tanh(x / c)`` on attention scores and output logits; or None.
        tie_word_embeddings: whether the output embedding is the input embedding.
        initializer_range: standard deviation of new weights.
        scalar_head: whether the decoder ends in one number for each position, as reward models do, instead of logits.
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
        """The longest sequence before rotary frequencies change with the length; None where they never do."""
        lengths = [rope.original_max_positions for rope in self.ropes if rope.depends_on_length]
        return int(min(lengths)) if lengths else None


def with_rope_length(config: DecoderConfig, length: int) -> DecoderConfig:
    """The decoder with the rotary frequencies of sequences of ``length`` tokens for sequences of any length.

    Sampler and trainer then agree whatever the lengths of their sequences are. ``length`` becomes
    ``max_position_embeddings`` too.

    Raises:
        ValueError: if no frequencies depend on the length, or ``length`` is not positive.
    """
    if config.rope_switch_length is None:
        raise ValueError(f"rope_length={length} is for longrope and dynamic rope scaling, which this model has not")
    if length < 1:
        raise ValueError(f"rope_length must be positive, not {length}")
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
