"""Sizes and switches of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

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
        dims: components of a head that are rotated, the first ones; None for all of them.
        interleaved: whether components ``2 i`` and ``2 i + 1`` are a pair, and not ``i`` and ``i + dims / 2``.
        query_beta: ``b`` in the factor ``1 + b log(1 + floor(position / original_max_positions))`` of the queries
            (Llama 4, Ministral 3); 0 for none.
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
    dims: int | None = None
    interleaved: bool = False
    query_beta: float = 0.0

    @property
    def depends_on_length(self) -> bool:
        """Whether sequences longer than ``original_max_positions`` have other frequencies."""
        return self.kind == "dynamic" or (self.kind == "longrope" and self.short_factor != self.long_factor)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP: a router chooses ``per_token`` of ``count`` experts for each token.

    Attributes:
        count: experts, each a gated MLP.
        per_token: experts that a token is sent to.
        intermediate_size: width of an expert.
        scoring: of the router's logits, over all experts.
        normalized: whether the weights of the chosen experts are divided by their sum.
        scale: factor of the weights.
        groups, groups_per_token: experts are chosen from the ``groups_per_token`` groups whose two best have the
            largest sums, out of ``groups`` of equal size (DeepSeek V3); 1 and 1 to choose from all.
        selection_bias: whether a bias is added to the scores for the choice, and not for the weights.
        router_bias: whether the router's logits have a bias.
        bias: whether the experts' projections have biases.
        clamp: limit of the gate from above and of the other input from both sides, in
            ``(up + 1) * gate * sigmoid(1.702 gate)`` (gpt-oss); None for the config's activation.
        shared_size: width of an MLP that all tokens pass, whose output is added; 0 for none.
        shared_gate: whether that output is multiplied by the sigmoid of a projection of the input.
    """

    count: int
    per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    clamp: float | None = None
    shared_size: int = 0
    shared_gate: bool = False

    def __post_init__(self):
        size, rest = divmod(self.count, self.groups)
        if rest or not 1 <= self.groups_per_token <= self.groups:
            raise ValueError(
                f"{self.count} experts in {self.groups} groups (n_group), of which a token uses "
                f"{self.groups_per_token} (topk_group): the groups must be equal, and as many as a token uses"
            )
        if not 1 <= self.per_token <= self.groups_per_token * size:
            raise ValueError(
                f"num_experts_per_tok is {self.per_token}; it must be from 1 to the {self.groups_per_token * size} "
                "experts that a token chooses from"
            )


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek V2, https://arxiv.org/abs/2405.04434): keys and values are compressed.

    Attributes:
        query_rank: width of the compressed queries; None if they are not compressed.
        rank: width of the latent vector from which keys and values are computed, and which is cached.
        rope_dim: components of a head that are rotated; a key's are shared by all heads, and cached too.
        key_dim: components of a head that are not rotated.
        value_dim: components of a head's value.
    """

    query_rank: int | None
    rank: int
    rope_dim: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class DeltaRule:
    """Gated delta rule (https://arxiv.org/abs/2412.06464), a linear recurrence in place of attention.

    Attributes:
        key_heads: heads of queries and keys; each serves ``value_heads / key_heads`` adjacent value heads.
        value_heads: heads of values and of the state.
        key_dim, value_dim: components of a head.
        conv_size: width of the causal convolution of queries, keys and values, in tokens.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_size: int


class LayerKind(NamedTuple):
    """The settings in which the layers of a decoder differ."""

    window: int | None
    rope: Rope | None
    mixer: Literal["attention", "delta_rule"]
    sparse: bool


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of the decoder; two models with equal configs have the same parameter tree.

    Attributes:
        family: a row of ``hf_families.FAMILIES``, which says how a checkpoint names the parameters.
        vocab_size, hidden_size, intermediate_size: rows of the embedding, width of the residual stream and of the MLP.
        num_layers, num_heads, num_kv_heads, head_dim: ``num_heads / num_kv_heads`` query heads share a key head.
        max_position_embeddings: longest sequence that the model supports, in tokens; not enforced here.
        windows: sliding window of each layer, in slots, the query's own included; None for full attention.
        ropes: rotary frequencies of each layer; None for a layer without positions.
        mixers: attention or gated delta rule, for each layer; empty for attention in all.
        sparse: whether each layer has experts in place of an MLP; empty for none.
        query_scale: factor of the queries.
        activation: of the MLP, a key of ``ACTIVATIONS``.
        gated_mlp: whether the MLP is ``down(activation(gate(x)) * up(x))``, and not ``down(activation(up(x)))``.
        qkv_bias, output_bias, mlp_bias: whether these projections add a bias.
        qk_norm: normalization of queries and keys, over each head or over all heads together; None for none.
        attention_gate: whether each head's output is multiplied by the sigmoid of a projection of the input.
        attention_sinks: whether each head has a logit that takes part in the softmax and has no value (gpt-oss).
        pre_norms, post_norms: whether the inputs of attention and MLP are normalized, and their outputs before the
            residual is added.
        norm: root-mean-square norm, or layer norm with a bias.
        norm_epsilon: added to the mean square in every norm.
        norm_offset: added to a norm's stored scale (1 in Gemma).
        embedding_scale: factor of the embeddings, rounded to the compute dtype.
        residual_scale: factor of what attention and MLP add to the residual stream.
        output_scale: factor of the final hidden states, and so of the logits.
        attention_softcap, logit_softcap: ``c`` in ``c * tanh(x / c)`` on attention scores and output logits; or None.
        tie_word_embeddings: whether the output embedding is the input embedding.
        initializer_range: standard deviation of new weights.
        scalar_head: whether the output is a scalar for each position, as in reward models, instead of logits.
        experts: of the sparse layers.
        latent: attention is multi-head latent attention; its heads have these sizes in place of ``head_dim``.
        delta: of the layers whose mixer is ``delta_rule``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    query_scale: float
    activation: str
    tie_word_embeddings: bool
    initializer_range: float
    norm_epsilon: float
    mixers: tuple[Literal["attention", "delta_rule"], ...] = ()
    sparse: tuple[bool, ...] = ()
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    attention_gate: bool = False
    attention_sinks: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    output_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scalar_head: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    delta: DeltaRule | None = None

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer; layers of equal kind differ in their weights only."""
        mixers: tuple[Any, ...] = self.mixers or ("attention",) * self.num_layers
        sparse = self.sparse or (False,) * self.num_layers
        return tuple(LayerKind(*kind) for kind in zip(self.windows, self.ropes, mixers, sparse, strict=True))

    def num_sparse(self, layers: int | None = None) -> int:
        """Number of layers with experts.

        Args:
            layers: count among this many layers, the first; None for all.
        """
        return sum(kind.sparse for kind in self.kinds[:layers])

    @property
    def num_attention_layers(self) -> int:
        """Number of the layers with attention, which are those with a KV cache."""
        return sum(kind.mixer == "attention" for kind in self.kinds)

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the states of one sequence, in all layers with the gated delta rule.

        Args:
            itemsize: bytes of a number in the compute dtype.
        """
        if self.delta is None:
            return 0
        d = self.delta
        inputs = (d.conv_size - 1) * (2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim)
        state = 4 * d.value_heads * d.key_dim * d.value_dim
        return (self.num_layers - self.num_attention_layers) * (itemsize * inputs + state)

    @property
    def rope_interleaved(self) -> bool:
        """Whether adjacent components are rotated as a pair; the same in all layers."""
        return any(rope is not None and rope.interleaved for rope in self.ropes)

    @property
    def rotary_dim(self) -> int:
        """Components of a head that rotations of all components apply to."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def rope_switch_length(self) -> int | None:
        """The longest sequence with unchanged rotary frequencies, in tokens; None if they are fixed."""
        ropes = [rope for rope in self.ropes if rope is not None and rope.depends_on_length]
        return int(min(rope.original_max_positions for rope in ropes)) if ropes else None


def with_layers(config: DecoderConfig, kinds: Sequence[LayerKind]) -> DecoderConfig:
    """The decoder with layers of other kinds, such as the first of its own.

    Args:
        config: of the decoder.
        kinds: of each layer.
    """
    windows, ropes, mixers, sparse = zip(*kinds, strict=True) if kinds else ((),) * 4
    return replace(config, num_layers=len(kinds), windows=windows, ropes=ropes, mixers=mixers, sparse=sparse)


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
    ropes = tuple(rope and _fixed(rope, length, config.rotary_dim) for rope in config.ropes)
    return replace(config, ropes=ropes, max_position_embeddings=length)


def _fixed(rope: Rope, length: int, head_dim: int) -> Rope:
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_positions else rope.short_factor
        return replace(rope, short_factor=factors, long_factor=factors)
    if rope.kind == "dynamic":
        ratio, dims = max(length / rope.original_max_positions, 1.0), rope.dims or head_dim
        theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (dims / (dims - 2))
        return Rope(theta=theta, dims=rope.dims, interleaved=rope.interleaved)
    return rope
