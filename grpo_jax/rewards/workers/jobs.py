"""Jobs of reward workers, and the errors of samples that could not be scored."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from dataclasses import dataclass

from grpo_jax.rewards.compose import RewardOutput


@dataclass(frozen=True)
class RewardError:
    """A sample that a reward could not score; of a batch that failed as a whole, its first.

    Attributes:
        reward: its name.
        kind: ``deadline``, ``died``, ``memory``, ``raised`` or ``nan``.
        detail: a traceback, or how the process died.
        prompt, completion: the culprit.
    """

    reward: str
    kind: str
    detail: str
    prompt: str
    completion: str


@dataclass
class Job:
    """Samples to be scored by one reward in one call."""

    name: str
    prompts: list[str]
    completions: list[str]
    body: bytes
    is_batch: bool
    future: Future[list[RewardOutput]]


@dataclass
class Worker:
    """A process, and its current task.

    Attributes:
        batch_reward: the reward whose batches alone it scores; None where it scores samples of all the others.
    """

    pid: int
    connection: socket.socket
    output: int
    batch_reward: str | None = None
    done: int = 0
    task: Job | None = None
    name: str = ""
    started: float = 0.0
    had_run: float = 0.0
    due: float = 0.0
    straggling: bool = False
    unfinished_line: bytes = b""
