"""How many positions a checkpoint has, read without its weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import hf_hub_download

from grpo_jax.models.hf_files import read_json


def num_positions(name_or_folder: str | Path) -> int | None:
    """The tokens that a model has positions for, as ``max_position_embeddings`` in its ``config.json`` says.

    Args:
        name_or_folder: a folder, or a hub id.

    Returns:
        None where the configuration names none, or cannot be read (yet): loading the model says why.
    """
    folder = Path(name_or_folder).expanduser()
    path = folder / "config.json" if folder.exists() else _fetched(str(name_or_folder))
    try:
        found = None if path is None else read_json(path).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


@cache
def _fetched(name: str) -> Path | None:
    """The configuration of a model on the hub; looked for once, whether it is there or not."""
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError):
        return None
