"""Untrusted Python programs in bubblewrap: each runs in its own namespaces, without network or files of the host."""

from __future__ import annotations

import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from grpo_jax.rewards.code.system_calls import system_call_filter
from grpo_jax.rewards.workers.processes import children, memory_of

INSTALL = (
    "programs are run only in bubblewrap. Install it (Debian, Ubuntu: apt-get install bubblewrap; "
    "Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap) on a Linux that allows users to create namespaces"
)
NOBODY = 65534
FIRST_LOOK_SECONDS = 0.1
"""Time until memory is first measured from outside: most programs end earlier, and limits per process always hold."""
LOOK_SECONDS, REAPING_SECONDS = 0.05, 2.0

Status = Literal["ended", "time", "memory", "output"]


class SandboxUnavailable(RuntimeError):  # noqa: N818 - named after the state it reports
    """Sandboxes cannot be used on this machine; nothing is run without one."""


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of a program. Exceeding one raises an error in the program or kills it.

    Attributes:
        seconds: processor time of each process; rounded up to whole seconds.
        wall_seconds: wall time; larger than ``seconds``, so that a program is not killed because the machine is busy.
        memory_bytes: address space of each process, and resident memory of all processes together, including kernel
            memory for their sockets and files.
        processes: processes and threads at any time.
        file_bytes: size of ``/tmp``, the only writable folder.
        output_bytes: bytes written to stdout and stderr together.

    Raises:
        ValueError: a limit is not above 0.
    """

    seconds: float = 4.0
    wall_seconds: float = 12.0
    memory_bytes: int = 512 << 20
    processes: int = 16
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program.

    Attributes:
        status: ``ended`` by itself, or killed because it exceeded ``time``, ``memory`` or ``output``.
        returncode: its exit status, 128 + n after signal n; None if it was killed for a limit.
        stdout, stderr: its output.
    """

    status: Status
    returncode: int | None
    stdout: bytes
    stderr: bytes


class Program:
    """A running program; a context manager that kills it and all its processes. Created by ``Sandbox.start``."""

    def __init__(self, process: subprocess.Popen[Any]):
        self.process = process
        streams = (process.stdout, process.stderr)
        self.output = {stream: bytearray() for stream in streams if stream is not None}

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for stream in self.output:
            stream.close()

    def kill(self) -> None:
        """Kill the program and every process that it started."""
        # Killing the sandbox's first process kills the others, and bwrap reaps it: no zombie is left to init.
        deadline = time.monotonic() + REAPING_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            for child in children(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.01)
        self.process.kill()
        self.process.wait()


class Sandbox:
    """Runs Python source in bubblewrap: all namespaces unshared, empty environment, no new privileges.

    A program sees a read-only ``/usr`` with Python's standard library, a private ``/tmp`` that is deleted afterwards,
    and its own processes; no network, no home, nothing of the host's ``/etc`` but the linker's cache, and only harmless
    devices. System calls that programs do not need (memfd, kernel keys, ptrace, io_uring, bpf, sockets of families
    other than AF_UNIX) fail. The hash seed is fixed, so that runs are reproducible. Processes that a program started
    end with it, and the program ends with this process.

    If this process is root, programs run as nobody, because the kernel does not limit the number of root's processes.

    Args:
        limits: resource limits of each program.
        packages: folders of packages that programs may import in addition to the standard library.
        python: path of the interpreter. Default: the running one, or ``/usr/bin/python3`` if a sandbox cannot read it.

    Raises:
        SandboxUnavailable: bubblewrap is missing or cannot create namespaces, the processor is neither x86-64 nor
            ARM64, or the interpreter or a package folder cannot be read (as nobody, if this process is root). The
            message says what to do. Nothing is ever run without a sandbox.
    """

    def __init__(
        self, limits: SandboxLimits = SandboxLimits(), *, packages: Sequence[str | Path] = (), python: str | None = None
    ):
        self.limits = limits
        self._packages = tuple(str(Path(folder).resolve()) for folder in packages)
        self._python = python or find_python()
        try:
            self._rules = system_call_filter()
        except OSError as error:
            raise SandboxUnavailable(str(error)) from error
        if (python is not None or packages) and (why := _refusal(self._python, self._packages)):
            shown = "".join(f" and {folder}" for folder in self._packages)
            raise SandboxUnavailable(f"no program can be run with {self._python}{shown}: {why}")

    def run(self, source: str, *, stdin: str = "", until: float = math.inf, output_bytes: int | None = None) -> Outcome:
        """Run a program as ``__main__`` until it ends or exceeds a limit.

        Args:
            source: Python. A syntax error gives exit status 1 and a message on stderr, as usual.
            stdin: standard input.
            until: the time of ``time.monotonic`` at which the program is killed.
            output_bytes: replaces ``limits.output_bytes``.
        """
        limits = self.limits if output_bytes is None else replace(self.limits, output_bytes=output_bytes)
        with self.start(source, stdin=stdin) as program:
            return finish(program, limits, until=until)

    def start(
        self, source: str, *, stdin: str = "", pass_fds: Sequence[int] = (), seconds: float | None = None
    ) -> Program:
        """Start a program without waiting for it; ``finish`` waits.

        Args:
            source: Python.
            stdin: standard input.
            pass_fds: file descriptors that the program inherits.
            seconds: processor time; replaces ``limits.seconds``.
        """
        program, standard_input, rules = files = [os.memfd_create(name) for name in ("program", "stdin", "rules")]
        try:
            _fill(program, source.encode("utf-8", "replace"))
            _fill(standard_input, stdin.encode("utf-8", "replace"))
            _fill(rules, self._rules)
            starter = _starter(self.limits, seconds or self.limits.seconds, self._packages, program)
            command = bubblewrap(self._python, self._packages, self.limits.file_bytes)
            command += ["--seccomp", str(rules), *AS_FIRST_PROCESS, self._python, "-sSB", "-c", starter]
            process = subprocess.Popen(
                stdin=standard_input,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(program, rules, *pass_fds),
                **as_nobody(command),
            )
        finally:
            for file in files:
                os.close(file)
        return Program(process)


