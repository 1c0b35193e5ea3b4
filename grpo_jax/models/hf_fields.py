"""Fields of a Hugging Face ``config.json`` without an effect on the decoder's outputs, and checks of field values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")

# Aliases of activations in transformers.
ACTIVATION_NAMES = {"swish": "silu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_pytorch_tanh"
)

# Defaults of generation, which this package takes from its own settings.
OF_GENERATION = (
    {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time", "stop_strings"}
    | {"do_sample", "num_beams", "num_beam_groups", "temperature", "top_k", "top_p", "min_p", "typical_p"}
    | {"epsilon_cutoff", "eta_cutoff", "diversity_penalty", "repetition_penalty", "encoder_repetition_penalty"}
    | {"length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"}
    | {"renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
    | {"exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "num_return_sequences"}
    | {"output_scores", "output_logits", "return_dict_in_generate", "decoder_start_token_id", "penalty_alpha"}
    | {"use_cache", "cache_implementation", "num_logits_to_keep"}
)
# Dropout is never applied here; transformers applies it in training only.
DROPOUT = {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout"} | {
    "embed_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
}
OF_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"} | {
    "mask_token_id",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "tokenizer_class",
    "prefix",
}
METADATA = (
    {"model_type", "architectures", "auto_map", "_name_or_path", "name_or_path", "_commit_hash", "internal_version"}
    | {"transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version", "mergekit_config"}
    | {"finetuning_task", "task_specific_params", "license", "language", "tags", "_from_model_config"}
    | {"id2label", "label2id", "num_labels", "problem_type", "is_llama_config", "model_max_length"}
)
# Settings of execution, which change outputs by rounding only.
EXECUTION = (
    {"dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset"}
    | {"_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention", "use_flash_attention_2"}
    | {"use_flash_attn", "flash_attn", "experts_implementation", "pretraining_tp", "chunk_size_feed_forward"}
    | {"gradient_checkpointing", "use_reentrant", "torch_compile", "fused_dense", "use_fused_rms_norm"}
    | {"return_dict", "output_attentions", "output_hidden_states", "output_router_logits"}
    | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "activation_function"}
)
# Of the training of a router, which this package takes from its own settings, and of parts that predict several tokens.
OF_TRAINING = (
    {"router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size", "initial_context_length"}
    | {"num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}
    | {"use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mtp_loss_scaling_factor"}
)
HARMLESS = METADATA | EXECUTION | OF_TOKENS | OF_GENERATION | DROPOUT | OF_TRAINING

# Switches without an effect at the value that turns them off.
HARMLESS_AT: dict[str, Any] = (
    dict.fromkeys(("use_mrope", "rope_interleaved", "use_bidirectional_attention", "is_decoder"), False)
    | dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "torchscript"), False)
    | dict.fromkeys(("use_bfloat16", "tf_legacy_loss"), False)
    | dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "bias", "use_bias"), False)
    | dict.fromkeys(("lm_head_bias", "add_bias_linear", "attention_out_bias", "attention_output_gate"), False)
    | dict.fromkeys(("use_sliding_window", "use_qk_norm", "qk_norm", "qk_layernorm"), False)
    | dict.fromkeys(("alibi", "parallel_attn", "use_parallel_residual", "multi_query"), False)
    | dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 0)
    | dict.fromkeys(("partial_rotary_factor", "rope_ratio", "rotary_pct", "rope_percentage"), 1.0)
    | dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "logit_scale"), 1.0)
    | dict.fromkeys(("scale_emb", "scale_depth", "mup_multiplier"), 1.0)
    | {"full_attn_mod": 1, "interpolate_factor": 1, "mlp_type": "default", "norm_type": "layer_norm"}
    | {"pruned_heads": {}, "is_causal": True, "scale_attn_weights": True, "mlp_only_layers": []}
)


def check_number(name: str, value: Any, *, zero: bool = False) -> float:
    """The value of a field as a float.

    Args:
        name: the field, for the error.
        value: its value.
        zero: whether 0 is allowed.

    Raises:
        ValueError: it is not a finite number, or is negative, or 0 where that is not allowed.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        wanted = "a finite number, at least 0" if zero else "a finite number above 0"
        raise ValueError(f"{name} in config.json must be {wanted}, not {value!r:.200}")
    return float(value)


def check_count(name: str, value: Any) -> None:
    """Check that a field is a whole number, at least 0.

    Args:
        name: the field, for the error.
        value: its value.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} in config.json must be a whole number, at least 0, not {value!r:.200}")


def check_object(name: str, value: Any) -> None:
    """Check that an optional field is a JSON object.

    Args:
        name: the field, for the error.
        value: its value; None where absent.

    Raises:
        ValueError: it is something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} in config.json must be an object with named fields, not {value!r:.200}")
