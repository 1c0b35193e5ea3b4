"""R6: programs that try to break out of their sandbox, or to make their tests pass without knowing what they expect."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from grpo_jax.rewards.code.reward import run_tests
from grpo_jax.rewards.code.sandbox import Sandbox, SandboxLimits, as_nobody

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
ESCAPES = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "code_escapes.jsonl").read_text().splitlines()
]
QUICK = {"read_canary_direct", "kill_victim", "eq_always", "bomb_fork_tree", "find_by_gc"}
LIMITS = SandboxLimits(seconds=1.0, wall_seconds=1.5, memory_bytes=256 << 20)


class Outside:
    """What a program must not reach: a secret in a file and in the environment, servers, a process, a folder."""

    def __init__(self):
        self.secret, self.number = secrets.token_hex(16), secrets.randbelow(10**12) + 10**12
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))
        self.folder.chmod(0o777)
        self.file = self.folder / "secret"
        self.file.write_text(self.secret)
        self.file.chmod(0o644)
        (self.folder / "open").mkdir()
        (self.folder / "open").chmod(0o777)
        os.environ["CANARY"] = self.secret
        self.calls = []
        self.servers = [self.listen(socket.AF_INET, ("127.0.0.1", 0))]
        self.servers += [self.listen(socket.AF_INET, ("127.0.0.1", 0), socket.SOCK_DGRAM)]
        self.unix, self.abstract = str(self.folder / "socket"), f"canary{secrets.token_hex(4)}"
        self.servers += [self.listen(socket.AF_UNIX, path) for path in (self.unix, "\0" + self.abstract)]
        os.chmod(self.unix, 0o777)
        self.victim = subprocess.Popen(**as_nobody(["sleep", "600"]))

    def listen(self, family, address, kind=socket.SOCK_STREAM):
        server = socket.socket(family, kind)
        server.bind(address)
        if kind == socket.SOCK_STREAM:
            server.listen()
        threading.Thread(target=self.take, args=(server, kind), daemon=True).start()
        return server

    def take(self, server, kind):
        while True:
            try:
                self.calls.append(server.accept()[1] if kind == socket.SOCK_STREAM else server.recvfrom(100))
            except OSError:
                return

    def fill_in(self, code):
        values = {
            "@CANARY_FILE@": str(self.file),
            "@CANARY_DIR@": str(self.folder / "open"),
            "@CANARY_ENV@": "CANARY",
            "@TCP_PORT@": str(self.servers[0].getsockname()[1]),
            "@UNIX_SOCKET@": self.unix,
            "@ABSTRACT_SOCKET@": self.abstract,
            "@VICTIM_PID@": str(self.victim.pid),
            "@PARENT_NAME@": Path("/proc/self/comm").read_text().strip(),
        }
        for name, value in values.items():
            code = code.replace(name, value)
        return code

    def is_untouched(self):
        return (
            self.file.read_text() == self.secret
            and not list((self.folder / "open").iterdir())
            and not self.calls
            and self.victim.poll() is None
        )

    def close(self):
        for server in self.servers:
            server.close()
        self.victim.kill()
        self.victim.wait()
        shutil.rmtree(self.folder)
        del os.environ["CANARY"]


@pytest.fixture(scope="module")
def outside():
    world = Outside()
    yield world
    world.close()


@pytest.fixture(scope="module")
def marked():
    """An empty folder of packages: by its name, which is part of what they run, sandboxes of this process are known."""
    with tempfile.TemporaryDirectory(prefix="packages-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def sandbox(marked):
    return Sandbox(LIMITS, packages=[marked])


def running(mark):
    """The processes of sandboxes that are so marked."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if mark.name.encode() in command.read_bytes():
                found.append(int(command.parent.name))
    return found


def assert_nothing_runs(mark):
    deadline = time.monotonic() + 3
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(mark) == []


def test_what_runs_in_a_sandbox_is_seen(sandbox, marked):
    """Or else the tests below would be blind."""
    with sandbox.start("import time; time.sleep(5)") as started:
        deadline = time.monotonic() + 5
        while len(running(marked)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(running(marked)) >= 2, started
    assert_nothing_runs(marked)


def assert_contained(escape, outside, sandbox, marked):
    code = outside.fill_in(escape["code"])
    started = time.monotonic()
    if escape["style"] == "stdin":
        expected = secrets.token_hex(16)
        ended = sandbox.run(code, stdin="2 3\n")
        said = ended.stdout + ended.stderr
        assert expected.encode() not in said
        assert outside.secret.encode() not in said, said
        assert len(ended.stdout) <= LIMITS.output_bytes
    else:
        verdict = run_tests(code, [f"assert f(2) == {outside.number}"], sandbox)
        assert verdict.passed == (False,), verdict
        assert outside.secret not in verdict.feedback
    assert time.monotonic() - started < 30
    assert outside.is_untouched()
    assert_nothing_runs(marked)


@pytest.mark.parametrize("escape", [each for each in ESCAPES if each["name"] in QUICK], ids=lambda each: each["name"])
def test_a_few_escapes(escape, outside, sandbox, marked):
    assert_contained(escape, outside, sandbox, marked)


@pytest.mark.slow
@pytest.mark.parametrize("escape", ESCAPES, ids=lambda each: each["name"])
def test_every_escape(escape, outside, sandbox, marked):
    assert_contained(escape, outside, sandbox, marked)
