"""Published configurations of model families, shrunk, with random weights written by transformers itself.

``data/published_configs.json`` has config.json files in the format of their day: ``published`` as found, and
``reconstructed`` from the defaults and the documentation of the families. A shrunk configuration has small sizes and
every other field as published, so that switches, patterns and spellings are those of the makers. Its weights are large
enough for a wrong rotation, window, offset, gate or route to show in the logits.
"""

import copy
import json
from pathlib import Path

import numpy as np
from checkpoints import VOCAB_SIZE

FACTS = json.loads((Path(__file__).parent / "data" / "published_configs.json").read_text())
RECONSTRUCTED = frozenset(FACTS["reconstructed"])
PUBLISHED = FACTS["published"] | FACTS["reconstructed"]

# The window, and the length from which what scales with the length differs; tests use sequences several times as long.
WINDOW = 6
ORIGINAL_LENGTH = 16
# YaRN's frequencies are those of all lengths, and its borders fall within so few of them only at a greater length.
YARN_ORIGINAL_LENGTH = 1024
# Stored with a head of their own, though the config does not say so and transformers' default is to tie it.
UNTIED = frozenset({"Mistral-Small-3.1-24B"})
# Model types that a class of transformers reads under another name.
SAME_AS = {"kimi_k2": "deepseek_v3"}

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
VISION_SIZES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "image_size": 28,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}


def text_fields(config):
    """The fields of the text model: those of ``text_config``, or the config itself."""
    return config.get("text_config", config)


