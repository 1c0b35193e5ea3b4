"""Small tokenizers in the exact file formats of model families, and checkpoints around them.

Vocabularies are trained on a few sentences; everything else (model, normalizer, pre-tokenizer, post-processor, decoder,
added tokens, fields of tokenizer_config.json, stop tokens of generation_config.json, the structure of the chat
template) is as the family publishes it.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 345? It is 357, of course!",
    "user system assistant model think answer: step by step\n\nQuestion: how many apples are there?\n",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Grüße aus Köln, naïve café, 你好世界, привет мир, l'été, it's we'll don't",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = CL100K.replace("{DIGITS}", "{1,3}")
QWEN = CL100K.replace("{DIGITS}", "")


@dataclass(frozen=True)
class Family:
    """The files of a tokenizer.

    Attributes:
        tokenizer: becomes ``tokenizer.json``.
        config: becomes ``tokenizer_config.json``.
        chat_template: the template.
        model_type: of ``config.json``.
        eos: the tokens of ``eos_token_id`` in ``generation_config.json``.
        config_eos: the token of ``eos_token_id`` in ``config.json``.
        bos: whether encoding a text puts the beginning-of-sequence token before it.
        turn_end: the token that ends the assistant's turn in the chat template.
        template_file: whether the template is in ``chat_template.jinja`` and not in ``tokenizer_config.json``.
        special_map: whether there is a ``special_tokens_map.json``.
        rows_missing: how many of the last token ids have no row in the embedding.
        padding: how many rows of the embedding have no token.
    """

    tokenizer: Tokenizer
    config: dict
    chat_template: str
    model_type: str
    eos: tuple[str, ...]
    config_eos: str
    bos: bool
    turn_end: str
    template_file: bool = False
    special_map: bool = True
    rows_missing: int = 0
    padding: int = 0
    extra: dict = field(default_factory=dict)

    @property
    def vocab_size(self):
        return len(self.tokenizer.get_vocab()) - self.rows_missing + self.padding

    def ids(self, tokens):
        return [self.tokenizer.token_to_id(token) for token in tokens]


def special(*contents, **flags):
    return [AddedToken(each, normalized=False, special=True, **flags) for each in contents]


def ordinary(*contents):
    return [AddedToken(each, normalized=False, special=False) for each in contents]


def byte_level(pattern, before=(), after=(), *, normalizer=None, digits=False, merges=120, **model):
    """A byte-level BPE tokenizer with added tokens before or after its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        split.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    trained.pre_tokenizer = pre_tokenizers.Sequence([*split, byte])
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    names = [each.content for each in before]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {piece: number for number, piece in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]], **model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*before, *after])
    return tokenizer


def sentencepiece(before, after=(), *, style, merges=120):
    """A BPE tokenizer as converted from SentencePiece, with byte fallback.

    Args:
        before: added tokens at the beginning of the vocabulary; one of them is ``<unk>``.
        after: those at its end.
        style: "prepend" (Llama 2: a normalizer puts the blank before each text), "metaspace" (a pre-tokenizer does, at
            the beginning alone) or "gemma" (nothing is put before a text).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=200 + merges, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [each.content for each in before]
    all_bytes = [f"<0x{number:02X}>" for number in range(256)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*names, *all_bytes, "▁", *pieces]))}
    pairs = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blank = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = blank
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(decode if style == "gemma" else [*decode, decoders.Strip(" ", 1, 0)])
    tokenizer.add_tokens([*before, *after])
    return tokenizer


def with_bos(tokenizer, bos, *, byte=False):
    """The post-processor that puts ``bos`` before each text."""
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template]) if byte else template
    return tokenizer


def with_byte_level(tokenizer):
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def template(name):
    """A chat template with the structure of a family's template, in other words."""
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


# The families -------------------------------------------------------------------------------------------------------


