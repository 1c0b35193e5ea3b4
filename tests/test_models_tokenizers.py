"""Tokenizers of checkpoints: every family's files, ids without a row in the embedding, and unchanged export."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
from families import FAMILIES, family, write_family, write_json, write_tokenizer_files
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from grpo_jax.data.prompts import R1_ZERO, encode_prompts, render_prompts
from grpo_jax.models import from_pretrained, save_pretrained
from grpo_jax.models.tokenizers import read_tokenizer, stop_ids, tokens_and_ids, write_tokenizer
from grpo_jax.tasks.sums import make_tokenizer

TEXTS = [
    "hello world",
    "the quick brown fox, x=12345 . n't 's",
    " leading and  double  spaces ",
    "line\n\n  indented\ttab\r\n",
    "Köln 你好 naïve e\u0301 🙂",
    "a<|im_end|>b <think>x</think> </s> [INST] hi <end_of_turn>\n",
    "",
]
QUESTION = [{"role": "user", "content": "What is 12 + 345?"}]
# Families for which the class in transformers builds a tokenizer that differs from the file.
REBUILT = ("llama2", "phi3", "phi4", "chatml_llama2")

# Families that add a space before each text between added tokens, so that decoding returns more spaces.
PREPENDS = ("llama2", "mistral_v1", "phi3", "chatml_llama2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tokenizer files of every family, with the config.json that AutoTokenizer looks at."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_tokenizer_files(root / name, name)
        write_json(root / name / "config.json", {"model_type": family(name).model_type})
    return root


def edit(folder, file="tokenizer_config.json", **changes):
    content = json.loads((folder / file).read_text()) | changes
    write_json(folder / file, {name: value for name, value in content.items() if value is not ...})


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_encodes_and_decodes_as_its_file_does(folders, name):
    loaded = read_tokenizer(folders / name)
    file = Tokenizer.from_file(str(folders / name / "tokenizer.json"))
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(folders / name / "tokenizer.json"))
    for text in TEXTS:
        assert loaded(text).input_ids == file.encode(text).ids == wrapped(text).input_ids
        plain = file.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False).input_ids == plain
        assert loaded.decode(plain) == file.decode(plain, skip_special_tokens=False)
    assert len(loaded) == len(file.get_vocab())
    for token in ("bos_token", "eos_token", "unk_token", "pad_token"):
        named = family(name).config.get(token)
        assert getattr(loaded, token) == (named["content"] if isinstance(named, dict) else named)
    assert loaded.chat_template == family(name).chat_template


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_of_every_family_begins_once_and_a_turn_ends_with_its_token(folders, name):
    loaded, made = read_tokenizer(folders / name), family(name)
    (plain,) = encode_prompts(["What is 1+2?"], loaded, template=R1_ZERO)
    assert (plain[0] == loaded.bos_token_id) == made.bos
    assert plain.count(loaded.bos_token_id) == made.bos
    (text,) = render_prompts([QUESTION], loaded)
    (chat,) = encode_prompts([QUESTION], loaded)
    writes_bos = "bos_token" in made.chat_template
    if writes_bos:
        assert chat.count(loaded.bos_token_id) == 1
        assert chat[0] == loaded.bos_token_id
    assert loaded.decode(chat) == text or name in PREPENDS
    assert chat == loaded.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    answered = [*QUESTION, {"role": "assistant", "content": "It is 357."}]
    said = loaded.apply_chat_template(answered, return_dict=False)
    assert loaded.convert_tokens_to_ids(made.turn_end) in said[-3:]


def test_the_templates_of_families_have_their_branches(folders):
    tokenizers = {name: read_tokenizer(folders / name) for name in ("qwen3", "deepseek_r1_qwen", "gemma3", "qwen25")}

    def rendered(name, messages, **options):
        return tokenizers[name].apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    assert rendered("qwen3", QUESTION).endswith("<|im_start|>assistant\n")
    assert rendered("qwen3", QUESTION, enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert rendered("deepseek_r1_qwen", QUESTION).endswith("<think>\n")
    told = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert rendered("gemma3", told).startswith("<bos><start_of_turn>user\nBe brief.\n\nWhat is")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    assert '"name": "add"' in rendered("qwen25", QUESTION, tools=[tool])
    assert '"name"' not in rendered("qwen25", QUESTION)


def word_level(folder):
    """A word-level tokenizer as ``save_pretrained`` writes it."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "hello", "world"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    return folder


