"""Read the rows of data sets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_jax.data.formats import Rows, _cut, _dataset_rows


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a file or folder in {Path.cwd()} nor an accessible data set on the hub: "
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
        raise ValueError(f"{source} has no default subset; set subset to one of {_cut(names)}")
    return "main"
