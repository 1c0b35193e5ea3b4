"""Tasks: what is asked, what is right and what is paid for; one, or a mixture of several with a reward for each."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from jax.sharding import Mesh

from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.errands import ERRANDS
from grpo_jax.data.notes import DataNotes
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.sources import Problem, reward_columns
from grpo_jax.data.turns import check_turn_end
from grpo_jax.models import Pretrained
from grpo_jax.monitor.metrics import to_json
from grpo_jax.prompt_settings import rendering_of
from grpo_jax.reward_settings import RewardSettings, Scoring
from grpo_jax.rewards.compose import Scores
from grpo_jax.rewards.pool import Fault
from grpo_jax.run import Run
from grpo_jax.settings import DataSettings

TASK = "mixture/task"
"""The column that tells which task of a mixture a row is of; no data set has one of this name."""
Asked = Literal["training", "held_out", "evaluation"]
"""Problems of a task that completions are sampled for."""
OF_COMPLETIONS = ("completion_length", "truncated")
"""Columns that are of no problem but of what was drawn for it."""


@dataclass(frozen=True)
class Task:
    """What is asked and what is paid for.

    Attributes:
        name: how its figures are called; None where it is the only task.
        data, rewards: settings.
        weight: its share of the prompts, beside those of other tasks.
    """

    name: str | None
    data: DataSettings
    rewards: RewardSettings
    weight: float = 1.0


def read_tasks(path: Path, data: DataSettings, rewards: RewardSettings) -> list[Task]:
    """The tasks of a mixture: a JSON object of names, each with a ``weight`` and settings of its own.

    Such as ``{"sums": {"weight": 2, "format_weight": 0.2}, "errands": {"dataset": "errands", "accuracy_weight": 0,
    "reward_model": "runs/reward_model/model"}}``.

    Args:
        path: of the file.
        data, rewards: the settings that hold where a task says nothing else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such object, or names something twice; a setting is not known, or its value cannot be.
    """

    def no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        if twice:
            raise ValueError(f"{path}: {twice} stand twice in one object")
        return dict(pairs)

    try:
        read = json.loads(path.read_text(), object_pairs_hook=no_name_twice)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict) or not read or not all(isinstance(each, dict) for each in read.values()):
        raise ValueError(f'{path} must hold tasks by name, such as {{"sums": {{"weight": 2}}}}')
    return [_task(f"{path}, task {name!r}", name, given, data, rewards) for name, given in read.items()]


def _task(where: str, name: str, given: Mapping[str, Any], data: DataSettings, rewards: RewardSettings) -> Task:
    if not name or "/" in name:
        raise ValueError(f"{where}: a name is not blank and without a stroke; it begins the names of figures")
    known = {each: get_type_hints(each) for each in (DataSettings, RewardSettings)}
    unknown = [key for key in given if key != "weight" and not any(key in names for names in known.values())]
    if unknown:
        names = ["weight", *sorted(known[DataSettings]), *sorted(known[RewardSettings])]
        raise ValueError(f"{where}: {unknown} are no settings of a task; those are {names}")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight is {weight!r}; it must be a number above 0")

    def of(settings: type) -> dict[str, Any]:
        return {
            key: _as_field(key, value, known[settings][key]) for key, value in given.items() if key in known[settings]
        }

    try:
        own = replace(data, **of(DataSettings)), replace(rewards, **of(RewardSettings))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Task(name, *own, weight=float(weight))


def _as_field(key: str, value: Any, annotation: Any) -> Any:
    try:
        return _typed(value, annotation)
    except TypeError:
        wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        wanted = wanted.replace("typing.", "").replace("tuple[", "list[")
        raise ValueError(f"{key} is {value!r}; it must be {wanted}") from None


def _typed(value: Any, annotation: Any) -> Any:
    """A value from JSON as a field of this type holds it: lists as tuples, whole numbers as floats where those are.

    Raises:
        TypeError: it is none.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for each in args:
            try:
                return _typed(value, each)
            except TypeError:
                continue
    elif origin is Literal and value in args:
        return value
    elif origin is tuple and isinstance(value, list):
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(items) == len(value):
            return tuple(map(_typed, value, items))
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif type(value) is annotation and annotation in (str, int, bool, NoneType):
        return value
    raise TypeError(value)


