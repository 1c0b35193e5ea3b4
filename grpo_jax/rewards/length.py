"""Rewards for the length of a completion in tokens.

They take the column ``completion_length``, which experiments pass to every reward: the number of tokens of each
completion, including the end-of-sequence token.
"""

from __future__ import annotations

import math
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.compose import RewardFn, score_with
from grpo_jax.rewards.math.answer import answer_reward


@per_sample(columns=("completion_length",))
def soft_overlong_reward(
    prompts: list[str],
    completions: list[str],
    *,
    completion_length: list[int],
    max_length: int,
    cache: int,
    **_columns: list[Any],
) -> list[float]:
    """0 up to ``max_length - cache`` tokens, then falling linearly to -1 at ``max_length``, and -1 beyond.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13; verl: ``overlong_buffer``).

    Args:
        prompts, completions: ignored.
        completion_length: ``[B]`` lengths in tokens.
        max_length: length in tokens from which the punishment is -1.
        cache: number of tokens before ``max_length`` over which the punishment grows.

    Raises:
        ValueError: ``cache`` is not between 1 and ``max_length``.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache is {cache}; it must be between 1 and max_length = {max_length}")
    return [-min(max((length - (max_length - cache)) / cache, 0.0), 1.0) for length in completion_length]


@per_sample(columns=("completion_length", "*"))
def cosine_length_reward(
    prompts: list[str],
    completions: list[str],
    *,
    completion_length: list[int],
    max_length: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
    accuracy: RewardFn = answer_reward,
    **columns: list[Any],
) -> list[float | None]:
    """Cosine length reward: ``end + (start - end) (1 + cos(pi length / max_length)) / 2``.

    (start, end) depends on whether the answer is right. By default a right answer gets a higher reward the shorter it
    is and a wrong one the longer it is. Section 4 of arXiv 2502.03373.

    Args:
        prompts, completions: passed to ``accuracy``.
        completion_length: ``[B]`` lengths in tokens.
        max_length: the maximum completion length in tokens.
        right: rewards of a right answer at length 0 and at ``max_length``.
        wrong: rewards of a wrong answer at length 0 and at ``max_length``.
        exceeded: reward from ``max_length`` on, right or wrong.
        accuracy: the reward function that returns 1 for a right answer; where it has no score, there is none.
        columns: passed to ``accuracy``.

    Raises:
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    columns = {"completion_length": completion_length, **columns}
    graded = score_with("accuracy", accuracy, prompts, completions, columns)

    def reward(score: float | None, length: int) -> float | None:
        if score is None or math.isnan(score):
            return None
        if length >= max_length:
            return exceeded
        start, end = right if score == 1 else wrong
        return end + (start - end) * (1 + math.cos(math.pi * length / max_length)) / 2

    return [reward(each.score, length) for each, length in zip(graded, completion_length, strict=True)]
