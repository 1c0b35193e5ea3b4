"""Rows of a file in one of the formats that data sets come in."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
Refuse = Callable[[str], None]
MAX_LINE_BYTES = 256 * 2**20
"""The longest line of a JSON-lines file, in bytes."""
WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Names of the array of rows in a JSON file that is one object."""


# Single files ---------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, refuse: Refuse) -> Rows:
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                refuse(f"{where} is longer than {MAX_LINE_BYTES:,} bytes, the longest line that is read")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                is_empty = not line.strip()
                problem = "is an empty line; each must be a JSON object" if is_empty else f"is not JSON: {error!s:.200}"
                refuse(f"{where} {problem}")
                continue
            if isinstance(row, dict):
                yield where, row
            else:
                hint = "; name a file that is one array .json" if isinstance(row, list) and number == 1 else ""
                refuse(f"{where} must be a JSON object, and is a {type(row).__name__}{hint}")


def _json_rows(path: Path, refuse: Refuse) -> Rows:
    """Rows of a file that is an array of objects, an object around one such array, or JSON lines."""
    with _opened(path) as file:
        first = file.readline(MAX_LINE_BYTES).removeprefix(b"\xef\xbb\xbf")
        while first and not first.strip():
            first = file.readline(MAX_LINE_BYTES)
        rest = file.read(1)
    try:
        row = json.loads(first) if first.lstrip().startswith(b"{") else None
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and (rest.strip() or _only_array(row) is None):
        yield from _jsonl_rows(path, refuse)
        return
    with _opened(path) as file:
        try:
            whole = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is neither a JSON array nor JSON lines: {error!s:.200}") from error
    rows = whole if isinstance(whole, list) else _only_array(whole)
    if rows is None:
        has = f"an object with {_cut([*whole])}" if isinstance(whole, dict) else f"a {type(whole).__name__}"
        raise ValueError(
            f"{path} must hold an array of objects, an object with one such array, or an object on each line; it is "
            f"{has}"
        )
    for number, each in enumerate(rows, 1):
        if isinstance(each, dict):
            yield f"{path} row {number}", each
        else:
            refuse(f"{path} row {number} must be a JSON object, and is a {type(each).__name__}")


def _only_array(whole: Any) -> list[Any] | None:
    """The rows of an object that is a wrapper around them, such as ``{"version": 1, "data": [...]}``."""
    arrays = [whole[name] for name in WRAPPERS if isinstance(whole.get(name), list)] if isinstance(whole, dict) else []
    return arrays[0] if len(arrays) == 1 else None


def _table_rows(path: Path, refuse: Refuse) -> Rows:
    """Rows of a CSV or TSV file with a header; every value is text."""
    csv.field_size_limit(2**31 - 1)
    start = 1
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            delimiter = "\t" if _bare(path).suffix == ".tsv" else ";" if ";" in first and "," not in first else ","
            header = next(csv.reader([first], delimiter=delimiter), [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise ValueError(f"{path}: the header has the columns {_cut(twice)} more than once")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            start = 2
            for values in reader:
                where, start = f"{path}:{start}", reader.line_num + 2
                if len(values) == len(header):
                    yield where, dict(zip(header, values, strict=True))
                elif values:
                    refuse(f"{where} has {len(values)} fields, and the header has {len(header)}")
        except csv.Error as error:
            raise ValueError(f"{path}:{start} is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error


def _parquet_rows(path: Path, _refuse: Refuse) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error!s:.200}") from error


def _arrow_rows(path: Path, _refuse: Refuse) -> Rows:
    import datasets
    import pyarrow

    try:
        dataset = datasets.Dataset.from_file(str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not an Arrow file that can be read: {error!s:.200}") from error
    yield from _dataset_rows(dataset, str(path))


def _dataset_rows(dataset: Any, name: str) -> Rows:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", dict(row)


FORMATS: dict[str, Callable[[Path, Refuse], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: _zstd(path),
}


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path


def _format(path: Path) -> Callable[[Path, Refuse], Rows] | None:
    suffix = _bare(path).suffix.lower()
    is_compressed = path.suffix in COMPRESSIONS
    return None if is_compressed and suffix in (".parquet", ".arrow") else FORMATS.get(suffix)


def _opened(path: Path) -> Any:
    return COMPRESSIONS.get(path.suffix, lambda file: file.open("rb"))(path)


def _zstd(path: Path) -> Any:
    import pyarrow

    # PythonFile's own read is not buffered, and readline needs a buffer.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # pyright: ignore[reportArgumentType]


def _file_rows(path: Path, refuse: Refuse) -> Rows:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (looked for in {Path.cwd()})")
    read = _format(path)
    if read is None:
        raise ValueError(
            f"{path} ends in {''.join(path.suffixes[-2:])!r}; files that can be read end in one of {[*FORMATS]}, and "
            f"those that are text also with one of {[*COMPRESSIONS]} after it"
        )
    return _whole(read(path, refuse), path)


def _cut(names: list[str], most: int = 20) -> str:
    """A list of names as text, the first ``most`` of them."""
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _whole(rows: Rows, path: Path) -> Rows:
    try:
        yield from rows
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error!s:.200}") from error
