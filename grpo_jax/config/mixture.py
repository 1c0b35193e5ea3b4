"""Tasks of a run: one, or a mixture of several from a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from grpo_jax.config.data import DataConfig
from grpo_jax.config.files import read_settings_file, with_settings
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.jsonl import to_json
from grpo_jax.tasks.generated import TASKS
from grpo_jax.tasks.toy_config import TOY


@dataclass(frozen=True)
class TaskConfig:
    """A task of a run: problems and rewards.

    Attributes:
        name: prefix of its metrics; None if it is the only task.
        data: its problems.
        rewards: its rewards.
        weight: its share of the prompts, relative to the other tasks.
    """

    name: str | None
    data: DataConfig
    rewards: RewardConfig
    weight: float = 1.0


def read_tasks(path: Path, data: DataConfig, rewards: RewardConfig) -> list[TaskConfig]:
    """The tasks of a mixture file (JSON or YAML): task name -> ``weight`` and settings of ``data`` and ``rewards``.

    For example ``{"sums": {"weight": 2, "format_weight": 0.2}, "errands": {"dataset": "errands", "accuracy_weight": 0,
    "reward_model": "runs/reward_model/model"}}``.

    Args:
        path: the file.
        data: data settings of every task, unless the task sets its own.
        rewards: reward settings of every task, unless the task sets its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another form, names a task twice, or has an unknown setting or a wrong value.
    """
    read = read_settings_file(path)
    if not read or not all(isinstance(given, dict) for given in read.values()):
        raise ValueError(f'{path} must map task names to settings, such as {{"sums": {{"weight": 2}}}}')
    return [_task(f"{path}, task {name!r}", name, given, data, rewards) for name, given in read.items()]


def _task(where: str, name: str, given: Mapping[str, Any], data: DataConfig, rewards: RewardConfig) -> TaskConfig:
    if not name or "/" in name:
        raise ValueError(f"{where}: a task name must not be empty or contain '/'; it is a prefix of metric names")
    names = {each: {field.name for field in dataclasses.fields(each)} for each in (DataConfig, RewardConfig)}
    unknown = [key for key in given if key != "weight" and not any(key in known for known in names.values())]
    if unknown:
        known = ["weight", *sorted(names[DataConfig]), *sorted(names[RewardConfig])]
        raise ValueError(f"{where}: {unknown} are not settings of a task; the settings are {known}")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight is {weight!r}; it must be a number above 0")
    own = {
        each: {key: value for key, value in given.items() if key in known and key != "weight"}
        for each, known in names.items()
    }
    return TaskConfig(
        name,
        with_settings(data, own[DataConfig], where),
        with_settings(rewards, own[RewardConfig], where),
        weight=float(weight),
    )


def as_settings(mixture: Sequence[TaskConfig]) -> dict[str, Any]:
    """A mixture as JSON, to be compared on resume; includes the order, on which the sampling noise depends."""
    return to_json(
        {
            "order": [task.name for task in mixture],
            "tasks": {str(task.name): dataclasses.asdict(task) for task in mixture},
        }
    )


def shares(tasks: Sequence[TaskConfig], num_prompts: int) -> list[int]:
    """Prompts per step of each task: proportional to the weights, rounded by largest remainder.

    Args:
        tasks: with their weights.
        num_prompts: of a step.

    Raises:
        ValueError: a task would get no prompt.
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


def check_known(model: str | None, data: Sequence[DataConfig]) -> None:
    """Check that the toy model is used with the toy tasks only.

    Args:
        model: the model's name.
        data: data settings of all tasks.

    Raises:
        ValueError: the toy model is used with another dataset or a template.
    """
    is_toy = all(each.dataset in TASKS and not (each.template or each.chat_template) for each in data)
    if model == TOY and not is_toy:
        raise ValueError(
            f"the toy model knows the tasks {' and '.join(TASKS)} only, without a template; with another dataset or a "
            "template, name a model with --model"
        )
