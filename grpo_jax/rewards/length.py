"""Rewards for how long a completion is, in tokens.

They take the column ``completion_length``: the tokens of each completion, its ending one included, as experiments hand
it to every reward.
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
    """0 up to ``max_length - cache`` tokens, then falling in a straight line to -1 at ``max_length``, and -1 beyond.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13; verl: ``overlong_buffer``).

    Args:
        prompts, completions: not looked at.
        completion_length: in tokens.
        max_length: the longest that is wanted.
        cache: the tokens before that over which the punishment grows.

    Raises:
        ValueError: ``cache`` is not from 1 to ``max_length``.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache is {cache}; it must be from 1 to max_length = {max_length}")
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
    """From one reward for the shortest completion along half a cosine to another for the longest, by right or wrong.

    ``end + (start - end) (1 + cos(pi length / max_length)) / 2``; by default right answers are worth more the shorter
    they are, and wrong ones less: think longer where it helps. The cosine reward of arXiv 2502.03373, section 4.

    Args:
        prompts, completions: handed to ``accuracy``.
        completion_length: in tokens.
        max_length: the longest that can be drawn.
        right: the reward of a right answer of no tokens, and of ``max_length``.
        wrong: the same of a wrong answer.
        exceeded: the reward at and beyond ``max_length``, right or wrong.
        accuracy: the reward that tells right (1) from wrong; where it has no score, this has none.
        columns: those that ``accuracy`` needs.

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
