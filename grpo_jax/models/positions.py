"""The number of positions of a checkpoint, read without its weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from grpo_jax.models.hf_files import read_json


def num_positions(name_or_folder: str | Path) -> int | None:
    """``max_position_embeddings`` in the ``config.json`` of a checkpoint, in tokens.

    Args:
        name_or_folder: a folder, or a hub id.

    Returns:
        None if the configuration has no such field or cannot be read; ``from_pretrained`` raises with the reason.
    """
    folder = Path(name_or_folder).expanduser()
    path = folder / "config.json" if folder.exists() else _fetched(str(name_or_folder))
    try:
        value = None if path is None else read_json(path).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) and value > 0 else None


@cache
def _fetched(name: str) -> Path | None:
    """The configuration of a model on the hub, or None; cached in both cases."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError):
        return None
