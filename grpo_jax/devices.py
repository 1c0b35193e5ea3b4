"""The devices that programs are made for: this machine's, or those of a plan, which are compiled for but not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

HOST_MEMORY = "pinned_host"
"""The host's memory that devices copy from and to by themselves."""


class Planned(NamedTuple):
    """Devices of a plan.

    Attributes:
        devices: all of them.
        memory: of each, in bytes; None if unknown.
    """

    devices: tuple[Any, ...]
    memory: int | None


_planned: ContextVar[Planned | None] = ContextVar("planned", default=None)


@contextmanager
def planning_for(devices: Sequence[Any], memory: int | None) -> Iterator[None]:
    """A context in which settings and programs are made for other devices than this machine's.

    Nothing can be computed on them: programs are lowered and compiled from shapes.

    Args:
        devices: of a topology.
        memory: of each, in bytes; None if unknown, as of a CPU.
    """
    token = _planned.set(Planned(tuple(devices), memory))
    try:
        yield
    finally:
        _planned.reset(token)


def planned() -> Planned | None:
    """The devices that are planned for; None outside of ``planning_for``."""
    return _planned.get()


def all_devices() -> list[Any]:
    """The devices of all processes, or those that are planned for."""
    plan = planned()
    return jax.devices() if plan is None else list(plan.devices)


def first_device() -> Any:
    """A device of this process, or one that is planned for."""
    plan = planned()
    return jax.local_devices()[0] if plan is None else plan.devices[0]


def platform() -> str:
    """The platform that programs are compiled for by default: ``cpu``, ``gpu`` or ``tpu``."""
    plan = planned()
    return jax.default_backend() if plan is None else plan.devices[0].platform


def device_bytes(devices: Sequence[Any]) -> int | None:
    """The memory of the smallest of some devices; None where devices do not report theirs (CPU).

    Args:
        devices: of this process.
    """
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return min(sizes) if all(sizes) else None


def check_host_memory(device: Any, setting: str, advice: str) -> None:
    """Check that a device can keep arrays in the host's memory.

    Args:
        device: one of those that compute.
        setting: what needs it, such as ``remat is offload``.
        advice: what to do without.

    Raises:
        ValueError: it has no ``HOST_MEMORY``.
    """
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if kinds and HOST_MEMORY not in kinds:  # none are known of a device that is only compiled for
        raise ValueError(
            f"{setting}, which needs {HOST_MEMORY} memory; {device.device_kind} has {', '.join(kinds)}: {advice}"
        )


def to_device(tree: Any) -> Any:
    """A tree of arrays, inside a jitted function, with those in the host's memory moved to the device's.

    Args:
        tree: any pytree of arrays.
    """

    def move(x: Array) -> Array:
        is_on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if is_on_host else x

    return jax.tree.map(move, tree)
