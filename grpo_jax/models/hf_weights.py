"""Weights between the parameter tree and Hugging Face safetensors: the key table, lazy reading, writing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.transformer import param_shapes
from grpo_jax.types import Params

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
STORED_DTYPES = ("F32", "BF16", "F16")

TOP_MODULES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "score": "score"}
BLOCK_MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
BLOCK_MODULES_WITH_POST_NORMS = BLOCK_MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

# How a parameter is stored: its axes in this order, and the place of the heads' axis that is merged with the next one.
HEADS_OUT, HEADS_IN, LINEAR, HEADS_BIAS = ((1, 2, 0), 0), ((2, 0, 1), 1), ((1, 0), None), ((0, 1), 0)
LAYOUTS = {
    **{f"attention/{name}/kernel": HEADS_OUT for name in "qkv"},
    **{f"attention/{name}/bias": HEADS_BIAS for name in "qkv"},
    "attention/o/kernel": HEADS_IN,
    **{f"mlp/{name}/kernel": LINEAR for name in ("gate", "up", "down")},
    "score/kernel": LINEAR,
}


@dataclass(frozen=True)
class Entry:
    """A parameter's place in a Hugging Face checkpoint.

    Attributes:
        name: the stored tensor's.
        shape: the parameter's.
        axes: which axis of the parameter comes first, second, ... in storage.
        merged: the place, in that order, of an axis of heads that is stored as one with the axis after it; or None.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    merged: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        shape = [self.shape[axis] for axis in self.axes]
        if self.merged is not None:
            shape[self.merged : self.merged + 2] = [shape[self.merged] * shape[self.merged + 1]]
        return tuple(shape)


def _flatten(tree: Any) -> dict[str, Any]:
    """A nested dict as one dict, keys joined by slashes."""
    return flatten_dict(tree, sep="/")


