"""Rewards computed in processes of their own: a sample that hangs, dies or eats memory costs its own score alone."""

from __future__ import annotations

import json
import math
import os
import pickle
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle

from grpo_jax.rewards.calling import arguments, is_async, is_per_sample
from grpo_jax.rewards.compose import Graded, InvalidScoresError, RewardFn
from grpo_jax.rewards.worker import receive, send

FIRST_PATIENCE_SECONDS = 0.5
LEAST_PATIENCE_SECONDS = 0.25
USUAL_TIMES = 5.0
"""A worker that takes this many times what the reward usually takes is a straggler: another takes its place."""
MOST_STRAGGLERS = 32
MOST_WAITING = 3.0
"""Deadlines that a worker may have waited for a processor, which count for nothing, before its own ends it."""
SAMPLES_A_WORKER = 2000
"""Then a worker is replaced, so that what rewards keep does not add up."""
KEPT_FAULTS = 1000
START_SECONDS = 120
STUCK_SECONDS = 10
"""A worker that stops in the middle of a message is taken for dead."""
MOST_LINES = 20
"""Printed lines of one reward that are shown for each call; the rest are counted."""


@dataclass(frozen=True)
class Fault:
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
class Task:
    """Samples to be scored by one reward in one call."""

    name: str
    prompts: list[str]
    completions: list[str]
    body: bytes
    is_batch: bool
    future: Future[list[Graded]]


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
    task: Task | None = None
    name: str = ""
    started: float = 0.0
    had_run: float = 0.0
    due: float = 0.0
    straggling: bool = False
    unfinished_line: bytes = b""


