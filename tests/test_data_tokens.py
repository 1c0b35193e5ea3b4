"""Completions encoded and decoded as continuations of a prompt, with tokenizers of many families."""

import tempfile
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.encoded import decode_completions, decode_one, last_tokens
from grpo_jax.data.tokens import decode_following, encode_following, encode_texts
from grpo_jax.models.tokenizers import read_tokenizer
from grpo_jax.rollout.stop import stop_strings
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.types import Rollout
from tests.families import FAMILIES, family, write_tokenizer_files

PIECES = [
    "a",
    "    ",
    " ",
    "\n",
    "\n\n",
    "The",
    " answer",
    "is",
    "12",
    "é",
    "你好",
    "🙂",
    "\t",
    "x = 1",
    ".",
    "</think>",
]
TEXTS = ["    return 1", "hello", " hello", "\n    x", "  ", "\n\n", "🙂 ok", "é", "0", ".", "a\n  b\n", "日本語"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in FAMILIES:
        write_tokenizer_files(folder / name, name)
    return {name: read_tokenizer(folder / name) for name in FAMILIES}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_completion_of_every_family_decodes_to_its_text_after_any_prompt(tokenizers, name):
    tokenizer, turn_end = tokenizers[name], family(name).turn_end
    texts = [*TEXTS, f"done{turn_end}", f" a {turn_end}"]
    token_ids = encode_following(texts, tokenizer)
    assert decode_following(tokenizer, token_ids) == texts
    assert decode_following(tokenizer, []) == []
    for prompt in ("Question:", "Question: ", "def f():\n", turn_end):
        before = encode_texts([prompt], tokenizer)[0]
        for text, ids in zip(texts, token_ids, strict=True):
            assert decoded(tokenizer, before + ids) == decoded(tokenizer, before) + text
    assert encode_following([], tokenizer) == []
    assert encode_following([""], tokenizer) == [[]]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
def test_any_text_is_taught_as_it_is(pieces):
    text = "".join(pieces)
    for tokenizer in (cached("llama2"), cached("mistral_v1"), cached("gemma2"), cached("phi3")):
        [ids] = encode_following([text], tokenizer)
        assert decode_following(tokenizer, [ids]) == [text]


@cache
def cached(name):
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(folder, name)
        return read_tokenizer(Path(folder))


@pytest.mark.parametrize("with_special_tokens", [True, False])
@pytest.mark.parametrize("style", ["byte level", "prepend", "always", "first"])
def test_tokenizers_that_put_a_blank_before_each_text(style, with_special_tokens):
    letters = [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(models.BPE({each: n for n, each in enumerate(["▁", "Ġ", "Ċ", "\n", *letters])}, []))
    if style == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        if style == "prepend":
            tokenizer.normalizer = blanks
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>"} if with_special_tokens else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    texts = ["    x", "x", " x", "\n  x", ". x", "a"]
    assert decode_following(wrapped, encode_following(texts, wrapped)) == texts
    assert decode_following(wrapped, encode_texts(["x"], wrapped)) == [" x"]


def test_four_blanks_are_four_blanks(tokenizers):
    """Llama 2's tokenizer writes a blank before each text it encodes, and drops one of what it decodes."""
    tokenizer = tokenizers["llama2"]
    [ids] = encode_following(["    x"], tokenizer)
    assert tokenizer("    x", add_special_tokens=False)["input_ids"] != ids
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "▁▁▁▁x"
    assert tokenizer.decode(ids) == "   x"
    assert decode_one(tokenizer, [*ids, 2], [2]) == "    x"


@pytest.mark.parametrize("name", ["llama2", "qwen25", "gemma2"])
def test_streamed_text_and_step_ends_are_those_of_the_whole_completion(tokenizers, name):
    tokenizer = tokenizers[name]
    text = " Hello 你好 🙂\n    x"
    [ids] = encode_following([text], tokenizer)
    assert decode_one(tokenizer, ids, [2]) == text
    shown = ""
    for count in range(1, len(ids) + 1):  # as a terminal shows it: what ends within a character waits
        so_far = decode_one(tokenizer, ids[:count], [])
        if not so_far.endswith("\ufffd"):
            assert so_far.startswith(shown)
            shown = so_far
    assert shown == text
    for end in (1, 6, len(text)):
        [place] = last_tokens(tokenizer, ids, [end])
        assert decode_one(tokenizer, ids[: place + 1], [])[:end] == text[:end]
        assert place == 0 or decode_one(tokenizer, ids[:place], [])[:end] != text[:end]
    rows = jnp.array([ids, ids], jnp.int32)
    rollout = Rollout(rows, rows > -1, rows, rows > -1, jnp.zeros(rows.shape, jnp.float32), jnp.ones(2, bool))
    assert decode_completions(tokenizer, rollout, [2]) == [text] * 2


@pytest.mark.parametrize("name", ["llama2", "qwen25"])
def test_a_stop_string_may_begin_with_the_first_blank_of_a_completion(tokenizers, name):
    tokenizer = tokenizers[name]
    [ids] = encode_following([" stop it"], tokenizer)
    [end] = [n for n in range(1, len(ids) + 1) if decode_one(tokenizer, ids[:n], []).startswith(" stop")][:1]
    assert stop_strings(tokenizer, [" stop"])(ids, 0) == end
    assert stop_strings(tokenizer, ["  stop"])(ids, 0) is None


def test_a_tokenizer_without_some_characters_still_encodes_what_it_has():
    tokenizer = make_tokenizer()
    assert encode_following(["1+2="], tokenizer) == encode_texts(["1+2="], tokenizer)
    with pytest.raises(ValueError, match="cannot encode text 1, 'x'"):
        encode_following(["1", "x"], tokenizer)
