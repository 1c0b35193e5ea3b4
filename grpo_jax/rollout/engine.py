"""The generation loop on the host: which rows are decoded, in which batch, with how large a KV cache.

The rows of a batch are advanced some decode steps at a time. Between two dispatches the host reads the sampled tokens;
once few enough rows are unfinished they are gathered into a smaller batch. None of this changes the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Key

from grpo_jax.hosts import note_dispatch
from grpo_jax.rollout.buckets import (
    BUCKET_DIVISORS,
    DEFERRED_BUCKET,
    SINGLE_CHUNK_BUCKET,
    STEPS,
    Bucket,
    make_buckets,
)
from grpo_jax.rollout.compiled import CompiledSteps
from grpo_jax.rollout.decode import DecodeBatch, DecodeState
from grpo_jax.rollout.host_batch import HostBatch, RolloutStats
from grpo_jax.sharding import BATCH, place
from grpo_jax.types import Cache, Params, Prompts

OnTokensFn = Callable[[int, Sequence[int]], None]
"""Streaming callback ``(row, ids)``: the new tokens of a row of the rollout."""


class Dispatch(NamedTuple):
    """The results of some decode steps that the host has not read yet, and the rows they are of."""

    tokens: Array
    log_probs: Array
    experts: Array | None
    step: int
    host_index: np.ndarray
    host_row: np.ndarray


@dataclass
class RunningBatch:
    """A decode batch on the devices, and its bookkeeping on the host.

    Attributes:
        batch, state: after the last dispatch.
        buckets: the batch sizes it is compacted to.
        bucket: index of its present size.
        step: decode steps dispatched.
        chunk_lengths: columns of the chunks of its KV cache.
        empty_chunks: the chunks that are not written to yet.
        host_batches: the completions that its rows belong to.
        host_index: for each row, an index into ``host_batches``; -1 for a row that only fills the shape.
        host_row: for each row, its row there.
        prompt_index: for each row, its prompt, counted within a device.
        pending: dispatches that the host has not read, the oldest first.
    """

    batch: DecodeBatch
    state: DecodeState
    buckets: list[Bucket]
    bucket: int
    step: int
    chunk_lengths: tuple[int, ...]
    empty_chunks: list[Cache]
    host_batches: list[HostBatch]
    host_index: np.ndarray
    host_row: np.ndarray
    prompt_index: np.ndarray
    pending: list[Dispatch] = field(default_factory=list)

    @property
    def num_opened(self) -> int:
        """Number of chunks that are full or active."""
        return len(self.chunk_lengths) - len(self.empty_chunks)

    def chunks(self) -> list[Cache]:
        """All chunks of the rows' own KV cache, in order."""
        return [*self.batch.full_chunks, self.state.active_chunk, *self.empty_chunks]

    def unfinished(self) -> np.ndarray:
        """True at the rows that are unfinished according to the dispatches read so far."""
        result = np.zeros(len(self.host_index), bool)
        for number, host_batch in enumerate(self.host_batches):
            rows = self.host_index == number
            result[rows] = host_batch.unfinished[self.host_row[rows]]
        return result


