"""Tasks of a run: one, or a mixture of several from a file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo_jax.config.data import DataConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.jsonl import to_json
from grpo_jax.tasks.errands import ERRANDS


@dataclass(frozen=True)
class TaskConfig:
    """What is asked and what is paid for.

    Attributes:
        name: how its figures are called; None where it is the only task.
        data, rewards: settings.
        weight: its share of the prompts, beside those of other tasks.
    """

    name: str | None
    data: DataConfig
    rewards: RewardConfig
    weight: float = 1.0


def read_tasks(path: Path, data: DataConfig, rewards: RewardConfig) -> list[TaskConfig]:
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


def _task(where: str, name: str, given: Mapping[str, Any], data: DataConfig, rewards: RewardConfig) -> TaskConfig:
    if not name or "/" in name:
        raise ValueError(f"{where}: a name is not blank and without a stroke; it begins the names of figures")
    known = {each: get_type_hints(each) for each in (DataConfig, RewardConfig)}
    unknown = [key for key in given if key != "weight" and not any(key in names for names in known.values())]
    if unknown:
        names = ["weight", *sorted(known[DataConfig]), *sorted(known[RewardConfig])]
        raise ValueError(f"{where}: {unknown} are no settings of a task; those are {names}")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight is {weight!r}; it must be a number above 0")

    def of(settings: type) -> dict[str, Any]:
        return {
            key: _as_field(key, value, known[settings][key]) for key, value in given.items() if key in known[settings]
        }

    try:
        own = replace(data, **of(DataConfig)), replace(rewards, **of(RewardConfig))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return TaskConfig(name, *own, weight=float(weight))


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


def as_settings(mixture: Sequence[TaskConfig]) -> dict[str, Any]:
    """A mixture as JSON, for seeing later whether it is still the same; noise follows from the order too."""
    return to_json(
        {
            "order": [task.name for task in mixture],
            "tasks": {str(task.name): dataclasses.asdict(task) for task in mixture},
        }
    )


def shares(tasks: Sequence[TaskConfig], num_prompts: int) -> list[int]:
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


def check_known(model: str | None, asked: Sequence[DataConfig]) -> None:
    """Check that the embedded base, where no model is named, is asked what it knows.

    Raises:
        ValueError: it is not.
    """
    known = all(data.dataset in (None, ERRANDS) and not (data.template or data.chat_template) for data in asked)
    if model is None and not known:
        raise ValueError(
            "the embedded base knows its own sums and errands only; with a dataset or template, name a model too"
        )
