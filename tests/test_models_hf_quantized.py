"""Quantized tensors against transformers' own dequantization, and values computed by hand."""

import itertools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from grpo_jax.models.hf_headers import NUMPY_DTYPES, QUANTIZED_DTYPES, Stored, read_headers
from grpo_jax.models.hf_keys import Entry
from grpo_jax.models.hf_layouts import View
from grpo_jax.models.hf_quantized import E4M3, dequantized
from grpo_jax.models.hf_schemes import Scheme, read_scheme, without_scheme
from grpo_jax.models.hf_text import text_config
from grpo_jax.models.hf_weights import read_slice

FP8 = Scheme("fp8", (128, 128), "_scale_inv")
MXFP4 = Scheme("mxfp4", None)
FOLDER = Path("folder")
DTYPES = NUMPY_DTYPES | QUANTIZED_DTYPES | {"F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8}


class Tensor(Stored):
    """A stored tensor that is in memory."""

    def __init__(self, array):
        dtype = next(name for name, dtype in DTYPES.items() if array.dtype == dtype)
        super().__init__(FOLDER / "model.safetensors", array.shape, dtype, 0)
        object.__setattr__(self, "array", array)

    def mapped(self):
        return self.array


def fp8_codes(shape, seed=0):
    """All codes but NaN, in random order."""
    codes = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    return np.random.default_rng(seed).choice(codes, shape).view(ml_dtypes.float8_e4m3fn)


def fp8_scales(shape, dtype=np.float32):
    return np.random.default_rng(1).uniform(1e-4, 3e-2, shape).astype(dtype)


def mxfp4_codes(shape=(3, 10, 4, 16)):
    """Blocks and scales of three experts with 10 rows of 128 entries."""
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(110, 140, shape[:-1], np.uint8)


def read(codes, scales, scheme, name="experts.weight"):
    names = [name, name + scheme.scale_suffix] if scheme.block is not None else [name + "_blocks", name + "_scales"]
    found = dequantized(FOLDER, dict(zip(names, (Tensor(codes), Tensor(scales)), strict=True)), scheme)
    assert list(found) == [name]
    assert found[name].dtype == "F32"
    return found[name]


def values_of(codes, scales, scheme):
    return np.asarray(read(codes, scales, scheme).mapped())


def as_torch(array):
    by_bits = {ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn, ml_dtypes.bfloat16: torch.bfloat16}
    for dtype, theirs in by_bits.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(f"u{array.dtype.itemsize}").copy()).view(theirs)
    return torch.from_numpy(array)


def test_values_of_codes():
    np.testing.assert_array_equal(E4M3, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy())
    assert E4M3[[0x38, 0x01, 0x7E, 0xC0]].tolist() == [1, 2**-9, 448, -2]
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [0x7F, 0xFF]
    # Low bits first: 1 is 0.5, 7 is 6, 10 is -1, 13 is -3, times 2 and 1/4.
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    blocks[0, 0, 0, :2], blocks[0, 1, 0, 15] = [0x71, 0x0A], 0xD0
    values = values_of(blocks, np.array([[[128], [125]]], np.uint8), MXFP4)[0]
    assert values.shape == (32, 2)
    assert values[:4, 0].tolist() == [1, 12, -2, 0]
    assert values[31, 1] == -0.75
    assert np.count_nonzero(values) == 4


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("shape", "block", "scale_shape"),
    [
        ((256, 128), (128, 128), (2, 1)),
        ((300, 200), (128, 128), (3, 2)),
        ((72, 100), (64, 16), (2, 7)),
        ((2, 130, 257), (128, 128), (2, 2, 3)),
        ((40, 30), (None, None), ()),
        ((40, 30), (None, None), (1,)),
        ((3, 40, 30), (None, None), (3, 1, 1)),
        ((40, 30), (1, None), (40, 1)),
    ],
)
def test_fp8_as_in_transformers(shape, block, scale_shape, dtype):
    codes, scales = fp8_codes(shape), fp8_scales(scale_shape, dtype)
    tensor = read(codes, scales, Scheme("fp8", block, "_scale_inv"))
    assert tensor.shape == shape
    sizes = None if block == (None, None) else [own or size for own, size in zip(block, shape[-2:], strict=True)]
    wanted = _dequantize_fp8_weight(as_torch(codes), as_torch(scales), sizes, torch.float32)
    np.testing.assert_array_equal(tensor.mapped(), wanted.numpy())


