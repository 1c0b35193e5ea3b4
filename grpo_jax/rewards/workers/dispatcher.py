"""The thread that hands samples and batches to worker processes, and ends those that take too long."""

from __future__ import annotations

import json
import math
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from grpo_jax.rewards.calling import is_per_sample
from grpo_jax.rewards.compose import InvalidScoresError, RewardFn, RewardOutput
from grpo_jax.rewards.workers.jobs import Job, RewardError, Worker
from grpo_jax.rewards.workers.launch import death, processor_time, start
from grpo_jax.rewards.workers.worker import receive, send

FIRST_PATIENCE_SECONDS = 0.5
LEAST_PATIENCE_SECONDS = 0.25
USUAL_TIMES = 5.0
"""A worker that takes this many times what the reward usually takes is a straggler: another takes its place."""
MOST_STRAGGLERS = 32
MOST_WAITING = 3.0
"""Deadlines that a worker may have waited for a processor, which count for nothing, before its own ends it."""
SAMPLES_A_WORKER = 2000
"""Then a worker is replaced, so that what rewards keep does not add up."""
KEPT_ERRORS = 1000
STUCK_SECONDS = 10
"""A worker that stops in the middle of a message is taken for dead."""
MOST_LINES = 20
"""Printed lines of one reward that are shown for each call; the rest are counted."""


