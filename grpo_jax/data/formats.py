"""Read the rows of one file: JSON, JSON lines, CSV, parquet or arrow, compressed or not."""

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
"""Names of the array of rows in a JSON file that contains one object."""


# Single files ---------------------------------------------------------------------------------------------------------


def _jsonl_rows(path: Path, refuse: Refuse) -> Rows:
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                refuse(f"{where} is longer than {MAX_LINE_BYTES:,} bytes, the maximum of a line")
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
                hint = "; rename a file with one array to .json" if isinstance(row, list) and number == 1 else ""
                refuse(f"{where} must be a JSON object; it is a {type(row).__name__}{hint}")


def _json_rows(path: Path, refuse: Refuse) -> Rows:
    """The rows of a file with an array of objects, an object with one such array, or JSON lines."""
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
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is neither a JSON array nor JSON lines: {error!s:.200}") from error
    rows = content if isinstance(content, list) else _only_array(content)
    if rows is None:
        kind = f"an object with {_cut([*content])}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{path} must contain an array of objects, an object with one such array, or an object on each line; it is "
            f"{kind}"
        )
    for number, each in enumerate(rows, 1):
        if isinstance(each, dict):
            yield f"{path} row {number}", each
        else:
            refuse(f"{path} row {number} must be a JSON object; it is a {type(each).__name__}")


def _only_array(content: Any) -> list[Any] | None:
    """The array of rows in an object such as ``{"version": 1, "data": [...]}``; None unless there is exactly one."""
    is_object = isinstance(content, dict)
    arrays = [content[name] for name in WRAPPERS if isinstance(content.get(name), list)] if is_object else []
    return arrays[0] if len(arrays) == 1 else None


def _table_rows(path: Path, refuse: Refuse) -> Rows:
    """The rows of a CSV or TSV file with a header; all values are text."""
    csv.field_size_limit(2**31 - 1)
    start = 1
    with _opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            delimiter = "\t" if _bare(path).suffix == ".tsv" else ";" if ";" in first and "," not in first else ","
            header = next(csv.reader([first], delimiter=delimiter), [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise ValueError(f"{path}: the header has the columns {_cut(repeated)} more than once")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            start = 2
            for values in reader:
                where, start = f"{path}:{start}", reader.line_num + 2
                if len(values) == len(header):
                    yield where, dict(zip(header, values, strict=True))
                elif values:
                    refuse(f"{where} has {len(values)} fields; the header has {len(header)}")
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
        raise ValueError(f"{path} is not a readable parquet file: {error!s:.200}") from error


def _arrow_rows(path: Path, _refuse: Refuse) -> Rows:
    import datasets
    import pyarrow

    try:
        dataset = datasets.Dataset.from_file(str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable Arrow file: {error!s:.200}") from error
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

    # readline needs a buffer, and PythonFile.read has none.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # pyright: ignore[reportArgumentType]


def _file_rows(path: Path, refuse: Refuse) -> Rows:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (looked for in {Path.cwd()})")
    read = _format(path)
    if read is None:
        raise ValueError(
            f"{path} has the unknown suffix {''.join(path.suffixes[-2:])!r}; known are {[*FORMATS]}, for text formats "
            f"optionally followed by one of {[*COMPRESSIONS]}"
        )
    return _checked(read(path, refuse), path)


def _cut(names: list[str], most: int = 20) -> str:
    """The first ``most`` names as text, and how many more there are."""
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _checked(rows: Rows, path: Path) -> Rows:
    try:
        yield from rows
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error!s:.200}") from error
