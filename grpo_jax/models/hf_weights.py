"""Loading and saving of weights in safetensors files, shard by shard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from grpo_jax import hosts
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.hf_files import INDEX_FILE, config_file, cut, read_json, weight_files
from grpo_jax.models.hf_headers import NUMPY_DTYPES, Stored, read_headers
from grpo_jax.models.hf_keys import EMBEDDING_SUFFIX, LAYER, Entry, _flatten, best_table, key_table
from grpo_jax.models.hf_layouts import View
from grpo_jax.models.hf_quantized import Quantized, dequantized, log_dequantized
from grpo_jax.models.hf_reading import reading_sharding, redistributed
from grpo_jax.models.hf_schemes import read_scheme
from grpo_jax.models.hf_text import text_config
from grpo_jax.models.parameters import param_shapes
from grpo_jax.types import Params

QUANTIZED = re.compile(
    r"\.(weight_scale(_inv)?|weight_packed|weight_zero_point|qweight|qzeros|g_idx|SCB|scales|absmax|quant_map)$|"
    r"_proj_(blocks|scales)$|"
    r"\.weight\.(absmax|quant_map|quant_state\..*)$"
)
COMPARED_BYTES = 64 * 2**20
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
"""Prefixes of the tensors of a multimodal model's text part."""
OTHER_PARTS = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in ("visual", "vision_tower", "vision_model", "multi_modal_projector", "mtp")
)
"""Prefixes of the tensors that are not read."""


def load_params(
    folder: Path, config: DecoderConfig, *, param_dtype: Any, shardings: Callable[[Any], Any] | None
) -> Params:
    """Read a checkpoint's weights onto their devices, one tensor at a time and only its local shards.

    With shardings over several processes, all call this together; each reads its part of the rows of a tensor, and
    the devices exchange them.

    Args:
        folder: the checkpoint.
        config: sizes and switches of the decoder.
        param_dtype: dtype of the parameters, whatever that of the files.
        shardings: from the tree of ``ShapeDtypeStruct`` to a tree of ``jax.sharding.Sharding``; None puts everything
            on the first local device.

    Raises:
        FileNotFoundError: as ``weight_files``.
        ValueError: tensors that are missing, surplus, of another shape or of a dtype other than float32, bfloat16 and
            float16 (one error lists all); tensors with NaN or infinity, in the file or in ``param_dtype`` (one error);
            quantized tensors that ``config.json`` does not describe (one error); an ``lm_head.weight`` that differs
            from the embedding it is tied to; or a damaged file.
    """
    table, stored = check_weights(folder, config)
    if jax.process_index() == 0:
        log_dequantized(folder, stored)
    shapes = param_shapes(config, param_dtype)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placement: dict[str, Any] = dict.fromkeys(table, device)
    else:
        placement = _flatten(shardings(shapes))
    by_all = not all(sharding.is_fully_addressable for sharding in placement.values())
    if config.tie_word_embeddings and not config.scalar_head:
        _check_tied_head(folder, stored, table["embed/embedding"].names[0], by_all)
    params: dict[str, Any] = dict.fromkeys(table)
    not_finite: dict[str, str] = {}
    # The largest tensors of a file first, while few others are in memory.
    for path in sorted(table, key=lambda path: (str(stored[table[path].names[0]].file), -math.prod(table[path].shape))):
        entry = table[path]
        sharding = reading_sharding(placement[path], entry, np.dtype(param_dtype).itemsize)
        array, problem = _load([stored[name] for name in entry.names], entry, sharding, np.dtype(param_dtype))
        params[path] = redistributed(array, placement[path])
        if problem:
            not_finite[path] = f"{entry.names[0]}{' and its like' if entry.is_sliced else ''}: {problem}"
    if by_all:
        # The process that read such a value knows it, and all must stop.
        of_all = hosts.gather(not_finite, "the weights", is_long=True)
        not_finite = {path: problem for of_one in of_all for path, problem in of_one.items()}
    if not_finite:
        listed = cut([not_finite[path] for path in table if path in not_finite], separator="\n  ")
        raise ValueError(
            f"{len(not_finite)} of {len(table)} tensors in {folder} have NaN or infinity; use an earlier checkpoint:\n"
            f"  {listed}"
        )
    return unflatten_dict(params, sep="/")


