"""The order of training data: shuffled by epoch, deterministic and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(count)`` for one epoch, from ``(seed, epoch)`` alone.

    Args:
        count: number of examples.
        seed: seed of all epochs.
        epoch: number of the epoch, from 0.
    """
    return np.random.default_rng([seed, epoch]).permutation(count)


class ProblemIterator:
    """An infinite iterator over batches ``(index, problems)``; a batch depends on ``seed`` and its step alone.

    Every epoch is a new permutation of the problems, without the last ``len(problems) % num_prompts``, which do not
    fill a batch. No batch contains a problem twice. ``index`` is ``[num_prompts]`` int32, the positions in
    ``problems``.

    Args:
        problems: the problems.
        num_prompts: problems per batch.
        seed: from 0 to 2**32 - 1.

    Raises:
        ValueError: ``num_prompts`` is below 1 or above the number of problems; the seed is out of range.
    """

    def __init__(self, problems: Sequence[Problem], *, num_prompts: int, seed: int):
        import grain  # most of a second

        if not 1 <= num_prompts <= len(problems):
            raise ValueError(
                f"num_prompts is {num_prompts}; with {len(problems)} problems it must be from 1 to {len(problems)}"
            )
        self._problems = problems
        self._identity = {"seed": seed, "num_prompts": num_prompts, "problems": _digest(problems)}
        # Batching before repeating keeps a batch within one epoch. No threads: the rows are in memory.
        order = grain.MapDataset.range(len(problems)).shuffle(seed=seed).batch(num_prompts, drop_remainder=True)
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._indices = iter(order.repeat(None).to_iter_dataset(in_this_thread))

    def __iter__(self) -> ProblemIterator:
        return self

    def __next__(self) -> tuple[np.ndarray, list[Problem]]:
        index = next(self._indices).astype(np.int32)
        return index, [self._problems[i] for i in index]

    def get_state(self) -> dict[str, Any]:
        """The position in the order and the identity of the data, as JSON types."""
        return {**self._identity, "position": self._indices.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from where ``get_state`` was called.

        Raises:
            ValueError: the state is from an iterator with another seed, ``num_prompts`` or other problems.
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
    """Batches of the positions ``0 .. count - 1`` in order, padded to one size with the last position.

    Args:
        count: number of positions.
        size: batch size.

    Yields:
        ``size`` positions, and how many of them are not padding.
    """
    for first in range(0, count, size):
        positions = list(range(first, min(first + size, count)))
        yield positions + [positions[-1]] * (size - len(positions)), len(positions)
