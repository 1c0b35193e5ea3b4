"""The process that scores: one that has loaded the rewards and forks, and its forks, each with one batch at a time.

Started by ``pool`` as ``python -m grpo_jax.rewards.workers.worker``; it never imports jax. A message is its length and
its body.
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
        for reward in rewards.values():
            warm_up(reward)
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
                pid = fork(control, rewards, setup["memory_bytes"], setup["deadline"])
                alive.add(pid)
                send(control, json.dumps({"pid": pid}).encode())
            case "slow":
                for pid in descendants(asked["pid"]):
                    with suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, pid, 10)  # a tenth of what others in its session get
            case "usual":
                try:
                    for pid in descendants(asked["pid"]):
                        os.setpriority(os.PRIO_PROCESS, pid, 0)
                    done = True
                except OSError:
                    done = False
                send(control, json.dumps({"done": done}).encode())
            case "end":
                alive.discard(asked["pid"])
                send(control, json.dumps({"status": end(asked["pid"], ended)}).encode())
        reap(ended, alive)
    for pid in alive:
        end(pid, ended)
    reap(ended, set())


def fork(control: socket.socket, rewards: dict[str, Any], memory_bytes: int, deadline: float) -> int:
    """A new worker; it answers on the first and prints to the second descriptor that come with the request."""
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
            LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        with suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for stream in (sys.stdout, sys.stderr):  # so that a worker's last words before it is killed are seen
            cast(TextIOWrapper, stream).reconfigure(line_buffering=True)
        serve(socket.socket(fileno=descriptor), rewards, deadline)
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


def serve(connection: socket.socket, rewards: dict[str, Any], deadline: float) -> None:
    """Score the batches that come, until no more do."""
    while (request := receive(connection)) is not None:
        name, prompts, completions, columns = pickle.loads(request)
        try:
            answer = scored(rewards[name], prompts, completions, columns, deadline)
        except MemoryError:
            answer = fault("memory")
        except InvalidScoresError as error:
            answer = {"fault": "wrong", "detail": str(error)} if not is_per_sample(rewards[name]) else fault("raised")
        except BaseException:
            answer = fault("raised")
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        send(connection, json.dumps(answer).encode())
        if answer.get("fault") == "memory":
            return  # an object whose allocation failed may be left half made


def scored(
    reward: Any, prompts: list[str], completions: list[str], columns: dict[str, list[Any]], deadline: float
) -> dict[str, Any]:
    """The scores of a batch as JSON."""
    if not (is_async(reward) and is_per_sample(reward)):
        values = invoke(reward, arguments(reward, prompts, completions, columns))
        return {"scores": [as_answer(graded) for graded in as_reward_outputs(values, completions)]}
    rows = [
        arguments(reward, [prompt], [completion], {name: [values[row]] for name, values in columns.items()})
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    found = invoke_each(reward, rows, seconds=deadline)
    return {"scores": [answer_of_one(values, each) for values, each in zip(found, completions, strict=True)]}


def answer_of_one(values: Any, completion: str) -> dict[str, Any]:
    """What an async reward gave for one sample, or the fault that it raised."""
    if isinstance(values, TimeoutError):
        return {"fault": "deadline", "detail": "it took longer than its deadline"}
    try:
        if isinstance(values, BaseException):
            raise values
        return as_answer(as_reward_outputs(values, [completion])[0])
    except Exception:
        return fault("raised")


def fault(kind: str) -> dict[str, Any]:
    """The exception that is being handled, as an answer."""
    return {"fault": kind, "detail": traceback.format_exc()}


def as_answer(graded: RewardOutput) -> dict[str, Any]:
    """A score as JSON; NaN is a fault of the reward."""
    if graded.failed:
        return {"fault": "nan", "detail": "the reward returned NaN; None says that there is no score"}
    return {"score": graded.score, "details": dict(graded.details), "note": graded.note, "steps": list(graded.steps)}


if __name__ == "__main__":
    main()
