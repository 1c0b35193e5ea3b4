"""Sequence packing: examples of different lengths in rows of one length; lengths of padded rows."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.conversations import Example
from grpo_jax.data.iterator import epoch_order
from grpo_jax.types import COLUMNS, Packed


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit bin packing: every example goes into the fullest row that has room for it, or into a new row.

    Args:
        lengths: lengths of the examples in tokens, in the order in which they are placed.
        capacity: length of a row in tokens.

    Returns:
        The examples in each row, as indices into ``lengths``.

    Raises:
        ValueError: a length is not from 1 to ``capacity``.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"example {example} has {length} tokens; it must have from 1 to {capacity}")
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


def bucket_length(longest: int, limit: int) -> int:
    """The smallest of 64, 128, 192, 256, 384, 512, 768, ... columns that holds ``longest`` tokens; at most ``limit``.

    Args:
        longest: tokens of the longest row.
        limit: columns that there are.
    """
    lengths = [COLUMNS, 2 * COLUMNS, 3 * COLUMNS]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-2])
    return min(limit, next(length for length in lengths if length >= longest))


class PackedBatches:
    """The sequence of all training batches; ``batches[step]`` depends on the seed and the step alone.

    Every epoch is a new permutation of the examples. Its last batch is padded with empty rows.

    Args:
        examples: examples of at most ``length`` tokens.
        num_sequences: rows per batch.
        length: tokens per row.
        num_epochs: number of epochs.
        seed: seed of the permutations.
        packing: whether examples share rows.
        pad_id: token id of padding.

    Raises:
        ValueError: there are no examples, one is too long, or a count is below 1.
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
            raise ValueError("there are no examples to train on")
        self._examples, self._length, self._num_sequences, self._pad_id = examples, length, num_sequences, pad_id
        self._batches: list[list[list[int]]] = []
        lengths = np.array([len(example.token_ids) for example in examples])
        if lengths.max() > length:
            raise ValueError(f"the longest example has {lengths.max()} tokens; the length of a row is {length}")
        for epoch in range(num_epochs):
            order = epoch_order(len(examples), seed=seed, epoch=epoch)
            placed = pack(lengths[order].tolist(), length) if packing else [[n] for n in range(len(examples))]
            rows = [[int(order[n]) for n in row] for row in placed]
            # The rows opened last are the emptiest: without a shuffle they would be the last batches of every epoch.
            rows = [rows[n] for n in np.random.default_rng([seed, epoch, 1]).permutation(len(rows))]
            self._batches += [rows[n : n + num_sequences] for n in range(0, len(rows), num_sequences)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Packed:
        rows = [[self._examples[n] for n in row] for row in self._batches[step]]
        longest = max(sum(len(example.token_ids) for example in row) for row in rows)
        return packed_rows(
            rows,
            num_sequences=self._num_sequences,
            length=bucket_length(longest, self._length),
            pad_id=self._pad_id,
        )

    @property
    def digest(self) -> str:
        """A hash of the examples, to check that a resumed run has the same data."""
        return hashlib.sha256(repr(self._examples).encode()).hexdigest()[:16]

    @property
    def packing_efficiency(self) -> float:
        """Fraction of token positions that are not padding."""
        tokens = sum(len(self._examples[n].token_ids) for batch in self._batches for row in batch for n in row)
        return tokens / (len(self._batches) * self._num_sequences * self._length)


def packed_rows(rows: Sequence[Sequence[Example]], *, num_sequences: int, length: int, pad_id: int) -> Packed:
    """Arrays of packed examples.

    Args:
        rows: the examples of each row, at most ``num_sequences`` rows; missing rows are empty.
        num_sequences: rows of the arrays.
        length: columns of the arrays.
        pad_id: token id of padding.
    """
    shape = (num_sequences, length)
    ids, loss_mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            end = start + len(example.token_ids)
            ids[r, start:end], loss_mask[r, start:end] = example.token_ids, example.loss_mask
            segments[r, start:end], positions[r, start:end] = number, np.arange(end - start)
            start = end
    return Packed(jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions), jnp.asarray(loss_mask))
