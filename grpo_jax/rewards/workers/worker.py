"""Worker processes: a parent that loads the rewards and forks, and its forks, each of which scores one job at a time.

The parent is started as ``python -m grpo_jax.rewards.workers.worker`` and never imports jax. A message on a connection
is its length (4 bytes) and its body.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, cast

from grpo_jax.rewards.calling import arguments, invoke, invoke_each, is_async, is_per_sample, warm_up
from grpo_jax.rewards.compose import InvalidScoresError, RewardOutput, as_reward_outputs
from grpo_jax.rewards.workers.processes import children, descendants

LENGTH = struct.Struct("!I")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def send(connection: socket.socket, body: bytes) -> None:
    """Write a message.

    Args:
        connection: the socket.
        body: the message.

    Raises:
        OSError: the connection is closed.
    """
    connection.sendall(LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes | None:
    """The next message; None if the connection is closed."""
    with suppress(OSError):
        header = _receive_bytes(connection, LENGTH.size)
        if header is not None:
            return _receive_bytes(connection, LENGTH.unpack(header)[0])
    return None


def _receive_bytes(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def main() -> None:
    """Load the rewards and report errors, then carry out requests to fork, slow down, speed up and kill workers."""
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = pickle.loads(receive(control) or b"")
    sys.path[:] = setup["path"]
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopts and reaps the children of killed workers
    try:
        rewards = pickle.loads(setup["rewards"])
        for reward in rewards.values():
            warm_up(reward)
    except BaseException:
        send(control, json.dumps({"error": traceback.format_exc()}).encode())
        return
    send(control, b"{}")
    ended: dict[int, int] = {}
    alive: set[int] = set()
    while (message := receive(control)) is not None:
        request = json.loads(message)
        match request["operation"]:
            case "fork":
                pid = fork(control, rewards, setup["memory_bytes"], setup["deadline"])
                alive.add(pid)
                send(control, json.dumps({"pid": pid}).encode())
            case "lower_priority":
                for pid in descendants(request["pid"]):
                    with suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, pid, 10)  # a tenth of the processor time of nice 0
            case "restore_priority":
                try:
                    for pid in descendants(request["pid"]):
                        os.setpriority(os.PRIO_PROCESS, pid, 0)
                    restored = True
                except OSError:
                    restored = False
                send(control, json.dumps({"restored": restored}).encode())
            case "end":
                alive.discard(request["pid"])
                send(control, json.dumps({"status": end(request["pid"], ended)}).encode())
        reap(ended, alive)
    for pid in alive:
        end(pid, ended)
    reap(ended, set())


def fork(control: socket.socket, rewards: dict[str, Any], memory_bytes: int, deadline: float) -> int:
    """Fork a worker, which replies on the first and prints to the second descriptor that come with the request.

    Args:
        control: the connection on which the descriptors arrive.
        rewards: by name.
        memory_bytes: address space of the worker.
        deadline: seconds for a sample of an async reward.

    Returns:
        The worker's process id.
    """
    _, (descriptor, output), _, _ = socket.recv_fds(control, 1, 2)
    pid = os.fork()
    if pid:
        os.close(descriptor)
        os.close(output)
        return pid
    control.close()
    try:
        os.setsid()
        if sys.platform == "linux":
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for stream in (sys.stdout, sys.stderr):  # so that the last lines of a killed worker are not lost
            cast(TextIOWrapper, stream).reconfigure(line_buffering=True)
        serve(socket.socket(fileno=descriptor), rewards, deadline)
    finally:
        os._exit(0)


def end(pid: int, ended: dict[int, int]) -> int:
    """Kill a worker and all its descendants.

    Args:
        pid: the worker.
        ended: wait statuses of workers that ended by themselves, by pid; the worker's is removed.

    Returns:
        The worker's wait status; -1 if it is unknown.
    """
    tree = list(descendants(pid)) if pid not in ended else []
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # a process group outlives its leader
    for descendant in tree:
        with suppress(OSError):
            os.kill(descendant, signal.SIGKILL)
    if pid not in ended:
        with suppress(ChildProcessError):
            ended[pid] = os.waitpid(pid, 0)[1]
    return ended.pop(pid, -1)


def reap(ended: dict[int, int], alive: set[int]) -> None:
    """Record workers that ended by themselves, and kill their orphans, which this process has adopted.

    Args:
        ended: wait statuses by pid; those of ended workers are added.
        alive: process ids of the workers that have not been killed.
    """
    for child in children(os.getpid()):
        if child not in alive:
            for descendant in list(descendants(child)):
                with suppress(OSError):
                    os.kill(descendant, signal.SIGKILL)
    with suppress(ChildProcessError):
        while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
            if reaped[0] in alive:
                ended[reaped[0]] = reaped[1]


def serve(connection: socket.socket, rewards: dict[str, Any], deadline: float) -> None:
    """Score jobs until the connection is closed.

    Args:
        connection: where jobs arrive and replies go.
        rewards: by name.
        deadline: seconds for a sample of an async reward.
    """
    while (job := receive(connection)) is not None:
        name, prompts, completions, columns = pickle.loads(job)
        try:
            reply = score(rewards[name], prompts, completions, columns, deadline)
        except MemoryError:
            reply = current_error("memory")
        except InvalidScoresError as error:
            is_batch = not is_per_sample(rewards[name])
            reply = {"error": "invalid", "detail": str(error)} if is_batch else current_error("raised")
        except BaseException:
            reply = current_error("raised")
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        send(connection, json.dumps(reply).encode())
        if reply.get("error") == "memory":
            return  # a failed allocation may leave objects in an inconsistent state


def score(
    reward: Any, prompts: list[str], completions: list[str], columns: dict[str, list[Any]], deadline: float
) -> dict[str, Any]:
    """The reply to a job: ``{"scores": [...]}`` with the fields of a ``RewardOutput`` or an error for each sample.

    Args:
        reward: the function.
        prompts, completions: ``[B]`` texts.
        columns: ``[B]`` values each.
        deadline: seconds for each sample of an async reward that is declared ``per_sample``.
    """
    if not (is_async(reward) and is_per_sample(reward)):
        values = invoke(reward, arguments(reward, prompts, completions, columns))
        return {"scores": [as_reply(output) for output in as_reward_outputs(values, completions)]}
    calls = [
        arguments(reward, [prompt], [completion], {name: [values[row]] for name, values in columns.items()})
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    results = invoke_each(reward, calls, seconds=deadline)
    return {"scores": [_async_reply(result, each) for result, each in zip(results, completions, strict=True)]}


def _async_reply(result: Any, completion: str) -> dict[str, Any]:
    """The reply for one sample of an async reward: what it returned or raised."""
    if isinstance(result, TimeoutError):
        return {"error": "deadline", "detail": "it took longer than its deadline"}
    try:
        if isinstance(result, BaseException):
            raise result
        return as_reply(as_reward_outputs(result, [completion])[0])
    except Exception:
        return current_error("raised")


def current_error(kind: str) -> dict[str, Any]:
    """The reply for the exception that is being handled."""
    return {"error": kind, "detail": traceback.format_exc()}


def as_reply(output: RewardOutput) -> dict[str, Any]:
    """A ``RewardOutput`` as JSON; NaN is an error."""
    if output.failed:
        return {"error": "nan", "detail": "the reward returned NaN; to abstain it must return None"}
    return {"score": output.score, "details": dict(output.details), "note": output.note, "steps": list(output.steps)}


if __name__ == "__main__":
    main()
