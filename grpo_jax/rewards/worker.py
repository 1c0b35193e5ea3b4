"""The process that scores: one that has loaded the rewards and forks, and its forks, each with one sample at a time.

Started by ``pool`` as ``python -m grpo_jax.rewards.worker``; it never imports jax. Messages are a length and a body.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from typing import Any

from grpo_jax.rewards.compose import Graded, as_graded
from grpo_jax.rewards.sandbox import children, descendants

LENGTH = struct.Struct("!I")
BECOME_REAPER = 36  # PR_SET_CHILD_SUBREAPER
LIBC = ctypes.CDLL(None)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def send(connection: socket.socket, body: bytes) -> None:
    """Write a message.

    Raises:
        OSError: the other side is gone.
    """
    connection.sendall(LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes | None:
    """Read a message; None where the other side is gone."""
    with suppress(OSError):
        head = _exactly(connection, LENGTH.size)
        if head is not None:
            return _exactly(connection, LENGTH.unpack(head)[0])
    return None


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main() -> None:
    """Load the rewards, say whether that went well, then fork, slow down and end workers as asked."""
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = pickle.loads(receive(control) or b"")
    sys.path[:] = setup["path"]
    if sys.platform == "linux":
        # What a killed worker leaves behind comes here, and is reaped.
        LIBC.prctl(BECOME_REAPER, 1, 0, 0, 0)
    try:
        rewards = pickle.loads(setup["rewards"])
    except BaseException:
        send(control, json.dumps({"error": traceback.format_exc()}).encode())
        return
    send(control, b"{}")
    ended: dict[int, int] = {}
    alive: set[int] = set()
    while (request := receive(control)) is not None:
        asked = json.loads(request)
        match asked["ask"]:
            case "fork":
                pid = fork(control, rewards, setup["memory_bytes"])
                alive.add(pid)
                send(control, json.dumps({"pid": pid}).encode())
            case "slow":
                for pid in descendants(asked["pid"]):
                    with suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, pid, 10)  # a tenth of what others in its session get
            case "end":
                alive.discard(asked["pid"])
                send(control, json.dumps({"status": end(asked["pid"], ended)}).encode())
        reap(ended, alive)
    for pid in alive:
        end(pid, ended)
    reap(ended, set())


def fork(control: socket.socket, rewards: dict[str, Any], memory_bytes: int) -> int:
    """A new worker, which answers on the descriptor that comes with the request."""
    _, (descriptor,), _, _ = socket.recv_fds(control, 1, 1)
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    control.close()
    try:
        os.setsid()
        if sys.platform == "linux":
            LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        with suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # what rewards print would tear the live view
            os.dup2(null, stream)
        serve(socket.socket(fileno=descriptor), rewards)
    finally:
        os._exit(0)


def end(pid: int, ended: dict[int, int]) -> int:
    """Kill a worker and what it started, and give its wait status; -1 where it is not known."""
    tree = list(descendants(pid)) if pid not in ended else []
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # a group outlives its leader
    for each in tree:
        with suppress(OSError):
            os.kill(each, signal.SIGKILL)
    if pid not in ended:
        with suppress(ChildProcessError):
            ended[pid] = os.waitpid(pid, 0)[1]
    return ended.pop(pid, -1)


def reap(ended: dict[int, int], alive: set[int]) -> None:
    """Take note of workers that have ended by themselves; end what they left, which comes to this process."""
    for child in children(os.getpid()):
        if child not in alive:
            for each in list(descendants(child)):
                with suppress(OSError):
                    os.kill(each, signal.SIGKILL)
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] in alive:
                ended[found[0]] = found[1]


def serve(connection: socket.socket, rewards: dict[str, Any]) -> None:
    """Score what comes, until nothing more does."""
    while (task := receive(connection)) is not None:
        name, prompt, completion, columns = pickle.loads(task)
        try:
            values = rewards[name]([prompt], [completion], **{key: [value] for key, value in columns.items()})
            answer = as_answer(as_graded(values, [completion])[0])
        except MemoryError:
            answer = {"fault": "memory", "detail": traceback.format_exc()}
        except BaseException:
            answer = {"fault": "raised", "detail": traceback.format_exc()}
        send(connection, json.dumps(answer).encode())
        if answer.get("fault") == "memory":
            return  # whatever did not get its memory may be half made


def as_answer(graded: Graded) -> dict[str, Any]:
    """A score as JSON; one that is not a number is a fault of the reward."""
    if graded.score is not None and math.isnan(graded.score):
        return {"fault": "nan", "detail": "the reward returned NaN; None says that there is no score"}
    return {"score": graded.score, "details": dict(graded.details), "note": graded.note, "steps": list(graded.steps)}


if __name__ == "__main__":
    main()
