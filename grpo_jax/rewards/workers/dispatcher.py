"""The thread that assigns samples and batches to worker processes and kills those that exceed their deadline."""

from __future__ import annotations

import json
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

INITIAL_SLOW_SECONDS = 0.5
MIN_SLOW_SECONDS = 0.25
SLOW_FACTOR = 5.0
"""A worker that takes this many times as long as usual for its reward is a straggler: another takes its place."""
MAX_STRAGGLERS = 32
MAX_WAITING = 3.0
"""Upper bound, in deadlines, of the time that a worker waits for a processor and that is added to its deadline."""
MAX_JOBS_PER_WORKER = 2000
"""A worker is replaced after this many samples, which bounds memory leaks of rewards."""
STUCK_SECONDS = 10
"""A worker that pauses for this long within a message counts as dead."""
MAX_LINES = 20
"""Printed lines of one reward that are kept for each call; the others are counted."""


class Dispatcher:
    """The thread that manages the workers of a ``RewardPool``, whose arguments it shares.

    Attributes:
        printed, num_printed: by reward, the last lines that it printed and the number of all.
        replaced: number of workers that were killed or died.
        process: the process that has loaded the rewards and forks workers.
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
        self.printed: dict[str, deque[str]] = {name: deque(maxlen=MAX_LINES) for name in rewards}
        self.num_printed = dict.fromkeys(rewards, 0)
        self.replaced = 0
        self._outstanding: set[Future[list[RewardOutput]]] = set()
        self._slow_after = dict.fromkeys(rewards, INITIAL_SLOW_SECONDS)
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._control, self.process = start(rewards, memory_bytes, deadline)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._waiting: dict[str | None, deque[Job]] = {}
        self._active: list[Worker] = []
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, job: Job | None) -> None:
        """Queue a job, whose future receives the scores; None ends the thread.

        Raises:
            RuntimeError: the thread has ended.
        """
        if not self._thread.is_alive():
            raise RuntimeError("this pool is closed, or its thread has died; create a new RewardPool")
        self._incoming.put(job)
        self._wake.send(b"x")

    def result(self, future: Future[list[RewardOutput]]) -> list[RewardOutput]:
        """Wait for the scores of a submitted job.

        Raises:
            RuntimeError: the thread died.
            InvalidScoresError: a batch reward returned something other than one score for each completion.
        """
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("the pool has died") from None

    def close(self) -> None:
        """End all workers and cancel the jobs that are not done."""
        if self._thread.is_alive():
            self.submit(None)
            self._thread.join()
        self._control.close()
        self.process.wait()
        self._woken.close()
        self._wake.close()

    # The methods below run in the thread.

    def _run(self) -> None:
        reason: Exception = CancelledError("the pool was closed")
        try:
            while self._serve():
                continue
        except Exception as error:
            reason = RuntimeError(f"the pool has died: {type(error).__name__}: {error}")
        self._selector.close()
        while not self._incoming.empty():
            job = self._incoming.get()
            if job is not None:
                self._outstanding.add(job.future)
        for future in self._outstanding:
            future.set_exception(reason)
        for worker in self._active:
            worker.connection.close()
            os.close(worker.output)

    def _serve(self) -> bool:
        """Handle what has arrived, then deadlines, then assign jobs; False if the thread is to end."""
        now = time.monotonic()  # before select, so that replies that arrived by then are read before deadlines apply
        for key, _ in self._selector.select(self._until_due()):
            if key.fileobj is self._woken:
                self._woken.recv(65536)
                while not self._incoming.empty():
                    job = self._incoming.get()
                    if job is None:
                        return False
                    self._outstanding.add(job.future)
                    self._waiting.setdefault(job.reward if job.is_batch else None, deque()).append(job)
            elif key.data not in self._active:
                continue  # replaced in this round
            elif key.fileobj == key.data.output:
                self._read_output(key.data)
            else:
                self._receive_reply(key.data)
        for worker, job in [(worker, worker.job) for worker in self._active if worker.job is not None]:
            if now >= worker.due:
                cpu_seconds, is_runnable = processor_time(worker.pid)
                used = cpu_seconds - worker.cpu_seconds_before
                waited = now - worker.started - used if is_runnable else 0.0
                allowed = self._allowed(job)
                worker.due = worker.started + allowed + min(waited, MAX_WAITING * allowed)
            if now >= worker.due:
                detail = f"it took more than {self._allowed(job):g} seconds"
                self._replace(worker, "deadline", detail)
            elif (
                not (job.is_batch or worker.is_straggler)
                and now - worker.started >= self._slow_after[job.reward]
                and sum(each.is_straggler for each in self._active) < MAX_STRAGGLERS
            ):
                worker.is_straggler = True
                self._request("lower_priority", pid=worker.pid)
        for batch_reward, jobs in self._waiting.items():
            while jobs and (worker := self._free(batch_reward)):
                self._assign(worker, jobs.popleft())
        return True

    def _allowed(self, job: Job) -> float:
        """The deadline of a job in seconds."""
        if not job.is_batch:
            return self._deadline
        # Samples that are awaited together have their own deadlines, which the worker then has time to report.
        return self._batch_deadline + (self._deadline if is_per_sample(self._functions[job.reward]) else 0.0)

    def _read_output(self, worker: Worker) -> None:
        with suppress(BlockingIOError):
            while text := os.read(worker.output, 1 << 16):
                *lines, rest = (worker.unfinished_line + text).split(b"\n")
                worker.unfinished_line = rest[-1000:]
                self.num_printed[worker.reward] += len(lines)
                self.printed[worker.reward].extend(line.decode(errors="replace")[:1000] for line in lines)

    def _until_due(self) -> float | None:
        """Seconds until the next deadline, or until a worker becomes a straggler; None if no worker has a job."""
        is_full = sum(worker.is_straggler for worker in self._active) >= MAX_STRAGGLERS
        due = [
            worker.due
            if worker.is_straggler or is_full or job.is_batch
            else min(worker.due, worker.started + self._slow_after[job.reward])
            for worker in self._active
            if (job := worker.job) is not None
        ]
        return max(min(due) - time.monotonic(), 0.001) if due else None

    def _free(self, batch_reward: str | None) -> Worker | None:
        """An idle worker for batches of a reward (None: for single samples), forked if there may be more; else None."""
        workers = [worker for worker in self._active if worker.batch_reward == batch_reward]
        for worker in workers:
            if worker.job is None:
                return worker
        if sum(not worker.is_straggler for worker in workers) >= (self._workers if batch_reward is None else 1):
            return None
        connection, remote_end = socket.socketpair()
        output, stdout = os.pipe()
        send(self._control, json.dumps({"operation": "fork"}).encode())
        socket.send_fds(self._control, [b"x"], [remote_end.fileno(), stdout])
        remote_end.close()
        os.close(stdout)
        os.set_blocking(output, False)
        connection.settimeout(STUCK_SECONDS)
        worker = Worker(self._receive()["pid"], connection, output, batch_reward)
        for source in (output, connection):
            self._selector.register(source, selectors.EVENT_READ, worker)
        self._active.append(worker)
        return worker

    def _assign(self, worker: Worker, job: Job) -> None:
        worker.job, worker.reward, worker.started = job, job.reward, time.monotonic()
        worker.cpu_seconds_before, _ = processor_time(worker.pid)
        worker.due = worker.started + self._allowed(job)
        try:
            send(worker.connection, job.body)
        except OSError:
            self._replace(worker)

    def _receive_reply(self, worker: Worker) -> None:
        message = receive(worker.connection)
        if message is None:
            self._replace(worker)
            return
        self._read_output(worker)
        job, worker.job = worker.job, None
        worker.jobs_done += 1
        if job is not None and not job.is_batch and not worker.is_straggler:
            slow = SLOW_FACTOR * (time.monotonic() - worker.started)
            self._slow_after[job.reward] = max(0.95 * self._slow_after[job.reward] + 0.05 * slow, MIN_SLOW_SECONDS)
        reply = json.loads(message)
        if job is not None:
            self._finish(job, reply)
        is_old = worker.batch_reward is None and worker.jobs_done >= MAX_JOBS_PER_WORKER
        if reply.get("error") == "memory" or is_old:
            self._replace(worker)
        elif worker.is_straggler:
            # Only root can raise a priority again; otherwise a new fork takes the worker's place.
            worker.is_straggler = not self._request("restore_priority", pid=worker.pid)["restored"]
            if worker.is_straggler:
                self._replace(worker)

    def _finish(self, job: Job, reply: Mapping[str, Any]) -> None:
        """Resolve a job's future with its scores or with the error of the whole batch."""
        if reply.get("error") == "invalid":
            self._outstanding.discard(job.future)
            job.future.set_exception(InvalidScoresError(f"reward {job.reward!r} {reply['detail']}"))
        elif "error" in reply:
            self._fail(job, reply["error"], reply["detail"])
        else:
            self._resolve(job, [self._output(job, row, each) for row, each in enumerate(reply["scores"])])

    def _output(self, job: Job, row: int, reply: Mapping[str, Any]) -> RewardOutput:
        if "error" in reply:
            return self._error_output(job, row, reply["error"], reply["detail"])
        return RewardOutput(**{**reply, "steps": tuple(map(tuple, reply["steps"]))})

    def _replace(self, worker: Worker, kind: str = "died", detail: str | None = None) -> None:
        """Kill a worker; its job, if it has one, fails. The detail defaults to how the process died."""
        self.replaced += 1
        self._read_output(worker)
        for source in (worker.connection, worker.output):
            self._selector.unregister(source)
        worker.connection.close()
        os.close(worker.output)
        self._active.remove(worker)
        status = self._request("end", pid=worker.pid)["status"]
        if worker.job is not None:
            self._fail(worker.job, kind, detail or death(status))

    def _request(self, operation: str, *, pid: int) -> dict[str, Any]:
        send(self._control, json.dumps({"operation": operation, "pid": pid}).encode())
        return {} if operation == "lower_priority" else self._receive()

    def _receive(self) -> dict[str, Any]:
        message = receive(self._control)
        if message is None:
            raise RuntimeError("the process that forks the workers has died")
        return json.loads(message)

    def _fail(self, job: Job, kind: str, detail: str) -> None:
        """Resolve a job without scores; the error is logged with its first sample."""
        if len(job.completions) > 1:
            detail = f"{detail.rstrip()}\n(the {len(job.completions)} completions of this batch have no score)"
        first = self._error_output(job, 0, kind, detail)
        self._resolve(job, [first] * len(job.completions))

    def _error_output(self, job: Job, row: int, kind: str, detail: str) -> RewardOutput:
        job.errors.append(RewardError(job.reward, kind, detail, job.prompts[row], job.completions[row]))
        return RewardOutput(None, note=f"{kind}: {detail.strip().splitlines()[-1]}", failed=True)

    def _resolve(self, job: Job, outputs: list[RewardOutput]) -> None:
        self._outstanding.discard(job.future)
        job.future.set_result(outputs)
