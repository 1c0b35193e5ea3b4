"""Runs of scripts by several processes on this host, as on several hosts."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(args, *, processes, devices, more=()):
    """One process of a command for each of ``processes``, each with some CPU devices; ``more`` are flags of each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for number in range(processes):
        flags = [
            *("--distributed.coordinator", f"localhost:{port}", "--distributed.num-processes", str(processes)),
            *("--distributed.process-id", str(number)),
        ]
        command = [sys.executable, *map(str, args), *(flags if processes > 1 else []), *(more[number] if more else [])]
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
