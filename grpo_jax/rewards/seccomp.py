"""The seccomp program of sandboxes: which system calls fail, and with which arguments."""

from __future__ import annotations

import struct

FORBIDDEN_CALLS = {
    # Name: its number on x86-64 and on ARM64, from the kernel's own tables; -1 where there is none.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "vmsplice": (278, 75),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "modify_ldt": (154, -1),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "acct": (163, 89),
}
SOCKET_CALLS = ((41, 198), (53, 199))  # socket, socketpair
SETSOCKOPT, LISTEN, FCNTL = (54, 208), (50, 201), (72, 25)
AF_UNIX, STREAM, SEQPACKET, KIND_MASK = 1, 1, 5, 0xF
SOL_SOCKET, BUFFER_SIZES = 1, (7, 8, 32, 33)
MOST_WAITING = 128
F_SETPIPE_SZ = 1031

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
OTHER_ABI = 0x40000000
LOAD, AND, EQUAL, ABOVE, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
ALLOW, NOT_PERMITTED, KILL = 0x7FFF0000, 0x00050001, 0x80000000
NUMBER, ARCHITECTURE, FIRST, SECOND, THIRD = 0, 4, 16, 24, 32  # offsets in the kernel's record; low halves of arguments

Step = tuple[int, int, int, int]


def filter_for(machine: str) -> bytes:
    """A seccomp program under which some system calls fail with EPERM, and everything else goes on.

    These fail: the calls in ``FORBIDDEN_CALLS``; sockets of any family but AF_UNIX, and datagrams (which leave memory
    in the receiver's queue after the sender is gone); larger buffers of sockets and pipes; more than ``MOST_WAITING``
    connections that nobody has accepted; and every call by x86-64's x32 numbers. A call by another architecture's
    entry, such as 32-bit ``int 0x80``, ends the process.

    Args:
        machine: as ``platform.machine`` names it.

    Raises:
        ValueError: the processor's calls are not listed here.
    """
    if machine not in MACHINES:
        raise ValueError(f"sandboxes know the system calls of {sorted(MACHINES)}; this machine is {machine}")
    column, architecture = MACHINES[machine]
    steps: list[Step] = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]
    steps += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, OTHER_ABI), (RETURN, 0, 0, NOT_PERMITTED)]
    for calls in FORBIDDEN_CALLS.values():
        if calls[column] >= 0:
            steps += [(EQUAL, 0, 1, calls[column]), (RETURN, 0, 0, NOT_PERMITTED)]
    for call in SOCKET_CALLS:
        steps += _rule(
            call[column],
            [(LOAD, 0, 0, FIRST), (EQUAL, 0, 4, AF_UNIX), (LOAD, 0, 0, SECOND), (AND, 0, 0, KIND_MASK)],
            [(EQUAL, 2, 0, STREAM), (EQUAL, 1, 0, SEQPACKET), (RETURN, 0, 0, NOT_PERMITTED)],
        )
    sizes = len(BUFFER_SIZES)
    steps += _rule(
        SETSOCKOPT[column],
        [(LOAD, 0, 0, SECOND), (EQUAL, 0, sizes + 2, SOL_SOCKET), (LOAD, 0, 0, THIRD)],
        [(EQUAL, sizes - 1 - number, number == sizes - 1, each) for number, each in enumerate(BUFFER_SIZES)],
        [(RETURN, 0, 0, NOT_PERMITTED)],
    )
    steps += _rule(LISTEN[column], [(LOAD, 0, 0, SECOND), (ABOVE, 0, 1, MOST_WAITING), (RETURN, 0, 0, NOT_PERMITTED)])
    steps += _rule(FCNTL[column], [(LOAD, 0, 0, SECOND), (EQUAL, 0, 1, F_SETPIPE_SZ), (RETURN, 0, 0, NOT_PERMITTED)])
    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _rule(number: int, *parts: list[Step]) -> list[Step]:
    """Steps for one system call, skipped for every other; behind them it is allowed."""
    steps = [step for part in parts for step in part]
    return [(EQUAL, 0, len(steps) + 1, number), *steps, (RETURN, 0, 0, ALLOW)]
