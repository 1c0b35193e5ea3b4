"""The model families with a mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from grpo_jax.models.config import Experts, Latent
from grpo_jax.models.hf_family import COMMON, MODULES, QWEN, Family, Fields, has_window, without
from grpo_jax.models.hf_fields import check_number
from grpo_jax.models.hf_layouts import (
    ALTERNATING_EXPERTS,
    FUSED_EXPERTS,
    FUSED_EXPERTS_TRANSPOSED,
    LATENT_HEADS,
)

EXPERTS = {f"mlp/experts/{name}": f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}
SPARSE_MODULES = MODULES | {"mlp/router": "mlp.gate"} | EXPERTS
MIXTRAL_MODULES = (
    MODULES
    | {"mlp/router": "block_sparse_moe.gate"}
    | {
        f"mlp/experts/{name}": f"block_sparse_moe.experts.{{}}.{stored}.weight"
        for name, stored in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    }
)
DEEPSEEK_MODULES = (
    SPARSE_MODULES
    | {"mlp/selection_bias": "mlp.gate.e_score_correction_bias"}
    | {f"mlp/shared/{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
)
LATENT_MODULES = {
    "attention/q_a": "self_attn.q_a_proj",
    "attention/q_a_norm": "self_attn.q_a_layernorm",
    "attention/q_b": "self_attn.q_b_proj",
    "attention/kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention/kv_a_norm": "self_attn.kv_a_layernorm",
    "attention/k_b": "self_attn.kv_b_proj.weight",
    "attention/v_b": "self_attn.kv_b_proj.weight",
}
FUSED_MODULES = {
    "mlp/experts/gate": "mlp.experts.gate_up_proj",
    "mlp/experts/up": "mlp.experts.gate_up_proj",
    "mlp/experts/down": "mlp.experts.down_proj",
}
FUSED_VARIANTS = ((FUSED_MODULES, FUSED_EXPERTS), (FUSED_MODULES, FUSED_EXPERTS_TRANSPOSED))


def _softmax_experts(count: str, width: str, **settings: Any) -> Callable[[Fields], Experts]:
    """Experts that are scored by a softmax over all, normalized if ``norm_topk_prob`` says so or is not there."""

    def read(fields: Fields) -> Experts:
        normalized = fields.get("norm_topk_prob", True)
        return Experts(fields[count], fields["num_experts_per_tok"], fields[width], normalized=normalized, **settings)

    return read


def _deepseek_experts(fields: Fields) -> Experts:
    width = fields["moe_intermediate_size"]
    return Experts(
        fields["n_routed_experts"],
        fields["num_experts_per_tok"],
        width,
        scoring="sigmoid",
        normalized=fields["norm_topk_prob"],
        scale=check_number("routed_scaling_factor", fields["routed_scaling_factor"]),
        groups=fields["n_group"] or 1,
        groups_per_token=fields["topk_group"] or 1,
        selection_bias=True,
        shared_size=width * (fields["n_shared_experts"] or 0),
    )


def _all_layers(fields: Fields) -> tuple[bool, ...]:
    return (True,) * fields["num_hidden_layers"]


def _after_dense(fields: Fields) -> tuple[bool, ...]:
    return tuple(layer >= fields["first_k_dense_replace"] for layer in range(fields["num_hidden_layers"]))


def qwen_sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Every ``decoder_sparse_step``-th layer that is not in ``mlp_only_layers``.

    Args:
        fields: of the config.
    """
    dense, step = fields["mlp_only_layers"] or [], fields["decoder_sparse_step"]
    return tuple(
        layer not in dense and step > 0 and (layer + 1) % step == 0 for layer in range(fields["num_hidden_layers"])
    )


def _latent(fields: Fields) -> Latent:
    return Latent(
        fields["q_lora_rank"],
        fields["kv_lora_rank"],
        fields["qk_rope_head_dim"],
        fields["qk_nope_head_dim"],
        fields["v_head_dim"],
    )


def _latent_scale(fields: Fields) -> float:
    """Factor of the queries: with YaRN, the square of its attention factor is in it, and not in the rotations."""
    scale = (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]) ** -0.5
    rope = fields["rope_parameters"] or fields["rope_scaling"] or {}
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    factor, all_dim = (check_number(name, rope.get(name) or 0, zero=True) for name in ("factor", "mscale_all_dim"))
    if is_scaled and factor > 1:
        scale *= (0.1 * all_dim * math.log(factor) + 1) ** 2
    return scale


