"""What a step of online RL has sampled and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.monitor.samples import Sample
from grpo_jax.rewards.compose import Scores
from grpo_jax.rollout.host_batch import concatenated
from grpo_jax.types import Rollout


@dataclass
class Experience:
    """What was drawn in a step, and what is known of it; B completions.

    Attributes:
        step: which.
        problems: what was asked, one for each group.
        tasks: the task of each group.
        texts: the prompt of each completion.
        columns: of its problem, and what its reward wants to know of itself.
        rollout: what was drawn.
        completions: the same as text.
        lengths: in tokens.
        started: when the step began, by ``time.monotonic``.
        times: what parts of it took, and the bytes that were moved.
    """

    step: int
    problems: list[Problem]
    tasks: list[str | None]
    texts: list[str]
    columns: dict[str, list[Any]]
    rollout: Rollout
    completions: list[str]
    lengths: np.ndarray
    started: float
    times: dict[str, float] = field(default_factory=dict)


def has_reward_variance(total: np.ndarray, group_size: int) -> np.ndarray:
    """``[groups]``, whether the rewards of a group that are present are not all the same."""
    groups = total.reshape(-1, group_size)
    present = ~np.isnan(groups)
    return np.where(present, groups, -np.inf).max(1) > np.where(present, groups, np.inf).min(1)


def joined(rounds: Sequence[Experience]) -> Experience:
    """What was drawn in several attempts at a step, as one."""
    if len(rounds) == 1:
        return rounds[0]
    times = {name: sum(each.times[name] for each in rounds) for name in ("rollout_time", "reshard_time")}
    lengths = np.concatenate([each.lengths for each in rounds])
    names = dict.fromkeys(name for each in rounds for name in each.columns)
    return Experience(
        step=rounds[0].step,
        problems=[problem for each in rounds for problem in each.problems],
        tasks=[task for each in rounds for task in each.tasks],
        texts=[text for each in rounds for text in each.texts],
        columns={
            name: [value for each in rounds for value in each.columns.get(name, [None] * len(each.completions))]
            for name in names
        },
        rollout=concatenated([each.rollout for each in rounds]),
        completions=[text for each in rounds for text in each.completions],
        lengths=lengths,
        started=rounds[0].started,
        times={
            **times,
            "rollout_tokens_per_second": float(lengths.sum() / times["rollout_time"]),
            "reshard_bytes": rounds[0].times["reshard_bytes"],
        },
    )


def as_samples(drawn: Experience, scores: Scores, advantages: np.ndarray) -> list[Sample]:
    """A step's completions with what they were worth."""
    group_size = len(drawn.completions) // len(drawn.problems)
    return [
        Sample(
            prompt=drawn.texts[i],
            completion=drawn.completions[i],
            rewards={name: float(part[i]) for name, part in scores.parts.items() if not math.isnan(part[i])},
            reward=float(scores.total[i]),
            advantage=None if math.isnan(advantages[i]) else float(advantages[i]),
            answer=drawn.problems[i // group_size].answer,
            note=scores.notes[i],
        )
        for i in range(len(drawn.completions))
    ]