def test_scales_that_are_powers_of_2():
    """``scale_fmt`` ue8m0, stored in one byte."""
    scales = np.array([[118, 120], [100, 130]], np.uint8)
    tensor = read(codes := fp8_codes((256, 256)), scales.view(ml_dtypes.float8_e8m0fnu), FP8)
    wanted = codes.astype(np.float32) * np.kron(2.0 ** (scales.astype(np.float32) - 127), np.ones((128, 128)))
    np.testing.assert_array_equal(tensor.mapped(), wanted.astype(np.float32))


def test_mxfp4_as_in_transformers():
    blocks, scales = mxfp4_codes()
    scales[0, 0, :2] = 0, 250  # the least and nearly the largest
    tensor = read(blocks, scales, MXFP4)
    assert tensor.shape == (3, 128, 10)
    wanted = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(tensor.mapped(), wanted.numpy())


VIEWS = [
    ((2, 130, 257), [(), (1,), (slice(None), slice(100, 130)), (0, slice(3, 7), slice(250, 257))]),
    ((2, 13, 10, 257), [(slice(None), 5), (1, slice(2, 9), slice(3, 5)), (slice(0, 0),), (0, slice(0, 13, 2), 1)]),
    ((1, 2, 65, 2, 257), [(0, slice(None), slice(None), 1), (0, 1, slice(4, 60), 0, slice(128, 200))]),
]


@pytest.mark.parametrize(("view", "indices"), VIEWS)
def test_slices_of_views(view, indices):
    tensor = read(fp8_codes((2, 130, 257)), fp8_scales((2, 2, 3)), FP8).mapped()
    whole = np.asarray(tensor).reshape(view)
    seen = tensor.reshape(view)
    assert seen.shape == view
    for index in indices:
        np.testing.assert_array_equal(seen[index], whole[index])


def test_slices_of_mxfp4():
    tensor = read(*mxfp4_codes(), MXFP4).mapped()
    whole, seen = np.asarray(tensor).reshape(3, 128, 5, 2), tensor.reshape((3, 128, 5, 2))
    parts = (
        [slice(1, 3), 2, slice(None)],
        [slice(None), slice(40, 55), 77, slice(5, 5)],
        [slice(None), slice(1, 4)],
        [0, 1],
    )
    for index in itertools.product(*parts):
        np.testing.assert_array_equal(seen[index], whole[index])


FUSED = View((72, 130), (1, 2, 0), (12, 6, 130), (slice(4, 8),))  # the second of three groups of heads
EVERY_SECOND = View((3, 128, 10), (0, 1, 2), (3, 128, 5, 2), (slice(None), slice(None), slice(None), slice(1, 2)))


