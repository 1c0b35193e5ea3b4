"""What a program in a sandbox may ask of the kernel, and how much the kernel keeps for it."""

import os
import platform
import shutil
import subprocess
import threading
import time

import pytest

from grpo_jax.rewards.code import sandbox as sandbox_module
from grpo_jax.rewards.code.sandbox import NOBODY, Sandbox, SandboxLimits, as_nobody
from grpo_jax.rewards.code.system_calls import FORBIDDEN_CALLS, MACHINES
from grpo_jax.rewards.workers.processes import descendants, kernel_bytes

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as another user")
LIMITS = SandboxLimits(seconds=2.0, wall_seconds=8.0, memory_bytes=160 << 20)
ROOM = 160 << 20
"""Of kernel memory that grows between two looks, and by what else runs on the machine."""


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(LIMITS)


@pytest.fixture
def groups_of_this_process():
    before = os.getgroups()
    os.setgroups([4, 27])
    yield
    os.setgroups(before)


@needs_root
@needs_bubblewrap
@pytest.mark.parametrize("changed_by", ["setpriv", "Popen"])
def test_programs_of_root_run_as_nobody_without_supplementary_groups(
    changed_by, sandbox, groups_of_this_process, monkeypatch
):
    if changed_by == "Popen":
        monkeypatch.setattr(sandbox_module, "_setpriv", tuple)
    elif shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    with sandbox.start("import os, time\nprint(os.getgroups(), flush=True)\ntime.sleep(60)\n") as program:
        assert program.process.stdout.readline() == b"[]\n"
        processes = list(descendants(program.process.pid))
        assert len(processes) >= 3  # bwrap, the shell and the program
        for pid in processes:
            with open(f"/proc/{pid}/status") as file:
                status = dict(line.rstrip().split(":", 1) for line in file)
            assert status["Uid"].split() == status["Gid"].split() == [str(NOBODY)] * 4
            assert status["Groups"].split() == []
            assert pid != program.process.pid or int(status["CapPrm"], 16) == 0


@needs_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_popen_changes_the_user_only_where_setpriv_cannot(tmp_path, monkeypatch):
    """Given a user, ``Popen`` forks: the time of a start then grows with the memory of this process."""
    by_popen = {"args": ["true"], "user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        assert as_nobody(["true"]).keys() == {"args"}
        sandbox_module._setpriv.cache_clear()
        path = os.environ["PATH"]
        monkeypatch.setenv("PATH", str(tmp_path))
        assert as_nobody(["true"]) == by_popen
        sandbox_module._setpriv.cache_clear()
        monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
        (tmp_path / "setpriv").write_text("#!/bin/sh\necho unrecognized option >&2\nexit 1\n")
        (tmp_path / "setpriv").chmod(0o755)
        assert as_nobody(["true"]) == by_popen
    finally:
        sandbox_module._setpriv.cache_clear()


@needs_bubblewrap
def test_no_socket_but_unix(sandbox):
    program = (
        "import socket\nfor family in range(64):\n  for kind in range(1, 12):\n    for more in (0, 0x800, 0x80000):\n"
        "      try: socket.socket(family, kind | more, 0); print(family, kind)\n      except OSError: pass\n"
        "for family in range(-2, 64):\n  for kind in (1, 2, 3, 5):\n"
        "    try: socket.socketpair(family, kind); print('pair', family, kind)\n    except OSError: pass\n"
    )
    ended = sandbox.run(program)
    assert ended.returncode == 0, ended
    assert {line.removeprefix("pair ").split()[0] for line in ended.stdout.decode().splitlines()} == {"1"}


@needs_bubblewrap
def test_what_the_standard_library_needs_of_sockets_still_works(sandbox):
    program = (
        "import asyncio, multiprocessing, subprocess\n"
        "async def main():\n  await asyncio.sleep(0)\n  return 7\n"
        "a, b = multiprocessing.Pipe()\na.send(asyncio.run(main()))\nprint(b.recv())\n"
        "child = multiprocessing.Process(target=lambda: a.send(3))\nchild.start()\nprint(b.recv())\nchild.join()\n"
        "print(subprocess.run(['/bin/echo', '5'], capture_output=True, text=True).stdout)\n"
    )
    assert sandbox.run(program).stdout.split() == [b"7", b"3", b"5"]


@needs_bubblewrap
def test_every_forbidden_call_fails(sandbox):
    """With EPERM, before the kernel looks at the arguments."""
    column = MACHINES[platform.machine()][0]
    numbers = {name: calls[column] for name, calls in FORBIDDEN_CALLS.items() if calls[column] is not None}
    assert len(numbers) > 40
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for name, number in {numbers!r}.items():\n"
        "  ctypes.set_errno(0)\n  result = libc.syscall(number, -1, 0, 0, 0, 0, 0)\n"
        "  if result != -1 or ctypes.get_errno() != 1: print(name, result, ctypes.get_errno())\n"
        "print('done')\n"
    )
    assert sandbox.run(program).stdout == b"done\n"


@needs_bubblewrap
@pytest.mark.skipif(platform.machine() != "x86_64", reason="entries of x86-64")
def test_the_entries_of_other_architectures_are_closed(sandbox):
    x32 = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    x32 += "print(libc.syscall(0x40000000 | 39), ctypes.get_errno())\n"
    assert sandbox.run(x32).stdout == b"-1 1\n"
    # mov eax, 20 (getpid); int 0x80; ret
    int80 = (
        "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(bytes.fromhex('b814000000cd80c3'))\n"
        "call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "print('before', flush=True)\nprint(call())\n"
    )
    ended = sandbox.run(int80)
    assert ended.stdout == b"before\n"
    assert ended.returncode == 128 + 31  # SIGSYS


