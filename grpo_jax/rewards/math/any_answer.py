"""Reward for questions with several right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.reward import load_parser, math_reward


@per_sample(columns=("answer", "other_answers"), warm_up=load_parser)
def any_answer_reward(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str | None],
    other_answers: Sequence[Sequence[str] | None] | None = None,
    grader: Callable[..., list[float | None]] = math_reward,
    **_columns: list[Any],
) -> list[float | None]:
    """The largest score of a completion over several gold answers; None if the grader gives None for all of them.

    Args:
        prompts: ``[B]`` prompts, or an empty list.
        completions: ``[B]`` completions.
        answer: ``[B]`` first gold answers.
        other_answers: ``[B]`` further gold answers of each question; None or empty if there are none.
        grader: per-sample reward of prompts, completions and ``answer``.
    """
    others = other_answers or [None] * len(answer)
    golds = [[first, *(more or [])] for first, more in zip(answer, others, strict=True)]
    indices = [index for index, row in enumerate(golds) for _ in row]
    scores = iter(
        grader(
            [prompts[index] for index in indices] if prompts else [],
            [completions[index] for index in indices],
            answer=[gold for row in golds for gold in row],
        )
    )
    present = [[score for score in (next(scores) for _ in row) if score is not None] for row in golds]
    return [max(row, default=None) for row in present]