CLASSES = (..., "Qwen2Tokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "TokenizersBackend", "GPT2Tokenizer", "Mine")


@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gemma3_text", "mistral"])
def test_the_file_is_read_whatever_class_and_model_are_named(tmp_path, named, model_type):
    folder = word_level(tmp_path)
    edit(folder, tokenizer_class=named)
    write_json(folder / "config.json", {"model_type": model_type})
    assert read_tokenizer(folder)("hello world").input_ids == [3, 4]


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "smollm2", "llama2"])
def test_a_family_of_tokenizers_in_another_family_of_models(folders, tmp_path, name, model_type):
    folder = shutil.copytree(folders / name, tmp_path / "copy")
    edit(folder, tokenizer_class="LlamaTokenizerFast")
    edit(folder, "config.json", model_type=model_type)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [read_tokenizer(folder)(text).input_ids for text in TEXTS] == [file.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3", {"add_bos_token": False}),
        ("gemma2", {"add_bos_token": False}),
        ("qwen25", {"add_bos_token": True, "bos_token": "<|endoftext|>"}),
        ("smollm2", {"add_bos_token": True, "add_eos_token": True}),
        ("llama2", {"add_eos_token": True}),
        ("deepseek_r1_qwen", {"add_bos_token": False, "legacy": True}),
        ("qwen25", {"add_prefix_space": True}),
    ],
)
def test_tokens_around_a_text_are_those_of_the_file(folders, tmp_path, name, changes):
    folder = shutil.copytree(folders / name, tmp_path / "copy")
    edit(folder, **changes)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [read_tokenizer(folder)(text).input_ids for text in TEXTS] == [file.encode(text).ids for text in TEXTS]


