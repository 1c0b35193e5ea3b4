"""A Hugging Face ``config.json`` as a ``DecoderConfig``, with every field accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.models.config import ACTIVATIONS, DecoderConfig, Rope

Fields = Mapping[str, Any]

LAYER_TYPES = ("full_attention", "sliding_attention")
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
}
QWEN = COMMON | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA = {name: default for name, default in COMMON.items() if name != "hidden_act"} | {
    "num_key_value_heads": REQUIRED,
    "head_dim": REQUIRED,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is read.

    Attributes:
        architecture: the class that transformers loads it with.
        fields: what it reads from its config, with the value that a missing field has in transformers.
        is_sliding: ``(fields, layer) -> bool`` where no ``layer_types`` are given.
        traits: what the family fixes, whatever its config says.
        same_as: fields that old configs carry in vain; each must equal the field that is read in its place.
        theta: the base of the rotary frequencies where the config gives none.
        local_theta: the same for sliding layers; None if they have no base of their own.
    """

    architecture: str
    fields: Fields
    is_sliding: Callable[[Fields, int], bool] = lambda fields, layer: False
    traits: Fields = field(default_factory=dict)
    same_as: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10_000.0
    local_theta: float | None = None


def _is_sliding_in_qwen(fields: Fields, layer: int) -> bool:
    has_window = fields["use_sliding_window"] and fields["sliding_window"] is not None
    return has_window and layer >= fields["max_window_layers"]


GEMMA_TRAITS = {"post_norms": True, "norm_offset": 1.0, "scaled_embeddings": True}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", COMMON | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        COMMON | {"sliding_window": 4096},
        is_sliding=lambda fields, layer: fields["sliding_window"] is not None,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN,
        is_sliding=_is_sliding_in_qwen,
        traits={"qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN | {"head_dim": 128, "attention_bias": False},
        is_sliding=_is_sliding_in_qwen,
        traits={"qk_norm": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        is_sliding=lambda fields, layer: layer % 2 == 0,
        traits=GEMMA_TRAITS,
        same_as={"sliding_window_size": "sliding_window", "hidden_act": "hidden_activation"},
    ),
    # No attn_logit_softcapping: transformers reads one here and never applies it, so a value is an error.
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA | {"final_logit_softcapping": None, "rope_local_base_freq": None, "sliding_window_pattern": 6},
        is_sliding=lambda fields, layer: (layer + 1) % fields["sliding_window_pattern"] != 0,
        traits=GEMMA_TRAITS | {"qk_norm": True},
        same_as={"_sliding_window_pattern": "sliding_window_pattern"},
        theta=1_000_000.0,
        local_theta=10_000.0,
    ),
}

