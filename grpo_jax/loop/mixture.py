"""Scorer of a mixture of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.encoded import Texts
from grpo_jax.hosts import gather
from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.rewards.compose import Scores
from grpo_jax.rewards.scorer import Scoring
from grpo_jax.rewards.workers.pool import RewardError

TASK = "mixture/task"
"""Column with the task of each row; the slash keeps it apart from the columns of datasets."""


class MixtureScorer:
    """Scores each row with the scorer of its task; same interface as ``Scorer``.

    Args:
        tasks: the tasks of the mixture.

    Attributes:
        weights: ``task/reward`` -> weight.
        judge: name of the part that holds the tasks' judges; None if no task has one.
    """

    def __init__(self, tasks: Sequence[TaskRuntime]):
        self._tasks = {task.name: task for task in tasks}
        self.weights = {f"{task.name}/{name}": weight for task in tasks for name, weight in task.scorer.weights.items()}
        self.judge = "judge" if any(task.scorer.judge for task in tasks) else None

    def score(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """Like ``Scorer.score``; ``counted`` has ``task/reward``, 0 for other tasks.

        Args:
            prompts, completions: ``[B]`` texts.
            columns: ``[B]`` values each; the column ``TASK`` names each row's task.
        """
        selections = self._selections(prompts, completions, columns)
        return self._merged([(task, rows, task.scorer.score(*texts, **own)) for task, rows, texts, own in selections])

    def start(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scoring:
        """Like ``Scorer.start``.

        Args:
            prompts, completions, columns: as for ``score``.
        """
        selections = self._selections(prompts, completions, columns)
        started = [(task, rows, task.scorer.start(*texts, **own)) for task, rows, texts, own in selections]
        return Scoring(
            [future for _, _, scoring in started for future in scoring.futures],
            lambda: self._merged([(task, rows, scoring.result()) for task, rows, scoring in started]),
        )

    def _selections(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[tuple[TaskRuntime, list[int], tuple[list[str], Sequence[str]], dict[str, list[Any]]]]:
        """The rows of each task, with their texts and columns."""
        return [
            (
                task,
                rows,
                ([prompts[row] for row in rows], _texts(completions, rows)),
                _select(columns, rows, task),
            )
            for task, rows in self._rows(columns[TASK])
        ]

    def _merged(self, scored: Sequence[tuple[TaskRuntime, list[int], Scores]]) -> Scores:
        B = sum(len(rows) for _, rows, _ in scored)
        total, outcome, notes = np.full(B, np.nan, np.float32), np.full(B, np.nan, np.float32), [""] * B
        parts: dict[str, np.ndarray] = {}
        counted = {name: np.zeros(B, np.float32) for name in self.weights}
        steps: list[tuple[tuple[int, float], ...]] = [()] * B
        for task, rows, scores in scored:
            total[rows], outcome[rows] = scores.total, scores.outcome
            judge = task.scorer.judge
            named = scores.parts if judge is None else {**scores.parts, "judge": scores.parts[judge]}
            for name, values in named.items():
                parts.setdefault(name, np.full(B, np.nan, np.float32))[rows] = values
            for name, values in scores.counted.items():
                counted[f"{task.name}/{name}"][rows] = values
            for row, note, step_scores in zip(rows, scores.notes, scores.steps, strict=True):
                notes[row], steps[row] = note, step_scores
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
        """Like ``Scorer.streaming_scorer``.

        Args:
            columns: ``[B]`` values each, of the problems; the column ``TASK`` names each one's task.
            prompts, decode, eos_ids, max_completion_length: as in ``Scorer.streaming_scorer``.
        """
        watches: dict[int, tuple[Callable[[int, Sequence[int]], None], int]] = {}
        for task, rows in self._rows(columns[TASK]):
            watch = task.scorer.streaming_scorer(
                [prompts[row] for row in rows],
                _select(columns, rows, task),
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
        """Like ``Scorer.take_errors``."""
        return [error for errors in gather(self.take_own_errors(), "the errors of rewards") for error in errors]

    def take_own_errors(self) -> list[RewardError]:
        """Like ``Scorer.take_own_errors``."""
        return [error for task in self._tasks.values() for error in task.scorer.take_own_errors()]

    def _rows(self, names: Sequence[str]) -> list[tuple[TaskRuntime, list[int]]]:
        tasks = dict.fromkeys(names)
        return [(self._tasks[task], [row for row, name in enumerate(names) if name == task]) for task in tasks]


def _texts(completions: Sequence[str], rows: list[int]) -> Sequence[str]:
    return completions.at(rows) if isinstance(completions, Texts) else [completions[row] for row in rows]


def _select(columns: Mapping[str, Sequence[Any]], rows: list[int], task: TaskRuntime) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in columns.items() if name in task.columns}
