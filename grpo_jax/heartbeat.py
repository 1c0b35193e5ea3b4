"""Connection with the other processes of a run, and the end of a process that would wait for a lost one for ever.

Exchanges of values have timeouts (``hosts``); computations that span the processes have none. So every process beats in
JAX's coordination service, with the place where it is, and watches the others. It ends, with a message that names the
process and its host, if another one

- has not beaten for ``silence`` seconds: it was killed or stopped, or the network was cut;
- has ended with an error, which the message repeats;
- is behind this one for longer than an exchange may take: it is hung, or computes something else;
- has made no progress for that long, and neither has this one: one of the two is hung between exchanges.

If the first process is lost, JAX ends the others at once, since it holds the coordination service.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from grpo_jax import hosts

BEAT = 2.0
"""Seconds between beats."""
SILENCE = 60.0
"""Seconds without a beat after which a process counts as lost."""
GRACE = 15.0
"""Seconds that a process which knows of another one's error has to end by itself."""
TRY_AGAIN = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) if the same commands go on from the last checkpoint: another process was
lost, or this one was preempted."""
NOT_CONNECTED = 69
"""Exit status (EX_UNAVAILABLE) if the processes did not find each other. A launcher should retry a few times, since one
of them may only be late."""
CONNECTION_TIMEOUT = 60
"""Seconds in which all processes must have been started."""
COMMUNICATION = tuple(f"{code}: " for code in ("UNKNOWN", "UNAVAILABLE", "INTERNAL", "ABORTED", "DEADLINE_EXCEEDED"))
"""Beginnings of XLA's errors if the connection with another process is lost in a computation."""
_own: Watch | None = None


def connect(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout: float = hosts.TIMEOUT,
    connection_timeout: float = CONNECTION_TIMEOUT,
    silence: float = SILENCE,
) -> None:
    """Connect with the other processes and watch them, before JAX is used otherwise; again, it does nothing.

    If they do not come in time, the process ends with a message and status 69, since JAX cannot be interrupted here.

    Args:
        coordinator: address of the first process, host:port; None, and None for the others, where JAX finds them
            (TPU pods, SLURM, Open MPI 4).
        num_processes: how many there are.
        process_id: number of this one.
        timeout: seconds that processes wait for each other, as in ``hosts.set_timeout``.
        connection_timeout: seconds in which all must have been started.
        silence: seconds without a beat after which a process counts as lost.

    Raises:
        RuntimeError: JAX was used before.
        ValueError: JAX finds no cluster, or the address has no port.
    """
    global _own
    if jax.distributed.is_initialized():
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"distributed.coordinator is {coordinator!r}; it must be host:port, such as host0:8476")
    hosts.set_timeout(timeout)
    waiting = threading.Timer(connection_timeout, _not_connected, (coordinator, num_processes, process_id))
    waiting.daemon = True
    waiting.start()
    # JAX's notice of preemption would catch SIGTERM until the run does, and nothing would come of it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=int(2 * connection_timeout + 60),  # its own end has no message
            heartbeat_timeout_seconds=int(2 * silence),
        )
    except ValueError as error:
        if coordinator is not None:
            raise
        raise ValueError(
            "distributed.auto is set, and JAX finds no cluster that it knows (a TPU pod, SLURM, Open MPI 4); set "
            "distributed.coordinator, distributed.num_processes and distributed.process_id instead"
        ) from error
    finally:
        waiting.cancel()
    _own = Watch(silence)
    atexit.register(_own.close)


def report_failure(text: str, status: int) -> None:
    """Tell the other processes that this one ends with an error; without other processes, do nothing.

    Args:
        text: the error.
        status: the exit status, which the others end with too.
    """
    if _own is not None:
        _own.fail(text, status)


def await_verdict(error: BaseException) -> None:
    """After an error of communication, wait until it is known which process was lost, and end with that message.

    Return if it is not such an error, if there are no other processes, or if all of them live.

    Args:
        error: the error.
    """
    if _own is not None and str(error).startswith(COMMUNICATION):
        time.sleep(_own.silence + 3 * BEAT)


@dataclass
class Beat:
    """The latest beat of a process, and when it came.

    Attributes:
        value: number of the beat; progress, place and host of the process; whether it has ended, and its error.
        seen: seconds on this process's monotonic clock.
        moved: when its progress or error last changed.
    """

    value: dict[str, Any]
    seen: float
    moved: float


