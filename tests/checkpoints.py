"""Tiny random checkpoints of every family, written by transformers itself, whose torch models are the oracle.

Weights are large enough for attention to be far from uniform, and norms and biases far from neutral, so that a wrong
rotation, window, cap, offset or bias shows in the logits.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

VOCAB_SIZE = 96
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Original lengths below that of ``test_parity.padded_batch``.
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}

# Name of a case -> transformers' config class and what it is given beyond the sizes.
CASES = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "llama_biases_linear_rope": (
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "qwen3_yarn": ("Qwen3Config", {"head_dim": 16, "rope_parameters": YARN_ROPE}),
    "qwen2_yarn_bent": (
        "Qwen2Config",
        {
            "rope_parameters": YARN_ROPE
            | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "llama_longrope": ("LlamaConfig", {"rope_parameters": LONGROPE, "head_dim": 16}),
    "mistral_dynamic": (
        "MistralConfig",
        {
            "max_position_embeddings": 16,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 6, "num_key_value_heads": 1}),
    "mistral_full": ("MistralConfig", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3_sliding_bias": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma2_bias_untied": ("Gemma2Config", GEMMA | {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            "sliding_window_pattern": 3,
        },
    ),
    "gemma3_capped": (
        "Gemma3TextConfig",
        GEMMA | {"final_logit_softcapping": 4.0, "hidden_activation": "gelu", "attention_bias": True},
    ),
}


def torch_model(case, seed=0):
    """A random torch model in float32, attention written out."""
    import transformers

    class_name, fields = CASES[case]
    return random_torch_model(getattr(transformers, class_name)(**SMALL | fields), seed)


def random_torch_model(config, seed=0):
    """The same for a config of transformers."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    neutral = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.2 / 32**0.5 if "embed" not in name and "lm_head" not in name else 0.7)
            else:
                weight.normal_(neutral if "norm" in name else 0.0, 0.4)
    return model


def load_torch_model(folder, dtype="float32"):
    """The torch model that transformers reads from a folder; an error if any weight is missing or surplus."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def torch_logits(model, ids, mask):
    """Float32 logits of left-padded token ids."""
    import torch

    mask = torch.from_numpy(np.asarray(mask))
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(ids)).long()
        return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.float().numpy()


def quick_jit(function):
    """``jax.jit`` that spends little on compiling."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config, seed=0, deviation=0.25):
    """Parameters of a decoder, none of them neutral, drawn without compiling anything."""
    from grpo_jax.models import param_shapes

    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, deviation, leaf.shape), leaf.dtype), param_shapes(config)
    )


def tiny_tokenizer(pad_token="<pad>"):
    """A tokenizer of ``VOCAB_SIZE`` words: ``<pad> <eos> <bos> w3 w4 ...``."""
    import tokenizers
    import transformers

    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, VOCAB_SIZE))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token=pad_token
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def write_checkpoint(folder, case, *, dtype="float32", max_shard_size="5GB", tokenizer=True):
    """A checkpoint as transformers writes it; gives back the torch model it was written from, in ``dtype``."""
    import torch

    model = torch_model(case).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return model


def edit_json(path, **changes):
    """Change fields of a JSON file; ``None`` for a field writes null, ``...`` removes it."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def old_spelling(config):
    """A config as transformers 4 wrote it."""
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = config["dtype"]
    parameters = config["rope_parameters"]
    if config["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    old["rope_theta"] = parameters["rope_theta"]
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    old["rope_scaling"] = None
    if scaling["rope_type"] == "linear":
        # transformers 4 took either name for the kind, except in Gemma 3.
        name = "rope_type" if config["model_type"] == "gemma3_text" else "type"
        old["rope_scaling"] = {name: "linear", "factor": scaling["factor"]}
    elif scaling["rope_type"] != "default":
        old["rope_scaling"] = scaling
    return old
