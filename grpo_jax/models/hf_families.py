"""The model families: the fields of their ``config.json``, what they mean for the decoder, and names of their tensors.

A family is a row of ``FAMILIES``. Only mathematics that no other family has needs code elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

from grpo_jax.models.hf_delta import HYBRID_FAMILIES
from grpo_jax.models.hf_family import (
    COMMON,
    MODULES,
    QWEN,
    REQUIRED,
    Family,
    Fields,
    has_window,
    is_sliding_in_qwen,
    without,
)
from grpo_jax.models.hf_fields import check_number
from grpo_jax.models.hf_layouts import FUSED_GATE_UP, FUSED_QKV
from grpo_jax.models.hf_sparse import SPARSE_FAMILIES


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


OLMO = COMMON | {"attention_bias": False, "rms_norm_eps": 1e-5}
GLM = COMMON | {"head_dim": 128, "attention_bias": True, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": None}
GEMMA = {
    **without(COMMON, "hidden_act"),
    "num_key_value_heads": REQUIRED,
    "head_dim": REQUIRED,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256.0,
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

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", COMMON | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM", COMMON | {"sliding_window": 4096}, is_sliding=has_window),
    "ministral": Family(
        "MinistralForCausalLM", COMMON | {"sliding_window": 4096, "layer_types": None}, is_sliding=has_window
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        COMMON | {"head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None},
        is_sliding=has_window,
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
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN,
        is_sliding=is_sliding_in_qwen,
        traits={"qkv_bias": True},
        fixed=dict.fromkeys(("qkv_bias", "use_qkv_bias"), True),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN | {"head_dim": 128, "attention_bias": False},
        is_sliding=is_sliding_in_qwen,
        traits={"qk_norm": "head"},
        fixed=dict.fromkeys(("use_qk_norm", "qk_norm"), True),
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
        fixed={"qk_norm": True},
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
        is_sliding=has_window,
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
        without(COMMON, "rms_norm_eps")
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
        is_sliding=has_window,
        traits=LAYER_NORM_TRAITS
        | {"gated_mlp": False}
        | dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), lambda fields: fields["use_bias"]),
        modules=MODULES | {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        without(COMMON, "rms_norm_eps")
        | {"layer_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": None},
        names={"layer_norm_eps": "rms_norm_eps"},
        traits=LAYER_NORM_TRAITS | {"qkv_bias": lambda fields: fields["use_qkv_bias"]},
        rotary_factor=0.25,
    ),
    **SPARSE_FAMILIES,
    **HYBRID_FAMILIES,
}