class Watch:
    """Beats of this process, and an eye on those of the others.

    One thread talks to the service, which may not answer; another one judges by what is known.

    Args:
        silence: seconds without a beat after which a process counts as lost.
    """

    def __init__(self, silence: float):
        self.silence = silence
        self._number, self._error, self._status, self._has_ended = 0, None, 0, False
        self._closing = threading.Event()
        self._lock = threading.Lock()
        started = time.monotonic()
        self._own, count = hosts.membership()
        unknown = {"number": -1, "progress": 0, "place": "the start", "host": "unknown host"}
        unknown |= {"error": None, "status": 0, "has_ended": False}
        self._moved = 0, started
        self._beats = {n: Beat(dict(unknown), started, started) for n in range(count)}

        for turn in (self._turn, self._judge):
            threading.Thread(target=self._repeat, args=(turn,), name=f"watch{turn.__name__}", daemon=True).start()

    def _repeat(self, turn: Callable[[], None]) -> None:
        while not self._closing.wait(BEAT):
            turn()

    def fail(self, text: str, status: int) -> None:
        """Publish an error of this process.

        Args:
            text: the error.
            status: exit status.
        """
        self._error, self._status = text, status
        self._tell()

    def _tell(self) -> None:
        telling = threading.Thread(target=self._turn, daemon=True)
        telling.start()
        telling.join(BEAT)  # the service may not answer

    def close(self) -> None:
        """At the end of the process: after an error, end without waiting for the others to end well.

        The first process waits until they know of it, since it holds the service by which they learn of it. Without an
        error, this process announces that it has ended, so that the others do not take its silence for a loss.
        """
        self._closing.set()
        if self._error is None:
            self._has_ended = True
            self._tell()
            return
        deadline = time.monotonic() + GRACE + 2 * BEAT
        while self._own == 0 and time.monotonic() < deadline and not all(self._has_failed(n) for n in self._beats):
            time.sleep(BEAT / 4)
            self._turn()
        _end(self._status)

    def _has_failed(self, process: int) -> bool:
        return process == self._own or self._beats[process].value["error"] is not None

    def _beat(self) -> None:
        progress, place, _ = hosts.progress()
        with self._lock:
            self._number += 1
            beat = {"number": self._number, "progress": progress, "place": place, "host": socket.gethostname()}
            beat |= {"error": self._error, "status": self._status, "has_ended": self._has_ended}
            text = json.dumps(beat)
            hosts.client().key_value_set(f"grpo_jax/beats/{self._own}", text, allow_overwrite=True)

    def _turn(self) -> None:
        """Beat, and read the beats of the others."""
        try:
            self._beat()
            found = hosts.client().key_value_dir_get("grpo_jax/beats/")
        except jax.errors.JaxRuntimeError:
            return
        now = time.monotonic()
        for key, text in found:
            process, value = int(key.rpartition("/")[2]), json.loads(text)
            last = self._beats[process]
            if value["number"] != last.value["number"]:
                is_same = all(value[name] == last.value[name] for name in ("progress", "error"))
                self._beats[process] = Beat(value, now, last.moved if is_same else now)

    def _judge(self) -> None:
        now, (progress, place, timeout) = time.monotonic(), hosts.progress()
        if progress != self._moved[0]:
            self._moved = progress, now
        if self._error is not None:  # it is about to end
            return
        for process, beat in self._beats.items():
            value = beat.value
            if process == self._own or value["has_ended"]:
                continue
            name = f"process {process} of {len(self._beats)} on {value['host']}"
            if value["error"] is not None and now - beat.moved > GRACE - 2 * BEAT:
                self._leave(f"{name} ended with an error: {value['error']}", value["status"])
            if now - beat.seen > self.silence and value["error"] is None:
                self._leave(
                    f"{name} has not been heard of for {self.silence:g} s; it was killed or stopped, or the network "
                    f"was cut (it was at or after {value['place']!r})",
                    TRY_AGAIN,
                )
            longest = timeout * hosts.LONGER
            has_stopped = now - beat.moved > longest
            if has_stopped and value["progress"] < progress:
                self._leave(
                    f"{name} has been at or after {value['place']!r} for {longest:g} s, while this one is at or after "
                    f"{place!r}; it is hung or out of step",
                    TRY_AGAIN,
                )
            if has_stopped and value["progress"] == progress and now - self._moved[1] > longest:
                self._leave(
                    f"{name} and this one have both been at or after {place!r} for {longest:g} s; one of them is hung, "
                    "or their work takes longer (--distributed.timeout)",
                    TRY_AGAIN,
                )

    def _leave(self, text: str, status: int) -> NoReturn:
        print(f"error: {text}", file=sys.stderr)
        self.fail(text, status)
        _end(status)


def _not_connected(coordinator: str | None, num_processes: int | None, process_id: int | None) -> NoReturn:
    if process_id is None:
        text = "distributed.auto: the processes that the cluster names did not all connect in time"
    elif process_id == 0:
        text = (
            f"not all of the {num_processes} processes connected to process 0 at {coordinator} in time; start them "
            "with the same --distributed.coordinator, an address that they can reach"
        )
    else:
        text = (
            f"process 0 did not answer at {coordinator} in time, or others did not; start process 0 on that host, and "
            f"all {num_processes} processes, and check that the port can be reached from here"
        )
    print(f"error: {text} (--distributed.connection-timeout sets the time)", file=sys.stderr)
    _end(NOT_CONNECTED)


def _end(status: int) -> NoReturn:
    """End the process now: its main thread may be in a computation that never ends."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # the cursor, which the live view hides
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
