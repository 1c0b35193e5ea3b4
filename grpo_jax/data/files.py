"""Read the rows of local files, folders and data sets on the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.data.formats import FORMATS, Refuse, Rows, _bare, _cut, _dataset_rows, _file_rows, _format
from grpo_jax.data.hub import _hub_rows, _hub_subset

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def read_rows(
    source: str, split: str | None = None, subset: str | None = None, *, skipped: list[str] | None = None
) -> Rows:
    """Read the rows of a data source, as pairs ``(where, row)`` with a location such as ``data.jsonl:3``.

    Args:
        source: a file in one of ``FORMATS``, compressed or not; a folder of them, in the layout of the hub or with one
            file or folder for each split; a data set written by ``save_to_disk``; or the id of a data set on the hub.
            Local paths take precedence.
        split: split of a folder or data set, by default "train".
        subset: configuration of a folder or data set.
        skipped: if given, unreadable rows are skipped and the reasons appended to it.

    Raises:
        FileNotFoundError: the file, folder, split or data set does not exist.
        ValueError: the format is unknown, a file or row is damaged, or a split or subset is given for a single file.
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
                f"{name}={value!r} is set, but {source} is a single file: name the file of that {name}, or a folder "
                "with its splits"
            )
    return _file_rows(path, refuse)


def is_file(source: str) -> bool:
    """Whether ``source`` is an existing file, or else has the name of one and is not a folder."""
    return Path(source).is_file() or (not Path(source).is_dir() and _format(Path(source)) is not None)


def split_names(source: str, subset: str | None = None) -> list[str]:
    """The splits of a folder or of a data set on the hub; none for a single file.

    If the hub does not list the splits, "train" and "test" are assumed.

    Args:
        source: path of a file or folder, or id of a data set on the hub.
        subset: configuration of the folder or data set.

    Raises:
        FileNotFoundError: the folder contains no data.
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
            return ["train", "test"]  # reading a missing split is an error
    if (path / "dataset_dict.json").is_file():
        return json.loads((path / "dataset_dict.json").read_text())["splits"]
    return [] if (path / "state.json").is_file() else [*_split_files(path, subset)]


# Folders --------------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path, split: str, subset: str | None, refuse: Refuse) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_rows(folder, split, subset)
    splits = _split_files(folder, subset)
    if split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}; it has {_cut([*splits])}")
    return (row for path in splits[split] for row in _file_rows(path, refuse))


def _saved_rows(folder: Path, split: str, subset: str | None) -> Rows:
    """The rows of a data set written by ``save_to_disk``."""
    import datasets

    if subset is not None:
        raise ValueError(f"subset={subset!r} is set, but {folder} was written by save_to_disk, without subsets")
    dataset = datasets.load_from_disk(folder)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise FileNotFoundError(f"{folder} has no split {split!r}; it has {_cut([*map(str, dataset)])}")
        dataset = dataset[split]
    elif split != "train":
        raise FileNotFoundError(f"{folder} was written by save_to_disk with a single split; do not set split")
    return _dataset_rows(dataset, f"{folder} ({split})" if split != "train" else str(folder))


def _split_files(folder: Path, subset: str | None) -> dict[str, list[Path]]:
    """The files of each split of a folder.

    Found by the configurations in its README.md, as ``datasets`` does, or else by the names of files and folders.
    """
    snapshot = folder / "snapshots"
    if snapshot.is_dir() and (folder / "refs" / "main").is_file():  # the cache of the hub
        folder = snapshot / (folder / "refs" / "main").read_text().strip()
    configurations = _configurations(folder)
    if subset is not None and subset not in configurations:
        if not (folder / subset).is_dir():
            here = sorted(configurations or (each.name for each in folder.iterdir() if each.is_dir()))
            raise ValueError(f"subset={subset!r} is set, but {folder} has {_cut(here) if here else 'no subsets'}")
        return _split_files(folder / subset, None)
    if configurations:
        names = [*configurations]
        chosen = subset or (names[0] if len(names) == 1 else next((n for n in ("default", "main") if n in names), None))
        if chosen is None:
            raise ValueError(f"{folder} has several subsets; set subset to one of {_cut(names)}")
        return configurations[chosen]
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and _format(path) and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    files = [path for path in files if path.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
    if not files:
        present = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} has no data file ({', '.join(FORMATS)}), only {_cut(present)}")
    return _by_split(folder, files)


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        split = next((name for name in (_split_of(part) for part in reversed(parts)) if name), None)
        if split is not None:
            splits.setdefault(split, []).append(path)
    splits = splits or {"train": files}
    for split, paths in splits.items():
        # A file named after the split in the folder itself takes precedence.
        paths = [path for path in paths if path.parent == folder and _bare(path).stem == split] or paths
        # Files of equal names, or in two formats, are two versions of the same rows or two subsets.
        clashing = [path for path in paths if sum(path.name == other.name for other in paths) > 1]
        if len({_bare(path).suffix for path in paths}) > 1:
            clashing = paths
        if clashing:
            names = _cut([str(path.relative_to(folder)) for path in clashing])
            raise ValueError(
                f"{folder}: several files could be the split {split}: {names}; name one of them, or set subset to the "
                "folder of one"
            )
        splits[split] = paths
    return splits


def _split_of(name: str) -> str | None:
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((split for split, spelled in SPLIT_WORDS.items() if any(word in spelled for word in words)), None)


def _configurations(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of each split of each configuration in a data set's README.md."""
    card = folder / "README.md"
    match = re.match(r"---\s*\n(.*?\n)---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    if match is None:
        return {}
    import yaml

    try:
        configurations = (yaml.safe_load(match[1]) or {}).get("configs") or []
        return {
            each.get("config_name", "default"): {
                split: [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
                for split, patterns in _patterns(each["data_files"])
            }
            for each in configurations
            if "data_files" in each
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{card}: its configs cannot be read: {error!s:.200}") from error


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Splits with their file patterns, from a pattern, a list of them, or a list of objects with split and path."""
    if isinstance(data_files, str) or all(isinstance(each, str) for each in data_files):
        data_files = [{"split": "train", "path": data_files}]
    for each in data_files:
        yield each["split"], [each["path"]] if isinstance(each["path"], str) else each["path"]
