"""Held-out splits of data sources, and the check that a grader can read their gold answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from grpo_jax.data.files import split_names
from grpo_jax.data.problems import Problem
from grpo_jax.data.statistics import prompt_key
from grpo_jax.rewards.code.test_cases import why_untestable
from grpo_jax.rewards.math.answer import gold_answer
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.tasks.generated import TASKS

REASONING_GYM = "reasoning-gym:"
GENERATED_PROBLEMS = 4096
DEFAULT_HELD_OUT = 256
HELD_OUT_SEED = 1_000_003
Row = TypeVar("Row")


def ungraded(prompts: list[str], completions: list[str], **_columns: object) -> list[None]:
    """The accuracy reward of prompts without a grader: always absent.

    Args:
        prompts, completions: ``[B]`` texts.
    """
    return [None] * len(completions)


def key_of(problem: Problem) -> str:
    """The ``prompt_key`` of a problem: equal for prompts that differ only in case and white space."""
    return prompt_key(problem.prompt)


def is_generated(source: str) -> bool:
    """Whether a data source is a toy task or a reasoning-gym task instead of a data set."""
    return source.startswith(REASONING_GYM) or source in TASKS


def default_split(source: str, subset: str | None, but: str | None = None) -> str | None:
    """The evaluation split of a source: "test", or else "validation"; None if it has neither.

    Args:
        source: path of a file or folder, id of a data set on the hub, or name of a generated task.
        subset: configuration of a folder or data set.
        but: a split to exclude, such as the training split.
    """
    names = ["test"] if is_generated(source) else [name for name in split_names(source, subset) if name != but]
    return next((name for name in ("test", "validation") if name in names), None)


def hold_out(
    rows: list[Row], most: int | None, *, key: Callable[[Row], str], source: str
) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows and held-out rows, a fixed random tenth of the distinct keys.

    Args:
        rows: all rows.
        most: maximum number of held-out rows; None for no maximum.
        key: maps a row to its key, such as its prompt. Rows with equal keys are in the same split.
        source: name of the source, for the error.

    Returns:
        The training rows and the held-out rows.

    Raises:
        ValueError: there are fewer than ten distinct keys.
    """
    row_keys = [*map(key, rows)]
    keys = list(dict.fromkeys(row_keys))
    if len(keys) < 10:
        raise ValueError(
            f"{source} has {len(keys)} problems, too few to hold out a tenth; set eval_dataset or eval_split"
        )
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(keys))
    count = len(keys) // 10 if most is None else min(most, len(keys) // 10)
    chosen = {keys[n] for n in order[:count]}
    training = [row for row, row_key in zip(rows, row_keys, strict=True) if row_key not in chosen]
    held_out = [row for row, row_key in zip(rows, row_keys, strict=True) if row_key in chosen]
    return training, held_out[:most]


def check_gold(problems: list[Problem], grader: str, source: str) -> None:
    """Check that the grader can read the gold answers (or tests) of the first 100 problems.

    Args:
        problems: the problems.
        grader: "math", "code" or "exact".
        source: name of the source, for the error.

    Raises:
        ValueError: more than half of them are unreadable; the message has an example.
    """
    first = problems[:100]
    if grader == "code":
        unread = [problem.columns.get("tests") for problem in first if why_untestable(problem.columns.get("tests"))]
    elif grader == "math":
        gold = [problem.answer or "" for problem in first]
        unread = [each for each in gold if read_answer(gold_answer(each)) is None]
    else:
        unread = [problem.answer for problem in first if not (problem.answer or "").strip()]
    if 2 * len(unread) > len(first):
        raise ValueError(
            f"the grader {grader} cannot read {len(unread)} of the first {len(first)} answers or tests of {source}, "
            f"such as {unread[0]!r:.200}; choose another grader or answer_column"
        )
