"""The toy tasks by name: generated problems, demonstrations and preferences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.preferences import Preference
from grpo_jax.data.problems import Problem
from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.math.answer import answer_reward
from grpo_jax.tasks.demonstrations import errand_preferences, worked_sums
from grpo_jax.tasks.errands import ERRANDS, MOST_ERRANDS, errand_problems, errand_reward, sample_errands
from grpo_jax.tasks.sums import sample_sums, sum_problems
from grpo_jax.tasks.toy_config import ToyConfig

SUMS = "sums"


@dataclass(frozen=True)
class GeneratedTask:
    """A toy task with its grader, which is fast and never fails, so that it runs in the training process.

    Attributes:
        sample: ``(rng, count, held_out) -> problems``; held-out problems and others are disjoint.
        reward: the accuracy reward.
        num_problems: number of training problems.
        asks_for_format: whether to reward the format ``<think>...</think><answer>...</answer>``.
        has_final_answers: whether completions have a final answer, for majority votes.
    """

    sample: Callable[[np.random.Generator, int, bool], list[Problem]]
    reward: RewardFn
    num_problems: int
    asks_for_format: bool
    has_final_answers: bool


def _sums(rng: np.random.Generator, count: int, held_out: bool) -> list[Problem]:
    toy = ToyConfig()
    return sum_problems(sample_sums(rng, count, min_terms=toy.min_terms, max_terms=toy.max_terms, held_out=held_out))


def _errands(rng: np.random.Generator, count: int, held_out: bool) -> list[Problem]:
    return errand_problems(sample_errands(rng, count, held_out=held_out))


TASKS: Mapping[str, GeneratedTask] = {
    SUMS: GeneratedTask(_sums, answer_reward, 4096, asks_for_format=True, has_final_answers=True),
    ERRANDS: GeneratedTask(_errands, errand_reward, MOST_ERRANDS, asks_for_format=False, has_final_answers=False),
}
DEMONSTRATIONS: Mapping[str, Callable[..., list[Demonstration]]] = {
    SUMS: worked_sums,
    "sums-chinese": partial(worked_sums, in_chinese=True),
}
"""``(rng, count, *, held_out) -> demonstrations``."""
PREFERENCES: Mapping[str, Callable[..., list[Preference]]] = {ERRANDS: errand_preferences}
"""``(rng, count, *, held_out) -> preferences``."""
