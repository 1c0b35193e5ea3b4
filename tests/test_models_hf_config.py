"""config.json as DecoderConfig: transformers is the oracle, and no field is ignored silently."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from checkpoints import CASES, SMALL, old_spelling

from grpo_jax.models import from_hf_config
from grpo_jax.models.config import Rope
from grpo_jax.models.hf_config import FAMILIES, HARMLESS, HARMLESS_AT, REQUIRED

# As published on the hub, in the format of their day.
HUB_CONFIGS = {
    "meta-llama/Llama-2-7b-hf": """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true,
        "transformers_version": "4.31.0.dev0", "vocab_size": 32000}""",
    "meta-llama/Llama-3.2-1B-Instruct": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
        "use_cache": true, "vocab_size": 128256}""",
    "mistralai/Mistral-7B-v0.1": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
        "use_cache": true, "vocab_size": 32000}""",
    "Qwen/Qwen2.5-0.5B-Instruct": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": true,
        "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen/Qwen3-0.6B": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
    "google/gemma-2-27b": """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
        "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0,
        "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "sliding_window_size": 4096, "torch_dtype": "float32", "transformers_version": "4.42.0.dev0",
        "use_cache": true, "vocab_size": 256000, "_attn_implementation": "eager"}""",
    "google/gemma-3-1b-it": """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
}


def small(family, **changes):
    """The smallest config of a family that is accepted, with changes; ``...`` removes a field."""
    required = {"head_dim": 16} if family.startswith(("gemma", "qwen3")) else {}
    required |= {} if FAMILIES[family].is_linear is None else {"num_hidden_layers": 4}
    config = {"model_type": family, **SMALL, **required, **changes}
    return {name: value for name, value in config.items() if value is not ...}


def transformers_config(hf_config):
    import transformers

    # Kimi K2 has no class of its own there.
    model_type = {"kimi_k2": "deepseek_v3"}.get(hf_config["model_type"], hf_config["model_type"])
    return transformers.AutoConfig.for_model(**hf_config | {"model_type": model_type})


def rope_of(parameters, config, interleaved):
    """A rope from transformers' standardized parameters."""
    ignored = {"type", "attn_factor", "mscale", "mscale_all_dim", "max_position_embeddings"}
    ignored |= {"mrope_section", "mrope_interleaved"}
    read = {name: value for name, value in parameters.items() if name not in ignored}
    dims = int(config.head_dim * (read.pop("partial_rotary_factor", None) or 1.0))
    given = {name: float(value) if type(value) is int else value for name, value in read.items()}
    if given["rope_type"] == "yarn":
        has_scales = "mscale" in parameters and "mscale_all_dim" in parameters
        given.setdefault("attention_factor", 1.0 if has_scales else 0.1 * math.log(given["factor"]) + 1)
    names = {"rope_theta": "theta", "rope_type": "kind", "original_max_position_embeddings": "original_max_positions"}
    names["llama_4_scaling_beta"] = "query_beta"
    rope = Rope(**{names.get(name, name): value for name, value in given.items()})
    return dataclasses.replace(rope, dims=None if dims == config.head_dim else dims, interleaved=interleaved)


