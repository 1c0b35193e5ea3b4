"""Several rewards made into one, every part kept in sight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUMBERS = (int, float, np.integer, np.floating, np.bool_)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

@dataclass(frozen=True)
class Graded:
    """A score with what else there is to know of it.

    Attributes:
        score: the reward, or None where there is none.
        details: further figures by name, which are logged beside the reward and never learnt from.
        note: what a person should read beside the completion, such as an interpreter's message.
    """

    score: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


RewardFn = Callable[..., Sequence[float | None]]
"""``(prompts: list[str], completions: list[str], **columns: list) -> list[float | None]``.

Called with every column of the problems, one entry a completion; None (or NaN) says that there is no score.
"""


@dataclass(frozen=True)
class Scores:
    """Rewards of some completions; NaN where absent.

    Attributes:
        total: float32 ``[B]``.
        parts: float32 ``[B]`` by the name of the reward, before weighting.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]


def weighted(rewards: Mapping[str, RewardFn], weights: Mapping[str, float]) -> Callable[..., Scores]:
    """A function ``(prompts, completions, **columns) -> Scores`` with ``total = sum_i weights[i] * parts[i]``.

    A total is absent where a part with a weight is: a sum that leaves a part out would be compared with sums that have
    it. A part with weight 0 is scored to be looked at and does not touch the total, absent or not.

    Score one example before compute is spent, so that a reward that cannot run is found at once.

    Raises:
        ValueError: no rewards; names that differ between ``rewards`` and ``weights``; a weight that is not finite, or
            all of them 0. And when called: columns of different lengths; a reward that raises (the cause is chained),
            returns something other than one entry a completion, or an entry that is no number or not finite in
            float32. Each names the reward.
    """
    if not rewards or set(rewards) != set(weights):
        raise ValueError(f"there must be rewards, and one weight for each: rewards {[*rewards]}, weights {[*weights]}")
    if not all(math.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be finite and not all 0: {dict(weights)}")

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> Scores:
        lengths = {name: len(c) for name, c in {"prompts": prompts, "completions": completions, **columns}.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"prompts, completions and columns must have one entry a completion: {lengths}")
        parts = {name: _run(name, reward, prompts, completions, columns) for name, reward in rewards.items()}
        total = np.zeros(len(completions))
        for name, part in parts.items():
            if weights[name]:
                total += weights[name] * part
        return Scores(total.astype(np.float32), {name: part.astype(np.float32) for name, part in parts.items()})

    return score


def _run(
    name: str, reward: RewardFn, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> np.ndarray:
    try:
        values = reward(prompts, completions, **columns)
    except Exception as error:
        raise ValueError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It was called as reward(prompts, completions, "
            f"**columns) with the columns {[*columns]}"
        ) from error
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise ValueError(f"reward {name!r} must return a list, and returned {type(values).__name__}")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} must return one entry a completion: {len(completions)}, not {len(values)}")
    return np.array([_number(name, value, completion) for value, completion in zip(values, completions, strict=True)])


def _number(name: str, value: Any, completion: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, NUMBERS) or abs(value) > LARGEST_FLOAT32:
        raise ValueError(
            f"reward {name!r} returned {value!r:.200}; an entry must be None or a number that float32 can hold. "
            f"The completion: {completion!r:.200}"
        )
    return float(value)
