"""A run's folder: locked by one process, with the settings that the run was started with."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Collection, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import jax

from grpo_jax.jsonl import PART, write_atomically
from grpo_jax.loop.claim import Claim

START_DATE = "begun.txt"
CLAIM = ".claim"
ABSENT = "(absent)"
BEFORE_ANY = ("config.json", "data.json", START_DATE, ".lock", CLAIM)
"""Files that a run writes before it computes anything."""
PACKAGES = (
    "grpo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "transformers",
    "tokenizers",
    "grain",
    "orbax-checkpoint",
)


class claim_folder:  # noqa: N801 - used as a function
    """A context that locks a run's folder for this process and writes ``config.json``.

    Args:
        folder: created if it does not exist.
        settings: the run's settings as JSON.
        resumable_fields: settings that may differ from the folder's, those of nested settings with dots.

    Attributes:
        previous: settings of the last process in this folder; None if the folder has no results yet.

    Raises:
        ValueError, RuntimeError: as ``Run``.
        OSError: the folder is a file, or cannot be created or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumable_fields: Collection[str]):
        self.previous: dict[str, Any] | None = None
        known = folder / "config.json"
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"run_dir: {folder} is a file; name a folder")
        if not known.exists() and folder.exists() and not all(map(_is_of_a_start, folder.iterdir())):
            raise ValueError(f"run_dir: {folder} is not empty and holds no run (no config.json); choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise OSError(f"run_dir: {folder} cannot be written: {error.strerror or error}") from error
        try:
            self._claim = _lock_or_claim(self._lock, folder)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._describe(folder, settings, resumable_fields)
        except BaseException:
            self.__exit__()
            raise

    def _describe(self, folder: Path, settings: Mapping[str, Any], resumable_fields: Collection[str]) -> None:
        known, start_date = folder / "config.json", folder / START_DATE
        if known.exists() and has_results(folder):
            self.previous = read_settings(known)
            different = differences(self.previous, settings, resumable_fields)
            if different:
                raise ValueError(
                    f"{folder} holds a run with another configuration; choose another folder, remove this one, or "
                    "run with what it was started with:\n  " + "\n  ".join(different)
                )
        if not start_date.exists() or not has_results(folder):
            write_atomically(start_date, f"{date.today().isoformat()}\n".encode())
        write_atomically(known, json.dumps(settings, indent=2).encode() + b"\n")

    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None:
        if self._claim is not None:
            self._claim.close()
        self._lock.close()


def _lock_or_claim(lock: IO[str], folder: Path) -> Claim | None:
    """Lock a file, or claim its folder where the file system cannot lock.

    Raises:
        RuntimeError: another process has it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another process is running in {folder}; wait for it or choose another folder") from error
    except OSError:  # a network file system without locks, such as Lustre without the option flock
        return Claim(folder / CLAIM)
    return None


def _is_of_a_start(path: Path) -> bool:
    """Whether a file may be all that a process leaves which is killed before it has written ``config.json``."""
    return path.name in BEFORE_ANY or (path.name.startswith(".") and path.name.endswith(PART))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's ``config.json``, or another JSON object in its folder.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object; restore it, or choose another run_dir")
    return settings


def read_start_date(path: Path) -> str:
    """The date in ``begun.txt``, such as "2026-11-27".

    Raises:
        ValueError: it is not a date.
    """
    try:
        return date.fromisoformat(path.read_text().strip()).isoformat()
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: it is not a date such as 2026-11-27, which prompts may contain; write the day on "
            "which the run was started, or choose another run_dir"
        ) from error


def has_results(folder: Path) -> bool:
    """Whether a run's folder holds results; until then the run may be restarted with other settings."""
    files = [path for path in folder.rglob("*") if path.is_file() and not _is_of_a_start(path)]
    return any(path.stat().st_size for path in files)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], resumable_fields: Collection[str] = ()) -> list[str]:
    """The settings that differ, as lines ``name: old -> new``.

    Args:
        old: nested settings.
        new: nested settings.
        resumable_fields: names to ignore, those of nested settings with dots.
    """
    old, new = _flatten(old, resumable_fields), _flatten(new, resumable_fields)
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{n}: {old.get(n, ABSENT)!r} -> {new.get(n, ABSENT)!r}"
        for n in names
        if old.get(n, ABSENT) != new.get(n, ABSENT)
    ]


def _flatten(settings: Mapping[str, Any], without: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat dict with dotted names, except those in ``without``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        dotted = f"{prefix}{name}"
        if dotted not in without:
            flat |= _flatten(value, without, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_summary() -> str:
    """Number and kind of the devices, such as ``8 x cpu``."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