# Fields that say nothing about what the model computes.
HARMLESS = (
    {"model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "tokenizer_class"}
    | {"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "unsloth_fixed", "unsloth_version"}
    | {"attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "pretraining_tp"}
    | {"use_cache", "cache_implementation", "attention_dropout", "chunk_size_feed_forward"}
    | {"return_dict", "output_attentions", "output_hidden_states"}
    | {"is_llama_config", "transformers.js_config"}
    | {"id2label", "label2id", "num_labels", "problem_type"}
    | {"max_length", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}
)

# Switches that are harmless at one value, the one that leaves them off.
HARMLESS_AT = {
    "use_mrope": False,
    "rope_interleaved": False,
    "use_bidirectional_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "use_bfloat16": False,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
}

ROPE_FIELDS = {
    "default": {"theta": "rope_theta"},
    "linear": {"theta": "rope_theta", "factor": "factor"},
    "llama3": {
        "theta": "rope_theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}


def family_of(hf_config: Fields) -> Family:
    """The family of a config, by its ``model_type``.

    Raises:
        ValueError: if there is none, or one that is not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    supported = f"supported are {', '.join(sorted(FAMILIES))}"
    if "text_config" in hf_config:
        raise ValueError(
            f"model_type {model_type!r} is multimodal (it has a text_config); text models alone: {supported}"
        )
    if "auto_map" in hf_config:
        raise ValueError(
            f"model_type {model_type!r} comes with code of its own (auto_map), which is never run; {supported}"
        )
    raise ValueError(f"model_type {model_type!r} in config.json is not supported; {supported}")


def from_hf_config(hf_config: Fields) -> DecoderConfig:
    """Read a ``config.json``, old hub spelling and transformers 5 alike.

    Every field is used, known to change nothing, or an error. Fields that are left out mean what they mean in
    transformers.

    Args:
        hf_config: the parsed file.

    Raises:
        ValueError: for a family, a field or a value that is not supported, a field that is missing, and for two
            spellings of one thing that contradict each other; the message names it.
    """
    family = family_of(hf_config)
    fields = _read_fields(hf_config, family)
    traits = family.traits
    num_layers, num_heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    num_kv_heads = fields["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if fields["head_dim"] is None and fields["hidden_size"] % num_heads:
        raise ValueError(
            f"config.json has no head_dim, and hidden_size {fields['hidden_size']} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    head_dim = fields["head_dim"] or fields["hidden_size"] // num_heads
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even: rotary positions turn pairs of components")
    activation = fields["hidden_activation"] if "hidden_activation" in fields else fields["hidden_act"]
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    layer_types = _layer_types(fields, family)
    ropes = _ropes(fields, family)
    attention_bias = fields.get("attention_bias", False)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields["max_position_embeddings"],
        windows=tuple(fields["sliding_window"] if kind == "sliding_attention" else None for kind in layer_types),
        ropes=tuple(ropes[kind] for kind in layer_types),
        query_scale=fields.get("query_pre_attn_scalar", head_dim) ** -0.5,
        activation=activation,
        qkv_bias=traits.get("qkv_bias", attention_bias),
        output_bias=attention_bias,
        mlp_bias=fields.get("mlp_bias", False),
        qk_norm=traits.get("qk_norm", False),
        post_norms=traits.get("post_norms", False),
        norm_epsilon=fields["rms_norm_eps"],
        norm_offset=traits.get("norm_offset", 0.0),
        embedding_scale=fields["hidden_size"] ** 0.5 if traits.get("scaled_embeddings") else 1.0,
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        tie_word_embeddings=fields["tie_word_embeddings"],
        initializer_range=fields["initializer_range"],
        scalar_head=_has_scalar_head(hf_config),
    )


def with_scalar_head(hf_config: Fields) -> dict[str, Any]:
    """The configuration of the same model as a reward model: transformers' classifier of sequences with one label.

    One that has a scalar head already is given back as it is.
    """
    if _has_scalar_head(hf_config):
        return dict(hf_config)
    name = family_of(hf_config).architecture.removesuffix("ForCausalLM")
    name = {"Gemma3": "Gemma3Text"}.get(name, name)
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**hf_config, "architectures": [f"{name}ForSequenceClassification"], **labels}


def _has_scalar_head(hf_config: Fields) -> bool:
    """Whether the model is a reward model: a classifier of sequences with one label."""
    architectures = hf_config.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if not any(name.endswith("ForSequenceClassification") for name in named):
        return False
    labels = hf_config.get("num_labels") or len(hf_config.get("id2label") or (0, 1))
    if labels != 1:
        raise ValueError(
            f"config.json is of a classifier with {labels} labels; a reward model has one (num_labels or id2label)"
        )
    return True


def _read_fields(hf_config: Fields, family: Family) -> dict[str, Any]:
    """The family's fields with their defaults filled in, after every other field was found harmless."""
    if hf_config.get("quantization_config") is not None:
        raise ValueError(
            "config.json has a quantization_config: quantized weights cannot be trained; "
            "use the model's float32, bfloat16 or float16 checkpoint"
        )
    fields = {**family.fields, **{name: hf_config[name] for name in family.fields if name in hf_config}}
    missing = [name for name, value in fields.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    unknown = {
        name: value
        for name, value in hf_config.items()
        if value is not None
        and name not in family.fields
        and name not in HARMLESS
        and not (name in HARMLESS_AT and value == HARMLESS_AT[name])
        and not (name in family.same_as and value == fields[family.same_as[name]])
    }
    if unknown:
        raise ValueError(
            f"config.json of model_type {hf_config['model_type']!r} has fields whose meaning is not implemented: "
            + ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        )
    for name, default in family.fields.items():
        wanted = int if default is REQUIRED else type(default)
        accepted = (int, float) if wanted in (int, float) else (wanted,)
        is_null = fields[name] is None and (default is None or name in NULLABLE)
        if default is not None and not is_null and not isinstance(fields[name], accepted):
            raise ValueError(f"{name} in config.json must be of type {wanted.__name__}, not {fields[name]!r}")
        if wanted is float and not is_null:
            fields[name] = float(fields[name])
    for name in (*COUNTS, "num_key_value_heads", "head_dim"):
        if fields[name] is not None and not (isinstance(fields[name], int) and fields[name] > 0):
            raise ValueError(f"{name} in config.json must be a positive integer, not {fields[name]!r}")
    return fields


def _layer_types(fields: Fields, family: Family) -> tuple[str, ...]:
    """The kind of each layer: the config's list where there is one, else the family's rule."""
    num_layers = fields["num_hidden_layers"]
    kinds = fields.get("layer_types")
    if kinds is None:
        sliding = (family.is_sliding(fields, layer) for layer in range(num_layers))
        kinds = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding]
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {num_layers} layers (num_hidden_layers)")
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"layer_types has {unknown}; supported are {' and '.join(LAYER_TYPES)}")
    window = fields["sliding_window"] if fields.get("use_sliding_window", True) and "sliding_window" in fields else None
    if "sliding_attention" in kinds and not (isinstance(window, int) and window > 0):
        raise ValueError(
            f"config.json has sliding_attention layers but no window: sliding_window={fields['sliding_window']!r}, "
            f"use_sliding_window={fields.get('use_sliding_window', True)!r}"
        )
    return tuple(kinds)


def _ropes(fields: Fields, family: Family) -> dict[str, Rope]:
    """The rotary frequencies of each kind of layer, from either spelling."""
    old: dict[str, Any] = {"rope_theta": fields["rope_theta"], **(fields["rope_scaling"] or {})}
    new = fields["rope_parameters"] or {}
    if family.local_theta is None:
        rope = _rope(old, new, "rope_parameters", family.theta)
        return {"full_attention": rope, "sliding_attention": rope}
    # transformers 5.0 puts these two beside the kinds of layers, where they say nothing.
    says_nothing = {"rope_type": "default", "rope_theta": None}
    unknown = sorted(n for n in set(new) - set(LAYER_TYPES) if n not in says_nothing or new[n] != says_nothing[n])
    if unknown:
        raise ValueError(f"rope_parameters has {unknown}; expected are {' and '.join(LAYER_TYPES)}")
    full = new.get("full_attention") or {}
    local = new.get("sliding_attention") or {}
    local_old = {"rope_theta": fields["rope_local_base_freq"]}
    return {
        "full_attention": _rope(old, full, "rope_parameters.full_attention", family.theta),
        "sliding_attention": _rope(local_old, local, "rope_parameters.sliding_attention", family.local_theta),
    }


def _rope(old: Fields, new: Fields, where: str, theta: float) -> Rope:
    """One set of rotary frequencies; ``old`` and ``new`` are the two spellings, of which either may be empty."""
    merged: dict[str, Any] = {}
    for parameters in (old, new):
        for name, value in parameters.items():
            name = "rope_type" if name == "type" else name
            if value is None:
                continue
            if merged.setdefault(name, value) != value:
                raise ValueError(f"config.json gives {name} twice, as {merged[name]!r} and {value!r} ({where})")
    kind = merged.pop("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ValueError(
            f"rope scaling {kind!r} is not implemented ({where}); implemented are {', '.join(ROPE_FIELDS)}"
        )
    if merged.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is not implemented ({where})")
    merged.setdefault("rope_theta", theta)
    names = ROPE_FIELDS[kind]
    missing, unknown = sorted(set(names.values()) - set(merged)), sorted(set(merged) - set(names.values()))
    if missing or unknown:
        raise ValueError(f"rope scaling {kind!r} ({where}) lacks {missing} and has {unknown}, which it does not read")
    return Rope(kind=kind, **{name: float(merged[hf_name]) for name, hf_name in names.items()})