@pytest.mark.parametrize(
    ("tensor", "view", "shape"),
    [
        (read(fp8_codes((72, 130)), fp8_scales((1, 2)), FP8), FUSED, (130, 4, 6)),
        (read(*mxfp4_codes(), MXFP4), EVERY_SECOND, (3, 128, 5)),
    ],
)
def test_parts_of_parameters(tensor, view, shape):
    """As ``hf_layouts`` reads them, for a shard of each parameter."""
    values = np.asarray(tensor.mapped())
    for ranges in (tuple(map(range, shape)), tuple(range(size // 3, size - 1) for size in shape)):
        part = view.read(tensor.mapped(), shape, ranges)
        assert part.shape == tuple(map(len, ranges))
        np.testing.assert_array_equal(part, view.read(values, shape, ranges))


def test_experts_that_are_tensors_of_their_own():
    names = tuple(f"experts.{i}.weight" for i in range(3))
    tensors = [read(fp8_codes((72, 130), seed=i), fp8_scales((1, 2)), FP8, name) for i, name in enumerate(names)]
    entry = Entry(names, (3, 130, 72), View((72, 130), (1, 0), (72, 130)))
    wanted = np.stack([np.asarray(tensor.mapped()).T for tensor in tensors])
    np.testing.assert_array_equal(
        read_slice(tensors, entry, (range(1, 3), range(9, 130), range(72))), wanted[1:3, 9:130]
    )


def test_mxfp4_in_files(tmp_path):
    """The names of gpt-oss, and a file in which the tensors are not aligned."""
    blocks, scales = mxfp4_codes()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    bias = np.ones(5, ml_dtypes.bfloat16)
    save_file({"bias": bias, name + "_blocks": blocks, name + "_scales": scales}, tmp_path / "model.safetensors")
    found = dequantized(tmp_path, read_headers([tmp_path / "model.safetensors"]), MXFP4)
    assert {name: tensor.shape for name, tensor in found.items()} == {"bias": (5,), name: (3, 128, 10)}
    wanted = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(found[name].mapped(), wanted.numpy())


def test_views_that_merge_axes_are_refused():
    tensor = read(fp8_codes((4, 6)), fp8_scales((1, 1)), FP8).mapped()
    for shape in ((24,), (2, 12), (4, 6, 2), (4, 5)):
        with pytest.raises(ValueError, match=r"shape \(4, 6\) cannot be seen as"):
            tensor.reshape(shape)


def test_values_that_are_not_finite_stay_so():
    codes, scales = fp8_codes((2, 4)), np.full((1, 1), 0.5, np.float32)
    codes[1, 2] = np.nan
    assert np.argwhere(np.isnan(values_of(codes, scales, FP8))).tolist() == [[1, 2]]
    assert np.isnan(values_of(fp8_codes((2, 4)), np.full((1, 1), np.nan, np.float32), FP8)).all()
    blocks, exponents = mxfp4_codes((1, 2, 1, 16))
    exponents[0, 1, 0] = 255
    values = values_of(blocks, exponents, MXFP4)[0]
    assert np.isnan(values[:, 1]).all()
    assert np.isfinite(values[:, 0]).all()


def test_other_tensors_are_kept_and_scales_of_activations_left_out():
    names = ["q_proj.activation_scale", "mlp.down_proj.input_scale", "experts.up_proj_activation_scale"]
    stored = {
        "q_proj.weight": Tensor(fp8_codes((4, 4))),
        "q_proj.weight_scale_inv": Tensor(fp8_scales((1, 1))),
        "norm.weight": Tensor(np.ones(4, np.float32)),
        "layer_scale": Tensor(np.ones(4, np.float32)),
        **{name: Tensor(np.ones((), np.float32)) for name in (*names, "layers.0.self_attn.k_scale")},
    }
    assert set(dequantized(FOLDER, stored, FP8)) == {"q_proj.weight", "norm.weight", "layer_scale"}


CODES, SCALES = fp8_codes((256, 256)), fp8_scales((2, 2))
WRONG = [
    ({"a.weight": CODES}, FP8, "missing: a.weight_scale_inv, while there is a.weight"),
    ({"a.weight": CODES, "a.scale": SCALES}, FP8, "missing: a.weight_scale_inv"),
    ({"a.weight": CODES, "a.weight_scale_inv": SCALES[:1]}, FP8, r"a.weight_scale_inv is \(1, 2\), not \(2, 2\), for"),
    ({"a.weight": CODES, "a.weight_scale_inv": SCALES[0, 0]}, FP8, r"a.weight_scale_inv is \(\), not \(2, 2\)"),
    ({"a.weight": CODES[0], "a.weight_scale_inv": SCALES}, FP8, r"a.weight is \(256,\), not a matrix"),
    ({"a.weight": CODES.astype(np.float32), "a.weight_scale_inv": SCALES}, FP8, "a.weight is F32, not F8_E4M3"),
    ({"a.weight": CODES.view(ml_dtypes.float8_e5m2), "a.weight_scale_inv": SCALES}, FP8, "is F8_E5M2, not F8_E4M3"),
    (
        {"a.weight": CODES, "a.weight_scale_inv": SCALES.astype(np.uint8)},
        FP8,
        "a.weight_scale_inv is U8, not one of F32",
    ),
    (
        {"a.weight": CODES, "a.weight_scale_inv": SCALES},
        Scheme("fp8", (None, None), "_scale_inv"),
        r"not \(\) or \(1,\) or \(1, 1\), for",
    ),
    ({"a_blocks": mxfp4_codes()[0]}, MXFP4, "missing: a_scales, while there is a_blocks"),
    ({"a_scales": mxfp4_codes()[1]}, MXFP4, "missing: a_blocks, while there is a_scales"),
    ({"a_blocks": mxfp4_codes()[0], "a_scales": mxfp4_codes()[1][:, :5]}, MXFP4, r"is \(3, 5, 4\), not \(3, 10, 4\)"),
    (
        {"a_blocks": mxfp4_codes((3, 10, 4, 8))[0], "a_scales": mxfp4_codes()[1]},
        MXFP4,
        r"not \[..., rows, columns / 32",
    ),
    ({"a_blocks": mxfp4_codes()[0].view(np.int8), "a_scales": mxfp4_codes()[1]}, MXFP4, "a_blocks is I8, not U8"),
]


@pytest.mark.parametrize(("arrays", "scheme", "message"), WRONG)
def test_weights_that_do_not_fit_the_scheme(arrays, scheme, message):
    with pytest.raises(ValueError, match=message):
        dequantized(FOLDER, {name: Tensor(np.asarray(array)) for name, array in arrays.items()}, scheme)


def compressed(strategy="channel", **own):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, **own.pop("weights", {})},
        "input_activations": {"num_bits": 8},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **own,
    }


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        (None, None),
        ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}, FP8),
        (
            {"quant_method": "fp8", "fmt": "float8_e4m3fn", "weight_block_size": [64, 32]},
            Scheme("fp8", (64, 32), "_scale_inv"),
        ),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0", "ignored_layers": ["gate"]}, FP8),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
            Scheme("fp8", (None, None), "_scale_inv"),
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, MXFP4),
        (compressed(), Scheme("compressed-tensors", (1, None), "_scale")),
        (compressed("tensor", sparsity_config={}), Scheme("compressed-tensors", (None, None), "_scale")),
        (
            compressed("block", weights={"block_structure": [128, 128]}),
            Scheme("compressed-tensors", (128, 128), "_scale"),
        ),
    ],
)
def test_schemes_that_are_read(quantization, scheme):
    assert read_scheme({"quantization_config": quantization}) == scheme
    assert without_scheme({"vocab_size": 9, "quantization_config": quantization}) == {"vocab_size": 9}


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method='fbgemm_fp8'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method='modelopt'"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\]"),
        ({"bits": 4}, "quant_method=None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quant_method='fp8' and fmt='e5m2'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "quant_method='fp8' and expert_dtype='fp4'"),
        ({"quant_method": "fp8", "scale_fmt": "e5m3"}, "scale_fmt='e5m3'"),
        ({"quant_method": "fp8", "rotation": "hadamard"}, "quant_method='fp8' and rotation='hadamard'"),
        ({"quant_method": "mxfp4", "group_size": 16}, "quant_method='mxfp4' and group_size=16"),
        (compressed(format="pack-quantized"), "quant_method='compressed-tensors' and the format pack-quantized"),
        (compressed(format="nvfp4-pack-quantized"), "the format nvfp4-pack-quantized"),
        (compressed(weights={"num_bits": 4}), "weights of num_bits=4"),
        (compressed(weights={"type": "int"}), "weights of type='int'"),
        (compressed(weights={"symmetric": False}), "weights of symmetric=False"),
        (compressed("group"), "weights of strategy='group'"),
        (compressed(quantization_status="frozen"), "quantization_status='frozen'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config="),
        (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config="),
        (compressed(config_groups={}), "config_groups={}"),
        (
            compressed(
                config_groups={
                    str(i): compressed(s)["config_groups"]["group_0"] for i, s in enumerate(("tensor", "channel"))
                }
            ),
            "config_groups that differ",
        ),
    ],
)
def test_other_schemes_are_refused_in_one_sentence(quantization, named):
    with pytest.raises(
        ValueError, match=f"quantization_config in config.json has .*{named}.* not read; use a"
    ) as error:
        read_scheme({"quantization_config": quantization})
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [[128], [0, 128], [128, 1.5], "128", 128])
def test_blocks_are_two_positive_integers(block):
    with pytest.raises(ValueError, match="must be a list of two positive integers, not"):
        read_scheme({"quantization_config": {"quant_method": "fp8", "weight_block_size": block}})


PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "hf_configs"


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published configurations beside the checkout")
def test_published_schemes_are_read():
    found = [read_scheme(text_config(json.loads(path.read_text()))) for path in sorted(PUBLISHED.glob("*.json"))]
    methods = [scheme.method for scheme in found if scheme is not None]
    assert methods.count("fp8") >= 8
    assert methods.count("mxfp4") >= 2
