"""JAX's persistent compilation cache; callbacks and counts of compilations."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax


def enable_compilation_cache() -> None:
    """Enable JAX's persistent compilation cache in ``~/.cache/grpo_jax``, or in JAX_COMPILATION_CACHE_DIR.

    Each kind of processor has its own folder: programs compiled for other instructions (AVX-512, say) may not run.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "grpo_jax" / processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The instruction set and a digest of the processor's model and features.

    Not the host's name: machines of a cluster share a home, and names are reused.

    Args:
        cpuinfo: Linux's description of the processor; where it is missing, Python's ``platform`` is used.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    described = "\n".join(sorted(features)) or f"{platform.processor()} {platform.node()}"
    return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


_shows_compilations: list[Callable[[str | None], None]] = []


@contextmanager
def reporting_compilations(show: Callable[[str | None], None]) -> Iterator[None]:
    """A context in which ``show`` is called with a program's name as its compilation begins, and with None after it."""
    _listen_to_compilations()
    _shows_compilations.append(show)
    try:
        yield
    finally:
        _shows_compilations.remove(show)


@cache
def _listen_to_compilations() -> None:
    """Register the listener once: jax has no public way to remove one."""

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # lowering is done, compiling comes next
            name = str(about.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
        elif event == "/jax/core/compile/backend_compile_duration":
            name = None
        else:
            return
        for show in _shows_compilations[-1:]:
            show(name)

    jax.monitoring.register_event_duration_secs_listener(listen)


def count_compilations() -> Callable[[], int]:
    """A function that returns the number of programs compiled since this call, without cache hits."""
    compiled = 0

    def listen_for_requests(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    def listen_for_hits(event: str, **_: Any) -> None:
        nonlocal compiled
        compiled -= event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(listen_for_requests)
    jax.monitoring.register_event_listener(listen_for_hits)
    return lambda: compiled