def shrunk(published):
    """A published configuration with small sizes and all its other fields."""
    config = copy.deepcopy(published)
    config.pop("quantization_config", None)  # the weights beside it are written in float32
    if "text_config" in config or "vision_config" in config:
        config["vision_config"] = _vision(config.get("vision_config"))
        _shrink_ids(config, {})
    if "mm_tokens_per_image" in config:
        config["mm_tokens_per_image"] = 1
    text = text_fields(config)
    defaults = _defaults(config, text)

    def given(name):
        return text.get(name, defaults.get(name))

    heads, kv_heads = given("num_attention_heads"), given("num_key_value_heads")
    is_explicit = isinstance(given("head_dim"), int)
    is_quarter = given("partial_rotary_factor") == 0.25 or "qwen3_5" in text["model_type"]
    sizes = dict(SIZES)
    sizes["hidden_size"] = 32 if is_explicit else 64
    sizes["num_attention_heads"] = 4
    sizes["num_key_value_heads"] = 4 if kv_heads == heads else 1 if kv_heads == 1 else 2
    sizes["head_dim"] = 32 if is_quarter else 16
    sizes["rotary_dim"] = 8
    sizes["linear_num_key_heads"] = 2
    if isinstance(given("linear_num_value_heads"), int):
        sizes["linear_num_value_heads"] = 2 * given("linear_num_value_heads") // given("linear_num_key_heads")
    groups = given("n_group") or 1
    sizes |= dict.fromkeys(EXPERTS, 16 if groups > 1 else 8) | {"n_group": min(groups, 4)}
    sizes["topk_group"] = max(1, (given("topk_group") or 1) * sizes["n_group"] // groups)
    sizes["first_k_dense_replace"] = min(given("first_k_dense_replace") or 0, 1)
    sizes["num_hidden_layers"] = _num_layers(text)
    for name, size in sizes.items():
        if isinstance(given(name), int) and not isinstance(given(name), bool):
            text[name] = size
    if "out_hidden_size" in config.get("vision_config", {}):
        config["vision_config"]["out_hidden_size"] = sizes["hidden_size"]
    _shrink_ids(text, defaults)
    _shrink_lists(text, sizes["num_hidden_layers"])
    _shrink_rope(text, given)
    return config


def _defaults(config, text):
    """The sizes that the family's class has where the config has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[SAME_AS.get(text["model_type"], text["model_type"])]
    if "text_config" not in config and "vision_config" in config:
        config_class = config_class.sub_configs_defaults["text_config"]
        config_class = getattr(config_class, "config_class", config_class)
    return {name: getattr(config_class, name, None) for name in config_class.__dataclass_fields__}


def _num_layers(text):
    """Enough layers for one of each kind."""
    kinds = text.get("layer_types")
    if kinds is not None:
        return max(2, 1 + max(kinds.index(kind) for kind in set(kinds)))
    if text["model_type"] == "gemma3_text":
        return 6
    if text["model_type"].startswith(("qwen3_next", "qwen3_5", "olmo3", "smollm3")):
        return 4
    return 3 if "first_k_dense_replace" in text else 2


def _vision(published):
    """A small vision tower; some files of published configurations have none."""
    tower = copy.deepcopy(
        published or {"model_type": "pixtral", "hidden_size": 1024, "head_dim": 64, "image_size": 1540}
    )
    tower |= {name: value for name, value in VISION_SIZES.items() if tower.get(name)}
    if tower.get("model_type") == "pixtral":
        small = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim")
        tower |= {name: VISION_SIZES[name] for name in small}
    return tower


def _shrink_ids(text, defaults):
    eos = text.get("eos_token_id", defaults.get("eos_token_id"))
    if isinstance(eos, list):
        text["eos_token_id"] = [1, *range(3, 2 + len(eos))]
    elif isinstance(eos, int):
        text["eos_token_id"] = 1


def _shrink_lists(text, num_layers):
    for name in ("layer_types", "no_rope_layers", "attn_type_list", "moe_layer_freq"):
        if isinstance(text.get(name), list):
            text[name] = text[name][:num_layers]


def _shrink_rope(text, given):
    """Rotary scaling that acts within the length of the tests' sequences."""
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    original = scaling.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
    length = given("max_position_embeddings")
    is_yarn = scaling.get("rope_type", scaling.get("type")) == "yarn" and "llama_4_scaling_beta" not in scaling
    small = YARN_ORIGINAL_LENGTH if is_yarn else ORIGINAL_LENGTH
    small = small if scaling else 128
    text["max_position_embeddings"] = small * length // original if original else 128
    for fields in (scaling, text):
        if "original_max_position_embeddings" in fields:
            fields["original_max_position_embeddings"] = small
    if "initial_context_length" in text:
        text["initial_context_length"] = small
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    pairs = int(head_dim * (text.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0)) // 2
    for name in ("long_factor", "short_factor"):
        if name in scaling:
            factors = scaling[name]
            scaling[name] = [factors[round(i * (len(factors) - 1) / (pairs - 1))] for i in range(pairs)]
    if "mrope_section" in scaling:
        temporal = pairs - 2 * (pairs // 3)
        scaling["mrope_section"] = [temporal, pairs // 3, pairs // 3]


def torch_config(config):
    """The config of transformers for a config.json."""
    import transformers

    fields = copy.deepcopy(config)
    model_type = fields.pop("model_type")
    return transformers.AutoConfig.for_model(SAME_AS.get(model_type, model_type), **fields)


def torch_class(config):
    """The class of transformers that a config.json names."""
    import transformers

    return getattr(transformers, config["architectures"][0])


def published_torch_model(config, seed=0):
    """A random model of transformers in float32, attention written out, for a shrunk configuration."""
    import torch

    torch.manual_seed(seed)
    model = torch_class(config)._from_config(torch_config(config), attn_implementation="eager", dtype=torch.float32)
    text = torch_config(config).get_text_config()
    gain = _query_gain(text)
    embedding = 0.7 / (getattr(text, "embedding_multiplier", 1.0))
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            _randomise(name, weight, gain, embedding, model.config.model_type)
    return model.eval()


def _query_gain(text):
    """What makes attention scores of the small model as large as 1 / sqrt(head_dim) would."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    scale = getattr(text, "attention_multiplier", None) or getattr(text, "query_pre_attn_scalar", head_dim) ** -0.5
    return head_dim**-0.5 / scale


def _randomise(name, weight, gain, embedding, model_type):
    """Draw a parameter or buffer in place, by the kind that its name tells."""
    leaf = name.rsplit(".", 1)[-1]
    if any(part in name for part in ("inv_freq", "embed_scale", "position_ids")):
        return
    if leaf == "A_log":
        weight.normal_(-2.0, 1.0)  # states that decay over a few to dozens of tokens
    elif leaf in ("dt_bias", "sinks") or "e_score_correction_bias" in name or leaf.endswith("bias"):
        weight.normal_(0.0, 0.4)
    elif "norm" in name and weight.ndim == 1:
        # Gated norms of linear attention have no offset.
        has_offset = model_type.startswith(("gemma", "qwen3_next", "qwen3_5")) and "linear_attn" not in name
        weight.normal_(0.0 if has_offset else 1.0, 0.3)
        if "q_norm" in name:
            weight.mul_(gain)
    elif "embed" in name or "lm_head" in name:
        weight.normal_(0.0, embedding if "embed" in name else 0.7)
    elif "conv1d" in name:
        weight.normal_(0.0, 1.5)
    elif weight.ndim >= 2:
        # gpt-oss stores experts as [E, in, out], every other family as [..., out, in].
        fan_in = weight.shape[-2] if model_type == "gpt_oss" and weight.ndim == 3 else weight.shape[-1]
        # Activations of gpt-oss are clamped at 7.
        gate = 4.0 if model_type == "gpt_oss" and leaf == "gate_up_proj" else 1.2
        weight.normal_(0.0, gate / fan_in**0.5)
        if "q_proj" in name:
            weight.mul_(gain)


def write_published(folder, name, seed=0):
    """A checkpoint of a shrunk configuration in the names of the hub; gives back the model it was written from."""
    config = shrunk(PUBLISHED[name])
    model = published_torch_model(config | ({"tie_word_embeddings": False} if name in UNTIED else {}), seed)
    model.save_pretrained(folder)
    (Path(folder) / "config.json").write_text(json.dumps(config))
    (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": 0}))
    return model


def add_predictor(folder):
    """Add the layer that predicts one more token, as the makers publish it and transformers passes over it."""
    from safetensors.numpy import load_file, save_file

    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    text = text_fields(json.loads((path.parent / "config.json").read_text()))
    hidden = text["hidden_size"]
    last = next(name for name in sorted(tensors) if f".layers.{text['num_hidden_layers'] - 1}." in name)
    layer = last[: last.index(".layers.")] + f".layers.{text['num_hidden_layers'] - 1}."
    norms = {name: np.ones(hidden, np.float32) for name in ("enorm", "hnorm", "shared_head.norm")}
    if text["model_type"].startswith("qwen3"):
        own, more = "mtp.layers.0.", {"mtp.fc.weight": np.ones((hidden, 2 * hidden), np.float32)}
        more |= {
            f"mtp.{name}.weight": norms["enorm"] for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        }
    else:
        own = f"model.layers.{text['num_hidden_layers']}."
        more = {f"{own}{name}.weight": norm for name, norm in norms.items()}
        more[f"{own}eh_proj.weight"] = np.ones((hidden, 2 * hidden), np.float32)
        more[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"]
        more[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    copied = {name.replace(layer, own): tensors[name] for name in tensors if name.startswith(layer)}
    copies = {name: array.copy() for name, array in (copied | more).items()}
    save_file(tensors | copies, path, metadata={"format": "pt"})


def fuse_experts(folder):
    """Store the experts of a layer in two tensors, as some makers publish what transformers writes one by one."""
    from safetensors.numpy import load_file, save_file

    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    for layer in [
        name.removesuffix("0.up_proj.weight") for name in tensors if name.endswith("experts.0.up_proj.weight")
    ]:
        count = sum(name.startswith(layer) and name.endswith("up_proj.weight") for name in tensors)
        gate, up, down = (
            np.stack([tensors.pop(f"{layer}{i}.{kind}_proj.weight") for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        tensors |= {f"{layer}gate_up_proj": np.concatenate([gate, up], axis=1), f"{layer}down_proj": down}
    save_file(tensors, path, metadata={"format": "pt"})


def load_published(folder):
    """The model that transformers reads from a folder; an error if any weight is missing, surplus or misshapen."""
    config = json.loads((Path(folder) / "config.json").read_text())
    given = {"config": torch_config(config)} if config["model_type"] in SAME_AS else {}
    model, info = torch_class(config).from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True, **given
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], (problem, info[problem])
    return model.eval()


def ids_and_mask(length=24, paddings=(0, 5, 19)):
    """Random token ids with left padding."""
    ids = np.random.default_rng(0).integers(11, VOCAB_SIZE, (len(paddings), length)).astype(np.int32)
    return ids, np.arange(length)[None, :] >= np.array(paddings)[:, None]
