"""The tensors in safetensors files as their headers describe them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

HEADER_SIZE_BYTES = 8  # size of the JSON header at the start of a safetensors file, little-endian
NUMPY_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
"""Dtypes of weights that are not quantized."""
QUANTIZED_DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "U8": np.uint8}
"""Further dtypes of quantized weights and their scales."""


@dataclass(frozen=True)
class Stored:
    """A tensor as described in the header of its file.

    Attributes:
        file: the safetensors file.
        shape: of the stored tensor.
        dtype: in the notation of safetensors, such as ``BF16``.
        offset: of its first byte in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def mapped(self) -> np.ndarray:
        """The tensor as a read-only memory map of the file."""
        return np.asarray(
            np.memmap(self.file, (NUMPY_DTYPES | QUANTIZED_DTYPES)[self.dtype], "r", self.offset, self.shape)
        )


def read_headers(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors in safetensors files, by name.

    Raises:
        ValueError: a damaged file, or a tensor in two files.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            safe_open(file, framework="np")  # checks that the header and the file's size agree
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or not a safetensors file ({error}); download or export it again"
            ) from error
        with file.open("rb") as opened:
            header_size = int.from_bytes(opened.read(HEADER_SIZE_BYTES), "little")
            header = json.loads(opened.read(header_size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if name in stored:
                raise ValueError(f"both {stored[name].file} and {file.name} have {name}; keep one of the files")
            offset = HEADER_SIZE_BYTES + header_size + tensor["data_offsets"][0]
            stored[name] = Stored(file, tuple(tensor["shape"]), tensor["dtype"], offset)
    return stored