def check_weights(folder: Path, config: DecoderConfig) -> tuple[dict[str, Entry], dict[str, Stored | Quantized]]:
    """Check by the headers of a checkpoint's files that it has the weights of a decoder, and no others.

    Args:
        folder: the checkpoint.
        config: sizes and switches of the decoder.

    Returns:
        The entry of each parameter by its path, and the tensors by name.

    Raises:
        FileNotFoundError: as ``weight_files``.
        ValueError: as ``load_params``, except for the values of weights.
    """
    found = read_headers(weight_files(folder))
    found = {name: tensor for name, tensor in found.items() if not _is_other(name, found)}
    check_num_layers(folder, found, config.num_layers)
    stored = dequantized(folder, found, read_scheme(text_config(read_json(config_file(folder)))))
    prefix = _prefix(stored)
    shapes = {f"model.{name.removeprefix(prefix)}": tensor.shape for name, tensor in stored.items()}
    table = {
        path: replace(entry, names=tuple(_prefixed(name, prefix, stored) for name in entry.names))
        for path, entry in best_table(config, shapes).items()
    }
    expected = {name: entry.view.stored for entry in table.values() for name in entry.names}
    _check_tensors(folder, expected, stored, config)
    return table, stored


def _is_other(name: str, stored: Collection[str]) -> bool:
    """Whether a tensor is of a part that is not read: for images, or for predicting several tokens."""
    layer = LAYER.search(name)
    # A layer after the last that predicts the token after the next has a projection of its two inputs.
    return name.startswith(OTHER_PARTS) or (layer is not None and f"{name[: layer.end()]}eh_proj.weight" in stored)


def _prefix(stored: Iterable[str]) -> str:
    """The prefix of a decoder's tensor names: ``model.``, or none for one saved without its head."""
    found = [name.removesuffix(EMBEDDING_SUFFIX) for name in stored if name.endswith(EMBEDDING_SUFFIX)]
    return next((prefix for prefix in ("model.", "", *TEXT_PREFIXES) if prefix in found), "model.")


def _prefixed(name: str, prefix: str, stored: Mapping[str, Stored | Quantized]) -> str:
    """The name of a tensor in a checkpoint whose decoder has another prefix than ``model.``."""
    if name.startswith("model."):
        return prefix + name.removeprefix("model.")
    beside = prefix.removesuffix("model.") + name  # a head of a multimodal model's text part
    return beside if beside in stored else name


def check_num_layers(folder: Path, stored: Iterable[str], num_layers: Any) -> None:
    """Compare the number of layers of a config with that of the weights.

    Args:
        folder: the checkpoint, for the message.
        stored: names of the stored tensors.
        num_layers: ``num_hidden_layers`` of the config.

    Raises:
        ValueError: it is greater, or it is smaller and the weights have no gaps.
    """
    layers = {int(match[1]) for name in stored if (match := LAYER.search(name))}
    count = max(layers, default=-1) + 1
    if layers and (num_layers > count or (num_layers < count == len(layers))):
        raise ValueError(
            f"num_hidden_layers in {folder / 'config.json'} is {num_layers:,}, but the weights beside it have "
            f"{count:,} layers; they belong to another config, or are incomplete"
        )


def _check_tensors(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored | Quantized],
    config: DecoderConfig,
) -> None:
    quantized = [name for name in stored if QUANTIZED.search(name)]
    if quantized:
        raise ValueError(
            f"the weights in {folder} are quantized (they have {cut(quantized, 3)}), but its config.json has "
            "no quantization_config by which they are read; use the model's float32, bfloat16 or float16 checkpoint"
        )
    if not any(name in stored for name in expected if LAYER.search(name)):
        raise ValueError(
            f"the tensor names in {folder} are not those of the model_type in its config.json: {_naming(stored)}"
        )
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in stored]
    for name, tensor in sorted(stored.items()):
        if name not in expected:
            is_head = config.tie_word_embeddings and name.endswith("lm_head.weight")
            if not (name.endswith("rotary_emb.inv_freq") or is_head):
                problems.append(f"surplus: {name} {tensor.shape}")
        elif tensor.shape != expected[name]:
            problems.append(f"misshapen: {name} is {tensor.shape}, not {expected[name]}")
        elif tensor.dtype not in NUMPY_DTYPES:
            problems.append(f"dtype: {name} is {tensor.dtype}, not one of {', '.join(NUMPY_DTYPES)}")
    if problems:
        listed = cut(problems, 20, separator="\n  ")
        raise ValueError(f"the weights in {folder} do not fit its config.json:\n  {listed}")


