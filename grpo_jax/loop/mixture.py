"""The scorers of a mixture of tasks as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.rewards.compose import Scores
from grpo_jax.rewards.workers.pool import RewardError

TASK = "mixture/task"
"""The column that tells which task of a mixture a row is of; no data set has one of this name."""


class MixtureScorer:
    """The scorers of several tasks as one: each row is scored by the scorer of its task.

    Args:
        tasks: those of the mixture.

    Attributes:
        weights: of each reward, by ``task/reward``.
        judge: name of the part with each task's judge; None without one.
    """

    def __init__(self, tasks: Sequence[TaskRuntime]):
        self._tasks = {task.name: task for task in tasks}
        self.weights = {f"{task.name}/{name}": weight for task in tasks for name, weight in task.scorer.weights.items()}
        self.judge = "judge" if any(task.scorer.judge for task in tasks) else None

    def score(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """As ``Scorer.score``, with the column ``task``; ``counted`` has the parts of each task apart, 0 elsewhere."""
        B = len(completions)
        total, outcome, notes = np.full(B, np.nan, np.float32), np.full(B, np.nan, np.float32), [""] * B
        parts: dict[str, np.ndarray] = {}
        counted = {name: np.zeros(B, np.float32) for name in self.weights}
        steps: list[tuple[tuple[int, float], ...]] = [()] * B
        for task, rows in self._rows(columns[TASK]):
            own = task.scorer.score(
                [prompts[row] for row in rows], [completions[row] for row in rows], **_taken(columns, rows, task)
            )
            total[rows], outcome[rows] = own.total, own.outcome
            named = own.parts if task.scorer.judge is None else {**own.parts, "judge": own.parts[task.scorer.judge]}
            for name, values in named.items():
                parts.setdefault(name, np.full(B, np.nan, np.float32))[rows] = values
            for name, values in own.counted.items():
                counted[f"{task.name}/{name}"][rows] = values
            for row, note, of_steps in zip(rows, own.notes, own.steps, strict=True):
                notes[row], steps[row] = note, of_steps
        return Scores(total, parts, counted, notes, outcome, steps)

    def streaming_scorer(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        decode: Callable[[list[int]], str],
        *,
        eos_ids: Sequence[int],
        max_completion_length: int,
    ) -> Callable[[int, Sequence[int]], None] | None:
        """See ``Scorer.streaming_scorer``."""
        watches: dict[int, tuple[Callable[[int, Sequence[int]], None], int]] = {}
        for task, rows in self._rows(columns[TASK]):
            watch = task.scorer.streaming_scorer(
                [prompts[row] for row in rows],
                _taken(columns, rows, task),
                decode,
                eos_ids=eos_ids,
                max_completion_length=max_completion_length,
            )
            if watch is not None:
                watches |= {row: (watch, place) for place, row in enumerate(rows)}
        if not watches:
            return None

        def watch_all(row: int, ids: Sequence[int]) -> None:
            if row in watches:
                watch, place = watches[row]
                watch(place, ids)

        return watch_all

    def take_errors(self) -> list[RewardError]:
        """What could not be scored since the last call."""
        return [fault for task in self._tasks.values() for fault in task.scorer.take_errors()]

    def _rows(self, names: Sequence[str]) -> list[tuple[TaskRuntime, list[int]]]:
        rows = {name: [row for row, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        return [(self._tasks[name], found) for name, found in rows.items()]


def _taken(columns: Mapping[str, Sequence[Any]], rows: list[int], task: TaskRuntime) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in columns.items() if name in task.columns}
