"""Folders and files that are not supported checkpoints are refused with a description and a remedy."""

import json
import logging
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import SMALL, edit_json, write_checkpoint
from safetensors.numpy import load_file, save_file

from grpo_jax.models import from_pretrained, hf_weights
from grpo_jax.models.hf_weights import is_finite


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Checkpoints with an output embedding of its own and with a tied one, without tokenizers."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama2", "llama3")}
    for name, folder in folders.items():
        write_checkpoint(folder, name, tokenizer=False)
    return folders


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals["llama2"], tmp_path / "untied")


@pytest.fixture
def tied(originals, tmp_path):
    return shutil.copytree(originals["llama3"], tmp_path / "tied")


def change(folder, tensors):
    """Write tensors into the single file."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file)


def split(folder):
    """Split the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def embedding_of(loaded):
    return np.asarray(loaded.params["embed"]["embedding"])


TABLE = "model.embed_tokens.weight"


def stored_table(folder):
    return load_file(folder / "model.safetensors")[TABLE]


# Tied output embeddings -----------------------------------------------------------------------------------------------


def test_a_stored_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tied):
    table = stored_table(tied)
    other = table.copy()
    other[-1, -1] += 0.5
    for wrong in (other, table[:-1].copy()):
        change(tied, {"lm_head.weight": wrong})
        with pytest.raises(ValueError, match=r"tie_word_embeddings .* is true .* set it to false to use that head"):
            from_pretrained(tied)
    change(tied, {"lm_head.weight": other})
    edit_json(tied / "config.json", tie_word_embeddings=False)
    np.testing.assert_array_equal(from_pretrained(tied).params["lm_head"]["embedding"], other)


def test_an_equal_head_passes(tied):
    change(tied, {"lm_head.weight": stored_table(tied)})
    assert "lm_head" not in from_pretrained(tied).params


def test_each_of_several_processes_compares_its_rows_of_a_tied_head(tmp_path, monkeypatch):
    table = np.arange(36, dtype=np.float32).reshape(9, 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for row, finder in ((0, 0), (3, 0), (4, 1), (8, 1)):
        head = table.copy()
        head[row] += 1
        stored = {}
        for name, values in ((TABLE, table), ("lm_head.weight", head)):
            values.tofile(tmp_path / name)
            stored[name] = hf_weights.Stored(tmp_path / name, values.shape, "F32", 0)
        for process in range(2):
            own = []
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            # The other process tells what this one does not find.
            monkeypatch.setattr(
                hf_weights.hosts, "gather", lambda equal, *_, own=own, **__: own.append(equal) or [False]
            )
            with pytest.raises(ValueError, match="differs from"):
                hf_weights._check_tied_head(tmp_path, stored, TABLE, True)
            assert own == [process != finder]


# Which files are read -------------------------------------------------------------------------------------------------


def test_the_single_file_comes_before_an_index_as_in_transformers(folder, caplog):
    table = stored_table(folder)
    other = shutil.copytree(folder, folder.parent / "other")
    change(other, {TABLE: table + 1})
    split(other)
    for path in other.glob("model*"):
        shutil.copy(path, folder)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(embedding_of(from_pretrained(folder)), table)
    assert "the single file is loaded, as transformers does" in caplog.text


@pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "C:\\x", "", 7])
def test_an_index_that_leaves_its_folder_is_refused(folder, name):
    weight_map = split(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "x.safetensors")
    write_index(folder, weight_map | {"model.norm.weight": name})
    with pytest.raises(ValueError, match="lists files outside its folder, or entries that are not"):
        from_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_files_is_refused(folder, weight_map):
    split(folder)
    write_index(folder, weight_map)
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        from_pretrained(folder)


def test_links_into_a_hub_cache_are_followed(folder):
    table = stored_table(folder)
    split(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in [*folder.glob("*")]:
        path.rename(blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    np.testing.assert_array_equal(embedding_of(from_pretrained(folder)), table)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=f"{name} is a symbolic link to ../../blobs/abc, which does not exist"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_named(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        from_pretrained(folder)


def test_two_files_with_one_tensor_are_refused(folder):
    weight_map = split(folder)
    file = weight_map["model.norm.weight"]
    other = next(folder / name for name in weight_map.values() if name != file)
    save_file(load_file(other) | {"model.norm.weight": np.ones(32, np.float32)}, other)
    with pytest.raises(ValueError, match=r"both .* and .* have model.norm.weight"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-Q4_K_M.gguf"], r"has GGUF weights \(model-Q4_K_M.gguf\).*use the safetensors checkpoint"),
        (["tf_model.h5"], r"not in safetensors \(tf_model.h5\)"),
        (["consolidated.safetensors"], "consolidated.safetensors, which is not in transformers' layout"),
        (["model-00001-of-00002.safetensors"], r"but no model.safetensors.index.json that lists them"),
        ([f"pytorch_model-{i:05d}.bin" for i in range(2000)], r"pickled .*\.\.\. and 1,990 more"),
    ],
)
def test_other_formats_are_named(folder, files, message):
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message) as error:
        from_pretrained(folder)
    assert len(str(error.value)) < 800


def test_an_adapter_is_named_with_the_way_to_merge_it(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ValueError, match=r"LoRA adapter .* beside full weights; remove"):
        from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"only a LoRA adapter .*'owner/base'.*merge_and_unload"):
        from_pretrained(folder)