def test_truncation_and_padding_kept_in_the_file_do_not_cut_or_fill_a_text(folders, tmp_path):
    folder = shutil.copytree(folders / "qwen25", tmp_path / "copy")
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    edit(folder, "tokenizer.json", truncation=cut, padding=fill | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"})
    whole, loaded = read_tokenizer(folders / "qwen25"), read_tokenizer(folder)
    assert loaded(TEXTS).input_ids == whole(TEXTS).input_ids
    assert len(whole(TEXTS[1]).input_ids) > 3


def test_decoding_removes_no_spaces(tmp_path):
    folder = word_level(tmp_path)
    edit(folder, clean_up_tokenization_spaces=True)
    tokenizer = read_tokenizer(folder)
    tokenizer.add_tokens([".", "n't"])
    assert tokenizer.batch_decode([tokenizer("hello . n't").input_ids]) == ["hello . n't"]


def test_templates_are_read_from_each_place_they_can_be_in(folders, tmp_path):
    folder = shutil.copytree(folders / "qwen25", tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("in a file of its own")
    assert read_tokenizer(folder).chat_template == "in a file of its own"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit(folder, chat_template=named)
    assert read_tokenizer(folder).chat_template == {"default": "plain", "tool_use": "tools"}
    (folder / "chat_template.jinja").write_text("the default")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    assert read_tokenizer(folder).chat_template == {"default": "the default", "rag": "documents"}
    (tmp_path / "export").mkdir()
    write_tokenizer(read_tokenizer(folder), tmp_path / "export")
    assert (tmp_path / "export" / "additional_chat_templates" / "rag.jinja").read_text() == "documents"


def test_a_file_without_settings_is_a_tokenizer(folders, tmp_path):
    shutil.copy(folders / "llama2" / "tokenizer.json", tmp_path)
    loaded, whole = read_tokenizer(tmp_path), read_tokenizer(folders / "llama2")
    assert loaded(TEXTS).input_ids == whole(TEXTS).input_ids
    assert (loaded.bos_token, loaded.eos_token, loaded.chat_template) == (None, None, None)
    shutil.copy(folders / "llama2" / "special_tokens_map.json", tmp_path)
    assert read_tokenizer(tmp_path).special_tokens_map == whole.special_tokens_map


@pytest.mark.parametrize("file", ["/nowhere/tokenizer.json", "other", None])
def test_no_other_file_than_that_of_the_folder_is_read(folders, tmp_path, file):
    folder = shutil.copytree(folders / "qwen3", tmp_path / "copy")
    file = str(folders / "llama2" / "tokenizer.json") if file == "other" else file
    edit(folder, tokenizer_file=file, vocab_file=file, name_or_path="someone/else")
    assert read_tokenizer(folder)(TEXTS).input_ids == read_tokenizer(folders / "qwen3")(TEXTS).input_ids


def as_object(content):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize("place", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["gemma2", "llama2"])  # without and with the table of added tokens in the config
def test_special_tokens_are_read_as_texts_and_as_objects(folders, tmp_path, name, place):
    folder = shutil.copytree(folders / name, tmp_path / "copy")
    whole = read_tokenizer(folder)
    if name == "gemma2" and place == "special_tokens_map.json":
        edit(folder, bos_token=..., eos_token=..., additional_special_tokens=...)
    turns = ["<start_of_turn>", "<end_of_turn>"] if name == "gemma2" else []
    tokens = {each: as_object(getattr(whole, each)) for each in ("bos_token", "eos_token")}
    edit(folder, place, **tokens, additional_special_tokens=[as_object(each) for each in turns])
    loaded = read_tokenizer(folder)
    assert loaded(TEXTS).input_ids == whole(TEXTS).input_ids
    assert loaded.special_tokens_map == whole.special_tokens_map
    assert loaded.all_special_ids == whole.all_special_ids


# Errors -------------------------------------------------------------------------------------------------------------


def test_settings_without_a_tokenizer_are_refused(folders, tmp_path):
    assert read_tokenizer(tmp_path) is None
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"eos_token": "</s>"}')
        with pytest.raises(FileNotFoundError, match=rf"has {name} but no tokenizer\.json; copy that file"):
            read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"])
def test_other_vocabularies_are_refused_with_the_way_to_convert_them(folders, tmp_path, name):
    folder = shutil.copytree(folders / "llama2", tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=rf"no tokenizer\.json, and its {name} .* Convert it once: .*save_pretr"
    ):
        read_tokenizer(folder)


def test_damaged_files_are_named(folders, tmp_path):
    folder = shutil.copytree(folders / "llama2", tmp_path / "copy")
    whole = (folder / "tokenizer.json").read_text()
    for content, error in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        (whole[: len(whole) // 2], "the tokenizer in .*copy cannot be read"),
        ("{}", "the tokenizer in .*copy cannot be read"),
    ):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=error):
            read_tokenizer(folder)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, not list"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"])
def test_optional_files_that_are_not_really_there_are_refused(folders, tmp_path, name):
    folder = shutil.copytree(folders / "qwen3", tmp_path / "copy")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        read_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(FileNotFoundError, match=f"{name} is a symbolic link to .*gone, which does not exist"):
        read_tokenizer(folder)


# Ids and rows -------------------------------------------------------------------------------------------------------


def test_a_vocabulary_beyond_the_embedding_is_refused_at_loading(folders):
    count = len(family("llama3").tokenizer.get_vocab())
    vocabulary = count - 7  # all but the added tokens
    read_tokenizer(folders / "llama3", vocabulary)
    with pytest.raises(ValueError, match=rf"no row for '.*' \({vocabulary - 1}\)\. The tokenizer has"):
        read_tokenizer(folders / "llama3", vocabulary - 1)
    with pytest.raises(
        ValueError, match=rf"and 95 more. The tokenizer has {count} tokens, and vocab_size .* is {vocabulary - 100}"
    ):
        read_tokenizer(folders / "llama3", vocabulary - 100)


def test_ids_are_compared_with_rows_and_not_their_number(tmp_path):
    folder = word_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["world"] = 40
    write_json(folder / "tokenizer.json", content)
    assert read_tokenizer(folder, 41)("hello world").input_ids == [3, 40]
    with pytest.raises(ValueError, match=r"'world' \(40\). The tokenizer has 5 tokens, and vocab_size .* is 40"):
        read_tokenizer(folder, 40)


