"""The text model of a multimodal checkpoint, as the config of a text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_jax.models.hf_families import FAMILIES

Fields = Mapping[str, Any]

MULTIMODAL = {
    "gemma3": "gemma3_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
"""Multimodal model types, and the family of their text model if its config does not name one of its own."""
SAME_TEXT_MODEL = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"} | {
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models that equal those of another family for sequences of text."""
DEFAULTS = (
    {name: {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5} for name in ("qwen2_vl", "qwen2_5_vl")}
    | {"qwen3_vl": {"rope_theta": 500_000.0}}
    | {"qwen3_vl_moe": {"rope_theta": 500_000.0, "norm_topk_prob": True}}
)
"""Defaults of text models that are not those of the family that computes the same."""
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
OF_IMAGES = ("vision_", "image_", "video_")
# The three positions of a token of text are equal, so that all sections of a head are rotated as without sections.
OF_SECTIONS = ("mrope_section", "mrope_interleaved")


def is_multimodal(hf_config: Fields) -> bool:
    """Whether a config describes a text model among other parts."""
    return isinstance(hf_config.get("text_config"), Mapping) or "vision_config" in hf_config


def text_config(hf_config: Fields) -> dict[str, Any]:
    """The config of the text model alone, in the form in which the family publishes text models.

    A config of a text model is returned unchanged, as is one of a type that is not in ``MULTIMODAL``.

    Args:
        hf_config: contents of ``config.json``.
    """
    outer = hf_config.get("model_type")
    if not is_multimodal(hf_config) or outer not in MULTIMODAL:
        return dict(hf_config)
    inner = hf_config.get("text_config")
    if not isinstance(inner, Mapping):  # the text model's fields stand beside those of the other parts
        inner = {name: value for name, value in hf_config.items() if not name.startswith(OF_IMAGES)}
    text = {name: hf_config[name] for name in SHARED if name in hf_config} | dict(inner)
    ropes = [rope for name in ("rope_scaling", "rope_parameters") if isinstance(rope := inner.get(name), Mapping)]
    for name, default in DEFAULTS.get(outer, {}).items():
        if not any(name in rope for rope in ropes):
            text.setdefault(name, default)
    if "tie_word_embeddings" in hf_config:
        text["tie_word_embeddings"] = hf_config["tie_word_embeddings"]
    own = inner.get("model_type")
    text["model_type"] = MULTIMODAL[outer] if own in (None, outer) else SAME_TEXT_MODEL.get(own, own)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(name), Mapping):
            text[name] = _without_sections(text[name])
    if text["model_type"] in FAMILIES:
        text["architectures"] = [FAMILIES[text["model_type"]].architecture]
    return text


def _without_sections(rope: Fields) -> dict[str, Any] | None:
    kept = {name: value for name, value in rope.items() if name not in OF_SECTIONS}
    for name in ("type", "rope_type"):
        if kept.get(name) == "mrope":
            kept[name] = "default"
    return kept
