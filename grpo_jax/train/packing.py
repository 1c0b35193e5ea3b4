"""Prompts and completions packed into rows, so that an update pays for the tokens there are.

A padded batch costs the maximum lengths. Here each row holds completions of several lengths, after a prompt once for
each group (``shared``) or for each completion (``separate``). Losses do not notice: log-probabilities are ``[B, T]``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.sharding import BATCH, num_row_shards, place, replicated
from grpo_jax.types import ATTENTION_LENGTH, Batch, PackedBatch, PackedRows, Packing, Rollout

SHORTEST_ROW = 256
"""Tokens of the shortest rows: attention costs little over them, and shorter ones leave more room unused."""
TILE = 128
"""Tokens by which blocks of attention kernels are counted."""
TOKENS_PER_PLACE = 8
"""A row has a place for a sequence per this many tokens. More places cost more work on arrays of ``[places, T]``."""
LARGEST_SEQUENCE_ARRAY = 2**20
"""Entries of a row's arrays of ``[places, T]``, which bound its places where completions are very long."""


class Piece(NamedTuple):
    """Completions of one prompt that stand in one row after one copy of the prompt."""

    prompt: int
    completions: list[int]


def pack(
    sequences: Batch | Rollout,
    packing: Packing,
    *,
    micro_batch_tokens: int,
    mesh: Mesh | None = None,
    row_length: int | None = None,
    attention_length: float = ATTENTION_LENGTH,
) -> PackedBatch:
    """Micro-batches of packed rows that hold every completion once, on the mesh.

    The number of micro-batches depends on the lengths; the shapes only on the number of sequences, the row length and
    ``micro_batch_tokens``, so that a train step is compiled once for each row length.

    Args:
        sequences: B prompts with completions. Prompts that are equal are shared.
        packing: ``shared`` or ``separate``; ``Model.packing`` says which is best.
        micro_batch_tokens: most tokens of a micro-batch on a device, but at least a row over the devices of
            ``context``. Micro-batches are equal and as few as hold a row for each sequence.
        mesh: devices that the rows of a micro-batch are sharded over; None for one device.
        row_length: S; None for the one of ``row_lengths`` that costs least.
        attention_length: row length at which attention costs as much as all other work (``Model.attention_length``).

    Raises:
        ValueError: a prompt is empty, a completion has a hole in its mask, or a sequence is longer than the row length.
    """
    devices, shards = num_row_shards(mesh), 1 if mesh is None else mesh.shape["context"]
    packed = pack_on_host(
        sequences,
        packing,
        micro_batch_tokens=micro_batch_tokens * shards,
        devices=devices,
        row_length=row_length,
        attention_length=attention_length,
    )
    if mesh is None:
        return jax.tree.map(jnp.asarray, packed)
    everywhere, by_row = replicated(mesh), NamedSharding(mesh, P(None, *BATCH))
    return PackedBatch(place(packed.sequences, everywhere), place(packed.rows, by_row), place(packed.count, everywhere))


