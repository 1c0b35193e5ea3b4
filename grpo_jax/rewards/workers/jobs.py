"""Jobs of reward workers, and errors of samples that could not be scored."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from dataclasses import dataclass, field

from grpo_jax.rewards.compose import RewardOutput


@dataclass(frozen=True)
class RewardError:
    """A sample that a reward could not score; if a whole batch failed, its first sample.

    Attributes:
        reward: name of the reward.
        kind: ``deadline``, ``died``, ``memory``, ``raised`` or ``nan``.
        detail: a traceback, or how the process died.
        prompt, completion: the sample's texts.
    """

    reward: str
    kind: str
    detail: str
    prompt: str
    completion: str


@dataclass
class Job:
    """A call of one reward with one sample or a batch.

    Attributes:
        reward: name of the reward.
        prompts, completions: the texts, one for each sample.
        body: the pickled arguments, as sent to the worker.
        is_batch: whether the reward is called with a whole batch.
        future: receives one ``RewardOutput`` for each sample.
        errors: of samples that could not be scored; complete once the future is done.
    """

    reward: str
    prompts: list[str]
    completions: list[str]
    body: bytes
    is_batch: bool
    future: Future[list[RewardOutput]]
    errors: list[RewardError] = field(default_factory=list)


@dataclass
class Worker:
    """A worker process and its current job.

    Attributes:
        pid: process id.
        connection: socket for jobs and replies.
        output: descriptor of the pipe that holds the worker's stdout and stderr.
        batch_reward: the only reward that this worker scores, in whole batches; None if it scores single samples.
        jobs_done: number of finished jobs.
        job: the current job; None if idle.
        reward: name of the reward that last ran, to which output is attributed.
        started: ``time.monotonic`` at the start of the job.
        cpu_seconds_before: processor time of the process at the start of the job.
        due: ``time.monotonic`` at which the worker is killed.
        is_straggler: whether it runs at low priority because its job takes unusually long.
        unfinished_line: output after the last line break.
    """

    pid: int
    connection: socket.socket
    output: int
    batch_reward: str | None = None
    jobs_done: int = 0
    job: Job | None = None
    reward: str = ""
    started: float = 0.0
    cpu_seconds_before: float = 0.0
    due: float = 0.0
    is_straggler: bool = False
    unfinished_line: bytes = b""
