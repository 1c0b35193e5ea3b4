"""Rewards in worker processes: a sample that hangs, crashes or exhausts memory loses only its own score."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from grpo_jax.rewards.calling import arguments, is_async, is_per_sample
from grpo_jax.rewards.compose import RewardFn, RewardOutput
from grpo_jax.rewards.workers.dispatcher import MAX_LINES, Dispatcher
from grpo_jax.rewards.workers.jobs import Job, RewardError

MAX_ERRORS = 1000


class RewardPool:
    """A context manager that runs rewards in worker processes, each sample with a deadline and a memory limit.

    ``rewards[name]`` is a function of the same form as the original reward, to be passed to ``weighted``. Workers are
    forks of one process that has loaded the rewards, so a new one costs milliseconds. They do not import jax and share
    nothing with this process, and they end when it ends. Lines that they print are shown after each call, prefixed with
    the reward's name.

    A reward that is declared ``per_sample`` scores each sample separately, on any worker. A sample that exceeds its
    deadline, raises, returns NaN or something other than a number, exhausts its memory or kills its process has no
    score and is listed by ``take_errors``; all other samples are scored as without a pool. Samples that hang do not
    delay the others: a worker that takes five times as long as usual for its reward continues at low priority (at most
    32 of them) and another takes its place. So hanging samples lengthen a step by about one deadline if they sleep, and
    by up to four if they compute and processors are scarce.

    Any other reward is called once with the whole batch, in its own process, which is kept between calls with its
    caches and connections. If that call fails, the whole batch has no score from this reward. Samples of an ``async``
    reward that is declared ``per_sample`` are awaited together there, each with its own deadline.

    Args:
        rewards: by name; functions that ``cloudpickle`` can pickle, from a module or a notebook.
        workers: number of samples scored at once. Default: the number of processors plus one, so that none is idle
            while a sample waits.
        deadline: seconds for one sample and one reward. On Linux, time in which a runnable sample waits for a processor
            is added, up to three deadlines, so that a busy machine does not lose scores.
        batch_deadline: seconds for one call of a reward with a whole batch.
        memory_bytes: address space of a worker, including what it inherits (about 100 MiB plus the loaded rewards).
        show: called with each line that a reward prints, at most 20 lines for each call and reward.

    Raises:
        ValueError: ``rewards`` is empty, a number is not above 0, or a reward cannot be pickled or loaded. When called:
            a batch reward returned something other than one score for each completion.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFn],
        *,
        workers: int | None = None,
        deadline: float = 10.0,
        batch_deadline: float = 300.0,
        memory_bytes: int = 2 << 30,
        show: Callable[[str], None] = print,
    ):
        self.workers = default_workers() if workers is None else workers
        self.deadline, self.batch_deadline = deadline, batch_deadline
        if not rewards:
            raise ValueError("rewards is empty; a pool needs at least one reward")
        sizes = {"workers": self.workers, "deadline": deadline, "batch_deadline": batch_deadline}
        for name, value in {**sizes, "memory_bytes": memory_bytes}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.rewards: dict[str, RewardFn] = {name: partial(self._score, name) for name in rewards}
        self._functions = dict(rewards)
        self._sampled = [name for name, reward in rewards.items() if is_per_sample(reward) and not is_async(reward)]
        self._show = show
        self._ahead: dict[bytes, list[Job]] = {}
        self._errors: deque[RewardError] = deque(maxlen=MAX_ERRORS)
        self._dispatcher = Dispatcher(rewards, memory_bytes=memory_bytes, **sizes)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and cancel the jobs that are not done."""
        self._dispatcher.close()

    @property
    def replaced(self) -> int:
        """The number of workers that were killed or died so far."""
        return self._dispatcher.replaced

    def score_ahead(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Start to score a sample with every ``per_sample`` reward while other completions are still being sampled.

        A later call of the rewards with the same row returns these scores; ``drop_ahead`` drops those that are left.

        Args:
            prompt, completion: the texts.
            columns: the row's values by column, not lists.
        """
        for name in self._sampled:
            job = self._job(name, [prompt], [completion], {key: [value] for key, value in columns.items()})
            self._ahead.setdefault(job.body, []).append(job)
            self._dispatcher.submit(job)

    def take_errors(self) -> list[RewardError]:
        """The errors of scores that were returned since the last call, at most the newest thousand."""
        errors = [*self._errors]
        self._errors.clear()
        return errors

    def drop_ahead(self) -> None:
        """Forget the scores of ``score_ahead`` that no batch has taken."""
        self._ahead.clear()

    def probe(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Score one sample with every reward, to find rewards that cannot run before compute is spent.

        Args:
            prompt, completion: the texts.
            columns: the row's values by column, not lists.

        Raises:
            ValueError: a reward needs a missing column, raised, died or returned something other than a score. The
                message has the traceback.
        """
        for reward in self.rewards.values():
            reward([prompt], [completion], **{name: [value] for name, value in columns.items()})
        for error in self.take_errors():
            raise ValueError(
                f"reward {error.reward!r} cannot score a first example ({error.kind}); the columns are {[*columns]}:\n"
                f"{error.detail}"
            )

    def start(
        self, name: str, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[Job]:
        """Start to score a batch with one reward; ``result`` waits for the scores.

        Args:
            name: of the reward.
            prompts, completions: ``[B]`` texts.
            columns: ``[B]`` values each.
        """
        if not completions:
            return []
        if name in self._sampled:
            return [
                self._started(name, prompt, completion, {key: [values[row]] for key, values in columns.items()})
                for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
            ]
        job = self._job(name, prompts, completions, columns)
        self._dispatcher.submit(job)
        return [job]

    def result(self, jobs: Sequence[Job]) -> list[RewardOutput]:
        """Wait for the scores of a batch.

        Args:
            jobs: of ``start``.
        """
        outputs = []
        try:
            for job in jobs:
                outputs += self._dispatcher.result(job.future)
                self._errors.extend(job.errors)
        finally:
            self._show_printed()
        return outputs

    def _score(self, name: str, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[RewardOutput]:
        return self.result(self.start(name, prompts, completions, columns))

    def _started(self, name: str, prompt: str, completion: str, columns: Mapping[str, list[Any]]) -> Job:
        """The job of a sample: that of ``score_ahead`` if there is one."""
        job = self._job(name, [prompt], [completion], columns)
        if jobs := self._ahead.get(job.body):
            return jobs.pop()
        self._dispatcher.submit(job)
        return job

    def _show_printed(self) -> None:
        dispatcher = self._dispatcher
        for name, lines in dispatcher.printed.items():
            count, dispatcher.num_printed[name] = dispatcher.num_printed[name], 0
            for _ in range(len(lines)):
                self._show(f"{name}: {lines.popleft()}")
            if count > MAX_LINES:
                self._show(f"{name}: ... {count - MAX_LINES} earlier lines are not shown")

    def _job(self, name: str, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Job:
        reward = self._functions[name]
        try:
            names = arguments(reward, prompts, completions, columns)[1].keys()
        except ValueError as error:
            raise ValueError(f"reward {name!r} {error}") from error
        body = pickle.dumps((name, prompts, completions, {key: columns[key] for key in columns if key in names}))
        return Job(name, prompts, completions, body, name not in self._sampled, Future())


def default_workers() -> int:
    """The default number of workers: the number of processors plus one."""
    return (os.cpu_count() or 1) + 1