def as_settings(mixture: Sequence[Task]) -> dict[str, Any]:
    """A mixture as JSON, for seeing later whether it is still the same; noise follows from the order too."""
    return to_json(
        {
            "order": [task.name for task in mixture],
            "tasks": {str(task.name): dataclasses.asdict(task) for task in mixture},
        }
    )


def shares(tasks: Sequence[Task], num_prompts: int) -> list[int]:
    """How many prompts of a step are of each task: in proportion to the weights, to the nearest whole number.

    Raises:
        ValueError: a task would have none.
    """
    weights = [Fraction(task.weight) for task in tasks]
    exact = [num_prompts * weight / sum(weights) for weight in weights]
    counts = [math.floor(each) for each in exact]
    largest_rest = sorted(range(len(tasks)), key=lambda n: counts[n] - exact[n])
    for n in largest_rest[: num_prompts - sum(counts)]:
        counts[n] += 1
    if not all(counts):
        names = [task.name for task, count in zip(tasks, counts, strict=True) if not count]
        raise ValueError(f"of num_prompts = {num_prompts} there would be none of {names}; raise it, or their weight")
    return counts


def check_known(model: str | None, asked: Sequence[DataSettings]) -> None:
    """Check that the embedded base, where no model is named, is asked what it knows.

    Raises:
        ValueError: it is not.
    """
    known = all(data.dataset in (None, ERRANDS) and not (data.template or data.chat_template) for data in asked)
    if model is None and not known:
        raise ValueError(
            "the embedded base knows its own sums and errands only; with a dataset or template, name a model too"
        )


class OpenTask:
    """A task that is ready to be asked and scored.

    Attributes:
        name: of the task.
        problems, held_out: lists of problems, until ``encode`` made prompts of them.
        scoring: what scores completions; left with the run.
        is_graded: whether anything tells a right completion.
        same: whether two answers are the same for a majority vote.
        prompt_format: how prompts are made, once ``encode`` was called; see ``data.prompt_format``.

    Args:
        task: which.
        run: that it is for.
        seed: of what is drawn.
        max_completion_length: in tokens.
        mesh: that a reward model is split over.
        dtype: the precision a reward model computes in.
        asked: the problems whose completions ``scoring.score`` will get: those to train on, those held out from them,
            or those of ``DataSettings.load_for_evaluation``, which are then ``problems`` and ``held_out`` alike.

    Raises:
        ValueError: problems or rewards that cannot be had, or do not fit each other.
    """

    problems: EncodedProblems
    held_out: EncodedProblems
    prompt_format: dict[str, Any]

    def __init__(
        self,
        task: Task,
        run: Run,
        *,
        seed: int,
        max_completion_length: int,
        mesh: Mesh,
        dtype: Any,
        asked: Asked = "training",
    ):
        self.name, self._task, self._run = task.name, task, run
        self.is_graded = task.data.grader != "none"
        self.same = task.data.same
        if not self.is_graded and (task.rewards.accuracy_weight or task.rewards.gate_on_format):
            raise ValueError("grader is none, so that there is no accuracy to be paid for; set accuracy_weight to 0")
        notes = DataNotes()
        if asked == "evaluation":
            self._problems, accuracy = task.data.load_for_evaluation(notes)
            self._held_out, held_out_accuracy = self._problems, accuracy
        else:
            self._problems, self._held_out, accuracy, held_out_accuracy = task.data.load(seed, notes)
        notes.report(run.say, run.folder / ("data.json" if task.name is None else f"data-{task.name}.json"))
        self.columns = frozenset(reward_columns(self._problems)) | {*OF_COMPLETIONS}
        self.scoring: Scoring = run.enter(
            task.rewards.open(
                accuracy if asked == "training" else held_out_accuracy,
                held_out_accuracy,
                max_completion_length=max_completion_length,
                needs_pool=task.data.dataset not in (None, ERRANDS),
                mesh=mesh,
                dtype=dtype,
                today=run.begun,
                show=run.say,
            )
        )
        scored = self._problems if asked == "training" else self._held_out
        self.scoring.probe(_first_row(scored), _first_row(self._held_out))

    def encode(self, policy: Pretrained, *, max_prompt_length: int, first: int = 0, first_held_out: int = 0) -> None:
        """Make prompts of the problems.

        Args:
            policy: whose tokens they are made of, and whose prompt format is the default.
            max_prompt_length: in tokens.
            first, first_held_out: what the prompts' noise is counted from.

        Raises:
            ValueError: as ``EncodedProblems``; and the policy does not stop where its chat template ends a turn.
        """
        of_task = "" if self.name is None else f"{self.name}: "
        rendering = rendering_of(
            self._task.data, policy, say=lambda text: self._run.say(of_task + text), today=self._run.begun
        )
        self.prompt_format = prompt_format_of(rendering, policy.tokenizer)
        first_problem = self._problems[0]
        check_turn_end(policy.tokenizer, policy.eos_ids, first_problem.prompt, first_problem.columns, **rendering)

        def encoded(problems: list[Problem], first_index: int) -> EncodedProblems:
            found = self._task.data.encode(
                problems,
                policy.tokenizer,
                pad_id=policy.pad_id,
                max_prompt_length=max_prompt_length,
                rendering=rendering,
                first_index=first_index,
            )
            if found.dropped:
                self._run.say(f"{found.dropped} of {len(problems)} prompts dropped: over {max_prompt_length} tokens")
            return found

        self.problems = encoded(self._problems, first)
        is_same = self._held_out is self._problems
        self.held_out = self.problems if is_same else encoded(self._held_out, first_held_out)


