"""Demonstrations and preferences of the toy tasks."""

from __future__ import annotations

import numpy as np

from grpo_jax.data.conversations import (
    Demonstration,
)
from grpo_jax.data.preferences import Preference
from grpo_jax.tasks.errands import sample_errands, sample_preference
from grpo_jax.tasks.sums import sample_sums, worked
from grpo_jax.tasks.toy_model import ToyConfig


def worked_sums(
    rng: np.random.Generator, count: int, *, held_out: bool, in_chinese: bool = False
) -> list[Demonstration]:
    """The embedded default's demonstrations: sums with their running totals."""
    recipe = ToyConfig()
    sums = sample_sums(rng, count, min_terms=recipe.min_terms, max_terms=recipe.max_terms, held_out=held_out)
    return [
        Demonstration(each.question, worked(each, in_chinese=in_chinese), each.question, {"answer": each.answer})
        for each in sums
    ]


def errand_preferences(rng: np.random.Generator, count: int, *, held_out: bool) -> list[Preference]:
    """The embedded default's preferences: two careless replies to an errand."""
    errands = sample_errands(rng, count, held_out=held_out)
    pairs = [(each, *sample_preference(each, rng)) for each in errands]
    return [Preference(errand.question, better, worse, errand.question) for errand, better, worse in pairs]
