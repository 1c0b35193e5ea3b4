"""Crash-safe JSON lines: logs that a killed process leaves readable."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""A log row: values by name, including ``step``."""
PART = ".part"
"""End of the name of a file that is being written, which begins with a dot."""


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file atomically: a reader or a crash sees the complete old file or the complete new one.

    Args:
        path: the file.
        data: the new content, as a whole or in chunks (of which one is in memory at a time).

    Raises:
        OSError: it cannot be written, and says so with the name of the file, which is unchanged.
    """
    part = path.with_name(f".{path.name}{PART}")
    try:
        with part.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # it takes space on a disk that is full
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def to_json(value: Any) -> Any:
    """``value`` as JSON types: arrays as lists, array scalars as numbers, paths as text, NaN and infinities as None.

    Raises:
        TypeError: ``value`` has no JSON equivalent.
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
"""A row whose first key is its step, which can be read without parsing the row."""


PLAIN = {str, int, bool, float, type(None)}
_encode_plain = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def to_line(row: Row) -> bytes:
    """A row as a line of a log. NaN and infinities are written as null.

    Raises:
        ValueError: it has no integer ``step``.
        TypeError: a value has no JSON equivalent.
    """
    step = to_json(row.get("step"))
    if not isinstance(step, int | float) or int(step) != step:
        raise ValueError(f"a row of a log needs an integer 'step', not {step!r}; its keys are {sorted(row)}")
    if {*map(type, row.values())} <= PLAIN and type(step) is int:  # not visited one by one
        with contextlib.suppress(ValueError):  # a number that is not finite
            return _as_bytes(_encode_plain(dict(row)))
    return _as_bytes(json.dumps({**to_json(row), "step": int(step)}, ensure_ascii=False))


def _as_bytes(text: str) -> bytes:
    # A lone surrogate cannot be encoded as UTF-8; JSON writes it as a backslash escape.
    return (text + "\n").encode("utf-8", "backslashreplace")


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline of a file. Reads the file from its end."""
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
    """The rows of a JSON-lines file; an incomplete last line (without a newline) is ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object; the message names file and line.
    """
    lines = _whole_lines(Path(path).read_bytes()).split(b"\n")[:-1]
    return [_parse(Path(path), number, line) for number, line in enumerate(lines, 1)]


class JsonlLog:
    """An append-only log with one JSON object per line.

    ``append`` hands its rows to the operating system before it returns, so that a killed process loses at most the line
    it was writing. Opening the log removes an incomplete last line. No file handle stays open between calls.

    Args:
        path: the file, which is created with its folder if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        _cut_torn_line(self.path)

    def append(self, *rows: Row) -> None:
        """Append rows in one write.

        Args:
            rows: mappings with an integer ``step``; numbers may be Python's, NumPy's or JAX's. NaN and infinities are
                written as null.

        Raises:
            ValueError: a row has no integer ``step``; nothing is written.
            TypeError: a value has no JSON equivalent; nothing is written.
            OSError: it cannot be written, such as on a full disk; the error names the file, and no part of a row
                stays in it.
        """
        self.append_lines([to_line(row) for row in rows])

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """Append rows that ``to_line`` has encoded, in one write.

        Args:
            lines: of ``to_line``.

        Raises:
            OSError: as ``append``.
        """
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            with contextlib.suppress(OSError):
                _cut_torn_line(self.path)
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error

    def rewind(self, step: int) -> int:
        """Remove the rows after ``step``, for a run that resumes from there.

        The file is replaced atomically, and the remaining lines are unchanged to the byte.

        Returns:
            Number of removed rows.

        Raises:
            ValueError: a line is not a JSON object with a ``step``; the message names file and line.
        """
        # Two passes with one line in memory: the completions of all steps may take gigabytes.
        dropped = sum(self._step(number, line) > step for number, line in self._lines())
        if dropped:
            write_atomically(self.path, (line for number, line in self._lines() if self._step(number, line) <= step))
        return dropped

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n"))

    def _step(self, number: int, line: bytes) -> int:
        if found := STEP_FIRST.match(line):
            return int(found[1])
        row = _parse(self.path, number, line)
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{self.path}, line {number}: expected an integer 'step' among {sorted(row)}")
        return row["step"]


class NoLog:
    """In place of a ``JsonlLog`` on a process that writes none.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, *rows: Row) -> None:
        """Do nothing."""

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """Do nothing."""

    def rewind(self, step: int) -> int:
        """Do nothing."""
        return 0
