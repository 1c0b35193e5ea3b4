"""A claim on a folder, for file systems that cannot lock files."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
import warnings
from pathlib import Path

BEAT = 5.0
"""Seconds after which a claim is renewed."""
WATCH = 3 * BEAT
"""Seconds that a claim must not have changed in until it counts as that of a process that has ended."""


class Claim:
    """A file that the process which holds a folder changes every ``BEAT`` seconds, until it is closed.

    That of a process which was killed stops changing. No clock is compared with that of another host.

    Args:
        path: the file.

    Raises:
        RuntimeError: another process changes the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._owner = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4()}"
        self._count = 0
        self._closing = threading.Event()
        found = _text(path)
        if found:
            time.sleep(WATCH)
            self._require(found)
        self._write()
        time.sleep(BEAT / 5)  # another one that starts at the same moment overwrites it: the last one has the folder
        self._require(self._claim())
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the folder up."""
        self._closing.set()
        self._thread.join()
        if _text(self._path) == self._claim():
            self._path.unlink()

    def _claim(self) -> str:
        return f"{self._owner} {self._count}"

    def _write(self) -> None:
        self._path.write_text(self._claim())

    def _require(self, text: str) -> None:
        now = _text(self._path)
        if now != text:
            raise RuntimeError(
                f"another process is running in {self._path.parent} ({' '.join(now.split()[:4])}); wait for it or "
                "choose another folder"
            )

    def _renew(self) -> None:
        while not self._closing.wait(BEAT):
            try:
                self._require(self._claim())
            except RuntimeError as error:  # this process did not run for a while
                warnings.warn(str(error), stacklevel=2)
                return
            try:
                self._count += 1
                self._write()
            except OSError:
                self._count -= 1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
