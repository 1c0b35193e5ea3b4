"""Which samples a person should read: the surprising ones, and one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo_jax.monitor.samples import Sample


def spot_checks(samples: Sequence[Sample], *, group_size: int, seed: int) -> list[Sample]:
    """Up to four samples of a step, each with why it was chosen: what is to be found is found at the edges.

    - the highest reward above the mean of its group: what paid where its siblings did not;
    - the largest disagreement between two parts of the reward, each against its own course over the step: what
      satisfies one and not the other;
    - the lowest reward below the mean of its group;
    - one at random, so that the rest is seen too.

    Samples without a reward are chosen only at random, and nothing is chosen twice.

    Args:
        samples: those of a group adjacent.
        group_size: samples for each prompt.
        seed: of the random one.
    """
    rewards = np.array([sample.reward for sample in samples], float)
    groups = rewards.reshape(-1, group_size)
    present = ~np.isnan(groups)
    means = np.where(present, groups, 0).sum(1) / np.maximum(present.sum(1), 1)
    jump = rewards - np.repeat(means, group_size)
    chosen: dict[int, str] = {}

    def choose(surprise: np.ndarray, why: str) -> None:
        surprise = np.where(np.isnan(surprise), -np.inf, surprise)
        surprise[list(chosen)] = -np.inf
        place = int(surprise.argmax())
        if surprise[place] > 0:
            chosen[place] = why

    choose(jump, "highest reward above its group")
    choose(np.where(np.isnan(rewards), np.nan, disagreement(samples)), "largest disagreement between parts")
    choose(-jump, "lowest reward below its group")
    rest = [place for place in range(len(samples)) if place not in chosen]
    if rest:
        chosen[rest[np.random.default_rng(seed).integers(len(rest))]] = "at random"
    return [replace(samples[place], why=why) for place, why in chosen.items()]


def disagreement(samples: Sequence[Sample]) -> np.ndarray:
    """For each sample the largest difference between two of its parts, each standardized over the samples."""
    names = [*dict.fromkeys(name for sample in samples for name in sample.rewards)]
    values = [[np.nan if (x := sample.rewards.get(name)) is None else x for name in names] for sample in samples]
    parts = np.array(values, float).reshape(len(samples), -1)
    standardized = []
    for part in parts.T:
        known = part[~np.isnan(part)]
        if known.size and known.std() > 0:
            standardized.append((part - known.mean()) / known.std())
    if len(standardized) < 2:
        return np.zeros(len(samples))
    stacked = np.array(standardized)
    return stacked.max(0) - stacked.min(0)