class Dispatcher:
    """A thread with the workers of a ``RewardPool``; see there for its arguments and for how it treats them.

    Attributes:
        errors: what could not be scored, the newest thousand.
        printed, num_printed: by reward, the last lines it printed and how many there were.
        replaced: how many workers were ended before the pool was closed.
        process: the one that has loaded the rewards and forks.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFn],
        *,
        workers: int,
        deadline: float,
        batch_deadline: float,
        memory_bytes: int,
    ):
        self._workers, self._deadline, self._batch_deadline = workers, deadline, batch_deadline
        self._functions = dict(rewards)
        self.errors: deque[RewardError] = deque(maxlen=KEPT_ERRORS)
        self.printed: dict[str, deque[str]] = {name: deque(maxlen=MOST_LINES) for name in rewards}
        self.num_printed = dict.fromkeys(rewards, 0)
        self.replaced = 0
        self._outstanding: set[Future[list[RewardOutput]]] = set()
        self._patience = dict.fromkeys(rewards, FIRST_PATIENCE_SECONDS)
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._control, self.process = start(rewards, memory_bytes, deadline)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, task: Job | None) -> None:
        """Have a task done, whose future gets the scores; None ends the thread.

        Raises:
            RuntimeError: the thread has ended.
        """
        if not self._thread.is_alive():
            raise RuntimeError("this pool is closed, or its thread has died: make another one")
        self._incoming.put(task)
        self._wake.send(b"x")

    def result(self, future: Future[list[RewardOutput]]) -> list[RewardOutput]:
        """The scores of a task that was submitted.

        Raises:
            RuntimeError: the thread died.
            InvalidScoresError: a batch reward returned something other than a score for each completion.
        """
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("the pool has died") from None

    def close(self) -> None:
        """End all workers; tasks that are not done are cancelled."""
        if self._thread.is_alive():
            self.submit(None)
            self._thread.join()
        self._control.close()
        self.process.wait()
        for each in (self._woken, self._wake):
            each.close()

    # What follows runs in the thread.

    def _run(self) -> None:
        waiting: dict[str | None, deque[Job]] = {}
        active: list[Worker] = []
        reason: Exception = CancelledError("the pool was closed")
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            try:
                while self._serve(selector, waiting, active):
                    continue
            except Exception as error:
                reason = RuntimeError(f"the pool has died: {type(error).__name__}: {error}")
        while not self._incoming.empty():
            task = self._incoming.get()
            if task is not None:
                self._outstanding.add(task.future)
        for future in self._outstanding:
            future.set_exception(reason)
        for worker in active:
            worker.connection.close()
            os.close(worker.output)

    def _serve(
        self, selector: selectors.BaseSelector, waiting: dict[str | None, deque[Job]], active: list[Worker]
    ) -> bool:
        now = time.monotonic()  # before listening: what was answered by then is heard before a deadline is judged
        for key, _ in selector.select(self._until_due(active)):
            if key.fileobj is self._woken:
                self._woken.recv(65536)
                while not self._incoming.empty():
                    task = self._incoming.get()
                    if task is None:
                        return False
                    self._outstanding.add(task.future)
                    waiting.setdefault(task.name if task.is_batch else None, deque()).append(task)
            elif key.data not in active:
                continue  # replaced since
            elif key.fileobj == key.data.output:
                self._read_output(key.data)
            else:
                self._hear(key.data, selector, active)
        for worker, task in [(worker, worker.task) for worker in active if worker.task is not None]:
            if now >= worker.due:
                has_run, could_run = processor_time(worker.pid)
                waited = now - worker.started - (has_run - worker.had_run) if could_run else 0.0
                allowed = self._allowed(task)
                worker.due = worker.started + allowed + min(waited, MOST_WAITING * allowed)
            if now >= worker.due:
                why = f"it took more than {self._allowed(task):g} seconds"
                self._replace(worker, selector, active, why, "deadline")
            elif not task.is_batch and now - worker.started >= self._patience[task.name] and not worker.straggling:
                stragglers = sum(each.straggling for each in active)
                if stragglers < MOST_STRAGGLERS:
                    worker.straggling = True
                    self._ask(ask="slow", pid=worker.pid)
        for batch_reward, tasks in waiting.items():
            while tasks and (worker := self._free(selector, active, batch_reward)):
                self._give(worker, tasks.popleft(), selector, active)
        return True

    def _allowed(self, task: Job) -> float:
        """Seconds that a task may take."""
        if not task.is_batch:
            return self._deadline
        # Samples that are awaited together have their own deadline, and are given time to say so.
        return self._batch_deadline + (self._deadline if is_per_sample(self._functions[task.name]) else 0.0)

    def _read_output(self, worker: Worker) -> None:
        with suppress(BlockingIOError):
            while text := os.read(worker.output, 1 << 16):
                *lines, rest = (worker.unfinished_line + text).split(b"\n")
                worker.unfinished_line = rest[-1000:]
                self.num_printed[worker.name] += len(lines)
                self.printed[worker.name].extend(line.decode(errors="replace")[:1000] for line in lines)

    def _until_due(self, active: list[Worker]) -> float | None:
        """Seconds until something is due though nobody speaks."""
        is_full = sum(worker.straggling for worker in active) >= MOST_STRAGGLERS
        due = [
            min(
                worker.due,
                math.inf
                if worker.straggling or is_full or task.is_batch
                else worker.started + self._patience[task.name],
            )
            for worker in active
            if (task := worker.task) is not None
        ]
        return max(min(due) - time.monotonic(), 0.001) if due else None

    def _free(self, selector: selectors.BaseSelector, active: list[Worker], batch_reward: str | None) -> Worker | None:
        """A worker for a batch of this reward, or for a sample of any other; a new one if more may run."""
        own = [worker for worker in active if worker.batch_reward == batch_reward]
        for worker in own:
            if worker.task is None:
                return worker
        if sum(not worker.straggling for worker in own) >= (self._workers if batch_reward is None else 1):
            return None
        ours, theirs = socket.socketpair()
        output, printed = os.pipe()
        send(self._control, json.dumps({"ask": "fork"}).encode())
        socket.send_fds(self._control, [b"x"], [theirs.fileno(), printed])
        theirs.close()
        os.close(printed)
        os.set_blocking(output, False)
        ours.settimeout(STUCK_SECONDS)
        worker = Worker(self._answer()["pid"], ours, output, batch_reward)
        for each in (output, ours):
            selector.register(each, selectors.EVENT_READ, worker)
        active.append(worker)
        return worker

    def _give(self, worker: Worker, task: Job, selector: selectors.BaseSelector, active: list[Worker]) -> None:
        worker.task, worker.name, worker.started = task, task.name, time.monotonic()
        worker.had_run, _ = processor_time(worker.pid)
        worker.due = worker.started + self._allowed(task)
        try:
            send(worker.connection, task.body)
        except OSError:
            self._replace(worker, selector, active, None, "died")

    def _hear(self, worker: Worker, selector: selectors.BaseSelector, active: list[Worker]) -> None:
        answer = receive(worker.connection)
        if answer is None:
            self._replace(worker, selector, active, None, "died")
            return
        self._read_output(worker)
        task, worker.task = worker.task, None
        worker.done += 1
        if task is not None and not task.is_batch and not worker.straggling:
            usual = USUAL_TIMES * (time.monotonic() - worker.started)
            self._patience[task.name] = max(0.95 * self._patience[task.name] + 0.05 * usual, LEAST_PATIENCE_SECONDS)
        said = json.loads(answer)
        if task is not None:
            self._settle(task, said)
        is_spent = worker.batch_reward is None and worker.done >= SAMPLES_A_WORKER
        if said.get("fault") == "memory" or is_spent:
            self._replace(worker, selector, active, None, "died")
        elif worker.straggling:
            # Its priority can be raised again by root alone; otherwise a new fork takes its place.
            worker.straggling = not self._ask(ask="usual", pid=worker.pid)["done"]
            if worker.straggling:
                self._replace(worker, selector, active, None, "died")

    def _settle(self, task: Job, said: Mapping[str, Any]) -> None:
        """Give a task its scores, or none where it failed as a whole."""
        if said.get("fault") == "wrong":
            self._outstanding.discard(task.future)
            task.future.set_exception(InvalidScoresError(f"reward {task.name!r} {said['detail']}"))
        elif "fault" in said:
            self._fail(task, said["fault"], said["detail"])
        else:
            graded = [self._graded(task, row, each) for row, each in enumerate(said["scores"])]
            self._resolve(task, graded)

    def _graded(self, task: Job, row: int, said: Mapping[str, Any]) -> RewardOutput:
        if "fault" in said:
            return self._failed(task, row, said["fault"], said["detail"])
        return RewardOutput(**{**said, "steps": tuple(map(tuple, said["steps"]))})

    def _replace(
        self, worker: Worker, selector: selectors.BaseSelector, active: list[Worker], why: str | None, kind: str
    ) -> None:
        self.replaced += 1
        self._read_output(worker)
        for each in (worker.connection, worker.output):
            selector.unregister(each)
        worker.connection.close()
        os.close(worker.output)
        active.remove(worker)
        status = self._ask(ask="end", pid=worker.pid)["status"]
        if worker.task is not None:
            self._fail(worker.task, kind, why or death(status))

    def _ask(self, **request: Any) -> dict[str, Any]:
        send(self._control, json.dumps(request).encode())
        return {} if request["ask"] == "slow" else self._answer()

    def _answer(self) -> dict[str, Any]:
        answer = receive(self._control)
        if answer is None:
            raise RuntimeError("the process that all workers are forks of has died")
        return json.loads(answer)

    def _fail(self, task: Job, kind: str, detail: str) -> None:
        """A task none of whose samples has a score; what it says stands beside the first of them."""
        if len(task.completions) > 1:
            detail = f"{detail.rstrip()}\n(the {len(task.completions)} completions of this batch have no score)"
        first = self._failed(task, 0, kind, detail)
        self._resolve(task, [first] * len(task.completions))

    def _failed(self, task: Job, row: int, kind: str, detail: str) -> RewardOutput:
        self.errors.append(RewardError(task.name, kind, detail, task.prompts[row], task.completions[row]))
        return RewardOutput(None, note=f"{kind}: {detail.strip().splitlines()[-1]}", failed=True)

    def _resolve(self, task: Job, graded: list[RewardOutput]) -> None:
        self._outstanding.discard(task.future)
        task.future.set_result(graded)
