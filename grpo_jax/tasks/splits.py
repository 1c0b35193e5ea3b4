"""Held-out splits of data sources, and whether a grader can read their gold answers."""

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
    """The reward of completions that nothing tells right from wrong: absent."""
    return [None] * len(completions)


def key_of(problem: Problem) -> str:
    """The key that tells problems apart; see ``statistics.prompt_key``."""
    return prompt_key(problem.prompt)


def is_generated(source: str) -> bool:
    """Whether a data source is generated rather than read."""
    return source.startswith(REASONING_GYM) or source in TASKS


def default_split(source: str, subset: str | None, but: str | None = None) -> str | None:
    """The split of a source for evaluation, "test" or else "validation"; None where it has neither.

    Args:
        source: a file, a folder, a data set on the hub, or one that is generated.
        subset: of a folder or of a data set on the hub.
        but: a split that is used otherwise.
    """
    names = ["test"] if is_generated(source) else [name for name in split_names(source, subset) if name != but]
    return next((name for name in ("test", "validation") if name in names), None)


def hold_out(
    rows: list[Row], most: int | None, *, key: Callable[[Row], str], source: str
) -> tuple[list[Row], list[Row]]:
    """Divide rows into those that are trained on and a tenth that is held out; always the same one.

    Rows with one key stay together.

    Args:
        rows: all of them.
        most: rows that are held out at most; None for no other limit.
        key: what tells rows apart, such as their prompt.
        source: where they come from, for the error.

    Raises:
        ValueError: fewer than ten keys.
    """
    key_of_row = [*map(key, rows)]
    keys = list(dict.fromkeys(key_of_row))
    if len(keys) < 10:
        raise ValueError(
            f"{source} has {len(keys)} problems, too few to hold a tenth of them out; name others with "
            "eval_dataset or eval_split"
        )
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(keys))
    count = len(keys) // 10 if most is None else min(most, len(keys) // 10)
    chosen = {keys[n] for n in order[:count]}
    kept: list[Row] = []
    held_out: list[Row] = []
    for row, of_row in zip(rows, key_of_row, strict=True):
        (held_out if of_row in chosen else kept).append(row)
    return kept, held_out[:most]


def check_gold(problems: list[Problem], grader: str, source: str) -> None:
    """See whether what is right can be read, of the first hundred problems: of others no completion gets a score.

    Raises:
        ValueError: of more than half of them it cannot; with an example.
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
            f"of the first {len(first)} problems of {source} the grader {grader} cannot read {len(unread)}, such as "
            f"{unread[0]!r:.200}; choose another grader or answer_column"
        )