def check_against_transformers(hf_config):
    config, whole = from_hf_config(hf_config), transformers_config(hf_config)
    oracle = whole.get_text_config()
    assert config.vocab_size == oracle.vocab_size
    assert config.hidden_size == oracle.hidden_size
    if oracle.model_type != "qwen3_5_moe_text":  # all of its layers have experts
        assert config.intermediate_size == oracle.intermediate_size
    assert config.num_layers == oracle.num_hidden_layers
    assert config.num_heads == oracle.num_attention_heads
    assert config.num_kv_heads == oracle.num_key_value_heads
    head_dim = getattr(oracle, "qk_head_dim", None) or getattr(oracle, "head_dim", None)
    assert config.head_dim == (head_dim or config.hidden_size // config.num_heads)
    assert config.max_position_embeddings == oracle.max_position_embeddings
    names = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps")
    assert config.norm_epsilon == next(getattr(oracle, name) for name in names if hasattr(oracle, name))
    assert config.tie_word_embeddings == whole.tie_word_embeddings
    assert config.initializer_range == oracle.initializer_range
    assert config.activation == getattr(oracle, "hidden_activation", getattr(oracle, "hidden_act", None))
    scale = getattr(oracle, "query_pre_attn_scalar", config.head_dim) ** -0.5
    if config.latent is not None and oracle.rope_parameters.get("mscale_all_dim"):
        rope = oracle.rope_parameters
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    assert config.query_scale == getattr(oracle, "attention_multiplier", scale)
    assert config.attention_softcap == getattr(oracle, "attn_logit_softcapping", None)
    assert config.logit_softcap == getattr(oracle, "final_logit_softcapping", None)
    window = getattr(oracle, "sliding_window", None)
    without_types = ("mistral", "ministral3", "starcoder2", "phi3")
    every_layer = "sliding_attention" if oracle.model_type in without_types and window else "full_attention"
    layer_types = getattr(oracle, "layer_types", None) or [every_layer] * config.num_layers
    assert config.windows == tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    parameters = oracle.rope_parameters
    for kind, rope in zip(layer_types, config.ropes, strict=True):
        if rope is not None:
            assert rope == rope_of(parameters.get(kind, parameters), config, rope.interleaved)


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_configs_of_the_hub_are_read_as_transformers_reads_them(name):
    check_against_transformers(json.loads(HUB_CONFIGS[name]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_fields_have_their_default_in_transformers(model_type):
    check_against_transformers(small(model_type))


def test_gemma_scales_its_embeddings_and_offsets_its_norms():
    assert from_hf_config(small("gemma2")).embedding_scale == math.sqrt(32)
    assert from_hf_config(small("gemma3_text")).norm_offset == 1.0
    assert from_hf_config(small("llama")).embedding_scale == 1.0
    assert from_hf_config(small("llama")).norm_offset == 0.0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_that_transformers_declares_is_accounted_for(model_type):
    declared = {field.name for field in dataclasses.fields(type(transformers_config(small(model_type))))}
    family = FAMILIES[model_type]
    known = set(family.fields) | set(family.fixed) | HARMLESS | set(HARMLESS_AT)
    # Refused unless null: there is no other value with which these families are published.
    assert declared <= known | {"attn_logit_softcapping", "clip_qkv"}


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_give_one_config(case):
    import transformers

    class_name, fields = CASES[case]
    new = json.loads(
        getattr(transformers, class_name)(**SMALL | fields, dtype="float32").to_json_string(use_diff=False)
    )
    old = old_spelling(new)
    assert "rope_theta" in old
    assert "rope_parameters" not in old
    assert "torch_dtype" in old
    assert from_hf_config(new) == from_hf_config(old)


def test_integers_are_accepted_for_floats():
    whole = small("gemma2", final_logit_softcapping=30, attn_logit_softcapping=50, rope_theta=10000, rms_norm_eps=1)
    assert from_hf_config(whole) == from_hf_config(small("gemma2", rms_norm_eps=1.0))


def test_an_explicit_list_of_layer_types_wins_over_the_rule():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = from_hf_config(small("gemma2", layer_types=kinds, sliding_window=7))
    assert config.windows == (None, 7, None)


def test_null_switches_the_caps_and_the_window_off():
    config = from_hf_config(small("gemma2", final_logit_softcapping=None, attn_logit_softcapping=None))
    assert (config.logit_softcap, config.attention_softcap) == (None, None)
    assert from_hf_config(small("mistral", sliding_window=None)).windows == (None,) * 3
    assert from_hf_config(small("qwen2", use_sliding_window=True, sliding_window=None)).windows == (None,) * 3


@pytest.mark.parametrize("name", sorted(HARMLESS - {"model_type"}))
def test_harmless_fields_change_nothing(name):
    assert from_hf_config(small("llama", **{name: 7})) == from_hf_config(small("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"some_new_trick": True}, "some_new_trick=True"),
        ({"some_new_trick": 1, "another": "x"}, "some_new_trick=1, another='x'"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "relu"}, "'relu' is not supported; supported are silu, gelu"),
        ({"vocab_size": ...}, "lacks vocab_size"),
        ({"vocab_size": ..., "hidden_size": ...}, "lacks vocab_size, hidden_size"),
        ({"hidden_size": "32"}, "hidden_size in config.json must be of type int, not '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json must be a positive integer, not 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads in config.json must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"head_dim": 9}, "head_dim 9 must be even"),
        ({"rms_norm_eps": None}, "rms_norm_eps in config.json must be of type float, not None"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings in config.json must be of type bool, not 'no'"),
        ({"model_type": "bloom"}, "'bloom' in config.json is not supported; supported are .*gemma2, gemma3_text"),
        ({"model_type": ...}, "model_type None"),
        ({"model_type": "gemma9", "text_config": {}}, "'gemma9' is multimodal, and its text model .None. is not"),
        (
            {"model_type": "odd", "auto_map": {"AutoModel": "m.M"}},
            "needs code from the checkpoint .auto_map.",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "'mrope' is not implemented"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, r"'dynamic' .* lacks \['factor'\] and has \['alpha'\]"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"'longrope' .* lacks \['long_factor', 'short_factor'\]"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
            r"long_factor in config.json must be a list of 4 \(head_dim / 2\) numbers, not 3 entries",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 0, 1, 1]}},
            r"long_factor\[1\] in config.json must be a finite number above 0, not 0",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            "'dynamic' .* begins beyond max_position_embeddings=128",
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            "gives original_max_position_embeddings twice, as 64 and 32",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate in config.json must be true or"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor .* must be a finite number above 0, not 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, r"factor .* must be a finite number above 0, not '4'"),
        ({"rope_scaling": "linear"}, "rope_scaling in config.json must be an object"),
        ({"rope_theta": 0}, "rope_theta .* must be a finite number above 0, not 0"),
        ({"rope_theta": -1e4}, "rope_theta .* must be a finite number above 0, not -10000.0"),
        ({"rope_theta": float("nan")}, "rope_theta .* must be a finite number above 0, not nan"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in config.json must be a finite number, at least 0, not nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps in config.json must be a finite number, at least 0, not -1e-06"),
        ({"num_hidden_layers": True}, "num_hidden_layers in config.json must be a positive integer, not True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1,000,000,000, above 100,000"),
        ({"attention_bias": True, "qk_norm": True}, "qk_norm=True"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types="),
        ({"is_causal": False}, "is_causal=False"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"quantization": {"bits": 4}}, "has a quantization, whose quantized weights are not read; use a"),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' \(rope_parameters\) lacks \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, r"has \['beta'\], which it does not read"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            "gives rope_type twice, as 'linear' and 'llama3'",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta twice, as 10000.0 and 1000000.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not implemented"),
        ({"rope_parameters": {"full_attention": {}}}, r"has \['full_attention'\], which it does not read"),
    ],
)
def test_a_llama_config_that_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(small("llama", **changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types="),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config="),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types has .'chunked_attention'.; supported are"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention layers but no window"),
        ("mistral", {"sliding_window": 0}, "sliding_attention layers but no window: sliding_window=0"),
        ("gemma2", {"sliding_window_size": 5, "sliding_window": 4}, "sliding_window_size=5"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gemma2", {"head_dim": ...}, "lacks head_dim"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"_sliding_window_pattern": 5}, "_sliding_window_pattern=5"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_parameters has \['rope_theta'\]; expected are",
        ),
        (
            "gemma3_text",
            {"rope_local_base_freq": 1e4, "rope_parameters": {"sliding_attention": {"rope_theta": 1e5}}},
            r"rope_theta twice, as 10000.0 and 100000.0 \(rope_parameters.sliding_attention\)",
        ),
    ],
)
def test_other_families_refuse_by_name_too(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(small(model_type, **changes))


def test_unknown_fields_that_are_null_and_spellings_that_agree_pass():
    plain = from_hf_config(small("llama", rope_theta=1e6))
    assert plain == from_hf_config(small("llama", rope_theta=1e6, some_new_trick=None))
    assert plain == from_hf_config(small("llama", rope_theta=1e6, rope_parameters={"rope_theta": 1e6}))
    assert plain == from_hf_config(small("llama", rope_theta=1e6, use_mrope=False, partial_rotary_factor=1.0))
    assert plain == from_hf_config(small("llama", rope_theta=1e6, auto_map={"AutoModel": "m.M"}))
    plain = from_hf_config(small("gemma2"))
    assert plain == from_hf_config(small("gemma2", sliding_window_size=4096, hidden_act="gelu_pytorch_tanh"))


OFF = [
    ("mistral", {"attention_bias": False, "mlp_bias": False}),
    ("qwen2", {"attention_bias": False, "qkv_bias": True}),
    ("llama", {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}),
    ("llama", {"layer_types": ["full_attention"] * 3}),
    ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("llama", {"min_length": 0, "num_beams": 1, "bad_words_ids": None, "typical_p": 1.0, "internal_version": "7b"}),
    (
        "llama",
        {"use_qk_norm": False, "num_experts": 0, "logits_scaling": 1.0, "is_causal": True},
    ),
    ("llama", {"rope_scaling": {"rope_type": "default", "factor": 1.0}}),
    ("llama", {"original_max_position_embeddings": 64}),
    ("gemma3_text", {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": False}),
]


@pytest.mark.parametrize(("model_type", "fields"), OFF)
def test_switches_that_are_off_and_metadata_change_nothing(model_type, fields):
    plain = small(model_type, **{"sliding_window": None} if fields.get("sliding_window", 0) is None else {})
    assert from_hf_config({**plain, **fields}) == from_hf_config(plain)


def test_everything_that_transformers_writes_into_any_config_is_accepted():
    import transformers

    base = {**transformers.PreTrainedConfig().to_dict(), "model_type": "llama", "architectures": None}
    generation = transformers.GenerationConfig().to_dict()
    plain = small("llama")
    assert from_hf_config({**base, **generation, **plain}) == from_hf_config(plain)


@pytest.mark.parametrize(
    ("name", "same"), [("swish", "silu"), ("gelu_new", "gelu_pytorch_tanh"), ("gelu_python", "gelu")]
)
def test_activations_have_several_names(name, same):
    assert from_hf_config(small("llama", hidden_act=name)) == from_hf_config(small("llama", hidden_act=same))


def test_a_kind_of_scaling_that_transformers_would_not_read_is_refused():
    scaling = {"type": "linear", "factor": 8.0}
    with pytest.raises(ValueError, match=r"names its kind as type='linear'.* use rope_type instead"):
        from_hf_config(small("gemma3_text", rope_scaling=scaling))
    read = from_hf_config(
        small("gemma3_text", sliding_window_pattern=1, rope_scaling=scaling | {"rope_type": "linear"})
    )
    assert read.ropes[0] == Rope(1e6, "linear", factor=8.0)


def test_the_original_length_may_be_beside_the_scaling():
    scaling = {"rope_type": "yarn", "factor": 2.0}
    inside = small("qwen2", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    beside = small("qwen2", rope_scaling=scaling, original_max_position_embeddings=64)
    assert from_hf_config(inside) == from_hf_config(beside)
    assert from_hf_config(inside).ropes[0].original_max_positions == 64
    assert from_hf_config(small("qwen2", rope_scaling=scaling)).ropes[0].original_max_positions == 128


def test_an_attention_factor_that_only_other_programs_read_is_said(caplog):
    """As in DeepSeek-R1-0528-Qwen3-8B."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = from_hf_config(small("qwen3", rope_scaling=scaling | {"attn_factor": 0.8782488562869419}))
    assert config == from_hf_config(small("qwen3", rope_scaling=scaling))
    assert config.ropes[0].attention_factor == pytest.approx(1.1386294)
    assert "attn_factor=0.8782488562869419 (rope_parameters) is not read" in caplog.text


PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "hf_configs"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published configurations beside the checkout")
def test_published_configurations_are_read_as_in_transformers_or_refused_in_one_sentence():
    accepted = 0
    for path in sorted(PUBLISHED.glob("*.json")):
        published = json.loads(path.read_text())
        if "model_type" not in published:
            continue
        try:
            from_hf_config(published)
        except ValueError as error:
            message = str(error)
            assert published["model_type"] not in FAMILIES or "quantization_config" in message, (path, message)
            # Of a multimodal model the type of its text model, such as 'qwen3_5_moe_text'.
            assert f"'{published['model_type']}" in message or "quantiz" in message
            assert len(message) < 500
            assert "\n" not in message
        else:
            accepted += 1
            if published.get("num_labels") != 1:
                check_against_transformers(published)
    assert accepted >= 40


def test_only_sizes_are_required():
    required = {name for family in FAMILIES.values() for name, value in family.fields.items() if value is REQUIRED}
    assert required == {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    }


def test_fields_of_transformers_5_0_beside_the_layer_types_have_no_effect():
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    beside = {"rope_type": "default", "rope_theta": None}
    plain = from_hf_config(small("gemma3_text", rope_parameters=kinds))
    assert plain == from_hf_config(small("gemma3_text", rope_parameters=kinds | beside))
    with pytest.raises(ValueError, match=r"rope_parameters has \['rope_type'\]"):
        from_hf_config(small("gemma3_text", rope_parameters=kinds | {"rope_type": "linear"}))