# Contents of the files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("module.model.", "the prefix 'module.' of a wrapper"),
        ("_orig_mod.model.", "the prefix '_orig_mod.' of a wrapper"),
        ("transformer.h.", "the tensor names in .* are not those of the model_type"),
    ],
)
def test_another_prefix_is_named(folder, prefix, message):
    tensors = load_file(folder / "model.safetensors")
    save_file({n.replace("model.", prefix, 1): x for n, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_a_multimodal_checkpoint_is_read_by_its_prefix(tied, prefix):
    wanted = embedding_of(from_pretrained(tied))
    tensors = {n.replace("model.", prefix, 1): x for n, x in load_file(tied / "model.safetensors").items()}
    tensors |= {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
    save_file(tensors, tied / "model.safetensors")
    np.testing.assert_array_equal(embedding_of(from_pretrained(tied)), wanted)
    save_file(tensors | {f"{prefix}layers.0.odd.weight": np.ones(2, np.float32)}, tied / "model.safetensors")
    with pytest.raises(ValueError, match=r"surplus: .*layers.0.odd.weight"):
        from_pretrained(tied)


def test_a_base_model_is_read_without_its_prefix(tied):
    """As transformers writes a model without its head, for example an embedding model."""
    wanted = embedding_of(from_pretrained(tied))
    tensors = load_file(tied / "model.safetensors")
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, tied / "model.safetensors")
    np.testing.assert_array_equal(embedding_of(from_pretrained(tied)), wanted)


def test_quantized_weights_are_named(folder):
    change(folder, {"model.layers.0.mlp.up_proj.weight_scale": np.ones(1, np.float32)})
    with pytest.raises(
        ValueError,
        match=r"are quantized .*its config.json has no quantization_config .*use the model's float32, bfloat16 or",
    ):
        from_pretrained(folder)


@pytest.mark.parametrize("count", [2, 4, 2000, 10**6, 10**9])
def test_the_number_of_layers_is_compared_with_the_files_first(folder, count):
    edit_json(folder / "config.json", num_hidden_layers=count)
    with pytest.raises(ValueError, match=f"num_hidden_layers .* is {count:,}, but the weights .* have 3 layers"):
        from_pretrained(folder)


def test_lists_are_cut(folder):
    change(folder, {f"model.extra.{i}": np.zeros(1, np.float32) for i in range(1254)})
    with pytest.raises(ValueError, match=r"\.\.\. and 1,234 more"):
        from_pretrained(folder)


@pytest.mark.parametrize("param_dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_counted_by_tensor(folder, param_dtype):
    norm, up = np.ones(32, np.float32), np.ones((48, 32), np.float32)
    norm[3], up[5, 6], up[7, 8] = np.nan, np.inf, -np.inf
    change(folder, {"model.norm.weight": norm, "model.layers.1.mlp.up_proj.weight": up})
    with pytest.raises(ValueError, match=r"2 of .* tensors .* have NaN or infinity") as error:
        from_pretrained(folder, param_dtype=param_dtype)
    name = np.dtype(param_dtype).name
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        f"model.layers.1.mlp.up_proj.weight: 2 of 1,536 in {name}",
        f"model.norm.weight: 1 of 32 in {name}",
    ]


def test_weights_beyond_the_range_of_float16_are_refused(folder):
    change(folder, {"model.norm.weight": np.full(32, 1e5, np.float32)})
    with pytest.raises(ValueError, match="32 of 32 in float16"):
        from_pretrained(folder, param_dtype=np.float16)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finiteness_is_read_from_the_bits(dtype):
    limit = ml_dtypes.finfo(dtype).max
    finite = np.array([0.0, -0.0, 1.0, -1.0, limit, -limit], dtype)
    assert is_finite(finite)
    assert is_finite(finite[:0])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(finite, np.asarray(value, dtype)))


def test_a_multimodal_config_is_named_with_its_text_model(folder):
    text = {"model_type": "bloom", **SMALL}
    (folder / "config.json").write_text(json.dumps({"model_type": "seer", "text_config": text, "vision_config": {}}))
    with pytest.raises(ValueError, match=r"'seer' is multimodal, and its text model .'bloom'. is not .* gemma3, "):
        from_pretrained(folder)
