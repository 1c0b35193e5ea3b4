"""Quantized weights of Hugging Face checkpoints, dequantized as they are read: FP8 with scales, and MXFP4."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from grpo_jax.models.hf_files import cut
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


@runtime_checkable
class Header(Protocol):
    """A stored tensor."""

    @property
    def file(self) -> Path:
        """The file that has it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> str:
        """Its dtype in the notation of safetensors."""
        ...

    def mapped(self) -> Any:
        """An array of it, or an object whose slices are arrays."""
        ...


def dequantized(stored: Mapping[str, Header], scheme: Scheme) -> dict[str, Header]:
    """The tensors of a quantized checkpoint as they are read: each quantized one under one name, without its scales.

    Args:
        stored: the stored tensors by name.
        scheme: of their quantization.

    Raises:
        ValueError: quantized weights without scales or the reverse, or codes or scales of another shape or dtype than
            the scheme has; one error lists all.
    """
    found: dict[str, Header] = {}
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
        raise ValueError(f"the weights are not quantized as quantization_config in config.json has it:\n  {listed}")
    others = {name: tensor for name, tensor in stored.items() if name not in used and not OTHER_SCALES.search(name)}
    return {**others, **found}


def _pairs(stored: Mapping[str, Header], scheme: Scheme) -> Iterator[tuple[str, str, str]]:
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

    codes: Header
    scales: Header
    block: tuple[int | None, int | None] | None

    @property
    def file(self) -> Path:
        """The file that has the codes."""
        return self.codes.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dequantized tensor: that of MXFP4 has the last two axes in reverse, as transformers does."""
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
        splits = tuple((size,) for size in self.shape)
        if self.block is None:
            return LazyTensor(lambda indices: _read_mxfp4(codes, scales, indices), splits)
        rows, columns = self.shape[-2:]
        block = (self.block[0] or rows, self.block[1] or columns)
        scales = np.asarray(scales).astype(np.float32)
        if scales.size == 1:
            scales = scales.reshape((1,) * len(self.shape))
        return LazyTensor(lambda indices: _read_fp8(codes, scales, block, indices), splits)

    def problems(self, codes: str, scales: str) -> list[str]:
        """What does not fit the scheme.

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


@dataclass(frozen=True)
class LazyTensor:
    """A float32 tensor of which slices are computed when they are read.

    Attributes:
        read: from the indices along each of its axes to the values at all combinations of them.
        splits: for each of its axes, the sizes of the axes that it is seen as.
    """

    read: Callable[[Sequence[np.ndarray]], np.ndarray]
    splits: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes as they are seen."""
        return tuple(size for split in self.splits for size in split)

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """A view in which axes are split into several.

        Args:
            shape: of the view.

        Raises:
            ValueError: the view would merge axes, or have another number of entries.
        """
        rest, splits = list(shape), []
        for split in self.splits:
            found: list[int] = []
            while rest and (not found or math.prod(found) < math.prod(split)):
                found.append(rest.pop(0))
            splits.append(tuple(found))
        if rest or any(math.prod(old) != math.prod(new) for old, new in zip(self.splits, splits, strict=True)):
            raise ValueError(f"a quantized tensor of shape {self.shape} cannot be seen as one of shape {tuple(shape)}")
        return LazyTensor(self.read, tuple(splits))

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> np.ndarray:
        """A slice of the first axes as they are seen."""
        rest = [*index] if isinstance(index, tuple) else [index]
        indices, shape = [], []
        for split in self.splits:
            own, rest = tuple(rest[: len(split)]), rest[len(split) :]
            chosen = np.arange(math.prod(split)).reshape(split)[own]
            indices.append(chosen.reshape(-1))
            shape += chosen.shape
        if rest:
            raise IndexError(f"too many indices for shape {self.shape}")
        return self.read(indices).reshape(shape)


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