class GenerationLoop:
    """One call of the sampler: batches of prompts from prefill to the end of their last row."""

    def __init__(self, steps: CompiledSteps, params: Params, key: Key[Array, ""], on_tokens: OnTokensFn | None = None):
        self.steps, self.params, self.key, self.on_tokens = steps, params, key, on_tokens
        self.stats = RolloutStats()

    def run(self, prompts: Iterable[tuple[Prompts, int]]) -> Iterator[tuple[HostBatch, int]]:
        """Sample for one batch of prompts after the other; small remainders of several are merged into one batch.

        Args:
            prompts: batches of one shape, each with the number of its prompts that are real.

        Yields:
            Each prompt as soon as its samples are finished: its batch, and its number there.
        """
        deferred: list[RunningBatch] = []
        deferred_step = None
        first_prompt = 0
        remaining = iter(prompts)
        current = next(remaining, None)
        while current is not None:
            running = self.prefill(*current, first_prompt)
            first_prompt += current[1]
            current = next(remaining, None)
            can_defer = current is not None or bool(deferred)
            yield from self.decode(running, deferred_step if can_defer else -1)
            if running.unfinished().any():
                deferred.append(running)
                deferred_step = running.step
            if len(deferred) == BUCKET_DIVISORS[DEFERRED_BUCKET] or (current is None and len(deferred) > 1):
                merged = self.merge(deferred)
                deferred, deferred_step = [], None
                yield from self.decode(merged, -1)
        for running in deferred:
            yield from self.decode(running, -1)

    def prefill(self, prompts: Prompts, num_prompts: int, first_prompt: int) -> RunningBatch:
        """Start a batch of prompts.

        Args:
            prompts: N prompts.
            num_prompts: how many of them, the first, are real.
            first_prompt: number of the first prompt in the call's stream of prompts.
        """
        steps, N = self.steps, prompts.ids.shape[0]
        B = N * steps.group_size
        self.add_stats(batches=1)
        # Always in one layout: prompts in another would need another program.
        placed = place(prompts, None if steps.mesh is None else NamedSharding(steps.mesh, BATCH))
        batch, state, empty_chunks, experts = steps.prefill(self.params, placed, self.key)
        host_batch = HostBatch.empty(
            prompts, first_prompt, num_prompts, steps.group_size, steps.T, steps.pad_id, steps.experts_shape, experts
        )
        return RunningBatch(
            batch,
            state,
            make_buckets(N // steps.devices, B // steps.devices, steps.group_size),
            bucket=0,
            step=0,
            chunk_lengths=steps.chunk_lengths,
            empty_chunks=empty_chunks,
            host_batches=[host_batch],
            host_index=np.where(np.arange(B) < num_prompts * steps.group_size, 0, -1),
            host_row=np.arange(B),
            prompt_index=np.arange(B) // steps.group_size % (N // steps.devices),
        )

    def decode(self, running: RunningBatch, deferred_step: int | None) -> Iterator[tuple[HostBatch, int]]:
        """Advance a batch until all its rows are finished, or until it is small enough to be deferred.

        Args:
            running: the batch.
            deferred_step: the step at which it may be deferred; None for any, -1 for none.
        """
        while running.unfinished().any():
            if running.bucket == DEFERRED_BUCKET < len(running.buckets) - 1 and deferred_step in (None, running.step):
                while running.pending:
                    yield from self.read(running)
                return
            if running.step < self.steps.T:
                self.dispatch(running)
            if len(running.pending) > self.steps.ahead or running.step >= self.steps.T:
                yield from self.read(running)
                if running.step < self.steps.T:
                    self.compact(running)

    def dispatch(self, running: RunningBatch) -> None:
        """Launch the next decode steps of all rows."""
        if running.step == sum(running.chunk_lengths[: running.num_opened]):
            self._set_chunks(running, running.chunks(), running.num_opened + 1)
        running.state, *sampled = self.steps.decode(self.params, running.batch, running.state)
        tokens, log_probs, experts = sampled
        running.pending.append(Dispatch(tokens, log_probs, experts, running.step, running.host_index, running.host_row))
        running.step += STEPS
        caches = (running.batch.prompt.cache, running.chunks(), running.state.states)
        size = sum(x.nbytes for x in jax.tree.leaves(caches))
        self.add_stats(dispatches=1, row_steps=len(running.host_index) * STEPS)
        note_dispatch()
        self.stats = replace(self.stats, cache_bytes=max(self.stats.cache_bytes, size))

    def read(self, running: RunningBatch) -> Iterator[tuple[HostBatch, int]]:
        """Read the oldest pending dispatch: keep each row's tokens up to its end.

        Yields:
            The prompts whose samples are all finished by it.
        """
        tokens, log_probs, experts, step, host_index, host_row = running.pending.pop(0)
        steps = self.steps
        count = min(STEPS, steps.T - step)
        tokens, log_probs = np.asarray(tokens).T[:, :count], np.asarray(log_probs).T[:, :count]
        experts = None if experts is None else np.asarray(experts).swapaxes(0, 1)[:, :count]
        for number, host in enumerate(running.host_batches):
            device_rows = np.flatnonzero(host_index == number)
            device_rows = device_rows[host.unfinished[host_row[device_rows]]]
            rows, sampled = host_row[device_rows], tokens[device_rows]
            is_eos = np.isin(sampled, steps.eos_ids)
            ended = np.any(is_eos, axis=1)
            kept = np.where(ended, is_eos.argmax(1) + 1, count)
            if steps.stop is not None:
                for i, row in enumerate(rows):
                    sequence = [*host.ids[row, :step].tolist(), *sampled[i, : kept[i]].tolist()]
                    length = steps.stop(sequence, step)
                    if length is not None:
                        kept[i], ended[i] = length - step, True
            is_kept = np.arange(count)[None] < kept[:, None]
            host.ids[rows, step : step + count] = np.where(is_kept, sampled, steps.pad_id)
            host.log_probs[rows, step : step + count] = np.where(is_kept, log_probs[device_rows], 0)
            if host.experts is not None and experts is not None:
                host.experts[rows, step : step + count] = experts[device_rows]
            host.lengths[rows] = step + kept
            host.truncated[rows] = ~ended & (step + count == steps.T)
            host.unfinished[rows] = ~ended & (step + count < steps.T)
            self.add_stats(tokens=int(kept.sum()))
            if self.on_tokens is not None:
                first_row = host.first_prompt * steps.group_size
                for i, row in enumerate(rows):
                    self.on_tokens(int(first_row + row), sampled[i, : kept[i]].tolist())
            yield from ((host, n) for n in host.newly_finished())

    def compact(self, running: RunningBatch) -> None:
        """Gather the unfinished rows into the smallest bucket that holds them."""
        unfinished = running.unfinished().reshape(self.steps.devices, -1)
        most = unfinished.sum(1).max()
        while most and running.bucket + 1 < len(running.buckets) and most <= running.buckets[running.bucket + 1].rows:
            bookkeeping, indices = self._select_rows(running, running.buckets[running.bucket + 1])
            running.bucket += 1
            join_chunks = len(running.chunk_lengths) == 1 or running.bucket >= SINGLE_CHUNK_BUCKET
            num_opened = running.num_opened
            running.batch, running.state, chunks = self.steps.gather_rows(
                running.batch, running.state, running.chunks(), *indices, join_chunks=join_chunks
            )
            if join_chunks:
                running.chunk_lengths, num_opened = (sum(running.chunk_lengths),), 1
            self._set_chunks(running, chunks, num_opened)
            running.host_index, running.host_row, running.prompt_index = bookkeeping

    def _select_rows(self, running: RunningBatch, bucket: Bucket) -> tuple[tuple, tuple]:
        """The unfinished rows and their prompts in a smaller bucket.

        Returns:
            The batch's ``host_index``, ``host_row`` and ``prompt_index``; and the indices of ``decode.gather_rows``.
        """
        devices = self.steps.devices
        unfinished = running.unfinished().reshape(devices, -1)
        old_host_index, old_host_row, old_prompt_index = (
            x.reshape(devices, -1) for x in (running.host_index, running.host_row, running.prompt_index)
        )
        rows = np.zeros((devices, bucket.rows), np.int32)
        prompts = np.zeros((devices, bucket.prompts), np.int32)
        prompt_index = np.zeros((devices, bucket.rows), np.int32)
        is_real = np.zeros((devices, bucket.rows), bool)
        for d in range(devices):
            selected = np.flatnonzero(unfinished[d])
            rows[d, : len(selected)], is_real[d, : len(selected)] = selected, True
            present, prompt_index[d, : len(selected)] = np.unique(old_prompt_index[d, selected], return_inverse=True)
            prompts[d, : len(present)] = present
        host_index = np.where(is_real, np.take_along_axis(old_host_index, rows, 1), -1)
        host_row = np.take_along_axis(old_host_row, rows, 1)
        prefix_indices = share_prefixes(prompt_index, is_real, bucket)
        bookkeeping = (host_index.reshape(-1), host_row.reshape(-1), prompt_index.reshape(-1))
        return bookkeeping, (rows, prompts, *prefix_indices)

    def _set_chunks(self, running: RunningBatch, chunks: list[Cache], num_opened: int) -> None:
        """Give a batch its chunks; the last of the first ``num_opened`` is the active one."""
        starts = [sum(running.chunk_lengths[:i]) for i in range(num_opened)]
        running.batch = replace(
            running.batch,
            full_chunks=tuple(chunks[: num_opened - 1]),
            full_chunk_starts=self.steps.replicate(starts[:-1]),
            active_start=self.steps.replicate(starts[-1]),
        )
        running.state = replace(running.state, active_chunk=chunks[num_opened - 1])
        running.empty_chunks = chunks[num_opened:]

    def merge(self, deferred: list[RunningBatch]) -> RunningBatch:
        """One batch of several deferred at the same step; copies of the first one fill the shape."""
        first, devices = deferred[0], self.steps.devices
        count = BUCKET_DIVISORS[DEFERRED_BUCKET]
        part = first.buckets[DEFERRED_BUCKET]
        bucket = Bucket(count * part.rows, count * part.prompts, part.group)
        filled = [*deferred, *[first] * (count - len(deferred))]
        bookkeeping = []
        host_batches: list[HostBatch] = []
        for i, running in enumerate(filled):
            is_filler = i >= len(deferred)
            host_index = np.where((running.host_index < 0) | is_filler, -1, running.host_index + len(host_batches))
            bookkeeping.append((host_index, running.host_row, running.prompt_index + i * part.prompts))
            host_batches += [] if is_filler else running.host_batches
        host_index, host_row, prompt_index = (
            np.concatenate([x.reshape(devices, -1) for x in parts], axis=1) for parts in zip(*bookkeeping, strict=True)
        )
        self.add_stats(batches=1)
        batch, state = self.steps.merge(
            [(running.batch, running.state) for running in filled],
            *share_prefixes(prompt_index, host_index >= 0, bucket),
        )
        merged = RunningBatch(
            batch,
            state,
            make_buckets(bucket.prompts, bucket.rows, bucket.group),
            bucket=0,
            step=first.step,
            chunk_lengths=first.chunk_lengths,
            empty_chunks=[],
            host_batches=host_batches,
            host_index=host_index.reshape(-1),
            host_row=host_row.reshape(-1),
            prompt_index=prompt_index.reshape(-1),
        )
        self.compact(merged)
        return merged

    def add_stats(self, **counts: int) -> None:
        """Add counts to the statistics."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + n for name, n in counts.items()})


def share_prefixes(prompt_index: np.ndarray, is_real: np.ndarray, bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """``gather_index`` and ``scatter_index`` of ``types.PrefixCache``.

    Args:
        prompt_index: ``[devices, rows]``, the prompt of each row.
        is_real: ``[devices, rows]``, False at rows that only fill the shape.
        bucket: sizes on each device.
    """
    gather_index = np.zeros((len(prompt_index), bucket.prompts * bucket.group), np.int32)
    scatter_index = np.zeros(prompt_index.shape, np.int32)
    for d in range(len(prompt_index)):
        num_rows = np.zeros(bucket.prompts, np.int32)
        for row in np.flatnonzero(is_real[d]):
            prompt = prompt_index[d, row]
            scatter_index[d, row] = prompt * bucket.group + num_rows[prompt]
            gather_index[d, scatter_index[d, row]] = row
            num_rows[prompt] += 1
    return gather_index, scatter_index
