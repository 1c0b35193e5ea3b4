"""Checkpoints with quantized weights, in the layout that their makers publish, against transformers."""

import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import SMALL, edit_json, load_torch_model, random_torch_model, torch_logits
from safetensors.torch import load_file, save_file
from test_parity import logits_of, padded_batch, relative_error
from transformers import Qwen3Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from grpo_jax.models import describe_pretrained, from_hf_config, from_pretrained, save_pretrained
from grpo_jax.models.hf_schemes import without_scheme
from grpo_jax.sharding import make_mesh, param_shardings

# Sizes that blocks of 128 do not divide.
SIZES = {"hidden_size": 160, "intermediate_size": 136, "head_dim": 36, "num_hidden_layers": 2}
PROJECTION = re.compile(r"layers\.\d+\..*_proj\.weight$")
GATE = "model.layers.1.mlp.gate_proj.weight"
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
    "dequantize": False,
    "modules_to_not_convert": ["lm_head"],
}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
PER_ROW = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def quantize(weight, block, scale_dtype):
    """Codes and scales of a matrix, whose largest entry in each block is the largest code."""
    sizes = [own or size for own, size in zip(block, weight.shape, strict=True)]
    rows, columns = (-(-size // part) for size, part in zip(weight.shape, sizes, strict=True))
    padded = torch.zeros(rows * sizes[0], columns * sizes[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    tiles = padded.reshape(rows, sizes[0], columns, sizes[1])
    scales = (tiles.abs().amax((1, 3)) / 448).to(scale_dtype)
    codes = (tiles / scales.float()[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = codes.reshape(padded.shape)[: weight.shape[0], : weight.shape[1]].contiguous()
    return codes, scales, _dequantize_fp8_weight(codes, scales, sizes, torch.float32)


def write(folder, quantization, block, suffix, scale_dtype, *, tied=True):
    """A Qwen3 whose projections are quantized, in two files; gives back the model with dequantized weights."""
    config = Qwen3Config(**SMALL | SIZES, tie_word_embeddings=tied, rope_parameters={"rope_theta": 1e6})
    model = random_torch_model(config)
    model.save_pretrained(folder)
    tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
    for name in [name for name in tensors if PROJECTION.search(name)]:
        tensors[name], scales, state[name] = quantize(tensors[name] / 3, block, scale_dtype)
        if quantization["quant_method"] == "fp8" and block == (None, None):
            scales = scales[0, 0]
            tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(0.01)
        tensors[name + suffix] = scales
    model.load_state_dict(state)
    (folder / "model.safetensors").unlink()
    # A weight and its scales are in different files.
    parts = [{name: x for name, x in tensors.items() if name.endswith(suffix) == i} for i in (False, True)]
    for file, part in zip(FILES, parts, strict=True):
        save_file(part, folder / file)
    weight_map = {name: file for file, part in zip(FILES, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    edit_json(folder / "config.json", quantization_config=quantization)
    return model


LAYOUTS = {
    "blocks": (FP8, (128, 128), "_scale_inv", torch.float32),
    "tensor": (PER_TENSOR, (None, None), "_scale_inv", torch.bfloat16),
    "rows": (PER_ROW, (1, None), "_scale", torch.bfloat16),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    return {name: (folders[name], write(folders[name], *LAYOUTS[name], tied=name != "rows")) for name in LAYOUTS}


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["blocks"][0], tmp_path / "blocks")


def change(folder, edit, file=1):
    tensors = load_file(folder / FILES[file])
    edit(tensors)
    save_file(tensors, folder / FILES[file])
    weight_map = {name: each for each in FILES for name in load_file(folder / each)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers_with_the_same_values(checkpoints, layout, caplog, record_property):
    folder, oracle = checkpoints[layout]
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained(folder)
    assert f"14 of {24 + (layout == 'rows')} tensors in {folder} are quantized" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    ids, mask = padded_batch()
    error = relative_error(logits_of(loaded.model, loaded.params, ids, mask), torch_logits(oracle, ids, mask), mask)
    record_property("relative_error", float(error))
    assert error <= 1e-4


def test_the_export_is_not_quantized(checkpoints, tmp_path):
    folder, oracle = checkpoints["blocks"]
    loaded = from_pretrained(folder)
    save_pretrained(tmp_path / "out", loaded.params, hf_config=json.loads((folder / "config.json").read_text()))
    save_pretrained(tmp_path / "again", loaded.params, hf_config=loaded.hf_config)
    for name in ("out", "again"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    exported = load_torch_model(tmp_path / "out").state_dict()
    for name, wanted in oracle.state_dict().items():
        assert torch.equal(exported[name], wanted), name


def test_the_decoder_is_that_of_the_unquantized_model(checkpoints):
    """So are plans, which read only the config."""
    for folder, _ in checkpoints.values():
        config = json.loads((folder / "config.json").read_text())
        assert from_hf_config(config) == from_hf_config(without_scheme(config)) == describe_pretrained(folder).config


def test_shards_have_the_values_of_the_whole(checkpoints):
    folder, _ = checkpoints["blocks"]
    mesh = make_mesh(fsdp=4, tensor=2)
    whole = from_pretrained(folder, param_dtype=jnp.bfloat16).params
    shards = from_pretrained(
        folder, param_dtype=jnp.bfloat16, mesh=mesh, shardings=lambda shapes: param_shardings(shapes, mesh)
    ).params
    assert len(shards["layers_0"]["mlp"]["gate"]["kernel"].addressable_shards) == 8
    jax.tree.map(np.testing.assert_array_equal, whole, shards)
    assert whole["layers_0"]["mlp"]["gate"]["kernel"].dtype == ml_dtypes.bfloat16


def test_scales_that_are_not_finite_are_found(folder):
    def edit(tensors):
        tensors[GATE + "_scale_inv"][0, 1] = torch.nan

    change(folder, edit)
    with pytest.raises(ValueError, match=rf"1 of 24 tensors .* have NaN or infinity(?s:.*){GATE}: "):
        from_pretrained(folder)


def test_codes_that_are_not_finite_are_found(folder):
    def edit(tensors):
        tensors[GATE].view(torch.uint8)[5, 7] = 0x7F

    change(folder, edit, 0)
    with pytest.raises(ValueError, match=rf"1 of 24 tensors .* have NaN or infinity(?s:.*){GATE}: "):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(GATE + "_scale_inv"), f"missing: {GATE}_scale_inv, while there is {GATE}$"),
        (lambda t: t.update({GATE + "_scale_inv": torch.ones(1, 2)}), rf"{GATE}_scale_inv is \(1, 2\), not \(2, 2\)"),
        (lambda t: t.update({"model.norm.weight_scale_inv": torch.ones(1)}), "model.norm.weight is F32, not F8_E4M3"),
        (lambda t: t.update({"model.other.weight_scale_inv": torch.ones(1, 1)}), "model.other.weight_scale_inv"),
        (lambda t: t.update({"model.other.activation_scale": torch.ones(1, 1)}), None),
    ],
)
def test_scales_fit_the_weights(folder, edit, message):
    change(folder, edit)
    if message is None:
        describe_pretrained(folder)
    else:
        for read in (describe_pretrained, from_pretrained):
            with pytest.raises(ValueError, match=message):
                read(folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (..., r"the weights in .* are quantized \(they have .*\), but its config.json has no quantization_config"),
        (FP8 | {"weight_block_size": [64, 64]}, r"_scale_inv is \(2, 2\), not \(3, 3\)"),
        (PER_ROW, "down_proj.weight_scale, while there is"),
        ({"quant_method": "mxfp4"}, r"are quantized \(they have .*\), but its config.json has no"),
        ({"quant_method": "awq"}, "quant_method='awq', and such quantized weights are not read; use a checkpoint in"),
    ],
)
def test_another_quantization_than_that_of_the_config_is_refused(folder, quantization, message):
    edit_json(folder / "config.json", quantization_config=quantization)
    for read in (describe_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(folder)