QWEN_MOE = QWEN | {
    "head_dim": None,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
DEEPSEEK = COMMON | {
    "attention_bias": False,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    DEEPSEEK
    | {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128},
    traits={
        "experts": _deepseek_experts,
        "sparse": _after_dense,
        "latent": _latent,
        "head_dim": lambda fields: fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
        "query_scale": _latent_scale,
    },
    rope_interleaved=True,
    modules=DEEPSEEK_MODULES | LATENT_MODULES,
    layouts=LATENT_HEADS,
    fixed=SIGMOID | {"rope_interleave": True},
)

SPARSE_FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        COMMON | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8},
        is_sliding=has_window,
        traits={"experts": _softmax_experts("num_local_experts", "intermediate_size"), "sparse": _all_layers},
        theta=1_000_000.0,
        modules=MIXTRAL_MODULES,
        variants=((SPARSE_MODULES, {}),),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        COMMON
        | {"rms_norm_eps": 1e-5, "attention_bias": False}
        | {"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False},
        traits={
            "experts": _softmax_experts("num_experts", "intermediate_size"),
            "sparse": _all_layers,
            "qk_norm": "all",
        },
        modules=SPARSE_MODULES,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        without(QWEN_MOE, "max_window_layers", "layer_types"),
        is_sliding=lambda fields, layer: fields["use_sliding_window"] and fields["sliding_window"] is not None,
        traits={
            "experts": _softmax_experts("num_experts", "moe_intermediate_size"),
            "sparse": qwen_sparse_layers,
            "qk_norm": "head",
        },
        modules=SPARSE_MODULES,
        variants=FUSED_VARIANTS,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        COMMON
        | {"rms_norm_eps": 1e-5, "head_dim": 64, "attention_bias": True, "sliding_window": 128, "layer_types": None}
        | {"num_experts_per_tok": 4, "num_local_experts": 128, "swiglu_limit": 7.0},
        is_sliding=lambda fields, layer: layer % 2 == 0,
        traits={
            "experts": lambda fields: _softmax_experts(
                "num_local_experts",
                "intermediate_size",
                router_bias=True,
                bias=True,
                clamp=check_number("swiglu_limit", fields["swiglu_limit"]),
            )(fields),
            "sparse": _all_layers,
            "attention_sinks": True,
        },
        same_as={"experts_per_token": "num_experts_per_tok"},
        theta=150_000.0,
        default_rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        modules=MODULES
        | FUSED_MODULES
        | {"mlp/router": "mlp.router", "attention/sinks": "self_attn.sinks"}
        | {f"mlp/experts/{name}_bias": "mlp.experts.gate_up_proj_bias" for name in ("gate", "up")}
        | {"mlp/experts/down_bias": "mlp.experts.down_proj_bias"},
        layouts=ALTERNATING_EXPERTS,
        fixed={"swiglu_alpha": 1.702},
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        DEEPSEEK
        | {"rms_norm_eps": 1e-5, "use_qk_norm": False, "partial_rotary_factor": None, "moe_intermediate_size": 1408}
        | {"n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
        traits={
            "experts": _deepseek_experts,
            "sparse": _after_dense,
            "output_bias": False,
            "qk_norm": lambda fields: "head" if fields["use_qk_norm"] else None,
        },
        rotary_factor=0.5,
        modules=DEEPSEEK_MODULES,
        fixed=SIGMOID,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM",
        COMMON | {"head_dim": 128, "rotary_dim": None, "num_experts_per_tok": 8, "num_local_experts": 256},
        traits={
            "experts": _softmax_experts(
                "num_local_experts", "intermediate_size", scoring="sigmoid", selection_bias=True
            ),
            "sparse": _all_layers,
            "qk_norm": "all",
        },
        theta=5_000_000.0,
        rotary_factor=1.0,
        modules=MIXTRAL_MODULES | {"mlp/selection_bias": "block_sparse_moe.e_score_correction_bias"},
        variants=((SPARSE_MODULES | {"mlp/selection_bias": "mlp.e_score_correction_bias"}, {}),),
        fixed=SIGMOID
        | dict.fromkeys(("use_qk_norm", "use_routing_bias"), True)
        | {"qk_norm_type": "per_layer", "shared_intermediate_size": 0}
        # Every layer has softmax attention.
        | {"attn_type_list": lambda kinds: isinstance(kinds, list) and set(kinds) == {1}},
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
}
