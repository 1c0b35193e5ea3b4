"""Checks at the start of a run on several hosts: all were started alike, and all see its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import socket
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax

from grpo_jax.config.memory import memory_limit
from grpo_jax.hosts import agree, gather
from grpo_jax.jsonl import to_json
from grpo_jax.loop.run_folder import ABSENT, differences, package_versions

VISIBLE_WITHIN = 30.0
"""Seconds that a network file system may take to show a new file to other hosts."""
OF_ONE_HOST = ("address", "_cache", "_dir", "dump", "_log", "platform", "timeout", "traceback", "visible_devices")
"""Parts of names of JAX's settings that may differ between hosts, since they change no program."""


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a run as JSON, without those of a single process.

    Args:
        config: a dataclass.
    """
    return {name: value for name, value in to_json(dataclasses.asdict(config)).items() if name != "distributed"}


def check_same_start(config: Any) -> None:
    """Check that all processes have the same settings, versions, code, compiler options and devices.

    Args:
        config: the run's settings, a dataclass.

    Raises:
        ValueError: a process differs from the first; the differences are listed.
    """
    if jax.process_count() == 1:
        return
    memory_limit()  # exchanged once, and here, where all come
    devices = jax.local_devices()
    check_same(
        "was started differently from",
        {
            "settings": settings_of(config),
            "versions": {"python": sys.version.split()[0], **package_versions()},
            "code": code_digest(Path(sys.argv[0])),
            "compiler": compiler_options(),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
        },
    )


def check_same_modules() -> None:
    """Check that a user's modules, such as those of rewards, are the same on all processes that have imported them.

    Raises:
        ValueError: a process differs from the first; the modules are listed.
    """
    if jax.process_count() > 1:
        check_same("has other modules than", {"code": module_digests()}, of_both=True)


def check_same(how: str, facts: Any, *, of_both: bool = False) -> None:
    """Check that facts are the same on all processes.

    Args:
        how: verb phrase of the error between "process 1" and "process 0", such as "reads other data than".
        facts: nested dictionaries.
        of_both: whether a fact that only one of two processes has is not compared.

    Raises:
        ValueError: a process differs from the first; the differences are listed.
    """
    (first_host, first), *others = gather((socket.gethostname(), facts), f"whether a process {how} another")
    for process, (host, other) in enumerate(others, 1):
        different = differences(first, other)
        if of_both:
            different = [line for line in different if ABSENT not in line]
        if different:
            raise ValueError(f"process {process} ({host}) {how} process 0 ({first_host}):\n  " + "\n  ".join(different))


def code_digest(script: Path) -> dict[str, str]:
    """A digest of the package's code and of the script that runs.

    Args:
        script: path of the script.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    text = script.read_bytes() if script.is_file() else b""
    return {"grpo_jax": digest.hexdigest()[:12], script.name: hashlib.sha256(text).hexdigest()[:12]}


def module_digests() -> dict[str, str]:
    """A digest of each module that was imported from neither the standard library nor an installed package."""
    standard = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
    files: dict[str, Path] = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        is_installed = path.startswith(standard) or {"site-packages", "dist-packages"} & {*Path(path).parts}
        if path.endswith(".py") and not is_installed and name.partition(".")[0] not in ("grpo_jax", "__main__"):
            files[name] = Path(path)
    found = {name: path.read_bytes() if path.is_file() else b"" for name, path in files.items()}
    return {name: hashlib.sha256(text).hexdigest()[:12] for name, text in found.items()}


def compiler_options() -> dict[str, str]:
    """JAX's settings and the compiler's flags, without those that change no program."""
    options = {
        name: str(value) for name, value in jax.config.values.items() if not any(part in name for part in OF_ONE_HOST)
    }
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        flags = {flag for flag in os.environ.get(name, "").split() if not any(part in flag for part in OF_ONE_HOST)}
        options[name] = " ".join(sorted(flags))
    return options


def check_folder_is_shared(folder: Path) -> None:
    """Check that all processes see a folder, and each what the others write there.

    Args:
        folder: exists on the first process.

    Raises:
        ValueError: a process sees another folder or none, or cannot write there.
    """
    if jax.process_count() == 1:
        return
    token = agree(secrets.token_hex(4), "the name of probe files")
    own = folder / f".probe-{token}-{jax.process_index()}"
    problem = None
    try:
        own.touch()
    except OSError as error:
        problem = f"it cannot write there ({error.strerror or error})"
    gather(None, "writing probe files")
    deadline = time.monotonic() + VISIBLE_WITHIN
    wanted = [folder / f".probe-{token}-{process}" for process in range(jax.process_count())]
    while problem is None and (missing := [path.name for path in wanted if not path.exists()]):
        if time.monotonic() > deadline:
            problem = f"it does not see the file of process {missing[0].rpartition('-')[2]} there"
        time.sleep(0.1)
    problems = gather((socket.gethostname(), problem), "looking for probe files", is_long=True)
    with contextlib.suppress(OSError):  # a folder that is read-only here
        own.unlink(missing_ok=True)
    for process, (host, problem) in enumerate(problems):
        if problem is not None:
            raise ValueError(
                f"run_dir: {folder} is not a folder that all processes share: process {process} ({host}) says that "
                f"{problem}; name a folder on storage that every host mounts"
            )
