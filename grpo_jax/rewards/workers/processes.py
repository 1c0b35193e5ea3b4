"""Descendants and memory of processes, from ``/proc``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

INODE_BYTES = 2048
"""Upper bound on the kernel memory of an empty file: inode, directory entry and a name of any length."""


def descendants(pid: int) -> Iterator[int]:
    """The process ids of a process and of all its descendants."""
    yield pid
    for child in children(pid):
        yield from descendants(child)


def children(pid: int) -> list[int]:
    """The process ids of a process's children, including orphans that it adopted; none if it has ended."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []


def memory_of(pid: int) -> int:
    """Bytes of memory that a sandbox uses, given its first process.

    The resident memory of its processes, and upper bounds on the kernel memory of its sockets and of the files in its
    ``/tmp``. Processes that end meanwhile count 0.
    """
    processes = list(descendants(pid))
    return sum(map(resident_bytes, processes)) + kernel_bytes(processes)


def resident_bytes(pid: int) -> int:
    """The resident memory of one process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def kernel_bytes(processes: list[int]) -> int:
    """Upper bound on the kernel memory of a sandbox: of its sockets and its ``/tmp``.

    It is read from a process that is inside, with its own network namespace; 0 before there is one.

    Args:
        processes: the process ids of a sandbox, parents first.
    """
    for pid in reversed(processes):
        with suppress(OSError, ValueError, IndexError):
            if os.readlink(f"/proc/{pid}/ns/net") == own_network():
                continue
            with Path(f"/proc/{pid}/net/sockstat").open() as lines:
                sockets = int(next(lines).split()[2])
            folder = f"/proc/{pid}/root/tmp"
            if os.stat(folder).st_dev == os.stat("/tmp").st_dev:  # the host's: the sandbox is not set up yet
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
    """Size of a socket's send buffer, which programs in a sandbox cannot enlarge."""
    try:
        return int(Path("/proc/sys/net/core/wmem_default").read_text())
    except (OSError, ValueError):
        return 212_992