class RewardPool:
    """A context in which rewards run in other processes, each sample under a deadline and a memory cap of its own.

    ``rewards[name]`` is the reward of that name as a function of the same form, to be passed on to ``weighted``.
    Workers are forks of one process that has loaded the rewards, so a new one costs milliseconds. They import no jax
    and share nothing with this process. All of them end when this process does. What they print is shown after each
    call, behind the reward's name.

    A reward that is declared ``per_sample`` scores each sample alone, on any worker. A sample that takes too long,
    raises, returns NaN or no number, exhausts its memory or kills its process has no score and stands among
    ``take_faults``; every other sample is scored as without a pool. Samples that hang do not hold up the others: a
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
        self.replaced = 0
        self._outstanding: set[Future[list[Graded]]] = set()
        self.rewards: dict[str, RewardFn] = {name: partial(self._score, name) for name in rewards}
        self._functions = dict(rewards)
        self._sampled = [name for name, reward in rewards.items() if is_per_sample(reward) and not is_async(reward)]
        self._patience = dict.fromkeys(rewards, FIRST_PATIENCE_SECONDS)
        self._faults: deque[Fault] = deque(maxlen=KEPT_FAULTS)
        self._show = show
        self._printed: dict[str, deque[str]] = {name: deque(maxlen=MOST_LINES) for name in rewards}
        self._num_printed = dict.fromkeys(rewards, 0)
        self._ahead: dict[bytes, list[Future[list[Graded]]]] = {}
        self._incoming: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._control, self._process = start(rewards, memory_bytes, deadline)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; what was not scored by then is cancelled."""
        if self._thread.is_alive():
            self._submit(None)
            self._thread.join()
        self._control.close()
        self._process.wait()
        for each in (self._woken, self._wake):
            each.close()

    def ahead(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Begin to score a sample with every reward of single samples, while others are still being drawn.

        A later call of the rewards with the same row takes these scores. What is asked ahead of that and never called
        for is dropped with ``take_faults``.

        Args:
            prompt, completion: the texts.
            columns: the row's own values, not lists.
        """
        for name in self._sampled:
            task = self._task(name, [prompt], [completion], {key: [value] for key, value in columns.items()})
            self._ahead.setdefault(task.body, []).append(task.future)
            self._submit(task)

    def take_faults(self) -> list[Fault]:
        """What could not be scored since the last call, the newest thousand."""
        faults = [self._faults.popleft() for _ in range(len(self._faults))]
        self._ahead.clear()
        return faults

    def probe(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> None:
        """Score one sample with every reward, so that one that cannot run is found before compute is spent.

        Raises:
            ValueError: one needs a column that is not there, raised, died or returned something other than a score;
                with its traceback.
        """
        for reward in self.rewards.values():
            reward([prompt], [completion], **{name: [value] for name, value in columns.items()})
        for fault in self.take_faults():
            raise ValueError(
                f"reward {fault.reward!r} cannot score a first example ({fault.kind}); the columns are {[*columns]}:\n"
                f"{fault.detail}"
            )

    def _score(self, name: str, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Graded]:
        if not completions:
            return []
        if name in self._sampled:
            futures = [
                self._begun(name, prompt, completion, {key: [values[row]] for key, values in columns.items()})
                for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
            ]
        else:
            task = self._task(name, prompts, completions, columns)
            self._submit(task)
            futures = [task.future]
        graded = [each for future in futures for each in self._result(future)]
        self._show_printed()
        return graded

    def _begun(self, name: str, prompt: str, completion: str, columns: Mapping[str, list[Any]]) -> Future[list[Graded]]:
        """The score of a sample to come: the one that was begun ahead, where there is one."""
        task = self._task(name, [prompt], [completion], columns)
        begun = self._ahead.get(task.body)
        if begun:
            return begun.pop()
        self._submit(task)
        return task.future

    def _result(self, future: Future[list[Graded]]) -> list[Graded]:
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive() and not future.done():
                    raise RuntimeError("the pool has died") from None

    def _show_printed(self) -> None:
        for name, lines in self._printed.items():
            count, self._num_printed[name] = self._num_printed[name], 0
            for _ in range(len(lines)):
                self._show(f"{name}: {lines.popleft()}")
            if count > MOST_LINES:
                self._show(f"{name}: ... {count - MOST_LINES} earlier lines are not shown")

    def _task(self, name: str, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> Task:
        reward = self._functions[name]
        try:
            taken = set(arguments(reward, prompts, completions, columns)[1])
        except ValueError as error:
            raise ValueError(f"reward {name!r} {error}") from error
        own = {key: values for key, values in columns.items() if key in taken}
        body = pickle.dumps((name, prompts, completions, own))
        return Task(name, prompts, completions, body, name not in self._sampled, Future())

    def _submit(self, task: Task | None) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("this pool is closed, or its thread has died: make another one")
        self._incoming.put(task)
        self._wake.send(b"x")

    # What follows runs in the pool's own thread.

    def _run(self) -> None:
        waiting: dict[str | None, deque[Task]] = {}
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
        self, selector: selectors.BaseSelector, waiting: dict[str | None, deque[Task]], active: list[Worker]
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

    def _allowed(self, task: Task) -> float:
        """Seconds that a task may take."""
        if not task.is_batch:
            return self.deadline
        # Samples that are awaited together have their own deadline, and are given time to say so.
        return self.batch_deadline + (self.deadline if is_per_sample(self._functions[task.name]) else 0.0)

    def _read_output(self, worker: Worker) -> None:
        with suppress(BlockingIOError):
            while text := os.read(worker.output, 1 << 16):
                *lines, rest = (worker.unfinished_line + text).split(b"\n")
                worker.unfinished_line = rest[-1000:]
                self._num_printed[worker.name] += len(lines)
                self._printed[worker.name].extend(line.decode(errors="replace")[:1000] for line in lines)

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
        if sum(not worker.straggling for worker in own) >= (self.workers if batch_reward is None else 1):
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

    def _give(self, worker: Worker, task: Task, selector: selectors.BaseSelector, active: list[Worker]) -> None:
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

    def _settle(self, task: Task, said: Mapping[str, Any]) -> None:
        """Give a task its scores, or none where it failed as a whole."""
        if said.get("fault") == "wrong":
            self._outstanding.discard(task.future)
            task.future.set_exception(InvalidScoresError(f"reward {task.name!r} {said['detail']}"))
        elif "fault" in said:
            self._fail(task, said["fault"], said["detail"])
        else:
            graded = [self._graded(task, row, each) for row, each in enumerate(said["scores"])]
            self._resolve(task, graded)

    def _graded(self, task: Task, row: int, said: Mapping[str, Any]) -> Graded:
        if "fault" in said:
            return self._failed(task, row, said["fault"], said["detail"])
        return Graded(**{**said, "steps": tuple(map(tuple, said["steps"]))})

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

    def _fail(self, task: Task, kind: str, detail: str) -> None:
        """A task none of whose samples has a score; what it says stands beside the first of them."""
        if len(task.completions) > 1:
            detail = f"{detail.rstrip()}\n(the {len(task.completions)} completions of this batch have no score)"
        first = self._failed(task, 0, kind, detail)
        self._resolve(task, [first] * len(task.completions))

    def _failed(self, task: Task, row: int, kind: str, detail: str) -> Graded:
        self._faults.append(Fault(task.name, kind, detail, task.prompts[row], task.completions[row]))
        return Graded(None, note=f"{kind}: {detail.strip().splitlines()[-1]}", failed=True)

    def _resolve(self, task: Task, graded: list[Graded]) -> None:
        self._outstanding.discard(task.future)
        task.future.set_result(graded)


def default_workers() -> int:
    """How many workers a pool has unless it is told."""
    return (os.cpu_count() or 1) + 1


def processor_time(pid: int) -> tuple[float, bool]:
    """Seconds for which a process has run, and whether it would now; (0, no) where the system does not tell."""
    try:
        ran = int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0]) / 1e9
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return 0.0, False
    return ran, state == b"R"


def start(
    rewards: Mapping[str, RewardFn], memory_bytes: int, deadline: float
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """The process that has loaded the rewards and forks, and the connection to it.

    Raises:
        ValueError: it could not load them.
    """
    try:
        packed = cloudpickle.dumps(dict(rewards))
    except Exception as error:
        raise ValueError(f"a reward cannot be taken to another process: {type(error).__name__}: {error}") from error
    control, theirs = socket.socketpair()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.rewards.worker", str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,  # Ctrl-C is for the run, which then ends this in order
    )
    theirs.close()
    control.settimeout(START_SECONDS)
    with suppress(OSError):  # it then says nothing
        setup = {"path": sys.path, "rewards": packed, "memory_bytes": memory_bytes, "deadline": deadline}
        send(control, pickle.dumps(setup))
    said = json.loads(receive(control) or b'{"error": "its process died, or took two minutes"}')
    if "error" in said:
        control.close()
        process.kill()
        process.wait()
        raise ValueError(f"the rewards {[*rewards]} could not be loaded in a process of their own:\n{said['error']}")
    control.settimeout(None)
    return control, process


def death(status: int) -> str:
    """How a process died, from its wait status."""
    if status < 0:
        return "its process is gone"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        known = -code in [each.value for each in signal.Signals]
        return f"its process was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"its process ended with exit status {code}"