def test_added_tokens_beyond_the_embedding_are_refused_where_a_text_has_them(folders):
    made = family("chatml_llama2")
    rows = len(made.tokenizer.get_vocab()) - 2
    tokenizer = read_tokenizer(folders / "chatml_llama2", rows)
    enlarged = read_tokenizer(folders / "chatml_llama2", rows + 2)
    assert tokenizer(TEXTS[0]).input_ids == enlarged(TEXTS[0]).input_ids
    chat = render_prompts([QUESTION], tokenizer)[0]
    names = rf"'<\|im_start\|>' \({rows}\), '<\|im_end\|>' \({rows + 1}\)"
    refused = rf"no row for {names}: it has {rows} rows .* has {rows + 2} tokens"
    ways = (
        lambda: tokenizer(chat),
        lambda: tokenizer([TEXTS[0], chat], add_special_tokens=False),
        lambda: tokenizer(chat, return_tensors="np"),
        lambda: tokenizer.encode(chat),
        lambda: tokenizer.apply_chat_template(QUESTION),
        lambda: encode_prompts([QUESTION], tokenizer),
        lambda: encode_prompts(["Say <|im_start|><|im_end|>"], tokenizer, template="{question}"),
    )
    for way in ways:
        with pytest.raises(ValueError, match=refused):
            way()
    assert enlarged(chat).input_ids


def test_an_image_token_without_a_row_is_no_reason_to_refuse_a_text_model(folders):
    tokenizer = read_tokenizer(folders / "gemma3", family("gemma3").vocab_size)
    assert encode_prompts([QUESTION], tokenizer)
    with pytest.raises(ValueError, match=r"no row for '<image_soft_token>'"):
        tokenizer("<image_soft_token>")


def test_a_special_token_that_the_config_alone_names_has_no_row(folders, tmp_path):
    folder = shutil.copytree(folders / "smollm2", tmp_path / "copy")
    count = len(family("smollm2").tokenizer.get_vocab())
    edit(folder, additional_special_tokens=["<|new|>"])
    assert len(read_tokenizer(folder)) == count + 1
    with pytest.raises(ValueError, match=rf"no row for '<\|new\|>' \({count}\)"):
        read_tokenizer(folder, count)("a <|new|> b")


def test_stop_tokens_are_single_tokens_with_a_row(folders):
    tokenizer = read_tokenizer(folders / "chatml_llama2")
    rows = len(tokenizer)
    assert stop_ids(tokenizer, ["<|im_end|>", "</s>"], rows) == [rows - 1, 2]
    assert stop_ids(tokenizer, [], rows) == []
    newline = read_tokenizer(folders / "qwen3")
    assert stop_ids(newline, ["\n"], len(newline)) == newline("\n").input_ids
    for token in ("<|eot_id|>", "two words", "", "猫"):
        with pytest.raises(ValueError, match=r"stop_tokens: \[.*\] are not tokens of .* --stop-tokens must be single"):
            stop_ids(tokenizer, ["</s>", token], rows)
    with pytest.raises(
        ValueError, match=rf"stop_tokens: .* no row for '<\|im_end\|>' \({rows - 1}\); it has {rows - 2} rows"
    ):
        stop_ids(tokenizer, ["<|im_end|>"], rows - 2)


def test_long_lists_of_tokens_are_cut():
    assert tokens_and_ids(["a", "b"], [1, 2]) == "'a' (1), 'b' (2)"
    assert tokens_and_ids([str(n) for n in range(2000)], range(2000)).endswith("'4' (4) and 1,995 more")


# Writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_of_every_family_are_copied_unchanged(folders, tmp_path, name):
    source = files_in(folders / name)
    del source["config.json"]
    tokenizer = read_tokenizer(folders / name, family(name).vocab_size)
    tokenizer(TEXTS[:-1], padding=tokenizer.pad_token is not None, truncation=True, max_length=4)
    write_tokenizer(tokenizer, tmp_path)
    assert files_in(tmp_path) == source
    shutil.copy(folders / name / "config.json", tmp_path)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for kind in (PreTrainedTokenizerFast, *(() if name in REBUILT else (AutoTokenizer,))):
        again = kind.from_pretrained(tmp_path)
        assert [again(text).input_ids for text in TEXTS] == [file.encode(text).ids for text in TEXTS]