def _naming(stored: Mapping[str, Stored | Quantized]) -> str:
    """A description of unexpected tensor names, and how to convert them."""
    tables = [name for name in stored if name.endswith(EMBEDDING_SUFFIX)]
    prefix = tables[0].removesuffix(EMBEDDING_SUFFIX) if tables else ""
    if prefix.endswith("model.") and prefix != "model.":
        wrapper = prefix.removesuffix("model.")
        return (
            f"they have the prefix {wrapper!r} of a wrapper for training or compiling (DDP, FSDP, DeepSpeed, "
            "torch.compile, PEFT); save the wrapped model with its save_pretrained"
        )
    return f"they are {cut(sorted(stored), 3)}; convert them to the names that transformers writes for this model_type"


def _check_tied_head(folder: Path, stored: Mapping[str, Stored | Quantized], table: str, by_all: bool) -> None:
    """Check that a stored head is the embedding; all processes together if ``by_all``, each a part of its rows."""
    head = stored.get("lm_head.weight")
    if head is None:
        return
    equal = head.shape == stored[table].shape
    if equal:
        heads, tables, rows = head.mapped(), stored[table].mapped(), head.shape[0]
        step = max(1, COMPARED_BYTES // (4 * head.shape[1]))
        own, count = (jax.process_index(), jax.process_count()) if by_all else (0, 1)
        first, end = rows * own // count, rows * (own + 1) // count
        parts = (slice(row, min(row + step, end)) for row in range(first, end, step))
        pairs = ((np.asarray(heads[part]), np.asarray(tables[part])) for part in parts)
        equal = all(np.array_equal(head, table.astype(head.dtype)) for head, table in pairs)
    if by_all:
        equal = all(hosts.gather(equal, "the tied head", is_long=True))
    if not equal:
        raise ValueError(
            f"tie_word_embeddings in {folder / 'config.json'} is true (or missing, and true by default), "
            f"but the weights have an lm_head.weight that differs from {table}: set it to false to use that head, or "
            "delete lm_head.weight from the weights to use the embedding"
        )


def _load(
    tensors: Sequence[Stored | Quantized], entry: Entry, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> tuple[jax.Array, str | None]:
    """A parameter on its devices, and a description of its local values that are not finite, if any."""
    read, counts = {}, []

    def local_slice(index: Any) -> np.ndarray:
        ranges = tuple(range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=True))
        if ranges not in read:
            part = read_slice(tensors, entry, ranges)
            with np.errstate(over="ignore"):  # checked below
                # A contiguous array may become a device array without a copy, which must not change with the file.
                read[ranges] = part.astype(dtype, copy=part.flags.c_contiguous)
            if not (is_finite(part) and (_has_range_of(dtype, part.dtype) or is_finite(read[ranges]))):
                counts.append(np.count_nonzero(~np.isfinite(read[ranges].astype(np.float32))))
        return read[ranges]

    array = jax.make_array_from_callback(entry.shape, sharding, local_slice, dtype)
    # Transfers are asynchronous; without waiting, the host would hold many tensors.
    array.block_until_ready()
    return array, f"{sum(counts):,} of {array.size:,} in {dtype.name}" if counts else None


def _has_range_of(dtype: np.dtype, other: np.dtype) -> bool:
    """Whether every finite number of ``other`` is finite in ``dtype``; both floating point."""
    return float(jnp.finfo(dtype).max) >= float(jnp.finfo(other).max)


def is_finite(x: np.ndarray) -> bool:
    """Whether no entry of a floating-point array of 2 or 4 bytes is NaN or infinite; without a temporary copy."""
    if x.size == 0:
        return True
    # As unsigned integers, finite numbers sort before infinity and NaN, and negative numbers after positive ones.
    unsigned, signed = np.dtype(f"u{x.dtype.itemsize}"), np.dtype(f"i{x.dtype.itemsize}")
    positive, negative = (np.asarray(value, x.dtype).view(unsigned) for value in (np.inf, -np.inf))
    bits = x.view(unsigned)
    return bool(bits.max() < negative and bits.view(signed).max() < positive.view(signed))


def read_slice(tensors: Sequence[Any], entry: Entry, ranges: tuple[range, ...]) -> np.ndarray:
    """A slice of a parameter, read without the rest of the stored tensors.

    Args:
        tensors: the stored tensors of ``entry.names``: objects with a method ``mapped`` that gives an array.
        entry: of the parameter.
        ranges: a contiguous range of each axis of the parameter.

    Returns:
        The slice, with the parameter's axes, in the stored dtype; a view of the tensor if possible.
    """
    if not entry.is_sliced:
        return entry.view.read(tensors[0].mapped(), entry.shape, ranges)
    return np.stack([entry.view.read(tensors[i].mapped(), entry.shape[1:], ranges[1:]) for i in ranges[0]])


def save_params(folder: Path, params: Params, config: DecoderConfig, *, dtype: Any, max_shard_bytes: int) -> None:
    """Write parameters as safetensors, with an index if there are several files.

    One file's tensors are in host memory at a time. With parameters sharded over several processes, all call this
    together and the first one writes.

    Args:
        folder: an existing folder.
        params: the parameters of ``config``.
        config: sizes and switches of the decoder.
        dtype: of the stored tensors; None keeps the dtype of each parameter.
        max_shard_bytes: size limit of a file, unless a single tensor is larger.
    """
    flat, parts = _flatten(params), {}
    for path, entry in key_table(config).items():
        for i, name in enumerate(entry.names):
            parts.setdefault(name, []).append((flat[path], entry.view, i if entry.is_sliced else None))
    dtypes = {name: np.dtype(dtype or of_one[0][0].dtype) for name, of_one in parts.items()}
    plan = split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda of_one: math.prod(of_one[0][1].stored) * np.dtype(dtype or of_one[0][0].dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _export(parts[name], dtypes[name]) for name in names}
        if jax.process_index() == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors makes them readable by the owner only
    if plan.is_sharded and jax.process_index() == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _export(parts: Sequence[tuple[jax.Array, View, int | None]], dtype: np.dtype) -> np.ndarray:
    """A stored tensor from the parameters that it has parts of, or slices of parameters."""
    tensor = np.empty(parts[0][1].stored, dtype)
    for param, view, index in parts:
        param = param if index is None else param[index]
        if param.is_fully_addressable:
            # Of a copy, because an array caches its host value for as long as it lives.
            on_host = np.asarray(jnp.array(param, copy=True))
        else:
            on_host = multihost_utils.process_allgather(param, tiled=True)
        view.write(tensor, on_host.astype(dtype, copy=False))
    return tensor


def check_params(params: Params, config: DecoderConfig) -> None:
    """Check that a tree of parameters fits a config.

    Args:
        params: the parameters.
        config: gives their paths and shapes.

    Raises:
        ValueError: parameters that are missing, surplus, of another shape or of a dtype other than float32, bfloat16
            and float16; one error lists all.
    """
    expected = {path: leaf.shape for path, leaf in _flatten(param_shapes(config)).items()}
    given = _flatten(params)
    problems = [f"missing: {path} {shape}" for path, shape in expected.items() if path not in given]
    for path, param in given.items():
        if path not in expected:
            problems.append(f"surplus: {path} {param.shape}")
        elif param.shape != expected[path]:
            problems.append(f"misshapen: {path} is {param.shape}, not {expected[path]}")
        elif param.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            problems.append(f"dtype: {path} is {param.dtype}, not one of float32, bfloat16, float16")
    if problems:
        raise ValueError("the parameters do not fit the config:\n  " + cut(problems, 20, separator="\n  "))
