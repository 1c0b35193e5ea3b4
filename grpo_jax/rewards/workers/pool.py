"""Rewards computed in processes of their own: a sample that hangs, dies or eats memory costs its own score alone."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from grpo_jax.rewards.calling import arguments, is_async, is_per_sample
from grpo_jax.rewards.compose import RewardFn, RewardOutput
from grpo_jax.rewards.workers.dispatcher import MOST_LINES, Dispatcher
from grpo_jax.rewards.workers.jobs import Job, RewardError


class RewardPool:
    """A context in which rewards run in other processes, each sample under a deadline and a memory cap of its own.

    ``rewards[name]`` is the reward of that name as a function of the same form, to be passed on to ``weighted``.
    Workers are forks of one process that has loaded the rewards, so a new one costs milliseconds. They import no jax
    and share nothing with this process. All of them end when this process does. What they print is shown after each
    call, behind the reward's name.

    A reward that is declared ``per_sample`` scores each sample alone, on any worker. A sample that takes too long,
    raises, returns NaN or no number, exhausts its memory or kills its process has no score and stands among
    ``take_errors``; every other sample is scored as without a pool. Samples that hang do not hold up the others: a
    worker that takes five times as long as is usual for its reward goes on at a low priority, up to 32 of them, and
    another takes its place. So a step waits about one deadline longer where samples sleep, and up to four where they
    compute without end and processors are scarce.

    Any other reward is called once with the whole batch, in a process of its own that is kept from call to call, caches
    and connections included. Where the call fails, the whole batch has no score of this reward. Samples of an ``async``
    reward that is declared ``per_sample`` are awaited together there, each under its own deadline.

    Args:
        rewards: by name; functions that ``cloudpickle`` can take: of a module, or of a notebook.
        workers: how many score samples at once; by default one more than there are processors, so that none of these is
            idle while a sample waits for something.
        deadline: seconds for one sample and one reward. On Linux one that could run but waits for a processor is given
            the time it waited, up to three deadlines, so that a busy machine loses no honest score.
        batch_deadline: seconds for one call of a reward with a whole batch.
        memory_bytes: address space of a worker, what it inherits (some 100 MiB, and what the rewards load) included.
        show: called with each line that a reward prints, at most 20 of them for each call and reward.

    Raises:
        ValueError: no rewards, or a number that is not above 0; a reward cannot be taken to another process or loaded
            there. When called: a reward of batches returned another number of scores, or something else than scores.
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
            raise ValueError("there must be rewards to run")
        sizes = {"workers": self.workers, "deadline": deadline, "batch_deadline": batch_deadline}
        for name, value in {**sizes, "memory_bytes": memory_bytes}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        self.rewards: dict[str, RewardFn] = {name: partial(self._score, name) for name in rewards}
        self._functions = dict(rewards)
        self._sampled = [name for name, reward in rewards.items() if is_per_sample(reward) and not is_async(reward)]
        self._show = show
        self._ahead: dict[bytes, list[Future[list[RewardOutput]]]] = {}
        self._dispatcher = Dispatcher(rewards, memory_bytes=memory_bytes, **sizes)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; what was not scored by then is cancelled."""
        self._dispatcher.close()

    @property
    def replaced(self) -> int:
        """How many workers were ended and replaced so far."""
        return self._dispatcher.replaced

    def ahead(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Begin to score a sample with every reward of single samples, while others are still being drawn.

        A later call of the rewards with the same row takes these scores. What is asked ahead of that and never called
        for is dropped with ``take_errors``.

        Args:
            prompt, completion: the texts.
            columns: the row's own values, not lists.
        """
        for name in self._sampled:
            task = self._task(name, [prompt], [completion], {key: [value] for key, value in columns.items()})
            self._ahead.setdefault(task.body, []).append(task.future)
            self._dispatcher.submit(task)

    def take_errors(self) -> list[RewardError]:
        """What could not be scored since the last call, the newest thousand."""
        errors = [self._dispatcher.errors.popleft() for _ in range(len(self._dispatcher.errors))]
        self._ahead.clear()
        return errors

    def probe(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Score one sample with every reward, so that one that cannot run is found before compute is spent.

        Raises:
            ValueError: one needs a column that is not there, raised, died or returned something other than a score;
                with its traceback.
        """
        for reward in self.rewards.values():
            reward([prompt], [completion], **{name: [value] for name, value in columns.items()})
        for fault in self.take_errors():
            raise ValueError(
                f"reward {fault.reward!r} cannot score a first example ({fault.kind}); the columns are {[*columns]}:\n"
                f"{fault.detail}"
            )

    def _score(self, name: str, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[RewardOutput]:
        if not completions:
            return []
        if name in self._sampled:
            futures = [
                self._begun(name, prompt, completion, {key: [values[row]] for key, values in columns.items()})
                for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
            ]
        else:
            task = self._task(name, prompts, completions, columns)
            self._dispatcher.submit(task)
            futures = [task.future]
        try:
            return [each for future in futures for each in self._dispatcher.result(future)]
        finally:
            self._show_printed()

    def _begun(
        self, name: str, prompt: str, completion: str, columns: Mapping[str, list[Any]]
    ) -> Future[list[RewardOutput]]:
        """The score of a sample to come: the one that was begun ahead, where there is one."""
        task = self._task(name, [prompt], [completion], columns)
        begun = self._ahead.get(task.body)
        if begun:
            return begun.pop()
        self._dispatcher.submit(task)
        return task.future

    def _show_printed(self) -> None:
        dispatcher = self._dispatcher
        for name, lines in dispatcher.printed.items():
            count, dispatcher.num_printed[name] = dispatcher.num_printed[name], 0
            for _ in range(len(lines)):
                self._show(f"{name}: {lines.popleft()}")
            if count > MOST_LINES:
                self._show(f"{name}: ... {count - MOST_LINES} earlier lines are not shown")

    def _task(self, name: str, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Job:
        reward = self._functions[name]
        try:
            taken = set(arguments(reward, prompts, completions, columns)[1])
        except ValueError as error:
            raise ValueError(f"reward {name!r} {error}") from error
        own = {key: values for key, values in columns.items() if key in taken}
        body = pickle.dumps((name, prompts, completions, own))
        return Job(name, prompts, completions, body, name not in self._sampled, Future())


def default_workers() -> int:
    """How many workers a pool has unless it is told."""
    return (os.cpu_count() or 1) + 1
