"""The model families: the fields of their ``config.json``, what they mean for the decoder, and names of their tensors.

A family is a row of ``FAMILIES``. Only mathematics that no other family has needs code elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.hf_fields import check_number
from grpo_jax.models.hf_layouts import FUSED_GATE_UP, FUSED_QKV, Layout

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
NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")

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
    """

    architecture: str
    fields: Fields
    names: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    is_sliding: Callable[[Fields, int], bool] = lambda fields, layer: False
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


def _without(fields: Fields, *names: str) -> dict[str, Any]:
    return {name: default for name, default in fields.items() if name not in names}


def _has_window(fields: Fields, layer: int) -> bool:
    return fields["sliding_window"] is not None


def _is_sliding_in_qwen(fields: Fields, layer: int) -> bool:
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return has_window and layer >= fields["max_window_layers"]


def _is_local_but_every(pattern: str) -> Callable[[Fields, int], bool]:
    """All layers but every n-th, for the field ``pattern`` of the config that says n."""
    return lambda fields, layer: (layer + 1) % fields[pattern] != 0


def _gemma1_activation(fields: Fields) -> str:
    # Old configs say "gelu" and mean its approximation, as transformers reads them.
    named = fields["hidden_activation"] or fields["hidden_act"]
    return "gelu_pytorch_tanh" if named == "gelu" else named


