"""Runs of scripts by several processes on this host, as on several hosts, also with an address for each of them."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grpo_jax.loop.local_processes import cpu_environment, distributed_flags, free_port

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def network(count):
    """Names of network namespaces with an address for each, joined by a bridge; None where this is not allowed.

    The interface of namespace i in the first one, which has the bridge, is called ``to{i}``.
    """
    names = [f"grpo{os.getpid()}n{i}" for i in range(count)]

    def ip(*args):
        return subprocess.run(["ip", *args], capture_output=True).returncode == 0

    try:
        if shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
            yield None
            return
        first = names[0]
        ip("-n", first, "link", "add", "bridge", "type", "bridge")
        ip("-n", first, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            if i > 0:
                ip("-n", first, "link", "add", f"to{i}", "type", "veth", "peer", "name", "wire", "netns", name)
                ip("-n", first, "link", "set", f"to{i}", "master", "bridge", "up")
                ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{address(i)}/24", "dev", "wire" if i else "bridge")
            hosts = Path("/etc/netns") / name / "hosts"  # laid over /etc/hosts; gloo listens at the host's name
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{address(i)} {socket.gethostname()}\n")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def cut(namespaces, number):
    """Cut the network between a process and the others."""
    subprocess.run(["ip", "-n", namespaces[0], "link", "set", f"to{number}", "down"], check=True)


def mend(namespaces, number):
    """Join it to the others again."""
    subprocess.run(["ip", "-n", namespaces[0], "link", "set", f"to{number}", "up"], check=True)


def read(output):
    """The output of a process so far, at whose end its file then is."""
    output.seek(0)
    return output.read()


def address(number):
    """Address of a process in its namespace."""
    return f"10.77.0.{number + 1}"


def start(args, *, processes, devices, more=(), namespaces=None):
    """One process of a command for each of ``processes``, each with some CPU devices; ``more`` are flags of each.

    ``namespaces`` are those of ``network``.
    """
    coordinator = f"{address(0) if namespaces else 'localhost'}:{free_port()}"
    environment = cpu_environment(devices)
    started = []
    for number in range(processes):
        within = ["ip", "netns", "exec", namespaces[number]] if namespaces else []
        own = [*distributed_flags(number, processes, coordinator), *(more[number] if more else [])]
        cached = ["-m", "tests.cached"] if processes > 1 else []
        command = [*within, sys.executable, *cached, *map(str, args), *own]
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by finish; a full pipe would stop the process
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append((process, output))
    return started


def finish(started, timeout=240):
    """Exit status and output of each process; all are killed if one takes longer."""
    deadline = time.monotonic() + timeout
    try:
        for process, _ in started:
            process.wait(max(1, deadline - time.monotonic()))
    finally:
        outputs = []
        for process, output in started:
            process.kill()
            output.seek(0)
            outputs.append(output.read())
            output.close()
    return [(process.returncode, text) for (process, _), text in zip(started, outputs, strict=True)]


def run(args, **options):
    """``finish`` of ``start``, after a check that all ended well."""
    ended = finish(start(args, **options))
    assert [status for status, _ in ended] == [0] * len(ended), "\n".join(output[-2000:] for _, output in ended)
    return ended