def as_dict(content, **flags):
    """A special token as older configs write it."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **plain, **flags}


def llama2():
    tokenizer = sentencepiece(special("<unk>", "<s>", "</s>"), style="prepend")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": as_dict("<s>"),
        "eos_token": as_dict("</s>"),
        "unk_token": as_dict("<unk>"),
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    return Family(
        with_bos(tokenizer, "<s>"), config, template("llama2"), "llama", ("</s>",), "</s>", bos=True, turn_end="</s>"
    )


def llama3():
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>")
    tokenizer = byte_level(LLAMA3, after=special(*names, "<|eot_id|>", "<|python_tag|>"), ignore_merges=True)
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    eos = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return Family(
        with_bos(tokenizer, "<|begin_of_text|>", byte=True),
        config,
        template("llama3"),
        "llama",
        eos,
        "<|eot_id|>",
        bos=True,
        turn_end="<|eot_id|>",
    )


def mistral_v1():
    tokenizer = sentencepiece(special("<unk>", "<s>", "</s>"), style="prepend")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    return Family(
        with_bos(tokenizer, "<s>"), config, template("mistral"), "mistral", ("</s>",), "</s>", bos=True, turn_end="</s>"
    )


def mistral_v3():
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    tokenizer = sentencepiece(special(*names), style="metaspace")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    return Family(
        with_bos(tokenizer, "<s>"), config, template("mistral"), "mistral", ("</s>",), "</s>", bos=True, turn_end="</s>"
    )


def mistral_tekken():
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
    more = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "<SPECIAL_11>", "<SPECIAL_12>")
    tokenizer = byte_level(LLAMA3, before=special(*names, *more), ignore_merges=True)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return Family(
        with_bos(tokenizer, "<s>"),
        config,
        template("tekken"),
        "mistral",
        ("</s>",),
        "</s>",
        bos=True,
        turn_end="</s>",
        template_file=True,
    )


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>")
QWEN_CONFIG = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_pad|>"],
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "model_max_length": 131072,
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
}


def qwen25():
    after = [*special(*QWEN_SPECIAL), *ordinary("<tool_call>", "</tool_call>", "<|fim_prefix|>")]
    tokenizer = with_byte_level(byte_level(QWEN, after=after, normalizer=normalizers.NFC()))
    return Family(
        tokenizer,
        QWEN_CONFIG,
        template("qwen25"),
        "qwen2",
        ("<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        bos=False,
        turn_end="<|im_end|>",
        special_map=False,
        padding=32,
    )


def qwen3():
    names = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    tokenizer = byte_level(QWEN, after=[*special(*QWEN_SPECIAL), *ordinary(*names)], normalizer=normalizers.NFC())
    return Family(
        with_byte_level(tokenizer),
        QWEN_CONFIG,
        template("qwen3"),
        "qwen3",
        ("<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        bos=False,
        turn_end="<|im_end|>",
        special_map=False,
        padding=32,
    )


GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
GEMMA_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "use_default_system_prompt": False,
    "tokenizer_class": "GemmaTokenizer",
}


def gemma2():
    tokenizer = sentencepiece(special(*GEMMA_SPECIAL), style="gemma")
    config = GEMMA_CONFIG | {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    return Family(
        with_bos(tokenizer, "<bos>"),
        config,
        template("gemma2"),
        "gemma2",
        ("<eos>", "<end_of_turn>"),
        "<eos>",
        bos=True,
        turn_end="<end_of_turn>",
    )


def gemma3():
    """As in the 1B text model: the last token of its tokenizer, for images, has no row in its embedding."""
    tokenizer = sentencepiece(special(*GEMMA_SPECIAL, "<start_of_image>"), special("<image_soft_token>"), style="gemma")
    config = GEMMA_CONFIG | {
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
        "extra_special_tokens": {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>"},
        "sp_model_kwargs": None,
    }
    return Family(
        with_bos(tokenizer, "<bos>"),
        config,
        template("gemma3"),
        "gemma3_text",
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        bos=True,
        turn_end="<end_of_turn>",
        rows_missing=1,
    )


R1_TOKENS = tuple(f"<\uff5c{name}\uff5c>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant"))


def deepseek_r1_qwen():
    bos, eos, *turns = R1_TOKENS
    after = [*special(eos), *ordinary(*turns, "<think>", "</think>"), *special(bos)]
    tokenizer = with_bos(byte_level(QWEN, after=after, normalizer=normalizers.NFC()), bos, byte=True)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": as_dict(bos, normalized=True),
        "eos_token": as_dict(eos, normalized=True),
        "pad_token": as_dict(eos, normalized=True),
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 16384,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
    }
    return Family(
        tokenizer, config, template("r1"), "qwen2", (eos,), eos, bos=True, turn_end=eos, special_map=False, padding=16
    )


def phi3():
    names = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    after = [*special("<|endoftext|>"), *special(*names[1:], rstrip=True)]
    tokenizer = sentencepiece(special("<unk>", "<s>", "</s>"), after, style="prepend")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    eos = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    return Family(
        tokenizer, config, template("phi3"), "llama", eos, "<|endoftext|>", bos=False, turn_end="<|end|>", padding=32
    )


def phi4():
    after = special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>", lstrip=True)
    tokenizer = with_byte_level(byte_level(LLAMA3, after=after))
    config = {
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|dummy_85|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "tokenizer_class": "GPT2Tokenizer",
    }
    eos = ("<|endoftext|>", "<|im_end|>")
    return Family(tokenizer, config, template("phi4"), "llama", eos, "<|im_end|>", bos=False, turn_end="<|im_end|>")


def smollm2():
    before = special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
    tokenizer = byte_level(None, before=before, digits=True)
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": 49152,
    }
    return Family(
        tokenizer, config, template("chatml"), "llama", ("<|im_end|>",), "<|im_end|>", bos=False, turn_end="<|im_end|>"
    )


def chatml_llama2():
    """A base model with ChatML's tokens and template added, whose config still has only the base's EOS token."""
    after = special("<|im_start|>", "<|im_end|>")
    tokenizer = sentencepiece(special("<unk>", "<s>", "</s>"), after, style="prepend")
    config = llama2().config | {"pad_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}
    return Family(
        with_bos(tokenizer, "<s>"),
        config,
        template("chatml"),
        "llama",
        ("</s>",),
        "</s>",
        bos=True,
        turn_end="<|im_end|>",
        template_file=True,
    )


BUILDERS = {
    each.__name__: each
    for each in (
        llama2,
        llama3,
        mistral_v1,
        mistral_v3,
        mistral_tekken,
        qwen25,
        qwen3,
        gemma2,
        gemma3,
        deepseek_r1_qwen,
        phi3,
        phi4,
        smollm2,
        chatml_llama2,
    )
}
FAMILIES = tuple(BUILDERS)


@cache
def family(name):
    return BUILDERS[name]()


def write_tokenizer_files(folder, name):
    """The files of a family's tokenizer, in the publisher's format and not that of transformers."""
    made, folder = family(name), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.tokenizer.to_str(pretty=True), encoding="utf-8")
    config = dict(made.config)
    if name not in ("deepseek_r1_qwen", "gemma2"):  # those are older than the field
        config["added_tokens_decoder"] = {
            str(number): {
                "content": each.content,
                "lstrip": each.lstrip,
                "normalized": each.normalized,
                "rstrip": each.rstrip,
                "single_word": each.single_word,
                "special": each.special,
            }
            for number, each in sorted(made.tokenizer.get_added_tokens_decoder().items())
        }
    if made.template_file:
        (folder / "chat_template.jinja").write_text(made.chat_template, encoding="utf-8")
    else:
        config["chat_template"] = made.chat_template
    write_json(folder / "tokenizer_config.json", config)
    if made.special_map:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        write_json(folder / "special_tokens_map.json", {each: config[each] for each in names if config.get(each)})


def write_family(folder, name, *, sizes=None, scalar_head=False):
    """A whole checkpoint of a family: tiny random weights, configs and tokenizer; the folder, as a string.

    Args:
        folder: where to; new or empty.
        name: one of ``FAMILIES``.
        sizes: fields of ``config.json`` in addition to the tiny ones.
        scalar_head: a classifier with one label instead of a language model.
    """
    import jax

    from grpo_jax.models import from_hf_config, init_params, save_pretrained

    made = family(name)
    hf_config = {
        "model_type": made.model_type,
        "vocab_size": made.vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "eos_token_id": made.tokenizer.token_to_id(made.config_eos),
        **({"query_pre_attn_scalar": 8, "sliding_window": 64} if "gemma" in made.model_type else {}),
        **made.extra,
        **(sizes or {}),
    }
    if scalar_head:
        from grpo_jax.models.hf_config import with_scalar_head

        hf_config = with_scalar_head(hf_config)
    eos = made.ids(made.eos)
    generation_config = {"eos_token_id": eos if len(eos) > 1 else eos[0], "do_sample": True, "temperature": 0.6}
    params = init_params(from_hf_config(hf_config), jax.random.key(0))
    save_pretrained(folder, params, hf_config=hf_config, generation_config=generation_config)
    write_tokenizer_files(folder, name)
    return str(folder)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
