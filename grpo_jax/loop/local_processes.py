"""Several processes on this host, as on several hosts, with CPU devices: for benchmarks and tests."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    """A port that no process listens at, for the coordinator."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def cpu_environment(devices: int) -> dict[str, str]:
    """Environment variables of a process with so many CPU devices, which imports this repository."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }


def distributed_flags(number: int, count: int, address: str) -> list[str]:
    """The flags with which an experiment joins others; none for a single process.

    Args:
        number: of the process.
        count: of all processes.
        address: of the first one, with a port.
    """
    if count == 1:
        return []
    joined = {"coordinator": address, "num-processes": count, "process-id": number}
    return [word for name, value in joined.items() for word in (f"--distributed.{name}", str(value))]


def run_together(commands: Sequence[Sequence[str]], *, devices: int) -> list[str]:
    """The output of each of several processes that run at once; all are killed if one fails.

    Args:
        commands: of each process.
        devices: CPU devices of each.

    Raises:
        RuntimeError: a process failed; the message ends with the end of its output.
    """
    started, statuses = [], []
    try:
        for command in commands:
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below; a full pipe would stop the process
            environment = cpu_environment(devices)
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            started.append((process, output))
        while None in (statuses := [process.poll() for process, _ in started]) and not any(statuses):
            time.sleep(0.05)
    finally:
        outputs = []
        for process, output in started:
            process.kill()
            process.wait()
            output.seek(0)
            outputs.append(output.read())
            output.close()
    for status, text in zip(statuses, outputs, strict=True):  # of those that ended by themselves
        if status:
            raise RuntimeError(f"a process ended with status {status}:\n{text[-2000:]}")
    return outputs