@needs_bubblewrap
def test_buffers_cannot_be_enlarged(sandbox):
    program = (
        "import socket, fcntl, os\na, b = socket.socketpair()\n"
        "for option in (7, 8, 32, 33):\n"
        "  try: a.setsockopt(1, option, 1 << 22); print('grown', option)\n  except PermissionError: pass\n"
        "try: fcntl.fcntl(os.pipe()[1], 1031, 1 << 20); print('grown')\nexcept PermissionError: pass\n"
        "a.setsockopt(1, 9, 1); fcntl.fcntl(a, fcntl.F_GETFL)\nprint('done')\n"
    )
    assert sandbox.run(program).stdout == b"done\n"


FORKS = """
import os, socket, time
for _ in range(3): os.fork()
me = str(os.getpid())
os.mkdir('/tmp/' + me)
os.chdir('/tmp/' + me)
def fill(s):
    s.setblocking(False)
    try:
        while True: s.send(b'x' * 65536)
    except OSError: pass
"""
BOMBS = {
    "empty_files": "import os\nn = 0\nwhile True:\n  os.close(os.open('/tmp/%d' % n, os.O_CREAT)); n += 1\n",
    "links": FORKS + "open('a', 'w').close()\nn = 0\nwhile True:\n  os.link('a', 'l%d' % n); n += 1\n",
    "empty_folders": FORKS + "n = 0\nwhile True:\n  os.mkdir(str(n)); n += 1\n",
    "symbolic_links": FORKS + "n = 0\nwhile True:\n  os.symlink('x' * 100, 's%d' % n); n += 1\n",
    "named_pipes": FORKS + "n = 0\nwhile True:\n  os.mkfifo('p%d' % n); n += 1\n",
    "socket_files": FORKS
    + """
n = 0
while True:
    s = socket.socket(socket.AF_UNIX)
    s.bind('s%d' % n)
    s.close()
    n += 1
""",
}
FULL = {
    "socket_pairs": FORKS
    + """
kept = []
try:
    while True:
        kept.append(socket.socketpair())
        for s in kept[-1]: fill(s)
except OSError: time.sleep(60)
""",
    "not_accepted": FORKS
    + """
kept = []
try:
    while True:
        left = socket.socket(socket.AF_UNIX)
        left.bind('\\0%s.%d' % (me, len(kept)))
        left.listen(128)
        kept.append(left)
        for _ in range(128):
            s = socket.socket(socket.AF_UNIX)
            s.connect(left.getsockname())
            fill(s)
            s.close()
except OSError: time.sleep(60)
""",
    "datagrams_of_closed_sockets": FORKS
    + """
kept = []
try:
    while True:
        kept.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        kept[-1].bind('\\0%s.%d' % (me, len(kept)))
        for _ in range(12):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            s.connect(kept[-1].getsockname())
            fill(s)
            s.close()
except OSError: time.sleep(60)
""",
    "sent_away": FORKS
    + """
a, b = socket.socketpair()
a.setblocking(False)
try:
    while True:
        for s in socket.socketpair():
            fill(s)
            socket.send_fds(a, [b'x'], [s.fileno()])
            s.close()
except OSError: time.sleep(60)
""",
    "pipes": FORKS
    + """
try:
    while True:
        r, w = os.pipe()
        os.set_blocking(w, False)
        try:
            while True: os.write(w, b'x' * 65536)
        except BlockingIOError: pass
except OSError: time.sleep(60)
""",
}


class KernelMemory:
    """The most that shared and kernel memory of the machine grew by while a program ran."""

    def __enter__(self):
        self.before, self.most, self.done = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()

    def watch(self):
        while not self.done.wait(0.02):
            self.most = max(self.most, self.now() - self.before)

    def now(self):
        with open("/proc/meminfo") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
        return sizes["Slab"] + sizes["Shmem"]


@needs_bubblewrap
@pytest.mark.parametrize("name", ["empty_files", "links"])
def test_files_without_end_are_a_matter_of_memory(name, sandbox):
    check_bomb(BOMBS[name], sandbox, {"memory"})


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BOMBS if name not in ("empty_files", "links")])
def test_other_names_without_end_are_too(name, sandbox):
    check_bomb(BOMBS[name], sandbox, {"memory"})


@needs_bubblewrap
def test_sockets_count_that_no_descriptor_refers_to(sandbox):
    check_bomb(FULL["not_accepted"], sandbox, {"memory"})


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FULL if name != "not_accepted"])
def test_what_is_full_ends_for_its_memory_or_its_time(name, sandbox):
    check_bomb(FULL[name], sandbox, {"memory", "time"})


@needs_bubblewrap
def test_the_machines_own_files_do_not_count_for_a_sandbox_that_is_being_made():
    """Between its start and its own root, a sandbox has its own network and still the root of the machine."""
    command = ["bwrap", "--unshare-net", "--dev-bind", "/", "/", "sleep", "20"]
    with subprocess.Popen(command) as started:
        try:
            deadline = time.monotonic() + 10
            while len(list(descendants(started.pid))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)
            assert kernel_bytes(list(descendants(started.pid))) < 1 << 20
        finally:
            started.kill()


def check_bomb(program, sandbox, statuses):
    started = time.monotonic()
    with KernelMemory() as memory:
        ended = sandbox.run(program)
    assert ended.status in statuses, ended
    assert memory.most < LIMITS.memory_bytes + ROOM
    assert time.monotonic() - started < 20