def finish(
    program: Program,
    limits: SandboxLimits,
    *,
    beside: Sequence[Program] = (),
    extend_by_line: bool = False,
    until: float = math.inf,
) -> Outcome:
    """Wait until a program ends, or kill it when it exceeds a limit.

    Args:
        program: the program to wait for.
        limits: those on wall time, output, and the memory of all processes are enforced here.
        beside: other programs under the same limits on output and memory; ``program`` is killed when one exceeds them.
        extend_by_line: whether each line on the program's stdout restarts ``limits.wall_seconds``.
        until: the time of ``time.monotonic`` at which the program is killed.
    """
    programs = [program, *beside]
    started = time.monotonic()
    deadline, look = min(started + limits.wall_seconds, until), started + FIRST_LOOK_SECONDS
    status: Status = "ended"
    lines = 0
    with selectors.DefaultSelector() as selector:
        exited = os.pidfd_open(program.process.pid)
        selector.register(exited, selectors.EVENT_READ)
        for each in programs:
            for stream, kept in each.output.items():
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, kept)
        try:
            while status == "ended":
                ready = selector.select(max(min(deadline, look) - time.monotonic(), 0))
                for key, _ in ready:
                    if key.fileobj != exited and not _read(key, limits.output_bytes):
                        selector.unregister(key.fileobj)
                if any(key.fileobj == exited for key, _ in ready):
                    break
                now = time.monotonic()
                if extend_by_line and (seen := next(iter(program.output.values())).count(b"\n")) > lines:
                    lines, deadline = seen, min(now + limits.wall_seconds, until)
                if now >= look:
                    look = now + LOOK_SECONDS
                    if any(memory_of(each.process.pid) > limits.memory_bytes for each in programs):
                        status = "memory"
                if now >= deadline:
                    status = "time"
                if any(sum(map(len, each.output.values())) >= limits.output_bytes for each in programs):
                    status = "output"
            for key in list(selector.get_map().values()):
                if key.fileobj != exited:
                    _read(key, limits.output_bytes)
        finally:
            os.close(exited)
    if status != "ended":
        program.kill()
    returncode = program.process.wait()
    if returncode == 128 + signal.SIGXCPU:
        status = "time"
    stdout, stderr = (bytes(kept[: limits.output_bytes]) for kept in program.output.values())
    return Outcome(status, returncode if status == "ended" else None, stdout, stderr)


def _read(key: selectors.SelectorKey, most: int) -> bool:
    """Append what a stream holds to its buffer, up to ``most`` bytes in all; False at the end of the stream."""
    while len(key.data) < most:
        try:
            part = os.read(key.fd, 65536)
        except BlockingIOError:
            return True
        if not part:
            return False
        key.data.extend(part)
    return True


