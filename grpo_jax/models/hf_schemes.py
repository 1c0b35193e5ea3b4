"""The ``quantization_config`` of a ``config.json``: which schemes of quantized weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

READ = (
    "fp8 (float8_e4m3 with a scale for each block or tensor), mxfp4 or compressed-tensors in the format float-quantized"
)
BLOCK_SIZE = (128, 128)


@dataclass(frozen=True)
class Scheme:
    """How the quantized weights of a checkpoint are stored; others beside them are stored as they are.

    Attributes:
        method: ``quant_method`` of the config.
        block: rows and columns of a matrix that share a scale, None for all rows or columns. None for MXFP4, where 32
            entries of a row do.
        scale_suffix: added to the name of a weight gives that of its scales; MXFP4 has two suffixes of its own.
    """

    method: str
    block: tuple[int | None, int | None] | None
    scale_suffix: str = ""


def read_scheme(hf_config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a model's quantized weights by its ``config.json``; None if it has none.

    Modules that the config excludes from quantization are not read: a weight is quantized if it has scales.

    Args:
        hf_config: the parsed file.

    Raises:
        ValueError: a scheme, or a field of one, that is not read.
    """
    for name in ("quantization", "compression_config"):
        if hf_config.get(name):
            raise ValueError(
                f"config.json has a {name}, whose quantized weights are not read; use a checkpoint in {READ}, or the "
                "model's float32, bfloat16 or float16 checkpoint"
            )
    own = hf_config.get("quantization_config")
    if not own:
        return None
    if not isinstance(own, Mapping):
        raise ValueError(f"quantization_config in config.json must be an object, not {own!r:.200}")
    method = own.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        _refuse(f"quant_method={method!r:.200}")
    fields, reader = READERS[method]
    unknown = [f"{name}={value!r:.200}" for name, value in own.items() if name not in fields and value is not None]
    if unknown:
        _refuse(f"quant_method={method!r} and {unknown[0]}")
    return reader(own)


def without_scheme(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the same model with its weights dequantized.

    Args:
        hf_config: the parsed file.
    """
    return {name: value for name, value in hf_config.items() if name != "quantization_config"}


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"quantization_config in config.json has {what}, and such quantized weights are not read; use a checkpoint in "
        f"{READ}, or the model's float32, bfloat16 or float16 checkpoint"
    )


def _read_fp8(own: Mapping[str, Any]) -> Scheme:
    """As DeepSeek V3 and its followers store weights."""
    for name, read in (
        ("fmt", ("e4m3", "float8_e4m3fn")),
        ("scale_fmt", ("float", "ue8m0")),
        ("expert_dtype", ("fp8",)),
        ("activation_scheme", ("dynamic", "static")),
    ):
        if own.get(name, read[0]) not in read:
            _refuse(f"quant_method='fp8' and {name}={own[name]!r:.200}")
    return Scheme("fp8", _block(own.get("weight_block_size", BLOCK_SIZE)), "_scale_inv")


def _block(sizes: Any) -> tuple[int | None, int | None]:
    if sizes is None:
        return None, None
    sizes = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes,)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"the block of quantized weights in config.json must be a list of two positive integers, not {sizes!r:.200}"
        )
    return sizes


def _read_compressed(own: Mapping[str, Any]) -> Scheme:
    """As llm-compressor stores weights: a scale for each tensor, row or block, by the strategy of the config."""

    def refuse(what: str) -> NoReturn:
        _refuse(f"quant_method='compressed-tensors' and {what}")

    groups = own.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        refuse(f"config_groups={groups!r:.200}")
    formats = {str(own.get("format")), *(str(g["format"]) for g in groups.values() if g.get("format") is not None)}
    if formats != {"float-quantized"}:
        refuse(f"the format {' and '.join(sorted(formats - {'float-quantized'}))}")
    if own.get("quantization_status", "compressed") != "compressed":
        refuse(f"quantization_status={own['quantization_status']!r:.200}")
    for name in ("sparsity_config", "transform_config"):
        if own.get(name) and own[name] != {"format": "dense"}:
            refuse(f"{name}={own[name]!r:.200}")
    blocks = set()
    for group in groups.values():
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            refuse(f"weights={weights!r:.200}")
        for name, read in (("num_bits", (8,)), ("type", ("float",)), ("symmetric", (True,)), ("actorder", (None,))):
            if weights.get(name, read[0]) not in read:
                refuse(f"weights of {name}={weights[name]!r:.200}")
        strategy = weights.get("strategy")
        if strategy not in ("tensor", "channel", "block"):
            refuse(f"weights of strategy={strategy!r:.200}")
        block = weights.get("block_structure") if strategy == "block" else None
        blocks.add((1, None) if strategy == "channel" else _block(block))
    if len(blocks) > 1:
        refuse("config_groups that differ in the strategy of their weights")
    return Scheme("compressed-tensors", blocks.pop(), "_scale")


COMMON = {"quant_method", "modules_to_not_convert", "dequantize"}
READERS: Mapping[str, tuple[set[str], Callable[[Mapping[str, Any]], Scheme]]] = {
    "fp8": (
        COMMON
        | {"activation_scheme", "fmt", "scale_fmt", "expert_dtype", "weight_block_size"}
        | {"ignored_layers", "modules_to_convert"},
        _read_fp8,
    ),
    "mxfp4": (COMMON, lambda own: Scheme("mxfp4", None)),
    "compressed-tensors": (
        COMMON
        | {"config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "quantization_status"}
        | {"sparsity_config", "transform_config", "version", "run_compressed"},
        _read_compressed,
    ),
}
"""The fields of each scheme that are read or have no effect on the weights, and its reader."""
