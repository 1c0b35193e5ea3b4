"""Generated demonstrations and preferences of the toy tasks."""

from __future__ import annotations

import numpy as np

from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.preferences import Preference
from grpo_jax.tasks.errands import sample_errands, sample_preference
from grpo_jax.tasks.sums import sample_sums, worked
from grpo_jax.tasks.toy_config import ToyConfig


def worked_sums(
    rng: np.random.Generator, count: int, *, held_out: bool, in_chinese: bool = False
) -> list[Demonstration]:
    """Demonstrations of the sums task: worked solutions with running totals.

    Args:
        rng: source of the sums.
        count: number of demonstrations.
        held_out: whether to sample the held-out sums.
        in_chinese: whether the thoughts have Chinese digits.
    """
    toy = ToyConfig()
    sums = sample_sums(rng, count, min_terms=toy.min_terms, max_terms=toy.max_terms, held_out=held_out)
    return [
        Demonstration(each.question, worked(each, in_chinese=in_chinese), each.question, {"answer": each.answer})
        for each in sums
    ]


def errand_preferences(rng: np.random.Generator, count: int, *, held_out: bool) -> list[Preference]:
    """Preferences of the errands task: pairs of careless replies.

    Args:
        rng: source of errands, replies and preferences.
        count: number of pairs.
        held_out: whether to sample the held-out errands.
    """
    errands = sample_errands(rng, count, held_out=held_out)
    pairs = [(each, *sample_preference(each, rng)) for each in errands]
    return [Preference(errand.question, chosen, rejected, errand.question) for errand, chosen, rejected in pairs]
