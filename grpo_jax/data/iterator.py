"""Batches of problems in a deterministic, resumable order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from grpo_jax.data.problems import Problem


class ProblemIterator:
    """An endless iterator over batches ``(index, problems)``; the batches follow from ``seed`` and the step alone.

    An epoch visits every problem once, in an order of its own, but for the ``len(problems) % num_prompts`` at its end,
    which do not fill a batch: so no batch holds a problem twice. ``index`` are the positions in ``problems``, int32 of
    shape ``[num_prompts]``: the same problem has the same index in every epoch.

    Args:
        problems: what is visited.
        num_prompts: problems a batch.
        seed: from 0 to 2**32 - 1.

    Raises:
        ValueError: ``num_prompts`` is less than 1 or more than there are problems; a seed outside its range.
    """

    def __init__(self, problems: Sequence[Problem], *, num_prompts: int, seed: int):
        if not 1 <= num_prompts <= len(problems):
            raise ValueError(
                f"num_prompts={num_prompts} problems a batch cannot be drawn from {len(problems)} problems: "
                f"choose from 1 to {len(problems)}"
            )
        self._problems = problems
        self._identity = {"seed": seed, "num_prompts": num_prompts, "problems": _digest(problems)}
        # Batching before repeating keeps a batch within one epoch. No threads: the rows are in memory already.
        order = grain.MapDataset.range(len(problems)).shuffle(seed=seed).batch(num_prompts, drop_remainder=True)
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._indices = iter(order.repeat(None).to_iter_dataset(in_this_thread))

    def __iter__(self) -> ProblemIterator:
        return self

    def __next__(self) -> tuple[np.ndarray, list[Problem]]:
        index = next(self._indices).astype(np.int32)
        return index, [self._problems[i] for i in index]

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as a small dictionary that JSON can hold."""
        return {**self._identity, "position": self._indices.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``get_state`` was called.

        Raises:
            ValueError: the state was taken with another seed, another ``num_prompts`` or other problems.
        """
        different = {
            name: {"state": state.get(name), "iterator": value}
            for name, value in self._identity.items()
            if state.get(name) != value
        }
        if different:
            raise ValueError(f"this state belongs to another iterator: {different}")
        self._indices.set_state(state["position"])


def _digest(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.prompt, problem.answer)).encode())
    return digest.hexdigest()[:16]


def padded_batches(count: int, size: int) -> Iterator[tuple[list[int], int]]:
    """The positions from 0 to ``count`` in batches of one size, the last filled up; and how many of each are real."""
    for first in range(0, count, size):
        positions = list(range(first, min(first + size, count)))
        yield positions + [positions[-1]] * (size - len(positions)), len(positions)