def pack_on_host(
    sequences: Batch | Rollout,
    packing: Packing,
    *,
    micro_batch_tokens: int,
    devices: int,
    row_length: int | None,
    attention_length: float,
) -> PackedBatch:
    """``pack`` with NumPy arrays as its result.

    Args:
        sequences, packing, micro_batch_tokens, row_length, attention_length: as there.
        devices: that the rows of a micro-batch are sharded over; ``micro_batch_tokens`` are of each row's.
    """
    host = jax.tree.map(np.asarray, sequences)
    lengths = _completion_lengths(host.completion_mask)
    prompts, prompt_of = _distinct_prompts(host.prompt_ids, host.prompt_mask)
    sizes = np.array([len(prompt) for prompt in prompts])[prompt_of] - 1 + lengths
    T = host.completion_ids.shape[1]
    longest = host.prompt_ids.shape[1] - 1 + T
    candidates = row_lengths(int(sizes.max(initial=1)), longest) if row_length is None else [row_length]
    if sizes.max(initial=1) > candidates[-1]:
        raise ValueError(
            f"a prompt and its completion take {sizes.max()} places in a row of {row_length}; increase row_length"
        )
    layouts = [
        (length, _place(prompts, prompt_of, lengths, length, _places(length, T), packing)) for length in candidates
    ]

    def rows_at_once(length: int) -> int:
        # Every sequence may need a row of its own. Micro-batches are then equal: empty rows are computed, too.
        most, needed = max(1, micro_batch_tokens // length), -(-len(lengths) // devices)
        return devices * -(-needed // -(-needed // most))

    def cost(layout: tuple[int, list[list[Piece]]]) -> float:
        length, rows = layout
        computed = -(-len(rows) // rows_at_once(length)) * rows_at_once(length)  # of whole micro-batches
        return computed * length * (1 + length / attention_length)

    S, placed = min(layouts, key=cost)
    R = rows_at_once(S)
    N = -(-len(lengths) // R)
    arrays = _fill(host, prompts, lengths, placed, shape=(N * R, S), places=_places(S, T), packing=packing)
    stacked: dict[str, Any] = {name: None if x is None else x.reshape(N, R, *x.shape[1:]) for name, x in arrays.items()}
    # Each row has those of its tokens.
    host = replace(host, prompt_experts=None, completion_experts=None)
    return PackedBatch(host, PackedRows(**stacked), np.array(-(-len(placed) // R), np.int32))  # pyright: ignore[reportArgumentType]


def row_lengths(longest: int, most: int) -> list[int]:
    """The lengths of rows to choose from: the first three of 256, 320, 384, 512, 640, ... that hold ``longest`` tokens.

    Few lengths, so that few programs are compiled. They are the multiples of powers of two by 4, 5 and 6; beside them,
    ``most`` is one if it is shorter, which saves up to a fifth of long rows.

    Args:
        longest: tokens of the longest sequence.
        most: tokens of the longest sequence that there may be.
    """
    lengths = [SHORTEST_ROW, SHORTEST_ROW * 5 // 4, SHORTEST_ROW * 3 // 2]
    while lengths[-3] < longest:
        lengths.append(2 * lengths[-3])
    whole = max(SHORTEST_ROW, -(-most // TILE) * TILE)
    return [*([whole] if longest <= whole < lengths[-3] else []), *lengths[-3:]]


def micro_batch(packed: PackedBatch, index: Int[Array, ""] | int) -> Batch:
    """A micro-batch: R rows and their R * K sequences, those of unused places with masks of False.

    Args:
        packed: the batch.
        index: number of the micro-batch, which may be traced.
    """
    rows = jax.tree.map(lambda x: x[index], packed.rows)
    places = rows.sequence_index.reshape(-1)
    is_used = (places >= 0)[:, None]
    taken = jax.tree.map(lambda x: x.at[places].get(mode="clip"), packed.sequences)
    completion_mask = taken.completion_mask & is_used
    if isinstance(taken, Rollout):
        unused = jnp.zeros(len(places))
        taken = Batch.from_rollout(taken, unused)
    return replace(taken, completion_mask=completion_mask, loss_mask=taken.loss_mask & is_used, rows=rows)


def by_sequence(x: Float[Array, "R S"], rows: PackedRows, length: int) -> Float[Array, "B T"]:
    """Per-token outputs of packed rows as an array ``[R * K, T]`` of their sequences; meaningless at masked tokens.

    Args:
        x: for each of ``target_ids``.
        rows: one micro-batch.
        length: T.
    """
    (R, K), S = rows.starts.shape, x.shape[1]
    columns = jnp.minimum(rows.starts[:, :, None] + jnp.arange(length)[None, None], S - 1)
    return jnp.take_along_axis(x, columns.reshape(R, K * length), axis=1, mode="clip").reshape(R * K, length)


def in_batch_order(x: Float[Array, "B T"], rows: PackedRows, out: Float[Array, "All T"]) -> Float[Array, "All T"]:
    """``out`` with the sequences of a micro-batch written to their rows of the whole batch.

    Args:
        x: a row for each place of the micro-batch.
        rows: the micro-batch.
        out: a row for each sequence of the batch.
    """
    places = rows.sequence_index.reshape(-1)
    return out.at[jnp.where(places < 0, out.shape[0], places)].set(x, mode="drop")


def _places(row_length: int, completion_length: int) -> int:
    """K, the sequences that a row has places for."""
    return max(1, min(row_length // TOKENS_PER_PLACE, LARGEST_SEQUENCE_ARRAY // completion_length))


def _completion_lengths(mask: np.ndarray) -> np.ndarray:
    lengths = mask.sum(1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError("completion_mask must be True from a completion's first token to its last, without holes")
    return lengths


def _distinct_prompts(ids: np.ndarray, mask: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct prompts without padding, and the number of each sequence's prompt."""
    numbers: dict[bytes, int] = {}
    prompts, prompt_of = [], np.zeros(len(ids), np.int64)
    for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
        prompt = tokens[real]
        number = prompt_of[row] = numbers.setdefault(prompt.tobytes(), len(prompts))
        if number == len(prompts):
            prompts.append(prompt)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens, so its completion's first token cannot be predicted")
    return prompts, prompt_of


def _place(
    prompts: Sequence[np.ndarray],
    prompt_of: np.ndarray,
    lengths: np.ndarray,
    row_length: int,
    places: int,
    packing: Packing,
) -> list[list[Piece]]:
    """The pieces of each row: best-fit bin packing in which a row pays for a prompt once if it is shared.

    A completion counts at least ``row_length / places`` tokens, so that no row has more than ``places``.
    """
    costs = np.maximum(lengths, -(-row_length // places))
    members: list[list[int]] = [[] for _ in prompts]
    for sequence in np.argsort(-costs, kind="stable"):
        if lengths[sequence]:  # a completion without tokens has nothing to predict
            members[prompt_of[sequence]].append(int(sequence))
    rows: list[list[Piece]] = []
    free: list[int] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for prompt in sorted(range(len(prompts)), key=lambda n: -sum(costs[i] for i in members[n])):
        pieces: dict[int, Piece] = {}  # by row
        prefix = len(prompts[prompt]) - 1
        for sequence in members[prompt]:
            cost = int(costs[sequence])
            holding = [row for row in pieces if free[row] >= cost]
            if holding:
                row = min(holding, key=lambda row: free[row])
                pieces[row].completions.append(sequence)
            else:
                # The least that a completion counts may not fit where the sequence itself does.
                cost = min(cost + prefix, row_length)
                found = bisect_left(room, (cost, -1))
                if found == len(room):
                    room.append((row_length, len(rows)))
                    rows.append([])
                    free.append(row_length)
                row = room[found][1]
                piece = Piece(prompt, [sequence])
                rows[row].append(piece)
                if packing == "shared":
                    pieces[row] = piece
            del room[bisect_left(room, (free[row], row))]
            free[row] -= cost
            insort(room, (free[row], row))
    return rows


def _fill(
    host: Batch | Rollout,
    prompts: Sequence[np.ndarray],
    lengths: np.ndarray,
    placed: Sequence[Sequence[Piece]],
    *,
    shape: tuple[int, int],
    places: int,
    packing: Packing,
) -> dict[str, np.ndarray | None]:
    """The fields of ``PackedRows`` with the placed pieces, arrays of ``shape``."""
    new = partial(np.zeros, shape, np.int32)
    token_ids, segment_ids, prefix_ids, positions = new(), new(), new(), new()
    target_columns, target_ids, target_mask = new(), new(), np.zeros(shape, bool)
    starts = np.zeros((shape[0], places), np.int32)
    of_prompts, of_completions = host.prompt_experts, host.completion_experts
    experts = None if of_prompts is None else np.zeros((*shape, *of_prompts.shape[2:]), of_prompts.dtype)
    sequence_index = np.full_like(starts, -1)
    for r, pieces in enumerate(placed):
        column = segment = place = start = 0
        for prompt, completions in pieces:
            ids = prompts[prompt]
            before = len(ids) - 1
            segment += 1
            prefix = segment
            token_ids[r, column : column + before] = ids[:-1]
            of_prompt: Any = (
                None if of_prompts is None else of_prompts[completions[0]][host.prompt_mask[completions[0]]]
            )
            if experts is not None:
                experts[r, column : column + before] = of_prompt[:-1]
            segment_ids[r, column : column + before] = segment
            positions[r, column : column + before] = np.arange(before)
            column += before
            for sequence in completions:
                n = int(lengths[sequence])
                own = slice(column, column + n)
                completion = host.completion_ids[sequence, :n]
                if packing == "shared":
                    segment += 1
                    prefix_ids[r, own] = prefix
                token_ids[r, own] = [ids[-1], *completion[:-1]]
                if experts is not None and of_completions is not None:
                    experts[r, column] = of_prompt[-1]
                    experts[r, column + 1 : column + n] = of_completions[sequence, : n - 1]
                segment_ids[r, own] = segment
                positions[r, own] = np.arange(before, before + n)
                targets = slice(start, start + n)
                target_columns[r, targets] = np.arange(column, column + n)
                target_ids[r, targets] = completion
                target_mask[r, targets] = True
                sequence_index[r, place], starts[r, place] = sequence, start
                place, column, start = place + 1, column + n, start + n
    return {
        "token_ids": token_ids,
        "segment_ids": segment_ids,
        "prefix_ids": prefix_ids if packing == "shared" else None,
        "positions": positions,
        "target_columns": target_columns,
        "target_ids": target_ids,
        "target_mask": target_mask,
        "sequence_index": sequence_index,
        "starts": starts,
        "experts": experts,
    }
