"""The configuration of a checkpoint, its sizes and number of positions, read without weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.hf_config import from_hf_config
from grpo_jax.models.hf_files import read_json
from grpo_jax.models.hf_text import text_config


def num_positions(name_or_folder: str | Path) -> int | None:
    """``max_position_embeddings`` in the ``config.json`` of a checkpoint, in tokens.

    Args:
        name_or_folder: a folder, or a hub id.

    Returns:
        None if the configuration has no such field or cannot be read; ``from_pretrained`` raises with the reason.
    """
    value = (read_hf_config(name_or_folder) or {}).get("max_position_embeddings")
    return value if isinstance(value, int) and value > 0 else None


def read_decoder_config(name_or_folder: str | Path) -> DecoderConfig | None:
    """The sizes of a checkpoint.

    Args:
        name_or_folder: a folder, or a hub id.

    Returns:
        None if the configuration cannot be read or is not supported; ``from_pretrained`` raises with the reason.
    """
    hf_config = read_hf_config(name_or_folder)
    try:
        return None if hf_config is None else from_hf_config(hf_config)
    except ValueError:
        return None


def read_hf_config(name_or_folder: str | Path) -> dict[str, Any] | None:
    """The ``config.json`` of a checkpoint, of its text model if it is multimodal; None if it cannot be read.

    Args:
        name_or_folder: a folder, or a hub id.
    """
    folder = Path(name_or_folder).expanduser()
    path = folder / "config.json" if folder.exists() else _fetched(str(name_or_folder))
    try:
        contents = None if path is None else read_json(path)
    except (OSError, ValueError):
        return None
    return text_config(contents) if isinstance(contents, dict) else None


@cache
def _fetched(name: str) -> Path | None:
    """The configuration of a model on the hub, or None; cached in both cases."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError):
        return None