def _smollm_rope(fields: Fields, layer: int, kind: str) -> bool:
    flags = fields["no_rope_layers"]
    if flags is None:
        return (layer + 1) % fields["no_rope_layer_interval"] != 0
    if not isinstance(flags, list) or len(flags) != fields["num_hidden_layers"]:
        raise ValueError(
            f"no_rope_layers in config.json must be a list of {fields['num_hidden_layers']} zeros and ones, one for "
            f"each layer, not {flags!r:.200}"
        )
    return bool(flags[layer])


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
OLMO = COMMON | {"attention_bias": False, "rms_norm_eps": 1e-5}
GLM = COMMON | {"head_dim": 128, "attention_bias": True, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": None}
GEMMA = {
    **_without(COMMON, "hidden_act"),
    "num_key_value_heads": REQUIRED,
    "head_dim": REQUIRED,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
SCALED_EMBEDDINGS = {"embedding_scale": lambda fields: fields["hidden_size"] ** 0.5}
GEMMA_TRAITS = {
    "post_norms": True,
    "norm_offset": 1.0,
    "query_scale": lambda fields: check_number("query_pre_attn_scalar", fields["query_pre_attn_scalar"]) ** -0.5,
    "attention_softcap": lambda fields: fields.get("attn_logit_softcapping"),
    "logit_softcap": lambda fields: fields.get("final_logit_softcapping"),
    **SCALED_EMBEDDINGS,
}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
GEMMA_MODULES = MODULES | POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm"}
POST_NORM_TRAITS = {"pre_norms": False, "post_norms": True}
GLM_TRAITS = {"output_bias": False}
LAYER_NORM_TRAITS = {"norm": "layer"}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", COMMON | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", COMMON | {"sliding_window": 4096}, is_sliding=_has_window),
    "ministral": Family(
        "MinistralForCausalLM", COMMON | {"sliding_window": 4096, "layer_types": None}, is_sliding=_has_window
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        COMMON | {"head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None},
        is_sliding=_has_window,
        rope_fields=("llama_4_scaling_beta", "max_position_embeddings"),
        default_rope={
            "type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", QWEN, is_sliding=_is_sliding_in_qwen, traits={"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN | {"head_dim": 128, "attention_bias": False},
        is_sliding=_is_sliding_in_qwen,
        traits={"qk_norm": "head"},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        COMMON
        | {
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": None,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
        traits={"norm_offset": 1.0, "activation": _gemma1_activation, **SCALED_EMBEDDINGS},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        names={"hidden_activation": "hidden_act"},
        is_sliding=lambda fields, layer: layer % 2 == 0,
        traits=GEMMA_TRAITS,
        same_as={"sliding_window_size": "sliding_window", "hidden_act": "hidden_activation"},
        modules=GEMMA_MODULES,
    ),
    # No attn_logit_softcapping: transformers reads it here and does not apply it, so a value is an error.
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA
        | {"final_logit_softcapping": None, "rope_local_base_freq": None, "sliding_window_pattern": 6}
        # Multimodal checkpoints leave these out.
        | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "head_dim": 256},
        names={"hidden_activation": "hidden_act"},
        is_sliding=_is_local_but_every("sliding_window_pattern"),
        traits=GEMMA_TRAITS | {"qk_norm": "head"},
        same_as={"_sliding_window_pattern": "sliding_window_pattern", "hidden_act": "hidden_activation"},
        theta=1_000_000.0,
        local_theta=10_000.0,
        modules=GEMMA_MODULES,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", OLMO, traits=POST_NORM_TRAITS | {"qk_norm": "all"}, modules=MODULES | POST_NORMS
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        OLMO | {"sliding_window": 4096, "layer_types": None},
        is_sliding=lambda fields, layer: (layer + 1) % 4 != 0,
        traits=POST_NORM_TRAITS | {"qk_norm": "all"},
        theta=500_000.0,
        local_theta=500_000.0,
        modules=MODULES | POST_NORMS,
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        COMMON | {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": None, "layer_types": None},
        is_sliding=lambda fields, layer: fields["sliding_window"] is not None and (layer + 1) % 4 != 0,
        has_rope=lambda fields, layer, kind: fields["sliding_window"] is None or kind == "sliding_attention",
        traits=POST_NORM_TRAITS | {"qk_norm": "head"},
        modules=MODULES | POST_NORMS,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        COMMON
        | {
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        is_sliding=lambda fields, layer: (
            fields["use_sliding_window"]
            and fields["sliding_window"] is not None
            and not _smollm_rope(fields, layer, "")
        ),
        has_rope=_smollm_rope,
        theta=2_000_000.0,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        COMMON
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": None}
        | {"original_max_position_embeddings": 4096},
        is_sliding=_has_window,
        rotary_factor=1.0,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
        modules=MODULES
        | {f"attention/{name}": "self_attn.qkv_proj" for name in "qkv"}
        | {f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
        layouts=FUSED_QKV | FUSED_GATE_UP,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        COMMON
        | {"attention_bias": False, "mlp_bias": False}
        | dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0),
        traits={
            "embedding_scale": lambda fields: fields["embedding_multiplier"],
            "residual_scale": lambda fields: fields["residual_multiplier"],
            "query_scale": lambda fields: fields["attention_multiplier"],
            "output_scale": lambda fields: 1 / fields["logits_scaling"],
        },
    ),
    "glm": Family(
        "GlmForCausalLM",
        GLM,
        traits=GLM_TRAITS,
        rotary_factor=0.5,
        rope_interleaved=True,
        modules=MODULES | {f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
        layouts=FUSED_GATE_UP,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        GLM,
        traits=GLM_TRAITS | {"post_norms": True},
        rotary_factor=0.5,
        rope_interleaved=True,
        modules=MODULES
        | {f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")}
        | {"post_attention_norm": "post_self_attn_layernorm", "post_mlp_norm": "post_mlp_layernorm"},
        layouts=FUSED_GATE_UP,
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        _without(COMMON, "rms_norm_eps")
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.018042,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
            "sliding_window": None,
        },
        names={"norm_epsilon": "rms_norm_eps"},
        same_as={"layer_norm_epsilon": "norm_epsilon"},
        is_sliding=_has_window,
        traits=LAYER_NORM_TRAITS
        | {"gated_mlp": False}
        | dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), lambda fields: fields["use_bias"]),
        modules=MODULES | {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        _without(COMMON, "rms_norm_eps")
        | {"layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": None},
        names={"layer_norm_eps": "rms_norm_eps"},
        traits=LAYER_NORM_TRAITS | {"qkv_bias": lambda fields: fields["use_qkv_bias"]},
        rotary_factor=0.25,
    ),
}
