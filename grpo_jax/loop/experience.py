"""The completions of a step of online RL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from grpo_jax.data.encoded import Texts
from grpo_jax.data.problems import Problem
from grpo_jax.rewards.scorer import Scoring
from grpo_jax.rollout.host_batch import concatenated
from grpo_jax.types import Prompts, Rollout


@dataclass(frozen=True)
class ProblemBatch:
    """The problems of a step, before they are sampled for.

    Attributes:
        positions: of the problems, an array for each task.
        problems: the problems, one task after the other.
        tasks: the name of each one's task; None if there is one task.
        prompts: their tokens.
        texts: ``[B]``, the text of each completion's prompt.
        columns: ``[B]`` each, columns of the problems for rewards.
    """

    positions: list[np.ndarray]
    problems: list[Problem]
    tasks: list[str | None]
    prompts: Prompts
    texts: list[str]
    columns: dict[str, list[Any]]


@dataclass
class Experience:
    """The B completions of a step, in groups of one prompt each.

    Attributes:
        step: the number of the step.
        problems: one per group.
        tasks: the name of each group's task; None if there is one task.
        prompts: ``[B]``, the text of each completion's prompt.
        columns: ``[B]`` each, columns of the problem and facts of the completion, for rewards.
        rollout: the tokens.
        completions: ``[B]``, the texts, decoded where they are read.
        lengths: ``[B]``, in tokens.
        started: ``time.monotonic()`` at the start of the step.
        times: seconds of its phases, and bytes resharded.
        positions: of its problems, as in ``ProblemBatch``; of several sampling attempts, those of the first.
        scoring: its rewards, if they are computed in the background.
    """

    step: int
    problems: list[Problem]
    tasks: list[str | None]
    prompts: list[str]
    columns: dict[str, list[Any]]
    rollout: Rollout
    completions: Texts
    lengths: np.ndarray
    started: float
    times: dict[str, float] = field(default_factory=dict)
    positions: list[np.ndarray] = field(default_factory=list)
    scoring: Scoring | None = None

    @property
    def group_size(self) -> int:
        """Completions per prompt."""
        return len(self.completions) // len(self.problems)


def has_reward_variance(total: np.ndarray, group_size: int) -> np.ndarray:
    """``[groups]`` bool, whether the rewards of a group are not all equal; absent rewards are ignored.

    Args:
        total: ``[B]``, NaN where absent.
        group_size: G.
    """
    groups = total.reshape(-1, group_size)
    present = ~np.isnan(groups)
    return np.where(present, groups, -np.inf).max(1) > np.where(present, groups, np.inf).min(1)


def concatenate(attempts: Sequence[Experience]) -> Experience:
    """The completions of several sampling attempts of one step.

    Args:
        attempts: of one step, in order.
    """
    if len(attempts) == 1:
        return attempts[0]
    summed = ("rollout_time", "reshard_time", "scoring_time")
    times = {name: sum(attempt.times.get(name, 0.0) for attempt in attempts) for name in summed}
    lengths = np.concatenate([attempt.lengths for attempt in attempts])
    names = dict.fromkeys(name for attempt in attempts for name in attempt.columns)
    return Experience(
        step=attempts[0].step,
        problems=[problem for attempt in attempts for problem in attempt.problems],
        tasks=[task for attempt in attempts for task in attempt.tasks],
        prompts=[prompt for attempt in attempts for prompt in attempt.prompts],
        columns={
            name: [
                value for attempt in attempts for value in attempt.columns.get(name, [None] * len(attempt.completions))
            ]
            for name in names
        },
        rollout=concatenated([attempt.rollout for attempt in attempts]),
        completions=reduce(add, (attempt.completions for attempt in attempts)),
        lengths=lengths,
        started=attempts[0].started,
        times={
            **times,
            "rollout_tokens_per_second": float(lengths.sum() / times["rollout_time"]),
            "reshard_bytes": attempts[0].times["reshard_bytes"],
        },
        positions=attempts[0].positions,
    )
