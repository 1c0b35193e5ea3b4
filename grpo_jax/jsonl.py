"""Logs that survive a kill: files with one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""What is logged at one step: names to numbers (or text), ``step`` among them."""


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace the file at ``path`` by ``data``: whoever reads it, or a kill, sees the old or the new file, whole.

    Args:
        path: the file.
        data: what it is to hold; in parts, of which one is in memory at a time, if that is much.
    """
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def to_json(value: Any) -> Any:
    """``value`` in JSON's own types: arrays as lists, array scalars as numbers, NaN and infinities as None.

    Raises:
        TypeError: for anything JSON has no word for; the message names its type.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [to_json(item) for item in value]
        case Path():
            return str(value)
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError(f"cannot write a {type(value).__name__} as JSON; use numbers, text, lists, mappings or arrays")
    return to_json(array.tolist())


STEP_FIRST = re.compile(rb'\{"step": (-?\d+)[,}].*(?<=\})\s*$', re.DOTALL)
"""A row whose first key is its step, which need not be parsed to know it."""


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline of a file; of the file itself only its end is read."""
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected one JSON object, found {line[:80]!r}")
    return row


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a torn last line (one that no newline ends) is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    lines = _whole_lines(Path(path).read_bytes()).split(b"\n")[:-1]
    return [_parse(Path(path), number, line) for number, line in enumerate(lines, 1)]


class JsonlLog:
    """A file with one JSON object a line, appended to as a run goes on.

    Every ``append`` reaches the operating system before it returns, so a killed process loses at most the line it was
    writing. What a kill tore is removed when the file is opened again. No file handle stays open in between.

    Args:
        path: the file; it and its folder are made where they do not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        _cut_torn_line(self.path)

    def append(self, *rows: Row) -> None:
        """Add rows, all of them in one write.

        Args:
            rows: mappings with an integer ``step``; numbers may be Python's, NumPy's or JAX's. NaN and infinities,
                which JSON lacks, are written as null.

        Raises:
            ValueError: a row has no integer ``step``; nothing is written.
            TypeError: a value that JSON has no word for; nothing is written.
        """
        text = "".join(json.dumps(self._stepped(row), ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            # A lone surrogate has no UTF-8; its backslash form is JSON's own way to write it.
            file.write(text.encode("utf-8", "backslashreplace"))

    def rewind(self, step: int) -> int:
        """Drop the rows of steps after ``step``, so that a run resumed there continues its file as if never stopped.

        The lines that stay keep their bytes, and the file is replaced in one move.

        Returns:
            How many rows were dropped.

        Raises:
            ValueError: a line is not a JSON object with a ``step``; the message names the file and the line.
        """
        # Twice through the file, a line in memory at a time: completions of every step may be gigabytes.
        dropped = sum(self._step(number, line) > step for number, line in self._lines())
        if dropped:
            write_atomically(self.path, (line for number, line in self._lines() if self._step(number, line) <= step))
        return dropped

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n"))

    def _stepped(self, row: Row) -> dict[str, Any]:
        step = to_json(row.get("step"))
        if not isinstance(step, int | float) or int(step) != step:
            raise ValueError(f"a row for {self.path} needs an integer 'step', not {step!r}; its keys are {sorted(row)}")
        return {**to_json(row), "step": int(step)}

    def _step(self, number: int, line: bytes) -> int:
        if found := STEP_FIRST.match(line):
            return int(found[1])
        row = _parse(self.path, number, line)
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{self.path}, line {number}: expected an integer 'step' among {sorted(row)}")
        return row["step"]
