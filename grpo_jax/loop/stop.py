"""Requests to stop a run, by signals and alarms, and the exit status that says which it was."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, Literal

from grpo_jax.heartbeat import TRY_AGAIN

Reason = Literal["SIGINT", "alarm", "SIGTERM"]
INTERRUPTED, PREEMPTED = 130, TRY_AGAIN
"""Exit statuses of a stopped run: by Ctrl-C or an alarm; by SIGTERM, as of a preempted machine, after which a launcher
may start the same command again."""
STATUSES: dict[Reason, int] = {"SIGINT": INTERRUPTED, "alarm": INTERRUPTED, "SIGTERM": PREEMPTED}
"""Exit status by reason; the first of several reasons counts, for a launcher must not undo what a user decided."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A run stopped on request.

    Args:
        reason: why.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, reason: Reason = "SIGINT"):
        super().__init__(f"stopped by {reason}")
        self.status = STATUSES[reason]


def first_reason(reasons: Iterable[Reason | None]) -> Reason | None:
    """The reason that counts among those of all processes; None if there is none."""
    found = set(reasons)
    return next((reason for reason in STATUSES if reason in found), None)


class StopSignals:
    """A context in which SIGTERM and Ctrl-C request a stop instead of ending the process; a second Ctrl-C interrupts.

    Args:
        say: prints a line.

    Attributes:
        reason: why this process was requested to stop; None if it was not.
    """

    def __init__(self, say: Callable[[str], None]):
        self.reason: Reason | None = None
        self._say, self._is_interrupted = say, False

    def __enter__(self) -> StopSignals:
        with ExitStack() as stack:
            for number in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, self._handle))
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def request(self, reason: Reason) -> None:
        """Request a stop."""
        self.reason = first_reason((self.reason, reason))

    def _handle(self, number: int, _frame: Any) -> None:
        is_by_hand = number == signal.SIGINT
        if is_by_hand and self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted |= is_by_hand
        self.request("SIGINT" if is_by_hand else "SIGTERM")
        more = "; again to interrupt at once" if is_by_hand else ""
        # It may have come in the middle of a write to the same stream, which cannot be entered again; or the log of the
        # output is on a full disk. Neither may end the run before it is saved.
        with suppress(RuntimeError, OSError):
            self._say(f"{signal.Signals(number).name}: stopping at the next safe place{more}")