def key_table(config: DecoderConfig) -> dict[str, Entry]:
    """For each parameter, by its path such as ``layers_0/attention/q/kernel``, where a checkpoint has it."""
    block_modules = BLOCK_MODULES_WITH_POST_NORMS if config.post_norms else BLOCK_MODULES
    table = {}
    for path, leaf in _flatten(param_shapes(config)).items():
        module, kind = path.rsplit("/", 1)
        layer, _, in_block = path.partition("/")
        if layer in TOP_MODULES:
            stored_module = TOP_MODULES[layer]
        else:
            stored_module = f"model.layers.{layer.removeprefix('layers_')}.{block_modules[module.partition('/')[2]]}"
        axes, merged = LAYOUTS.get(in_block if in_block.count("/") else path, (tuple(range(leaf.ndim)), None))
        name = f"{stored_module}.{'bias' if kind == 'bias' else 'weight'}"
        table[path] = Entry(name, leaf.shape, axes, merged)
    return table


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if it holds something else; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the single one.

    Raises:
        FileNotFoundError: if there are none, if only pickled weights are there, or if the index names files that are
            not there.
    """
    if (folder / INDEX_FILE).is_file():
        files = sorted({folder / name for name in read_json(folder / INDEX_FILE).get("weight_map", {}).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which its {INDEX_FILE} names")
        return files
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    found = sorted(path.name for path in folder.iterdir())
    refuse_pickled(folder, found)
    raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; it has {found or 'nothing'}")


def refuse_pickled(where: Path | str, names: Iterable[str]) -> None:
    """Raise if any of the files is pickled weights.

    Raises:
        FileNotFoundError: some are; the error names them and says how to convert them.
    """
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        raise FileNotFoundError(
            f"{where} has pickled weights ({', '.join(pickled)}), which can run code when they are read and are "
            "refused. Convert them where you trust them: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors"
        )


def load_params(
    folder: Path, config: DecoderConfig, *, param_dtype: Any, shardings: Callable[[Any], Any] | None
) -> Params:
    """Read a checkpoint's weights straight onto their devices, one tensor at a time and of it only the local shards.

    Args:
        folder: has the safetensors files.
        config: what the decoder is made of.
        param_dtype: what the parameters are stored in, whatever the files hold.
        shardings: from the tree of ``ShapeDtypeStruct`` to a tree of ``jax.sharding.Sharding``; None puts everything
            on the first local device.

    Raises:
        FileNotFoundError: see ``weight_files``.
        ValueError: one for all tensors that are missing, surplus, of another shape or of a dtype other than float32,
            bfloat16 and float16; and for a file that is damaged.
    """
    table = key_table(config)
    shapes = param_shapes(config, param_dtype)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placement: dict[str, Any] = dict.fromkeys(table, device)
    else:
        placement = _flatten(shardings(shapes))
    with ExitStack() as stack:
        tensors = _open(stack, weight_files(folder))
        _check_tensors(folder, table, tensors, tied=config.tie_word_embeddings)
        params = {
            path: _load(tensors[entry.name], entry, placement[path], np.dtype(param_dtype))
            for path, entry in table.items()
        }
    return unflatten_dict(params, sep="/")


def _open(stack: ExitStack, files: Iterable[Path]) -> dict[str, Any]:
    """A handle on each stored tensor, from which slices can be read while the stack is open."""
    tensors = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(file, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error}); fetch or export it again") from error
        tensors.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def _check_tensors(folder: Path, table: Mapping[str, Entry], tensors: Mapping[str, Any], *, tied: bool) -> None:
    expected = {entry.name: entry.stored_shape for entry in table.values()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in sorted(tensors.items()):
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in expected:
            if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")):
                problems.append(f"surplus: {name} {shape}")
        elif shape != expected[name]:
            problems.append(f"misshapen: {name} is {shape}, not {expected[name]}")
        elif dtype not in STORED_DTYPES:
            problems.append(f"dtype: {name} is {dtype}, not one of {', '.join(STORED_DTYPES)}")
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its config.json:\n  " + "\n  ".join(problems))


def _load(tensor: Any, entry: Entry, sharding: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    read = {}

    def local_slice(index: Any) -> np.ndarray:
        ranges = tuple(range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=True))
        if ranges not in read:
            read[ranges] = read_slice(tensor, entry, ranges).astype(dtype, copy=False)
        return read[ranges]

    array = jax.make_array_from_callback(entry.shape, sharding, local_slice, dtype)
    # Transfers run behind; without waiting, the host would hold many tensors.
    return array.block_until_ready()


def read_slice(tensor: Any, entry: Entry, ranges: tuple[range, ...]) -> np.ndarray:
    """Part of a parameter, reading no other part of the stored tensor.

    Args:
        tensor: the stored one, sliceable; its slices are NumPy arrays.
        entry: the parameter's place.
        ranges: of each of the parameter's axes, contiguous.

    Returns:
        the part, with the parameter's axes, in the stored dtype.
    """
    stored = [ranges[axis] for axis in entry.axes]
    place = entry.merged
    if place is None:
        part = tensor[tuple(slice(r.start, r.stop) for r in stored)]
    else:
        heads, within = stored[place : place + 2]
        size = entry.shape[entry.axes[place + 1]]
        if len(within) == size:
            runs = [slice(heads.start * size, heads.stop * size)]
        else:
            runs = [slice(head * size + within.start, head * size + within.stop) for head in heads]
        before, after = (tuple(slice(r.start, r.stop) for r in rs) for rs in (stored[:place], stored[place + 2 :]))
        part = np.concatenate([tensor[(*before, run, *after)] for run in runs], axis=place)
    return part.reshape([len(r) for r in stored]).transpose(np.argsort(entry.axes))


def save_params(folder: Path, params: Params, config: DecoderConfig, *, dtype: Any, max_shard_bytes: int) -> None:
    """Write parameters as safetensors, with an index if they take more than one file.

    One file's tensors are in host memory at a time. Parameters may be spread over several processes: then all call
    this together, and the first one writes.

    Args:
        folder: exists.
        params: the tree of ``config``.
        config: what the decoder is made of.
        dtype: to write; None writes each parameter as it is.
        max_shard_bytes: the most a file holds, unless one tensor alone is larger.
    """
    flat = _flatten(params)
    by_name = {entry.name: (flat[path], entry) for path, entry in key_table(config).items()}
    plan = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda item: math.prod(item[1].shape) * np.dtype(dtype or item[0].dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _export(*by_name[name], dtype) for name in names}
        if jax.process_index() == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # safetensors writes them for the owner alone
    if plan.is_sharded and jax.process_index() == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _export(param: jax.Array, entry: Entry, dtype: Any) -> np.ndarray:
    if param.is_fully_addressable:
        # Of a copy, because an array keeps what the host once read of it for as long as it lives.
        on_host = np.asarray(jnp.array(param, copy=True))
    else:
        on_host = multihost_utils.process_allgather(param, tiled=True)
    stored = on_host.astype(dtype or param.dtype, copy=False).transpose(entry.axes).reshape(entry.stored_shape)
    return np.ascontiguousarray(stored)


def check_params(params: Params, config: DecoderConfig) -> None:
    """Check that a tree of parameters is one of ``config``.

    Raises:
        ValueError: one for all parameters that are missing, surplus, of another shape or not floating point.
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
        raise ValueError("the parameters do not fit the config:\n  " + "\n  ".join(problems))