class MixedScoring:
    """The scoring of several tasks as one: each row is scored as its task does.

    Args:
        tasks: those of the mixture.

    Attributes:
        weights: what each part counts, as ``task/part``.
        judge: the name of the part that holds what is watched in each task; None where nothing is.
    """

    def __init__(self, tasks: Sequence[OpenTask]):
        self._tasks = {task.name: task for task in tasks}
        self.weights = {
            f"{task.name}/{name}": weight for task in tasks for name, weight in task.scoring.weights.items()
        }
        self.judge = "judge" if any(task.scoring.judge for task in tasks) else None

    def score(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> Scores:
        """As ``Scoring.score``, with the column ``task``; ``counted`` has the parts of each task apart, 0 elsewhere."""
        B = len(completions)
        total, outcome, notes = np.full(B, np.nan, np.float32), np.full(B, np.nan, np.float32), [""] * B
        parts: dict[str, np.ndarray] = {}
        counted = {name: np.zeros(B, np.float32) for name in self.weights}
        steps: list[tuple[tuple[int, float], ...]] = [()] * B
        for task, rows in self._rows(columns[TASK]):
            own = task.scoring.score(
                [prompts[row] for row in rows], [completions[row] for row in rows], **_taken(columns, rows, task)
            )
            total[rows], outcome[rows] = own.total, own.outcome
            named = own.parts if task.scoring.judge is None else {**own.parts, "judge": own.parts[task.scoring.judge]}
            for name, values in named.items():
                parts.setdefault(name, np.full(B, np.nan, np.float32))[rows] = values
            for name, values in own.counted.items():
                counted[f"{task.name}/{name}"][rows] = values
            for row, note, of_steps in zip(rows, own.notes, own.steps, strict=True):
                notes[row], steps[row] = note, of_steps
        return Scores(total, parts, counted, notes, outcome, steps)

    def as_drawn(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        decode: Callable[[list[int]], str],
        *,
        eos_ids: Sequence[int],
        max_completion_length: int,
    ) -> Callable[[int, Sequence[int]], None] | None:
        """See ``Scoring.as_drawn``."""
        watches: dict[int, tuple[Callable[[int, Sequence[int]], None], int]] = {}
        for task, rows in self._rows(columns[TASK]):
            watch = task.scoring.as_drawn(
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

    def take_faults(self) -> list[Fault]:
        """What could not be scored since the last call."""
        return [fault for task in self._tasks.values() for fault in task.scoring.take_faults()]

    def _rows(self, names: Sequence[str]) -> list[tuple[OpenTask, list[int]]]:
        rows = {name: [row for row, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        return [(self._tasks[name], found) for name, found in rows.items()]


def _taken(columns: Mapping[str, Sequence[Any]], rows: list[int], task: OpenTask) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in columns.items() if name in task.columns}


def _first_row(problems: list[Problem]) -> dict[str, Any]:
    """The columns of a first problem, one value each."""
    return {name: values[0] for name, values in reward_columns(problems[:1]).items()}