def bubblewrap(python: str, packages: Sequence[str], file_bytes: int) -> list[str]:
    """The bwrap command line without the command that it runs.

    Args:
        python: path of the interpreter.
        packages: folders that are mounted read-only.
        file_bytes: size of ``/tmp``.

    Raises:
        SandboxUnavailable: bwrap is not on the PATH.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable(f"bubblewrap (bwrap) is not on the PATH: {INSTALL}")
    command = [found, "--unshare-user", "--disable-userns", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    command += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "PYTHONUTF8", "1"]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("bin", "lib", "lib64"):
        folder = Path("/", name)
        if folder.is_symlink():
            command += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.exists():
            command += ["--ro-bind", str(folder), str(folder)]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--size", str(file_bytes), "--tmpfs", "/tmp"]
    shown = [*packages] if Path(python).is_relative_to("/usr") else [str(Path(python).parent.parent), *packages]
    for folder in shown:
        command += ["--ro-bind", folder, folder]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp"]


AS_FIRST_PROCESS = ("--as-pid-1", "--", "/bin/sh", "-c", '"$@"; exit $?', "sh")
"""A shell is the sandbox's first process: its end kills all others, and the program itself is an ordinary process."""

STARTER = """\
import builtins, linecache, os, resource, sys
builtins.exit = builtins.quit = sys.exit
sys.path += {packages!r}
for what, limit in {limits!r}:
    resource.setrlimit(getattr(resource, what), (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds} + 1))
with open({program}) as file:
    code = file.read()
linecache.cache["program.py"] = (len(code), None, code.splitlines(True), "program.py")
main = sys.modules["__main__"] = type(sys)("__main__")
exec(compile(code, "program.py", "exec"), main.__dict__)
"""


def _starter(limits: SandboxLimits, seconds: float, packages: Sequence[str], program: int) -> str:
    """The code that the interpreter runs first: it sets its limits, then executes the program from an open file.

    Args:
        limits: limits per process.
        seconds: processor time.
        packages: folders to append to ``sys.path``.
        program: descriptor of the file that holds the program.
    """
    bounds = [
        ("RLIMIT_AS", limits.memory_bytes),
        ("RLIMIT_NPROC", limits.processes),
        ("RLIMIT_FSIZE", limits.file_bytes),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ]
    return STARTER.format(limits=bounds, seconds=math.ceil(seconds), packages=list(packages), program=program)


def _fill(file: int, content: bytes) -> None:
    with open(file, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(file, 0, os.SEEK_SET)


def as_nobody(command: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``Popen`` that start a command, as nobody without supplementary groups if this process is root.

    setpriv changes the user where it can, because ``Popen(user=...)`` rules out vfork: fork copies the page tables of
    this process, which costs it 75 ms of processor time with 4 GB of resident memory.

    Args:
        command: the program and its arguments.
    """
    if os.geteuid() != 0:
        return {"args": [*command]}
    if setpriv := _setpriv():
        return {"args": [*setpriv, *command]}
    return {"args": [*command], "user": NOBODY, "group": NOBODY, "extra_groups": []}


@cache
def _setpriv() -> tuple[str, ...]:
    """The setpriv command that starts another command as nobody; empty if setpriv is missing or cannot do that."""
    setpriv = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
    try:  # BusyBox's setpriv lacks these options
        subprocess.run([*setpriv, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return setpriv


@cache
def find_python() -> str:
    """The path of an interpreter that works in a sandbox: the running one, or else ``/usr/bin/python3``.

    Raises:
        SandboxUnavailable: neither works; the message gives the reasons.
    """
    reasons = []
    candidates = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "/usr/bin/python3"]
    for python in dict.fromkeys(map(os.path.realpath, candidates)):
        why = _refusal(python)
        if why is None:
            return python
        reasons.append(f"with {python}: {why}")
    raise SandboxUnavailable(f"no program can be run in a sandbox; {INSTALL}. {'. '.join(reasons)}")


def _refusal(python: str, packages: Sequence[str] = ()) -> str | None:
    """The reason why no program can be run with an interpreter and packages; None if one can."""
    source = f"import os\nfor folder in {list(packages)!r}: os.listdir(folder)\nprint('ready')"
    command = [*bubblewrap(python, packages, 1 << 20), *AS_FIRST_PROCESS, python, "-sSB", "-c", source]
    try:
        tried = subprocess.run(capture_output=True, text=True, timeout=30, **as_nobody(command))
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if tried.stdout == "ready\n" else tried.stderr.strip() or f"exit status {tried.returncode}"
