"""A Hugging Face ``config.json`` as a ``DecoderConfig``; fields that are not implemented are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from grpo_jax.models.config import ACTIVATIONS, DecoderConfig
from grpo_jax.models.hf_families import FAMILIES
from grpo_jax.models.hf_family import COUNTS, NULLABLE, REQUIRED, Family
from grpo_jax.models.hf_fields import (
    ACTIVATION_NAMES,
    HARMLESS,
    HARMLESS_AT,
    LAYER_TYPES,
    check_count,
    check_number,
    check_object,
)
from grpo_jax.models.hf_files import cut
from grpo_jax.models.hf_rope import read_ropes
from grpo_jax.models.hf_schemes import read_scheme, without_scheme
from grpo_jax.models.hf_text import MULTIMODAL, is_multimodal, text_config

Fields = Mapping[str, Any]

MAX_LAYERS = 100_000
LINEAR_ATTENTION = "linear_attention"
MIXERS: dict[str, Literal["attention", "delta_rule"]] = {LINEAR_ATTENTION: "delta_rule"}
"""The mixer of a layer by its type in ``layer_types``, for the types that are not attention."""


def family_of(hf_config: Fields) -> Family:
    """The family of a text model's config, by its ``model_type``.

    Raises:
        ValueError: no ``model_type``, or one that is not supported; the message describes it.
    """
    model_type = hf_config.get("model_type")
    supported = f"supported are {', '.join(sorted(FAMILIES))}"
    if is_multimodal(hf_config):
        inner = hf_config.get("text_config")
        own = f" ({inner.get('model_type')!r})" if isinstance(inner, Mapping) else ""
        raise ValueError(
            f"model_type {model_type!r} is multimodal, and its text model{own} is not supported; of multimodal models, "
            f"the text models of {', '.join(sorted(MULTIMODAL))} are"
        )
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type is None:
        raise ValueError(
            f"config.json has no model_type, so model_type None is not a transformers model's; {supported}"
        )
    if "auto_map" in hf_config:
        raise ValueError(
            f"model_type {model_type!r} needs code from the checkpoint (auto_map), which is never run; {supported}"
        )
    raise ValueError(f"model_type {model_type!r:.200} in config.json is not supported; {supported}")


def from_hf_config(hf_config: Fields) -> DecoderConfig:
    """The decoder's config from a ``config.json``, in the format of transformers 5 or of earlier versions.

    Every field is used, known to have no effect, or an error. Missing fields have their default in transformers.

    Args:
        hf_config: the parsed file; of a multimodal model, its text model is meant.

    Raises:
        ValueError: a family, a field or a value that is not supported; a missing field; or two fields that contradict
            each other. The message names it.
    """
    hf_config = text_config(hf_config)
    family = family_of(hf_config)
    given = _read_fields(hf_config, family)
    fields = {family.names.get(name, name): value for name, value in given.items()}
    num_heads = fields["num_attention_heads"]
    num_kv_heads = fields["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    traits: dict[str, Any] = {name: trait(given) if callable(trait) else trait for name, trait in family.traits.items()}
    fields["head_dim"] = traits.get("head_dim", fields["head_dim"])
    if fields["head_dim"] is None and fields["hidden_size"] % num_heads:
        raise ValueError(
            f"config.json has no head_dim, and hidden_size {fields['hidden_size']} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    head_dim = fields["head_dim"] or fields["hidden_size"] // num_heads
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even: rotary positions turn pairs of components")
    layer_types = _layer_types(given, family)
    latent = traits.get("latent")
    ropes = read_ropes(given, family, head_dim if latent is None else latent.rope_dim)
    attention_bias = fields.get("attention_bias", False)
    config = DecoderConfig(
        family=hf_config["model_type"],
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields["max_position_embeddings"],
        windows=tuple(given["sliding_window"] if kind == "sliding_attention" else None for kind in layer_types),
        ropes=tuple(
            ropes[kind] if family.has_rope(given, layer, kind) else None for layer, kind in enumerate(layer_types)
        ),
        mixers=() if family.is_linear is None else tuple(MIXERS.get(kind, "attention") for kind in layer_types),
        query_scale=head_dim**-0.5,
        activation=fields["hidden_act"],
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.get("mlp_bias", False),
        norm_epsilon=fields["rms_norm_eps"],
        tie_word_embeddings=fields["tie_word_embeddings"],
        initializer_range=fields["initializer_range"],
        scalar_head=_has_scalar_head(hf_config),
    )
    config = replace(config, **traits)
    activation = ACTIVATION_NAMES.get(config.activation, config.activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation {activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    # Logits are scaled by the hidden states, which a scalar head reads as they are.
    return replace(config, activation=activation, output_scale=1.0 if config.scalar_head else config.output_scale)


def with_scalar_head(hf_config: Fields) -> dict[str, Any]:
    """The ``config.json`` of the same model with a scalar head: transformers' sequence classifier with one label.

    A config that has a scalar head already is returned unchanged.
    """
    if _has_scalar_head(hf_config):
        return dict(hf_config)
    name = family_of(hf_config).architecture.removesuffix("ForCausalLM")
    name = {"Gemma3": "Gemma3Text"}.get(name, name)
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**hf_config, "architectures": [f"{name}ForSequenceClassification"], **labels}


def _has_scalar_head(hf_config: Fields) -> bool:
    """Whether the model is a sequence classifier with one label, as reward models are."""
    architectures = hf_config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return False
    labels = hf_config.get("num_labels") or len(hf_config.get("id2label") or (0, 1))
    if labels != 1:
        raise ValueError(
            f"config.json is that of a classifier with {labels} labels; a reward model has one (num_labels or id2label)"
        )
    return True


def _read_fields(hf_config: Fields, family: Family) -> dict[str, Any]:
    """The family's fields with defaults filled in; raises if another field may have an effect."""
    read_scheme(hf_config)
    hf_config = without_scheme(hf_config)
    fields = {**family.fields, **{name: hf_config[name] for name in family.fields if name in hf_config}}
    missing = [name for name, value in fields.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    unknown = {
        name: value
        for name, value in hf_config.items()
        if name not in family.fields
        and not _has_no_effect(name, value, hf_config)
        and not (name in family.same_as and value == fields[family.same_as[name]])
    }
    if unknown:
        raise ValueError(
            f"config.json of model_type {hf_config['model_type']!r} has fields whose meaning is not implemented: "
            + cut(f"{name}={value!r:.200}" for name, value in unknown.items())
            + "; remove those without an effect on the model's outputs"
        )
    for name, default in family.fields.items():
        wanted = int if default is REQUIRED else type(default)
        accepted = (int, float) if wanted in (int, float) else (wanted,)
        is_null = fields[name] is None and (default is None or name in NULLABLE)
        if default is not None and not is_null and not isinstance(fields[name], accepted):
            raise ValueError(f"{name} in config.json must be of type {wanted.__name__}, not {fields[name]!r:.200}")
        if wanted is int and default is not REQUIRED and not is_null:
            check_count(name, fields[name])
        if wanted is float and not is_null:
            fields[name] = check_number(name, fields[name], zero=name in ("rms_norm_eps", "initializer_range"))
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if fields.get(name) is not None:
            check_number(name, fields[name])
    for name in ("rope_scaling", "rope_parameters"):
        check_object(name, fields[name])
    for name in (*COUNTS, "num_key_value_heads", "head_dim"):
        if fields.get(name) is not None and not (type(fields[name]) is int and fields[name] > 0):
            raise ValueError(f"{name} in config.json must be a positive integer, not {fields[name]!r:.200}")
    if fields["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers in config.json is {fields['num_hidden_layers']:,}, above {MAX_LAYERS:,}")
    return fields


def _has_no_effect(name: str, value: Any, hf_config: Mapping[str, Any]) -> bool:
    """Whether a field that the family does not read leaves the computation unchanged.

    Args:
        name: of the field.
        value: of the field.
        hf_config: all fields of the config.
    """
    if value is None or name in HARMLESS:
        return True
    fixed = family_of(hf_config).fixed
    if name in fixed:
        return fixed[name](value) if callable(fixed[name]) else _is_same(value, fixed[name])
    if name in HARMLESS_AT:
        return _is_same(value, HARMLESS_AT[name])
    # Sizes of windows that are switched off are often left in the config.
    if name in ("sliding_window", "max_window_layers", "sliding_window_size"):
        return hf_config.get("use_sliding_window") is False
    if name == "layer_types":
        no_window = hf_config["model_type"] == "llama" or hf_config.get("sliding_window", 0) is None
        return no_window and value == ["full_attention"] * hf_config["num_hidden_layers"]
    return False


def _is_same(value: Any, wanted: Any) -> bool:
    """Whether two values of a field are equal; true and 1 are not."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _layer_types(fields: Fields, family: Family) -> tuple[str, ...]:
    """The kind of attention of each layer: ``layer_types`` of the config, else the family's rule."""
    num_layers = fields["num_hidden_layers"]
    kinds = fields.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"layer_types in config.json must be a list of names, not {kinds!r:.200}")
    if kinds is None:
        kinds = [_layer_type(fields, family, layer) for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {num_layers} layers (num_hidden_layers)")
    supported = LAYER_TYPES if family.is_linear is None else ("full_attention", LINEAR_ATTENTION)
    unknown = sorted(set(kinds) - set(supported))
    if unknown:
        raise ValueError(f"layer_types has {unknown}; supported are {' and '.join(supported)}")
    if set(kinds) == {LINEAR_ATTENTION}:
        raise ValueError(f"all layers in config.json are {LINEAR_ATTENTION}; at least one must be full_attention")
    window = fields["sliding_window"] if fields.get("use_sliding_window", True) and "sliding_window" in fields else None
    if "sliding_attention" in kinds and not (type(window) is int and window > 0):
        raise ValueError(
            f"config.json has sliding_attention layers but no window: sliding_window={fields['sliding_window']!r}, "
            f"use_sliding_window={fields.get('use_sliding_window', True)!r}"
        )
    return tuple(kinds)


def _layer_type(fields: Fields, family: Family, layer: int) -> str:
    if family.is_linear is not None and family.is_linear(fields, layer):
        return LINEAR_ATTENTION
    return "sliding_attention" if family.is_sliding(fields, layer) else "full_attention"
