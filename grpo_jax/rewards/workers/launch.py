"""Start of the process that loads the rewards and forks workers; state and death of processes."""

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
    """The processor seconds of a process and whether it is runnable; (0, False) where ``/proc`` does not say."""
    try:
        ran = int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0]) / 1e9
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return 0.0, False
    return ran, state == b"R"


def start(
    rewards: Mapping[str, RewardFn], memory_bytes: int, deadline: float
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the process that loads the rewards and forks workers.

    Args:
        rewards: by name; pickled by ``cloudpickle``.
        memory_bytes: address space of a worker.
        deadline: seconds for a sample of an async reward.

    Returns:
        The control connection to the process, and the process.

    Raises:
        ValueError: a reward cannot be pickled, or cannot be loaded there.
    """
    try:
        packed = cloudpickle.dumps(dict(rewards))
    except Exception as error:
        raise ValueError(f"a reward cannot be pickled for worker processes: {type(error).__name__}: {error}") from error
    control, remote_end = socket.socketpair()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.rewards.workers.worker", str(remote_end.fileno())],
        pass_fds=(remote_end.fileno(),),
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # so that Ctrl-C reaches only the run, which closes the pool
    )
    remote_end.close()
    control.settimeout(START_SECONDS)
    with suppress(OSError):  # then no reply is received either
        setup = {"path": sys.path, "rewards": packed, "memory_bytes": memory_bytes, "deadline": deadline}
        send(control, pickle.dumps(setup))
    reply = json.loads(receive(control) or b'{"error": "the process died, or took more than two minutes"}')
    if "error" in reply:
        control.close()
        process.kill()
        process.wait()
        raise ValueError(f"the rewards {[*rewards]} cannot be loaded in a worker process:\n{reply['error']}")
    control.settimeout(None)
    return control, process


def death(status: int) -> str:
    """How a process died, from its wait status."""
    if status < 0:
        return "its process has ended"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        known = -code in [each.value for each in signal.Signals]
        return f"its process was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"its process ended with exit status {code}"
