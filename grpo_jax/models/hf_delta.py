"""The model families of hybrids: layers with the gated delta rule, and some with attention."""

from __future__ import annotations

from typing import Any

from grpo_jax.models.config import DecoderConfig, DeltaRule, Experts
from grpo_jax.models.hf_family import COMMON, MODULES, Family, Fields, without
from grpo_jax.models.hf_layouts import rows
from grpo_jax.models.hf_sparse import FUSED_VARIANTS, SPARSE_MODULES, qwen_sparse_layers

DELTA_FIELDS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def _delta_rule(fields: Fields) -> DeltaRule:
    for name in DELTA_FIELDS:
        if not (type(fields[name]) is int and fields[name] > 0):
            raise ValueError(f"{name} in config.json must be a positive integer, not {fields[name]!r:.200}")
    delta = DeltaRule(*(fields[name] for name in DELTA_FIELDS))
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"linear_num_value_heads {delta.value_heads} is not a multiple of linear_num_key_heads {delta.key_heads}"
        )
    return delta


def _is_linear(fields: Fields, layer: int) -> bool:
    if fields["full_attention_interval"] < 1:
        raise ValueError("full_attention_interval in config.json must be at least 1, not 0")
    return (layer + 1) % fields["full_attention_interval"] != 0


def _experts(fields: Fields) -> Experts | None:
    if not fields["num_experts"]:
        return None
    return Experts(
        fields["num_experts"],
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        normalized=fields.get("norm_topk_prob", True),
        shared_size=fields["shared_expert_intermediate_size"],
        shared_gate=True,
    )


def _sparse_layers(fields: Fields) -> tuple[bool, ...]:
    has_experts = bool(fields["num_experts"])
    steps = {"decoder_sparse_step": 1, "mlp_only_layers": None, **fields}
    return tuple(has_experts and is_sparse for is_sparse in qwen_sparse_layers(steps))


HYBRID_MODULES = MODULES | {
    "attention/out_gate": "self_attn.q_proj",
    **{f"delta/{name}": "linear_attn.in_proj_qkv" for name in "qkv"},
    **{f"delta/{name}": f"linear_attn.in_proj_{name}" for name in "zab"},
    **{f"delta/{name}_conv": "linear_attn.conv1d.weight" for name in "qkv"},
    "delta/A_log": "linear_attn.A_log",
    "delta/dt_bias": "linear_attn.dt_bias",
    "delta/norm": "linear_attn.norm",
    "delta/o": "linear_attn.out_proj",
}


def _delta(config: DecoderConfig) -> tuple[int, int, int, int]:
    """Key heads, value heads of each, and components of a key and of a value head."""
    d = config.delta
    assert d is not None
    return d.key_heads, d.value_heads // d.key_heads, d.key_dim, d.value_dim


def _mixed(config: DecoderConfig) -> tuple[int, int, int]:
    heads, group, key_dim, value_dim = _delta(config)
    return heads * key_dim, heads * key_dim, heads * group * value_dim


def _with_gates(config: DecoderConfig) -> tuple[int, int, int, int]:
    _, group, key_dim, value_dim = _delta(config)
    return key_dim, key_dim, group * value_dim, group * value_dim


def _conv_width(config: DecoderConfig) -> tuple[int, int]:
    assert config.delta is not None
    return 1, config.delta.conv_size


def _key_heads(config: DecoderConfig) -> int:
    return _delta(config)[0]


def _groups(config: DecoderConfig) -> tuple[int, int]:
    group = _delta(config)[1]
    return group, group


GATED_QUERIES = [
    rows(i, lambda config: (config.head_dim,) * 2, axes=(1, 2, 0), groups=lambda config: config.num_heads)
    for i in range(2)
]
HYBRID_LAYOUTS = {
    **{f"delta/{name}_conv": rows(i, _mixed, axes=(0, 1, 2), rest=_conv_width) for i, name in enumerate("qkv")},
    **{f"delta/{name}/kernel": rows(i, _mixed, axes=(1, 2, 0)) for i, name in enumerate("qkv")},
    "attention/q/kernel": GATED_QUERIES[0],
    "attention/out_gate/kernel": GATED_QUERIES[1],
}
"""Queries, keys and values of the delta rule one after the other; of attention, queries and gate for each head."""
BY_KEY_HEAD = {
    **{
        f"delta/{name}/kernel": rows(i, _with_gates, axes=(1, 2, 0), groups=_key_heads) for i, name in enumerate("qkvz")
    },
    **{f"delta/{name}/kernel": rows(i, _groups, axes=(1, 0), groups=_key_heads) for i, name in enumerate("ba")},
}
"""For each key head of the delta rule in turn, all that belongs to it."""

HYBRID = COMMON | DELTA_FIELDS | {"head_dim": 256, "attention_bias": False, "partial_rotary_factor": None}
HYBRID |= {"layer_types": None, "full_attention_interval": 4}
SPARSE = HYBRID | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
SHARED_MODULES = {f"mlp/shared/{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
SPARSE_HYBRID_MODULES = SPARSE_MODULES | HYBRID_MODULES | SHARED_MODULES | {"mlp/shared_gate": "mlp.shared_expert_gate"}
TRAITS = {"qk_norm": "head", "norm_offset": 1.0, "attention_gate": True, "delta": _delta_rule}
SPARSE_TRAITS = TRAITS | {"experts": _experts, "sparse": _sparse_layers}
ROW: dict[str, Any] = {
    "is_linear": _is_linear,
    "has_rope": lambda fields, layer, kind: kind != "linear_attention",
    "rotary_factor": 0.25,
}
FIXED: dict[str, Any] = {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}

HYBRID_FAMILIES = {
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        SPARSE
        | {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True}
        | {"decoder_sparse_step": 1, "mlp_only_layers": None},
        traits=SPARSE_TRAITS,
        modules=SPARSE_HYBRID_MODULES
        | {f"delta/{name}": "linear_attn.in_proj_qkvz" for name in "qkvz"}
        | {f"delta/{name}": "linear_attn.in_proj_ba" for name in "ba"},
        layouts=HYBRID_LAYOUTS | BY_KEY_HEAD,
        variants=FUSED_VARIANTS,
        fixed=FIXED,
        **ROW,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM", HYBRID, traits=TRAITS, modules=HYBRID_MODULES, layouts=HYBRID_LAYOUTS, fixed=FIXED, **ROW
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        without(SPARSE, "intermediate_size") | {"num_experts": 256, "num_experts_per_tok": 8},
        names={"moe_intermediate_size": "intermediate_size"},
        traits=SPARSE_TRAITS,
        modules=SPARSE_HYBRID_MODULES,
        layouts=HYBRID_LAYOUTS,
        variants=FUSED_VARIANTS,
        fixed=FIXED | {"intermediate_size": lambda size: True},  # no layer has an MLP of its own
        **ROW,
    ),
}
