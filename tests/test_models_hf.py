"""Loading and saving of checkpoints: folders, EOS and pad ids, refused checkpoints, and interrupted writes."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from checkpoints import SMALL, edit_json, random_params, tiny_tokenizer, write_checkpoint
from huggingface_hub.utils import filter_repo_objects

from grpo_jax.models import from_hf_config, from_pretrained, hf, save_pretrained
from grpo_jax.sharding import make_mesh, param_shardings
from grpo_jax.train import reward_model_scores

LLAMA = {"model_type": "llama", **SMALL, "torch_dtype": "float32"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with a tokenizer, made once; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("original")
    write_checkpoint(folder, "llama2")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def test_everything_that_came_with_the_model_is_handed_over(original):
    loaded = from_pretrained(original)
    assert loaded.hf_config == json.loads((original / "config.json").read_text())
    assert loaded.generation_config == json.loads((original / "generation_config.json").read_text())
    assert loaded.config == from_hf_config(loaded.hf_config)
    assert loaded.tokenizer.decode([5, 7]) == "w5 w7"
    assert loaded.eos_ids == (1,)
    assert loaded.pad_id == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    assert loaded.params["layers_0"]["attention"]["q"]["kernel"].shape == (32, 4, 8)


def test_a_tilde_and_a_string_name_a_folder_too(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert from_pretrained(f"~/{folder.name}").config == from_pretrained(str(folder)).config


@pytest.mark.parametrize(
    ("of_generation", "of_config", "wanted"),
    [
        ([1, 7, 9], 5, (1, 7, 9, 5)),
        (7, [1, 5], (7, 1, 5)),
        (..., [5, 6], (5, 6, 1)),
        (None, 5, (5, 1)),
        (..., ..., (1,)),  # the tokenizer's
        ([96, 7, -1], 5, (7, 5, 1)),
    ],
)
def test_eos_ids_come_from_every_place_that_names_them(folder, of_generation, of_config, wanted):
    edit_json(folder / "generation_config.json", eos_token_id=of_generation)
    edit_json(folder / "config.json", eos_token_id=of_config)
    assert from_pretrained(folder).eos_ids == wanted


@pytest.mark.parametrize("value", ["</s>", 2.0, True, [1, None], [[1]]])
@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
def test_ids_that_are_not_numbers_are_refused_by_field_and_file(folder, field, value):
    edit_json(folder / "generation_config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"{field} in generation_config\.json must be a token id or a list of ids"):
        from_pretrained(folder)


def test_a_checkpoint_without_generation_config_and_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("chat_template*"), folder / "generation_config.json"]:
        path.unlink()
    loaded = from_pretrained(folder)
    assert loaded.tokenizer is None
    assert loaded.generation_config is None
    assert (loaded.eos_ids, loaded.pad_id) == ((1,), 0)
    edit_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"no EOS id .* name none; set eos_token_id in generation_config.json"):
        from_pretrained(folder)
    edit_json(folder / "config.json", eos_token_id=[96, 97])
    with pytest.raises(ValueError, match=r"no EOS id within the vocabulary of 96: .* name \[96, 97\]"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("of_tokenizer", "of_generation", "of_config", "wanted"),
    [("<pad>", 5, 6, 0), (None, 5, 6, 5), (None, ..., 6, 6), (None, None, -1, 9), (None, 96, ..., 9)],
)
def test_a_pad_id_is_settled(folder, of_tokenizer, of_generation, of_config, wanted):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    tiny_tokenizer(pad_token=of_tokenizer).save_pretrained(folder)
    edit_json(folder / "generation_config.json", pad_token_id=of_generation, eos_token_id=[9, 1])
    edit_json(folder / "config.json", pad_token_id=of_config)
    assert from_pretrained(folder).pad_id == wanted


def test_folders_without_a_checkpoint_are_refused(tmp_path, original):
    with pytest.raises(FileNotFoundError, match=r"has no config.json and so is not a checkpoint; it has nothing"):
        from_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"it has \['notes.txt'\]"):
        from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file; give the folder"):
        from_pretrained(original / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such/place, and it is not a hub id"):
        from_pretrained("/no/such/place")
    with pytest.raises(ValueError, match="revision='main' applies to hub ids"):
        from_pretrained(original, revision="main")


def test_a_repository_that_cannot_be_fetched_is_named():
    with pytest.raises(FileNotFoundError, match="'owner/name' could not be fetched from the hub: "):
        from_pretrained("owner/name")
    with pytest.raises(FileNotFoundError, match="'owner/name' at revision 'v2' could not be fetched"):
        from_pretrained("owner/name", revision="v2")


def test_a_repository_of_pickled_weights_is_refused_with_the_way_to_convert_them(folder, monkeypatch):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    monkeypatch.setattr(hf, "snapshot_download", lambda name, **_: str(folder))
    monkeypatch.setattr(hf, "list_repo_files", lambda name, revision: ["config.json", "pytorch_model.bin"])
    with pytest.raises(FileNotFoundError, match=r"owner/name has pickled weights \(pytorch_model.bin\).*convert them"):
        from_pretrained("owner/name")


def test_of_a_repository_only_harmless_files_are_fetched(original, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(original)

    monkeypatch.setattr(hf, "snapshot_download", snapshot_download)
    assert from_pretrained("owner/name", revision="v2").eos_ids == (1,)
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "modeling_x.py",
        "tokenizer_x.py",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx",
        "README.md",
        "flax_model.msgpack",
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(wanted + unwanted, **patterns)) == set(wanted)


def test_code_that_comes_with_a_checkpoint_is_never_run(folder):
    evil = f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n"
    (folder / "evil.py").write_text(evil)
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    assert from_pretrained(folder).tokenizer.decode([5]) == "w5"
    edit_json(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="never run; supported are"):
        from_pretrained(folder)
    assert not (folder / "ran").exists()


def test_damaged_json_and_unsupported_configs_are_named(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_type": "mrope", "factor": 4.0})
    with pytest.raises(ValueError, match="'mrope' is not implemented"):
        from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, not list"):
        from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        from_pretrained(folder)


def test_dtypes_that_are_not_supported_are_refused(original, tmp_path):
    with pytest.raises(ValueError, match="param_dtype must be float32, bfloat16 or float16, not int8"):
        from_pretrained(original, param_dtype=jnp.int8)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, not float16"):
        from_pretrained(original, dtype=jnp.float16)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, not int8"):
        save_pretrained(tmp_path / "export", {}, hf_config=LLAMA, dtype=jnp.int8)


@pytest.fixture(scope="module")
def params():
    return random_params(from_hf_config(LLAMA))


def test_the_config_is_kept_and_its_dtype_updated_as_it_was_spelled(params, tmp_path):
    save_pretrained(tmp_path / "a", params, hf_config=LLAMA, dtype=jnp.bfloat16)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written == {**LLAMA, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    config = {name: value for name, value in LLAMA.items() if name != "torch_dtype"} | {"architectures": ["Mine"]}
    save_pretrained(tmp_path / "b", params, hf_config=config, generation_config={"eos_token_id": [1, 7]})
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written == {**config, "dtype": "float32"}
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
    assert from_pretrained(tmp_path / "b").eos_ids == (1, 7)


def test_a_prompt_format_is_written_and_read_back(params, tmp_path):
    prompt_format = {"kind": "chat", "system_prompt": "Sei kurz.", "template_kwargs": {"enable_thinking": False}}
    config = LLAMA | {"eos_token_id": 1}
    save_pretrained(tmp_path / "with", params, hf_config=config, prompt_format=prompt_format)
    assert from_pretrained(tmp_path / "with").prompt_format == prompt_format
    save_pretrained(tmp_path / "without", params, hf_config=config)
    assert from_pretrained(tmp_path / "without").prompt_format is None
    (tmp_path / "with" / "prompt_format.json").write_text("[]")
    with pytest.raises(ValueError, match=r"prompt_format\.json must hold a JSON object, not list"):
        from_pretrained(tmp_path / "with")


class Tokenizer:
    """A tokenizer that runs a function while it is saved, after weights and config were written."""

    def __init__(self, on_save):
        self.save_pretrained = on_save


def test_the_folder_appears_only_when_it_is_complete(params, tmp_path):
    folder = tmp_path / "new" / "export"
    seen = []

    def look(partial):
        seen.extend(sorted(path.name for path in partial.iterdir()))
        assert not folder.exists()
        assert partial.parent == folder.parent

    save_pretrained(folder, params, hf_config=LLAMA, tokenizer=Tokenizer(look))
    assert seen == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_write_that_fails_leaves_nothing(params, tmp_path):
    def fail(partial):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "export", params, hf_config=LLAMA, tokenizer=Tokenizer(fail))
    assert not list(tmp_path.iterdir())


def test_remains_of_a_killed_write_are_removed_by_the_next(params, tmp_path):
    (tmp_path / ".export.partial").mkdir()
    (tmp_path / ".export.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    save_pretrained(tmp_path / "export", params, hf_config=LLAMA)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"config.json", "model.safetensors"}


def test_a_folder_that_is_not_empty_is_left_alone(params, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="export exists and is not empty; remove it or choose another name"):
        save_pretrained(tmp_path / "export", params, hf_config=LLAMA)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", params, hf_config=LLAMA)
    assert (tmp_path / "empty" / "config.json").exists()


# A scalar head instead of the output embedding ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama2", "qwen3", "gemma3"])
def causal(request, tmp_path_factory):
    """Checkpoints of causal models: with an output embedding of its own, and tied."""
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, request.param)
    return folder


def classifier_of(folder):
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert model.config.num_labels == 1
    return model.eval()


def test_a_causal_model_gets_a_head_of_zeros_on_the_same_trunk(causal, tmp_path):
    plain, scorer = from_pretrained(causal), from_pretrained(causal, scalar_head=True)
    assert ("lm_head" in plain.params) == (not plain.config.tie_word_embeddings)
    assert set(scorer.params) == set(plain.params) - {"lm_head"} | {"score"}
    trunk = {name: value for name, value in plain.params.items() if name != "lm_head"}
    of_scorer = {name: value for name, value in scorer.params.items() if name != "score"}
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), trunk, of_scorer)))
    head = scorer.params["score"]["kernel"]
    assert head.shape == (scorer.config.hidden_size, 1)
    assert not head.any()
    assert scorer.config.scalar_head
    assert not plain.config.scalar_head
    assert (scorer.eos_ids, scorer.pad_id) == (plain.eos_ids, plain.pad_id)

    save_pretrained(tmp_path / "scorer", scorer.params, hf_config=scorer.hf_config)
    assert not classifier_of(tmp_path / "scorer").score.weight.any()


def test_a_scalar_head_that_is_there_is_kept_and_scores_as_in_transformers(causal, tmp_path):
    scorer = from_pretrained(causal, scalar_head=True)
    head = jax.random.normal(jax.random.key(0), scorer.params["score"]["kernel"].shape)
    params = {**scorer.params, "score": {"kernel": head}}
    save_pretrained(tmp_path / "scorer", params, hf_config=scorer.hf_config, tokenizer=scorer.tokenizer)
    again, as_it_is = from_pretrained(tmp_path / "scorer", scalar_head=True), from_pretrained(tmp_path / "scorer")
    assert (again.params["score"]["kernel"] == head).all()
    assert (as_it_is.params["score"]["kernel"] == head).all()
    assert again.config == as_it_is.config
    assert again.hf_config == as_it_is.hf_config
    ids = [[2, 5, 9, 60, 7, 1]]
    with torch.no_grad():
        expected = float(classifier_of(tmp_path / "scorer")(torch.tensor(ids)).logits[0, 0])
    rows = jnp.asarray(ids, jnp.int32)
    assert float(reward_model_scores(again.model, again.params, rows, rows >= 0)[0]) == pytest.approx(
        expected, abs=1e-4
    )


def test_a_new_head_has_the_sharding_and_dtype_of_the_parameters(original):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = partial(param_shardings, mesh=mesh)
    scorer = from_pretrained(original, param_dtype=jnp.bfloat16, shardings=shardings, scalar_head=True)
    head = scorer.params["score"]["kernel"]
    assert head.dtype == jnp.bfloat16
    assert head.sharding == param_shardings(scorer.params, mesh)["score"]["kernel"]


def test_a_classifier_with_other_labels_is_no_start_for_a_reward_model(folder):
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "architectures": ["LlamaForSequenceClassification"]}
    edit_json(folder / "config.json", **labels)
    with pytest.raises(ValueError, match="classifier with 3 labels"):
        from_pretrained(folder, scalar_head=True)
