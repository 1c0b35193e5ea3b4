"""Examples of different lengths, packed into rows of one length."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.conversations import Example
from grpo_jax.types import Packed


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row: each goes where it leaves the least room, or else opens a new row (best fit).

    Args:
        lengths: of the examples, in the order in which they are placed.
        capacity: of a row.

    Raises:
        ValueError: an example is longer than a row, or has no length.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is free, row), in order
    for example, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"example {example} has {length} tokens, and a row from 1 to {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([example])
            free, row = capacity - length, len(rows) - 1
        else:
            free, row = room.pop(place)
            rows[row].append(example)
            free -= length
        if free:
            insort(room, (free, row))
    return rows


class PackedBatches:
    """The batches of a whole training, by number: ``batches[step]`` follows from the seed and the step alone.

    Each epoch visits every example once, in an order of its own. An epoch's last batch is filled up with empty rows.

    Args:
        examples: at most ``length`` tokens each.
        num_sequences: rows of a batch.
        length: tokens of a row.
        num_epochs: how often each example is visited.
        seed: of the orders.
        packing: whether examples share rows.
        pad_id: what stands in empty places.

    Raises:
        ValueError: no examples, or one that is too long; a count below 1.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        num_sequences: int,
        length: int,
        num_epochs: int = 1,
        seed: int = 0,
        packing: bool = True,
        pad_id: int = 0,
    ):
        for name, value in (("num_sequences", num_sequences), ("length", length), ("num_epochs", num_epochs)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not examples:
            raise ValueError("there are no examples to learn from")
        self._examples, self._length, self._num_sequences, self._pad_id = examples, length, num_sequences, pad_id
        self._batches: list[list[list[int]]] = []
        lengths = np.array([len(each.token_ids) for each in examples])
        if lengths.max() > length:
            raise ValueError(f"the longest example has {lengths.max()} tokens, and a row {length}")
        for epoch in range(num_epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
            placed = pack(lengths[order].tolist(), length) if packing else [[n] for n in range(len(examples))]
            rows = [[int(order[n]) for n in row] for row in placed]
            # Rows that are opened last are the emptiest; they are not to come last.
            rows = [rows[n] for n in np.random.default_rng([seed, epoch, 1]).permutation(len(rows))]
            self._batches += [rows[n : n + num_sequences] for n in range(0, len(rows), num_sequences)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Packed:
        return packed_rows(
            [[self._examples[n] for n in row] for row in self._batches[step]],
            num_sequences=self._num_sequences,
            length=self._length,
            pad_id=self._pad_id,
        )

    @property
    def digest(self) -> str:
        """What tells these examples from others."""
        return hashlib.sha256(repr(self._examples).encode()).hexdigest()[:16]

    @property
    def used(self) -> float:
        """The share of places that hold a token."""
        tokens = sum(len(self._examples[n].token_ids) for batch in self._batches for row in batch for n in row)
        return tokens / (len(self._batches) * self._num_sequences * self._length)


def packed_rows(rows: Sequence[Sequence[Example]], *, num_sequences: int, length: int, pad_id: int) -> Packed:
    """Examples as arrays, those of a row one after the other; rows that are lacking are empty."""
    shape = (num_sequences, length)
    ids, learnt = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            end = start + len(example.token_ids)
            ids[r, start:end], learnt[r, start:end] = example.token_ids, example.learnt
            segments[r, start:end], positions[r, start:end] = number, np.arange(end - start)
            start = end
    return Packed(jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions), jnp.asarray(learnt))
