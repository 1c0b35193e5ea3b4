"""Python programs that nobody trusts, run in bubblewrap: a fresh, empty, cut-off system for each."""

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
    "programs are run in bubblewrap and never without it. Install it (Debian, Ubuntu: apt-get install bubblewrap; "
    "Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap) on a Linux that lets users make namespaces"
)
NOBODY = 65534
FIRST_LOOK_SECONDS = 0.1
"""Before it nothing is looked at from outside: most programs have ended, and limits of each process always hold."""
LOOK_SECONDS = 0.05
REAPING_SECONDS = 2.0

Status = Literal["ended", "time", "memory", "output"]


class SandboxUnavailable(RuntimeError):  # noqa: N818 - the name says what is the matter
    """There is no sandbox here, so nothing is run."""


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use. What goes beyond fails in the program, or has all of it killed.

    Attributes:
        seconds: of processor time, for each process; rounded up to whole ones.
        wall_seconds: of wall time. More, so that a busy machine does not make a good program late.
        memory_bytes: address space of each process; and of all of them together resident memory with what the kernel
            keeps for their sockets and files.
        processes: how many there are at once, threads counted.
        file_bytes: what ``/tmp`` holds, and so what any file does.
        output_bytes: what it may write to stdout and stderr together.

    Raises:
        ValueError: one of them is not above 0.
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
class Ended:
    """How a program ended.

    Attributes:
        status: ``ended`` by itself, or killed for its ``time``, ``memory`` or ``output``.
        returncode: its exit status, 128 + n after signal n; None where it was killed for a limit.
        stdout, stderr: what it wrote.
    """

    status: Status
    returncode: int | None
    stdout: bytes
    stderr: bytes


class Program:
    """A program in a sandbox: a context that leaves nothing of it behind. Made by ``Sandbox.start``."""

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
        """End it and all that it started."""
        # Its first process takes the others with it, and is then still bwrap's to reap: no zombie is left to init.
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
    """Runs Python source in bubblewrap: namespaces of its own of every kind, no environment, no privileges to gain.

    A program sees a read-only ``/usr`` and Python's standard library, a private ``/tmp`` that is gone afterwards, and
    its own processes; no network, no home, none of the machine's settings and only harmless devices. System calls that
    it has no use for (files in memory, kernel keys, tracing of processes, io_uring, bpf, sockets other than AF_UNIX's)
    fail. Its hash seed is fixed,
    so that the same program does the same thing. What it started ends with it, and all of it with this process.

    Run as root, programs are started as nobody: the kernel does not count root's processes.

    Args:
        limits: what a program may use.
        packages: folders of packages that programs may import besides the standard library.
        python: path of the interpreter; by default this one or, where a sandbox cannot reach it, ``/usr/bin/python3``.

    Raises:
        SandboxUnavailable: bubblewrap is missing or may not make namespaces here, the processor is neither x86-64 nor
            ARM64, the interpreter or a folder of packages cannot be reached, as nobody if this process is root's; it
            says what to do. Nothing is ever run outside.
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
        if (python is not None or packages) and (why := refusal(self._python, self._packages)):
            shown = "".join(f" and {folder}" for folder in self._packages)
            raise SandboxUnavailable(f"no program could be run with {self._python}{shown}: {why}")

    def run(self, source: str, *, stdin: str = "", until: float = math.inf, output_bytes: int | None = None) -> Ended:
        """Run a program as ``__main__`` until it ends or reaches a limit.

        Args:
            source: Python. A syntax error is an exit status of 1 with the message on stderr, as usual.
            stdin: what it can read.
            until: when it is killed at the latest, by ``time.monotonic``.
            output_bytes: what it may write, instead of the limits' own.
        """
        limits = self.limits if output_bytes is None else replace(self.limits, output_bytes=output_bytes)
        with self.start(source, stdin=stdin) as program:
            return finish(program, limits, until=until)

    def start(
        self, source: str, *, stdin: str = "", pass_fds: Sequence[int] = (), seconds: float | None = None
    ) -> Program:
        """Start a program and return at once; ``finish`` waits for it.

        Args:
            source: Python.
            stdin: what it can read.
            pass_fds: descriptors of this process that it is given under the same numbers.
            seconds: of processor time, instead of the limits' own.
        """
        program, given, rules = files = [os.memfd_create(name) for name in ("program", "stdin", "rules")]
        try:
            _fill(program, source.encode("utf-8", "replace"))
            _fill(given, stdin.encode("utf-8", "replace"))
            _fill(rules, self._rules)
            starter = _starter(self.limits, seconds or self.limits.seconds, self._packages, program)
            process = subprocess.Popen(
                [
                    *bubblewrap(self._python, self._packages, self.limits.file_bytes),
                    *("--seccomp", str(rules), *AS_FIRST_PROCESS, self._python, "-sSB", "-c", starter),
                ],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(program, rules, *pass_fds),
                **other_user(),
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
    beat: bool = False,
    until: float = math.inf,
) -> Ended:
    """Wait until a program ends, or kill it for what it uses.

    Args:
        program: the one that is waited for.
        limits: of wall time, of output, and of the memory of all its processes.
        beside: others whose output and memory are held to the same limits, and for whose sake it may be killed.
        beat: whether every line on its stdout gives it ``limits.wall_seconds`` anew.
        until: when it is killed at the latest, by ``time.monotonic``.
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
                if beat and (seen := next(iter(program.output.values())).count(b"\n")) > lines:
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
    return Ended(status, returncode if status == "ended" else None, stdout, stderr)


def _read(key: selectors.SelectorKey, most: int) -> bool:
    """Take what has been written, up to a limit; False at its end."""
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
    """The command that makes a sandbox, up to the program that is run in it."""
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
"""A shell as the sandbox's first process: with it all others end, and the program is an ordinary one."""

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
    """What the interpreter runs first: it limits itself, then becomes the program in a file that is open for it."""
    bounds = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    limits_set = list(bounds.items())
    return STARTER.format(limits=limits_set, seconds=math.ceil(seconds), packages=list(packages), program=program)


def _fill(file: int, content: bytes) -> None:
    with open(file, "wb", closefd=False) as stream:
        stream.write(content)
    os.lseek(file, 0, os.SEEK_SET)


def other_user() -> dict[str, Any]:
    """As whom a sandbox is started: nobody, where this process is root's."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


@cache
def find_python() -> str:
    """The interpreter of sandboxes: this one's, if they can reach it, or that of the system.

    Raises:
        SandboxUnavailable: with neither can anything be run; says why.
    """
    reasons = []
    candidates = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "/usr/bin/python3"]
    for python in dict.fromkeys(map(os.path.realpath, candidates)):
        why = refusal(python)
        if why is None:
            return python
        reasons.append(f"with {python}: {why}")
    raise SandboxUnavailable(f"no program could be run in a sandbox; {INSTALL}. {'. '.join(reasons)}")


def refusal(python: str, packages: Sequence[str] = ()) -> str | None:
    """Why no program can be run with an interpreter and packages; None where it can."""
    source = f"import os\nfor folder in {list(packages)!r}: os.listdir(folder)\nprint('ready')"
    command = [*bubblewrap(python, packages, 1 << 20), *AS_FIRST_PROCESS, python, "-sSB", "-c", source]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=30, **other_user())
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if tried.stdout == "ready\n" else tried.stderr.strip() or f"exit status {tried.returncode}"
