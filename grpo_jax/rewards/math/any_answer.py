"""A grader for questions that have several right answers."""

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
    """The best score that a completion gets for one of several right answers.

    Args:
        prompts: passed on; may be empty.
        completions: passed on.
        answer: the first right answer of each.
        other_answers: the others of each; None or empty where there are none.
        grader: a per-sample reward that takes prompts, completions and ``answer``.

    Returns:
        For each completion the largest score; None where the grader abstains for every answer.
    """
    others = other_answers or [None] * len(answer)
    golds = [[first, *(more or [])] for first, more in zip(answer, others, strict=True)]
    places = [place for place, each in enumerate(golds) for _ in each]
    flat = grader(
        [prompts[place] for place in places] if prompts else [],
        [completions[place] for place in places],
        answer=[gold for each in golds for gold in each],
    )
    scores = iter(flat)
    present = [[score for score in (next(scores) for _ in each) if score is not None] for each in golds]
    return [max(each, default=None) for each in present]
