"""The process that has loaded the rewards and forks workers: its start and its death."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import cloudpickle

from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.workers.worker import receive, send

START_SECONDS = 120


def processor_time(pid: int) -> tuple[float, bool]:
    """Seconds for which a process has run, and whether it would now; (0, no) where the system does not tell."""
    try:
        ran = int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0]) / 1e9
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return 0.0, False
    return ran, state == b"R"


def start(
    rewards: Mapping[str, RewardFn], memory_bytes: int, deadline: float
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that has loaded the rewards and forks, and the connection to it.

    Raises:
        ValueError: it could not load them.
    """
    try:
        packed = cloudpickle.dumps(dict(rewards))
    except Exception as error:
        raise ValueError(f"a reward cannot be taken to another process: {type(error).__name__}: {error}") from error
    control, theirs = socket.socketpair()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.rewards.workers.worker", str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # Ctrl-C is for the run, which then ends this in order
    )
    theirs.close()
    control.settimeout(START_SECONDS)
    with suppress(OSError):  # it then says nothing
        setup = {"path": sys.path, "rewards": packed, "memory_bytes": memory_bytes, "deadline": deadline}
        send(control, pickle.dumps(setup))
    said = json.loads(receive(control) or b'{"error": "its process died, or took two minutes"}')
    if "error" in said:
        control.close()
        process.kill()
        process.wait()
        raise ValueError(f"the rewards {[*rewards]} could not be loaded in a process of their own:\n{said['error']}")
    control.settimeout(None)
    return control, process


def death(status: int) -> str:
    """How a process died, from its wait status."""
    if status < 0:
        return "its process is gone"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        known = -code in [each.value for each in signal.Signals]
        return f"its process was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"its process ended with exit status {code}"