def test_other_files_of_a_tokenizer_are_copied_too_and_nothing_else(folders, tmp_path):
    folder = shutil.copytree(folders / "llama2", tmp_path / "copy")
    (folder / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (folder / "added_tokens.json").write_text("{}")
    for name in ("tokenizer.py", "README.md", "vocab.bin", "model.safetensors"):
        (folder / name).write_text("no")
    (tmp_path / "export").mkdir()
    write_tokenizer(read_tokenizer(folder), tmp_path / "export")
    wanted = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "added_tokens.json",
    }
    assert set(files_in(tmp_path / "export")) == wanted


def test_the_files_are_kept_when_their_folder_is_gone_and_by_copies(folders, tmp_path):
    folder = shutil.copytree(folders / "qwen3", tmp_path / "copy")
    source = files_in(folder)
    del source["config.json"]
    tokenizer = read_tokenizer(folder)
    shutil.rmtree(folder)
    for number, each in enumerate((tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)))):
        (tmp_path / str(number)).mkdir()
        write_tokenizer(each, tmp_path / str(number))
        assert files_in(tmp_path / str(number)) == source


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_tokenizer_is_written_as_any_version_of_transformers_reads_it(folders, tmp_path, name):
    tokenizer = read_tokenizer(folders / name)
    tokenizer.add_tokens(["<mark>"])
    tokenizer.chat_template = "{{ messages }}"
    write_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "model_specific_special_tokens"} & set(written)
    assert not isinstance(written.get("extra_special_tokens"), list)
    texts = [*TEXTS, "one <mark> more"]
    for again in (read_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert [again(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]
        assert again.chat_template == "{{ messages }}"
        assert again.special_tokens_map == tokenizer.special_tokens_map


def test_a_tokenizer_that_was_made_here_comes_back(tmp_path):
    write_tokenizer(make_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "3+8=<think>11</think>"
    again = read_tokenizer(tmp_path)
    assert again(text).input_ids == make_tokenizer()(text).input_ids
    assert (again.eos_token, again.pad_token) == ("<eos>", "<pad>")


# Whole checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gemma3", "deepseek_r1_qwen", "chatml_llama2"])
def test_a_checkpoint_of_a_family_is_exported_unchanged_with_its_eos_ids(tmp_path, name):
    made = family(name)
    source = Path(write_family(tmp_path / "source", name))
    loaded = from_pretrained(source)
    named = {*made.ids(made.eos), made.tokenizer.token_to_id(made.config_eos), loaded.tokenizer.eos_token_id}
    assert set(loaded.eos_ids) == named
    turn_end = made.tokenizer.token_to_id(made.turn_end)
    assert (turn_end in loaded.eos_ids) == (name != "chatml_llama2")
    eos_ids = tuple(dict.fromkeys([*loaded.eos_ids, turn_end]))
    save_pretrained(
        tmp_path / "export",
        loaded.params,
        hf_config=loaded.hf_config,
        tokenizer=loaded.tokenizer,
        generation_config=loaded.generation_config,
        eos_ids=eos_ids,
    )
    again = from_pretrained(tmp_path / "export")
    assert again.eos_ids == eos_ids
    for config in (
        GenerationConfig.from_pretrained(tmp_path / "export"),
        AutoConfig.from_pretrained(tmp_path / "export"),
    ):
        assert config.eos_token_id == (list(eos_ids) if len(eos_ids) > 1 else eos_ids[0])
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "export" / file).read_text())
        assert written.pop("eos_token_id") == (list(eos_ids) if len(eos_ids) > 1 else eos_ids[0])
        before = json.loads((source / file).read_text())
        del before["eos_token_id"]
        assert written == before
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for file in kept:
        assert (source / file).exists() == (tmp_path / "export" / file).exists()
        assert not (source / file).exists() or (source / file).read_bytes() == (tmp_path / "export" / file).read_bytes()
