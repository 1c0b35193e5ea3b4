"""The definition of a model family, and the fields and modules that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.hf_layouts import Layout

Fields = Mapping[str, Any]

REQUIRED = object()
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
NULLABLE = (
    *("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"),
    *("q_lora_rank", "n_group", "topk_group", "n_shared_experts"),
)

MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
"""Stored names of a layer's modules, by the module's path."""


@dataclass(frozen=True)
class Family:
    """How the config and the weights of one ``model_type`` are read.

    Attributes:
        architecture: its class in transformers.
        fields: the config fields it reads, with their default in transformers.
        names: fields that other families name otherwise, with the name that others give them.
        traits: settings of ``DecoderConfig``, or functions of the fields that give them.
        is_sliding: ``(fields, layer) -> bool``, used if the config has no ``layer_types``.
        is_linear: ``(fields, layer) -> bool``, whether a layer has the gated delta rule, used if the
            config has no ``layer_types``; None for a family whose layers all have attention.
        has_rope: ``(fields, layer, layer type) -> bool``.
        same_as: unused fields of old configs; each must equal the field that is read in its place.
        theta: default base of the rotary frequencies.
        local_theta: default base for sliding layers, whose frequencies are never scaled by ``rope_scaling``; None if
            they have the same frequencies as others.
        rotary_factor: default part of a head's components that are rotated; None if all are, whatever the config says.
        rope_interleaved: as in ``config.Rope``.
        rope_kinds: names of kinds of scaling that mean another in this family.
        rope_fields: further fields of rotary parameters, of which only ``llama_4_scaling_beta`` has an effect.
        default_rope: rotary parameters of a config that has none.
        modules: names of modules, or of whole parameters, that differ from those of ``MODULES``.
        layouts: of parameters that are stored in another way than in ``hf_layouts.LAYOUTS``.
        variants: modules and layouts in which some checkpoints differ.
        fixed: fields that are not read, with the one value that they may have, or a function that is True of it.
    """

    architecture: str
    fields: Fields
    names: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    is_sliding: Callable[[Fields, int], bool] = lambda fields, layer: False
    is_linear: Callable[[Fields, int], bool] | None = None
    has_rope: Callable[[Fields, int, str], bool] = lambda fields, layer, kind: True
    same_as: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10_000.0
    local_theta: float | None = None
    rotary_factor: float | None = None
    rope_interleaved: bool = False
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    rope_fields: tuple[str, ...] = ()
    default_rope: Fields | None = None
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    variants: tuple[tuple[Mapping[str, str], Mapping[str, Layout]], ...] = ()
    fixed: Fields = field(default_factory=dict)


def without(fields: Fields, *names: str) -> dict[str, Any]:
    """The fields without some.

    Args:
        fields: of a family.
        names: of the fields to leave out.
    """
    return {name: default for name, default in fields.items() if name not in names}


def has_window(fields: Fields, layer: int) -> bool:
    """Whether all layers have a sliding window.

    Args:
        fields: of a config.
        layer: number of a layer.
    """
    return fields["sliding_window"] is not None


def is_sliding_in_qwen(fields: Fields, layer: int) -> bool:
    """Whether a layer has a sliding window: those from ``max_window_layers`` on, if windows are switched on.

    Args:
        fields: of a config.
        layer: number of the layer.
    """
    return fields["use_sliding_window"] and has_window(fields, layer) and layer >= fields["max_window_layers"]


COMMON = dict.fromkeys(COUNTS, REQUIRED) | {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
}
QWEN = COMMON | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
