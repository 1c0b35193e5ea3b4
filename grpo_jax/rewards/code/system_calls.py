"""The seccomp filter of sandboxes: system calls that programs do not need fail."""

from __future__ import annotations

import platform
import struct

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: its column in the tables below, and the kernel's constant for the architecture (AUDIT_ARCH)."""

# The numbers of each call on x86-64 and on ARM64, from the kernel's tables; None where the call does not exist.
FORBIDDEN_CALLS: dict[str, tuple[int | None, int | None]] = {
    # Memory and keys that outlive a program or escape its limits.
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # Other processes.
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"process_madvise": (440, 440), "pidfd_getfd": (438, 438)},
    # Interfaces of the kernel with a history of vulnerabilities.
    **{"bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "io_setup": (206, 0)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    # Namespaces and mounts.
    **{"unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41), "mount": (165, 40), "umount2": (166, 39)},
    **{"open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442)},
    **{"fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "syslog": (103, 116)},
    # No limit of the program bounds the kernel memory of these.
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262)},
    **{"splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75)},
}
SOCKET_CALLS = {"socket": (41, 198), "socketpair": (53, 199)}
UNIX_FAMILY = 1
# By call: its numbers, the index of an argument, and its values that fail because they enlarge buffers.
FORBIDDEN_ARGUMENTS = {
    "setsockopt": ((54, 208), 2, (7, 8, 32, 33)),  # SO_SNDBUF, SO_RCVBUF and what forces them
    "fcntl": ((72, 25), 1, (1031,)),  # F_SETPIPE_SZ
}
OTHER_ABI = 0x40000000
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, NOT_PERMITTED, NO_SUCH_FAMILY, KILL = 0x7FFF0000, 0x00050001, 0x00050061, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in ``struct seccomp_data``; an argument takes eight bytes, the low half first."""


def system_call_filter() -> bytes:
    """The seccomp filter as BPF bytecode, for ``bwrap --seccomp``.

    The calls in ``FORBIDDEN_CALLS`` and those of other ABIs fail with EPERM, as do larger buffers of sockets and pipes.
    Sockets of any family but AF_UNIX fail with EAFNOSUPPORT. All other calls are allowed.

    Raises:
        OSError: the processor is neither x86-64 nor ARM64.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(f"sandboxes support the processors {sorted(MACHINES)}; this machine is {machine}")
    column, architecture = MACHINES[machine]
    # (operation, value, label if true, label if false); None is the next step.
    steps: list[tuple[int, int, str | None, str | None]] = [
        (LOAD, ARCHITECTURE, None, None),
        (EQUAL, architecture, None, "kill"),
        (LOAD, NUMBER, None, None),
        (AT_LEAST, OTHER_ABI, "deny", None),
    ]
    forbidden = [calls[column] for calls in FORBIDDEN_CALLS.values()]
    steps += [(EQUAL, number, "deny", None) for number in forbidden if number is not None]
    steps += [(EQUAL, numbers[column], "family", None) for numbers in SOCKET_CALLS.values()]
    steps += [(EQUAL, numbers[column], name, None) for name, (numbers, _, _) in FORBIDDEN_ARGUMENTS.items()]
    steps.append((RETURN, ALLOW, None, None))
    labels = {"family": len(steps)}
    steps += [
        (LOAD, FIRST_ARGUMENT, None, None),
        (EQUAL, UNIX_FAMILY, "allow", None),
        (RETURN, NO_SUCH_FAMILY, None, None),
    ]
    for name, (_, argument, values) in FORBIDDEN_ARGUMENTS.items():
        labels[name] = len(steps)
        steps.append((LOAD, FIRST_ARGUMENT + 8 * argument, None, None))
        steps += [(EQUAL, value, "deny", None) for value in values]
        steps.append((RETURN, ALLOW, None, None))
    for name, result in (("allow", ALLOW), ("deny", NOT_PERMITTED), ("kill", KILL)):
        labels[name] = len(steps)
        steps.append((RETURN, result, None, None))

    def jump(label: str | None, step: int) -> int:
        return 0 if label is None else labels[label] - step - 1

    return b"".join(
        struct.pack("HBBI", operation, jump(if_true, step), jump(if_false, step), value)
        for step, (operation, value, if_true, if_false) in enumerate(steps)
    )
