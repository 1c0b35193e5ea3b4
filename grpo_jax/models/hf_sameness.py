"""A check that all processes read the same checkpoint, though each reads only its part of it."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import jax

from grpo_jax.hosts import gather
from grpo_jax.models.hf_files import weight_files

SAMPLES = 16
"""Parts of a file of weights that are compared."""
SAMPLE_BYTES = 4096


def check_same_checkpoint(folder: Path) -> None:
    """Check that a folder has the same checkpoint on all processes.

    Files of weights are compared by their sizes and by parts spread over them, so that this costs no time: another
    checkpoint of the same shapes differs nearly everywhere. Other files are compared whole.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: a process has other files than the first one.
    """
    if jax.process_count() == 1:
        return
    (first_host, first), *others = gather((socket.gethostname(), fingerprints(folder)), "whether checkpoints differ")
    for process, (host, other) in enumerate(others, 1):
        different = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if different:
            raise ValueError(
                f"process {process} ({host}) has another checkpoint in {folder} than process 0 ({first_host}): "
                f"{', '.join(different)}; give all hosts the same files"
            )


def fingerprints(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's files by their names; of a file of weights, of its size and of parts of it.

    Args:
        folder: of the checkpoint.
    """
    weights = {path.name for path in weight_files(folder)}
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in weights or path.suffix in (".json", ".jinja", ".txt", ".model")):
            found[path.name] = _digest(path, in_parts=path.name in weights)
    return found


def _digest(path: Path, *, in_parts: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        if not in_parts:
            digest.update(file.read())
        else:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "big"))
            for part in range(SAMPLES):
                file.seek(part * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))  # the first has the header, too
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
