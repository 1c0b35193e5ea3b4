"""Quantized weights of Hugging Face checkpoints, dequantized as they are read: FP8 with scales, and MXFP4."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grpo_jax.models.hf_files import cut
from grpo_jax.models.hf_headers import Stored
from grpo_jax.models.hf_schemes import Scheme

CODES = np.arange(256, dtype=np.uint8)
E4M3 = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The two values of a byte, that of its low bits first, as one integer.
E2M1_PAIRS = np.stack([E2M1[CODES & 15], E2M1[CODES >> 4]], axis=-1).view(np.uint64)[:, 0]
E8M0 = CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
MXFP4_SUFFIXES = "_blocks", "_scales"
MXFP4_BLOCK = 32
MXFP4_BYTES = MXFP4_BLOCK // 2
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
# Scales of quantized activations and caches: those are not quantized here.
OTHER_SCALES = re.compile(r"[._](activation_scale|input_scale|output_scale)$|\.self_attn\.[qkv]_scale$")


def dequantized(folder: Path, stored: Mapping[str, Stored], scheme: Scheme | None) -> dict[str, Stored | Quantized]:
    """The tensors of a checkpoint as they are read: each quantized one under one name, without its scales.

    Args:
        folder: the checkpoint, for messages.
        stored: the stored tensors by name.
        scheme: of quantized ones; None if there are none.

    Raises:
        ValueError: quantized weights without scales or the reverse, or codes or scales of another shape or dtype than
            the scheme has; one error lists all.
    """
    if scheme is None:
        return dict(stored)
    found: dict[str, Quantized] = {}
    used, problems = set[str](), []
    for name, codes, scales in _pairs(stored, scheme):
        used |= {codes, scales}
        if codes in stored and scales in stored:
            found[name] = quantized = Quantized(stored[codes], stored[scales], scheme.block)
            problems += quantized.problems(codes, scales)
        else:
            there, missing = (codes, scales) if codes in stored else (scales, codes)
            problems.append(f"missing: {missing}, while there is {there}")
    if problems:
        listed = cut(problems, 20, separator="\n  ")
        raise ValueError(f"the weights in {folder} are not quantized as its config.json has it:\n  {listed}")
    others = {name: tensor for name, tensor in stored.items() if name not in used and not OTHER_SCALES.search(name)}
    return {**others, **found}


def log_dequantized(folder: Path, stored: Mapping[str, Stored | Quantized]) -> None:
    """Log a warning if a checkpoint has quantized tensors: they are trained and exported dequantized.

    Args:
        folder: the checkpoint.
        stored: its tensors as they are read.
    """
    count = sum(isinstance(tensor, Quantized) for tensor in stored.values())
    if count:
        logging.getLogger(__name__).warning(
            "%s of %s tensors in %s are quantized; they are dequantized as they are read, and exported unquantized",
            f"{count:,}",
            f"{len(stored):,}",
            folder,
        )


def _pairs(stored: Mapping[str, Stored], scheme: Scheme) -> Iterator[tuple[str, str, str]]:
    """The name of each quantized tensor, and of its codes and scales, of which one may be missing."""
    if scheme.block is None:
        ends = MXFP4_SUFFIXES
        names = {name.removesuffix(end) for end in ends for name in stored if name.endswith(end)}
        yield from ((name, name + ends[0], name + ends[1]) for name in sorted(names))
    else:
        end = scheme.scale_suffix
        for name, tensor in sorted(stored.items()):
            if tensor.dtype == "F8_E4M3" or name + end in stored:
                yield name, name, name + end


@dataclass(frozen=True)
class Quantized:
    """A tensor that is stored as codes and scales, described as it is read.

    Attributes:
        codes: as stored.
        scales: as stored.
        block: rows and columns that share a scale, None for all; or None for MXFP4.
    """

    codes: Stored
    scales: Stored
    block: tuple[int | None, int | None] | None

    @property
    def file(self) -> Path:
        """The file that has the codes."""
        return self.codes.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantized tensor: that of MXFP4 has the last two axes in reverse, as in transformers."""
        if self.block is not None:
            return self.codes.shape
        *lead, rows, groups, _ = self.codes.shape
        return (*lead, groups * MXFP4_BLOCK, rows)

    @property
    def dtype(self) -> str:
        """The dtype of dequantized slices in the notation of safetensors."""
        return "F32"

    def mapped(self) -> LazyTensor:
        """The dequantized tensor, of which slices are computed when they are read."""
        codes, scales = self.codes.mapped(), self.scales.mapped()
        if self.block is None:
            return lazy_tensor(lambda indices: _read_mxfp4(codes, scales, indices), self.shape)
        rows, columns = self.shape[-2:]
        block = (self.block[0] or rows, self.block[1] or columns)
        scales = np.asarray(scales).astype(np.float32)
        if scales.size == 1:
            scales = scales.reshape((1,) * len(self.shape))
        return lazy_tensor(lambda indices: _read_fp8(codes, scales, block, indices), self.shape)

    def problems(self, codes: str, scales: str) -> list[str]:
        """Mismatches between the stored codes and scales and the scheme.

        Args:
            codes: name of the codes.
            scales: name of the scales.
        """
        code_dtype, scale_dtypes = ("U8", ("U8",)) if self.block is None else ("F8_E4M3", SCALE_DTYPES)
        found = []
        if self.codes.dtype != code_dtype:
            found.append(f"dtype: {codes} is {self.codes.dtype}, not {code_dtype}, and there is {scales}")
        if self.scales.dtype not in scale_dtypes:
            found.append(f"dtype: {scales} is {self.scales.dtype}, not one of {', '.join(scale_dtypes)}")
        shape = self.codes.shape
        if self.block is None:
            if len(shape) < 3 or shape[-1] != MXFP4_BYTES:
                return [*found, f"misshapen: {codes} is {shape}, not [..., rows, columns / 32, {MXFP4_BYTES}]"]
            wanted = [shape[:-1]]
        elif len(shape) < 2:
            return [*found, f"misshapen: {codes} is {shape}, not a matrix"]
        else:
            counts = tuple(-(-size // (part or size or 1)) for size, part in zip(shape[-2:], self.block, strict=True))
            wanted = [(*shape[:-2], *counts)]
            if self.block == (None, None):
                wanted = [(), (1,), *wanted]
        if self.scales.shape not in wanted:
            listed = " or ".join(map(str, wanted))
            found.append(f"misshapen: {scales} is {self.scales.shape}, not {listed}, for {codes} of shape {shape}")
        return found


Read = Callable[[Sequence[np.ndarray]], np.ndarray]
"""From indices along each axis of a tensor to its float32 values at all combinations of them."""


@dataclass(frozen=True)
class LazyTensor:
    """A view of a tensor whose values are computed when it becomes an array.

    Attributes:
        read: gives values of the tensor.
        indices: those in the view along each axis of the tensor, in the shape that the axis has in the view.
    """

    read: Read
    indices: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return tuple(size for index in self.indices for size in index.shape)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """A view of another shape, in which every axis is still a part of one axis of the tensor.

        Args:
            shape: of the view.

        Raises:
            ValueError: an axis of the view would belong to several of the tensor, or the number of entries differs.
        """
        rest, found = list(shape), []
        for index in self.indices:
            own: list[int] = []
            while rest and (math.prod(own) < index.size or rest[0] == 1):
                own.append(rest.pop(0))
            if math.prod(own) == index.size:
                found.append(index.reshape(own))
        if rest or len(found) < len(self.indices):
            raise ValueError(f"a quantized tensor of shape {self.shape} cannot be seen as one of shape {tuple(shape)}")
        return LazyTensor(self.read, tuple(found))

    def __getitem__(self, key: int | slice | tuple[int | slice, ...]) -> LazyTensor:
        """A view of a part, by integers or slices for the first axes."""
        rest = [*key] if isinstance(key, tuple) else [key]
        found = []
        for index in self.indices:
            own, rest = tuple(rest[: index.ndim]), rest[index.ndim :]
            found.append(np.asarray(index[own]))
        if rest:
            raise IndexError(f"too many indices for shape {self.shape}")
        return LazyTensor(self.read, tuple(found))

    def transpose(self, axes: Sequence[int] | np.ndarray) -> np.ndarray:
        """The values with the axes of the view in another order.

        Args:
            axes: of the view, in the new order.
        """
        return np.transpose(np.asarray(self), tuple(axes))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, float32 unless a dtype is given."""
        values = self.read([index.reshape(-1) for index in self.indices]).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)


def lazy_tensor(read: Read, shape: Sequence[int]) -> LazyTensor:
    """A whole tensor whose values are computed when it becomes an array.

    Args:
        read: gives values of the tensor.
        shape: of the tensor.
    """
    return LazyTensor(read, tuple(np.arange(size) for size in shape))


def _read_fp8(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], indices: Sequence[np.ndarray]
) -> np.ndarray:
    """``codes * scales`` in float32.

    Args:
        codes: float8 of one byte.
        scales: float32 with as many axes; the last two have an entry for each block of rows and columns.
        block: its rows and columns.
        indices: to read, along each axis.
    """
    *lead, rows, columns = indices
    codes = _at(codes.view(np.uint8), indices)
    lead = [index if size > 1 else np.zeros_like(index) for index, size in zip(lead, scales.shape, strict=False)]
    scales = _at(scales, [*lead, *(np.arange(size) for size in scales.shape[-2:])])
    row_blocks, column_blocks = rows // block[0], columns // block[1]
    bounds = [0, *(np.flatnonzero(np.diff(row_blocks)) + 1).tolist(), len(rows)]
    values = np.empty(codes.shape, np.float32)
    for matrix in np.ndindex(*codes.shape[:-2]):
        for first, end in itertools.pairwise(bounds):
            if first < end:
                part = values[matrix][first:end]
                np.take(E4M3, codes[matrix][first:end], mode="clip", out=part)
                with np.errstate(over="ignore", invalid="ignore"):  # values are checked by those who read them
                    part *= scales[matrix][row_blocks[first], column_blocks][None]
    return values


def _read_mxfp4(codes: np.ndarray, scales: np.ndarray, indices: Sequence[np.ndarray]) -> np.ndarray:
    """Values of 4 bits (E2M1) times powers of 2 (E8M0), in float32.

    Args:
        codes: uint8 ``[..., rows, columns / 32, 16]``, two values in each byte.
        scales: uint8 ``[..., rows, columns / 32]``: exponents plus 127, or 255 for NaN.
        indices: to read, along each axis of ``[..., columns, rows]``.
    """
    *lead, columns, rows = indices
    first = columns.min(initial=codes.shape[-2] * MXFP4_BLOCK) // MXFP4_BLOCK
    groups = np.arange(first, columns.max(initial=-1) // MXFP4_BLOCK + 1)
    codes = _at(codes, [*lead, rows, groups, np.arange(MXFP4_BYTES)])
    scales = _at(scales, [*lead, rows, groups])
    values = np.empty((*scales.shape, MXFP4_BLOCK), np.float32)
    for matrix in np.ndindex(*scales.shape[:-2]):
        part = values[matrix]
        np.take(E2M1_PAIRS, codes[matrix], mode="clip", out=part.view(np.uint64))
        with np.errstate(over="ignore", invalid="ignore"):
            part *= E8M0[scales[matrix]][..., None]
    stored = values.reshape(*values.shape[:-2], len(groups) * MXFP4_BLOCK)
    every = [np.arange(len(index)) for index in (*lead, rows)]
    return np.swapaxes(_at(stored, [*every, columns - first * MXFP4_BLOCK]), -1, -2)


def _at(array: np.ndarray, indices: Sequence[np.ndarray]) -> np.ndarray:
    """The entries at all combinations of indices along each axis; a view if each are evenly spaced."""
    slices = [_as_slice(index) for index in indices]
    found = array[tuple(slices)]
    for axis, (index, part) in enumerate(zip(indices, slices, strict=True)):
        if part == slice(None):
            found = found.take(index, axis=axis)
    return found


def _as_slice(index: np.ndarray) -> slice:
    """The slice with these indices, or of everything if there is none."""
    if len(index) == 0:
        return slice(0, 0)
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step < 1 or np.any(np.diff(index) != step):
        return slice(None)
    return slice(int(index[0]), int(index[-1]) + 1, step)
