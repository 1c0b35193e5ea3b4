"""Rows of files, folders and data sets on the Hugging Face hub, each with the place it was read from."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]
Refuse = Callable[[str], None]

MAX_LINE_BYTES = 256 * 2**20
"""The longest line of a JSON-lines file, in bytes."""
WRAPPERS = ("data", "rows", "examples", "instances", "train")
"""Names of the array of rows in a JSON file that is one object."""
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def read_rows(
    source: str, split: str | None = None, subset: str | None = None, *, skipped: list[str] | None = None
) -> Rows:
    """The rows of a source, each after its place in words, such as ``data.jsonl:3``.

    Args:
        source: a file in one of ``FORMATS``, compressed or not; a folder of them, in the layout of the hub or with one
            file or folder for each split; a data set that was written by ``save_to_disk``; or the id of a data set on
            the hub. A source that exists locally comes first.
        split: the split of a folder or of a data set on the hub, by default "train".
        subset: the configuration of a folder or of a data set on the hub.
        skipped: where given, rows that cannot be read are left out and the reasons are appended to it.

    Raises:
        FileNotFoundError: the file, folder, split or data set does not exist.
        ValueError: the format is unknown, a file or row is damaged, or a split or subset is named for a single file.
    """

    def refuse(message: str) -> None:
        if skipped is None:
            raise ValueError(message)
        skipped.append(message)

    path = Path(source)
    if not path.exists() and not is_file(source):
        return _hub_rows(source, split or "train", subset)
    if path.is_dir():
        return _folder_rows(path, split or "train", subset, refuse)
    for name, value in (("subset", subset), ("split", split)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} was asked for, but {source} is a single file: name the file of that {name} alone, "
                "or a folder with its splits"
            )
    return _file_rows(path, refuse)


def is_file(source: str) -> bool:
    """Whether a source is a single file, by what exists or else by its name."""
    return Path(source).is_file() or (not Path(source).is_dir() and _format(Path(source)) is not None)


def split_names(source: str, subset: str | None = None) -> list[str]:
    """The splits of a folder or of a data set on the hub; none for a single file.

    A data set on the hub that cannot be asked for them is taken to have "train" and "test".

    Raises:
        FileNotFoundError: the folder holds no data.
        ValueError: as ``read_rows``.
    """
    path = Path(source)
    if is_file(source):
        return []
    if not path.is_dir():
        import datasets

        try:
            return [str(name) for name in datasets.get_dataset_split_names(source, _hub_subset(source, subset))]
        except (FileNotFoundError, ConnectionError, ValueError):
            return ["train", "test"]  # what is not there is found when it is read
    if (path / "dataset_dict.json").is_file():
        return json.loads((path / "dataset_dict.json").read_text())["splits"]
    return [] if (path / "state.json").is_file() else [*_split_files(path, subset)]


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


def _whole(rows: Rows, path: Path) -> Rows:
    try:
        yield from rows
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error!s:.200}") from error


# Folders --------------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path, split: str, subset: str | None, refuse: Refuse) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split, subset)
    splits = _split_files(folder, subset)
    if split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}; it has {_cut([*splits])}")
    return (row for path in splits[split] for row in _file_rows(path, refuse))


def _saved_rows(folder: Path, split: str, subset: str | None) -> Rows:
    """Rows of a data set that ``save_to_disk`` wrote."""
    import datasets

    if subset is not None:
        raise ValueError(f"subset={subset!r} was asked for, but {folder} was written by save_to_disk and has none")
    dataset = datasets.load_from_disk(folder)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise FileNotFoundError(f"{folder} has no split {split!r}; it has {_cut([*map(str, dataset)])}")
        dataset = dataset[split]
    elif split != "train":
        raise FileNotFoundError(f"{folder} was written by save_to_disk with one split; leave split out")
    return _dataset_rows(dataset, f"{folder} ({split})" if split != "train" else str(folder))


def _split_files(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """The files of each split of a folder.

    Files named after a split in the folder itself come first; otherwise the folder is read as ``datasets`` would: by
    the configurations in its README.md, or by the names of files and folders.
    """
    snapshot = folder / "snapshots"
    if snapshot.is_dir() and (folder / "refs" / "main").is_file():  # the cache of the hub
        folder = snapshot / (folder / "refs" / "main").read_text().strip()
    configurations = _configurations(folder)
    if subset is not None and subset not in configurations:
        if not (folder / subset).is_dir():
            here = sorted(configurations or (each.name for each in folder.iterdir() if each.is_dir()))
            raise ValueError(f"subset={subset!r} was asked for, but {folder} has {_cut(here) if here else 'none'}")
        return _split_files(folder / subset, None)
    if configurations:
        names = [*configurations]
        chosen = subset or (names[0] if len(names) == 1 else next((n for n in ("default", "main") if n in names), None))
        if chosen is None:
            raise ValueError(f"{folder} has several subsets; choose one: subset= one of {_cut(names)}")
        return configurations[chosen]
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and _format(path) and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    files = [path for path in files if path.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
    if not files:
        present = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} holds no data file ({', '.join(FORMATS)}), but {_cut(present)}")
    return _by_split(folder, files)


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        split = next((name for name in (_split_of(part) for part in reversed(parts)) if name), None)
        if split is not None:
            found.setdefault(split, []).append(path)
    found = found or {"train": files}
    for split, paths in found.items():
        own = [path for path in paths if path.parent == folder and _bare(path).stem == split]
        paths = own or paths
        # A shard's name twice, or a split in two formats, are two versions of the same rows or two subsets.
        clashing = [path for path in paths if sum(path.name == other.name for other in paths) > 1]
        if len({_bare(path).suffix for path in paths}) > 1:
            clashing = paths
        if clashing:
            names = _cut([str(path.relative_to(folder)) for path in clashing])
            raise ValueError(
                f"{folder}: the split {split} could be several: {names}; name one of these files, or a subset= that is "
                "the folder of one"
            )
        found[split] = paths
    return found


def _split_of(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for split, spelled in SPLIT_WORDS.items() if any(word in spelled for word in words)), None)


def _configurations(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of each split of each configuration that a data set's README.md lists."""
    card = folder / "README.md"
    match = re.match(r"---\s*\n(.*?\n)---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    if match is None:
        return {}
    import yaml

    try:
        listed = (yaml.safe_load(match[1]) or {}).get("configs") or []
        return {
            each.get("config_name", "default"): {
                split: [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
                for split, patterns in _patterns(each["data_files"])
            }
            for each in listed
            if "data_files" in each
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{card}: its configs cannot be read: {error!s:.200}") from error


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Splits and their patterns, as a card gives them: a pattern, a list, or a list with a split and path each."""
    if isinstance(data_files, str) or all(isinstance(each, str) for each in data_files):
        data_files = [{"split": "train", "path": data_files}]
    for each in data_files:
        yield each["split"], [each["path"]] if isinstance(each["path"], str) else each["path"]


# The hub --------------------------------------------------------------------------------------------------------------


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a file or folder in {Path.cwd()} nor a data set that the hub would give: "
            f"{error!s:.500}"
        ) from error


def _hub_rows(source: str, split: str, subset: str | None) -> Rows:
    import datasets

    with _hub_errors(source):
        subset = _hub_subset(source, subset)
        dataset = datasets.load_dataset(source, subset, split=split)
    yield from _dataset_rows(dataset, f"{source} ({subset}, {split})")


def _hub_subset(source: str, subset: str | None) -> str:
    import datasets

    subset = subset or datasets.get_dataset_default_config_name(source)
    if subset:
        return subset
    names = datasets.get_dataset_config_names(source)
    if "main" not in names:
        raise ValueError(f"{source} has no default subset; choose one: subset= one of {_cut(names)}")
    return "main"


def _cut(names: list[str], most: int = 20) -> str:
    """A list of names as text, the first ``most`` of them."""
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")
