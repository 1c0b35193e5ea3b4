"""Processes seen from outside, by ``/proc``: what descends from one, and the memory it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

INODE_BYTES = 2048
"""A bound on what the kernel keeps for an empty file: its inode, its directory entry and a name of any length."""


def descendants(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for child in children(pid):
        yield from descendants(child)


def children(pid: int) -> list[int]:
    """The processes that a process started or was left with; none for one that is gone."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []


def memory_of(pid: int) -> int:
    """Bytes that a sandbox takes, by its first process: of all that descend from it, and of the kernel on their behalf.

    Resident memory, and bounds on what its sockets and the files in its ``/tmp`` take. What has ended meanwhile counts
    nothing.
    """
    processes = list(descendants(pid))
    return sum(map(resident_bytes, processes)) + kernel_bytes(processes)


def resident_bytes(pid: int) -> int:
    """The resident memory of one process; 0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def kernel_bytes(processes: list[int]) -> int:
    """A bound on what the kernel keeps for the sockets and the ``/tmp`` of processes that share one sandbox.

    Read off the first that is inside, in a network namespace of its own; 0 before there is one.
    """
    for pid in reversed(processes):
        with suppress(OSError, ValueError, IndexError):
            if os.readlink(f"/proc/{pid}/ns/net") == own_network():
                continue
            with Path(f"/proc/{pid}/net/sockstat").open() as lines:
                sockets = int(next(lines).split()[2])
            folder = f"/proc/{pid}/root/tmp"
            if os.stat(folder).st_dev == os.stat("/tmp").st_dev:  # the machine's own: the sandbox is still being made
                continue
            files = os.statvfs(folder)
            used = (files.f_blocks - files.f_bfree) * files.f_frsize
            return sockets * socket_bytes() + (files.f_files - files.f_ffree) * INODE_BYTES + used
    return 0


@cache
def own_network() -> str:
    """The network namespace of this process."""
    return os.readlink("/proc/self/ns/net")


@cache
def socket_bytes() -> int:
    """What may wait in the buffer of one socket, where nobody can enlarge it."""
    try:
        return int(Path("/proc/sys/net/core/wmem_default").read_text())
    except (OSError, ValueError):
        return 212_992
