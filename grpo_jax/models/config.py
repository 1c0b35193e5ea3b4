"""What a decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass
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
            low ones by ``factor``, leaves the high ones alone and blends in between.
        factor: how much longer sequences may become.
        low_freq_factor, high_freq_factor: waves longer than ``original_max_positions / low_freq_factor`` are low,
            those shorter than ``original_max_positions / high_freq_factor`` high (``llama3`` only).
        original_max_positions: the length that was trained on before scaling, in tokens (``llama3`` only).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: float = 1.0


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
