"""The loop on the host: which rows are computed, for how long, and with how large a cache.

Rows of one age are advanced some tokens at a time. Between two dispatches the host looks at what was drawn; once few
enough rows live they are gathered into a smaller batch. What is drawn does not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from grpo_jax.rollout.buckets import (
    BUCKET_DIVISORS,
    DEFERRED_BUCKET,
    JOINED_BUCKET,
    STEPS,
    Bucket,
    chunk_lengths,
    make_buckets,
)
from grpo_jax.rollout.decode import DecodeBatch, State, draw_tokens, join, prefill, take
from grpo_jax.rollout.host_batch import Batch, RolloutStats
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH, replicated
from grpo_jax.types import Cache, Model, Params, Prompts

StopFn = Callable[[Sequence[int], int], int | None]
OnTokensFn = Callable[[int, Sequence[int]], None]


class Sent(NamedTuple):
    """A dispatch that the host has not looked at yet."""

    tokens: Array
    log_probs: Array
    age: int
    batch_of: np.ndarray
    row_of: np.ndarray


@dataclass
class Running:
    """A cohort on the device, and what the host knows of it.

    Attributes:
        cohort, state: as of the last dispatch.
        ladder: batch sizes it may have.
        rung: the one it has.
        age: tokens dispatched.
        lengths: columns of the chunks of its cache.
        waiting: those that hold nothing yet.
        batch_of: for each row the batch it belongs to, in ``batches``; -1 for a row that only fills the shape.
        row_of: its row there.
        prompt_of: its prompt, counted within its device.
        unread: dispatches whose tokens the host has not looked at, the oldest first.
    """

    cohort: DecodeBatch
    state: State
    ladder: list[Bucket]
    rung: int
    age: int
    lengths: tuple[int, ...]
    waiting: list[Cache]
    batches: list[Batch]
    batch_of: np.ndarray
    row_of: np.ndarray
    prompt_of: np.ndarray
    unread: list[Sent] = field(default_factory=list)

    @property
    def opened(self) -> int:
        """How many of the chunks are written to, or were."""
        return len(self.lengths) - len(self.waiting)

    def chunks(self) -> list[Cache]:
        """The rows' own keys and values in order."""
        return [*self.cohort.closed, self.state.active, *self.waiting]

    def living(self) -> np.ndarray:
        """Which rows have not ended, as far as was looked."""
        result = np.zeros(len(self.batch_of), bool)
        for number, batch in enumerate(self.batches):
            mine = self.batch_of == number
            result[mine] = batch.living[self.row_of[mine]]
        return result


class Programs:
    """The compiled functions of a sampler, and what they were made for."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        group_size: int,
        max_completion_length: int,
        eos_ids: tuple[int, ...],
        pad_id: int,
        stop: StopFn | None,
        cache_dtype: Any,
        mesh: Mesh | None,
        ahead: int,
    ):
        self.group_size, self.T, self.pad_id = group_size, max_completion_length, pad_id
        self.eos_ids, self.stop, self.mesh, self.ahead = np.array(eos_ids), stop, mesh, ahead
        self.devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.chunk_lengths = chunk_lengths(max_completion_length)

        @jax.jit
        def begin(params: Params, prompts: Prompts, key: Key[Array, ""]):
            started = prefill(
                model,
                params,
                prompts,
                key,
                sampling,
                group_size=group_size,
                chunks=self.chunk_lengths,
                cache_dtype=cache_dtype,
            )
            return self.laid_out(started)

        @partial(jax.jit, donate_argnums=2)
        def advance(params: Params, cohort: DecodeBatch, state: State):
            state, tokens, log_probs = draw_tokens(model, params, cohort, state, sampling, eos_ids=eos_ids, count=STEPS)
            return self.laid_out(state), tokens, log_probs

        self.begin, self.advance = begin, advance
        self.take = jax.jit(
            lambda *args, joined: self.laid_out(take(model, *args, joined=joined)), static_argnames="joined"
        )
        self.join = jax.jit(lambda *args: self.laid_out(join(*args)))

    def laid_out(self, tree: Any) -> Any:
        """DecodeBatch and state with rows and prompts split over the mesh, and heads where they divide."""
        if self.mesh is None:
            return tree
        mesh = self.mesh

        def place(x):
            if x.ndim == 0 or (x.ndim == 1 and x.shape[0] < self.devices):  # the age; the starts of chunks
                return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
            heads = x.ndim > 2 and x.shape[1] % mesh.shape["tensor"] == 0
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*BATCH, "tensor") if heads else BATCH))

        return jax.tree.map(place, tree)

    def everywhere(self, numbers: int | list[int]) -> Array:
        """Numbers of the host on every device."""
        return jax.device_put(np.array(numbers, np.int32), None if self.mesh is None else replicated(self.mesh))


class GenerationLoop:
    """One call of the sampler: cohorts from their start to the end of their last row."""

    def __init__(self, programs: Programs, params: Params, key: Key[Array, ""], on_tokens: OnTokensFn | None = None):
        self.programs, self.params, self.key, self.on_tokens = programs, params, key, on_tokens
        self.stats = RolloutStats()

    def run(self, prompts: Iterable[tuple[Prompts, int]]) -> Iterator[tuple[Batch, int]]:
        """Draw for one set of prompts after the other; what is left of several is pooled. Gives each prompt that ends.

        Args:
            prompts: sets of one shape, each with how many of its prompts are to be drawn for.
        """
        parked: list[Running] = []
        parking_age = None
        first_place = 0
        coming = iter(prompts)
        current = next(coming, None)
        while current is not None:
            running = self.launch(*current, first_place)
            first_place += current[1]
            current = next(coming, None)
            may_park = current is not None or bool(parked)
            yield from self.drive(running, parking_age if may_park else -1)
            if running.living().any():
                parked.append(running)
                parking_age = running.age
            if len(parked) == BUCKET_DIVISORS[DEFERRED_BUCKET] or (current is None and len(parked) > 1):
                pool = self.pool(parked)
                parked, parking_age = [], None
                yield from self.drive(pool, -1)
        for running in parked:
            yield from self.drive(running, -1)

    def launch(self, prompts: Prompts, num_prompts: int, first_place: int) -> Running:
        """Read a set of prompts."""
        programs, N = self.programs, prompts.ids.shape[0]
        B = N * programs.group_size
        self.count(cohorts=1)
        # Always laid out alike: what lies elsewhere would be another program.
        placed = jax.device_put(prompts, None if programs.mesh is None else NamedSharding(programs.mesh, BATCH))
        cohort, state, waiting = programs.begin(self.params, placed, self.key)
        return Running(
            cohort,
            state,
            make_buckets(N // programs.devices, B // programs.devices, programs.group_size),
            rung=0,
            age=0,
            lengths=programs.chunk_lengths,
            waiting=waiting,
            batches=[Batch.of(prompts, first_place, num_prompts, programs.group_size, programs.T, programs.pad_id)],
            batch_of=np.where(np.arange(B) < num_prompts * programs.group_size, 0, -1),
            row_of=np.arange(B),
            prompt_of=np.arange(B) // programs.group_size % (N // programs.devices),
        )

    def drive(self, running: Running, parking_age: int | None) -> Iterator[tuple[Batch, int]]:
        """Advance a cohort until all its rows have ended, or until it is small enough to be parked.

        Args:
            running: the cohort.
            parking_age: the age at which it may be parked; None for any, -1 for none.
        """
        while running.living().any():
            if running.rung == DEFERRED_BUCKET < len(running.ladder) - 1 and parking_age in (None, running.age):
                while running.unread:
                    yield from self.read(running)
                return
            if running.age < self.programs.T:
                self.dispatch(running)
            if len(running.unread) > self.programs.ahead or running.age >= self.programs.T:
                yield from self.read(running)
                if running.age < self.programs.T:
                    self.compact(running)

    def dispatch(self, running: Running) -> None:
        """Draw the next tokens of all rows."""
        if running.age == sum(running.lengths[: running.opened]):
            self.hold(running, running.chunks(), running.opened + 1)
        running.state, tokens, log_probs = self.programs.advance(self.params, running.cohort, running.state)
        running.unread.append(Sent(tokens, log_probs, running.age, running.batch_of, running.row_of))
        running.age += STEPS
        caches = (running.cohort.prompt.cache, running.chunks())
        size = sum(x.nbytes for x in jax.tree.leaves(caches))
        self.count(dispatches=1, row_steps=len(running.batch_of) * STEPS)
        self.stats = replace(self.stats, cache_bytes=max(self.stats.cache_bytes, size))

    def read(self, running: Running) -> Iterator[tuple[Batch, int]]:
        """Look at the oldest dispatch that was not looked at: keep what was drawn before each row's end.

        Gives the prompts all of whose samples have ended with it.
        """
        tokens, log_probs, age, batch_of, row_of = running.unread.pop(0)
        programs = self.programs
        count = min(STEPS, programs.T - age)
        tokens, log_probs = np.asarray(tokens).T[:, :count], np.asarray(log_probs).T[:, :count]
        for number, batch in enumerate(running.batches):
            mine = np.flatnonzero(batch_of == number)
            mine = mine[batch.living[row_of[mine]]]
            rows, drawn = row_of[mine], tokens[mine]
            ends = np.isin(drawn, programs.eos_ids)
            ended = np.any(ends, axis=1)
            kept = np.where(ended, ends.argmax(1) + 1, count)
            if programs.stop is not None:
                for i, row in enumerate(rows):
                    sequence = [*batch.ids[row, :age].tolist(), *drawn[i, : kept[i]].tolist()]
                    length = programs.stop(sequence, age)
                    if length is not None:
                        kept[i], ended[i] = length - age, True
            within = np.arange(count)[None] < kept[:, None]
            batch.ids[rows, age : age + count] = np.where(within, drawn, programs.pad_id)
            batch.log_probs[rows, age : age + count] = np.where(within, log_probs[mine], 0)
            batch.lengths[rows] = age + kept
            batch.truncated[rows] = ~ended & (age + count == programs.T)
            batch.living[rows] = ~ended & (age + count < programs.T)
            self.count(tokens=int(kept.sum()))
            if self.on_tokens is not None:
                first_row = batch.first_place * programs.group_size
                for i, row in enumerate(rows):
                    self.on_tokens(int(first_row + row), drawn[i, : kept[i]].tolist())
            yield from ((batch, n) for n in batch.newly_finished())

    def compact(self, running: Running) -> None:
        """Gather the living rows into the smallest batch that holds them."""
        living = running.living().reshape(self.programs.devices, -1)
        most = living.sum(1).max()
        while most and running.rung + 1 < len(running.ladder) and most <= running.ladder[running.rung + 1].rows:
            rows, indices = self.choose(running, running.ladder[running.rung + 1])
            running.rung += 1
            joined = len(running.lengths) == 1 or running.rung >= JOINED_BUCKET
            opened = running.opened
            running.cohort, running.state, chunks = self.programs.take(
                running.cohort, running.state, running.chunks(), *indices, joined=joined
            )
            if joined:
                running.lengths, opened = (sum(running.lengths),), 1
            self.hold(running, chunks, opened)
            running.batch_of, running.row_of, running.prompt_of = rows

    def choose(self, running: Running, rung: Bucket) -> tuple[tuple, tuple]:
        """The rows and prompts that go to a rung, as the host's arrays and as the indices of ``take``."""
        devices = self.programs.devices
        living = running.living().reshape(devices, -1)
        old = [x.reshape(devices, -1) for x in (running.batch_of, running.row_of, running.prompt_of)]
        rows = np.zeros((devices, rung.rows), np.int32)
        prompts = np.zeros((devices, rung.prompts), np.int32)
        prompt_of = np.zeros((devices, rung.rows), np.int32)
        kept = np.zeros((devices, rung.rows), bool)
        for d in range(devices):
            chosen = np.flatnonzero(living[d])
            rows[d, : len(chosen)], kept[d, : len(chosen)] = chosen, True
            present, prompt_of[d, : len(chosen)] = np.unique(old[2][d, chosen], return_inverse=True)
            prompts[d, : len(present)] = present
        batch_of = np.where(kept, np.take_along_axis(old[0], rows, 1), -1)
        row_of = np.take_along_axis(old[1], rows, 1)
        gather, place = share(prompt_of, kept, rung)
        return (batch_of.reshape(-1), row_of.reshape(-1), prompt_of.reshape(-1)), (rows, prompts, gather, place)

    def hold(self, running: Running, chunks: list[Cache], opened: int) -> None:
        """Have these chunks, of which the last opened one is written to."""
        starts = [sum(running.lengths[:i]) for i in range(opened)]
        running.cohort = replace(
            running.cohort,
            closed=tuple(chunks[: opened - 1]),
            closed_starts=self.programs.everywhere(starts[:-1]),
            active_start=self.programs.everywhere(starts[-1]),
        )
        running.state = replace(running.state, active=chunks[opened - 1])
        running.waiting = chunks[opened:]

    def pool(self, parked: list[Running]) -> Running:
        """One cohort of several that are left with a part of their rows at the same age."""
        first, devices = parked[0], self.programs.devices
        parts = BUCKET_DIVISORS[DEFERRED_BUCKET]
        rung = first.ladder[DEFERRED_BUCKET]
        filled = [*parked, *[first] * (parts - len(parked))]
        batch_of, row_of, prompt_of = [], [], []
        batches: list[Batch] = []
        for i, part in enumerate(filled):
            real = part.batch_of if i < len(parked) else np.full_like(part.batch_of, -1)
            batch_of.append(np.where(real >= 0, real + len(batches), -1).reshape(devices, -1))
            row_of.append(part.row_of.reshape(devices, -1))
            prompt_of.append(part.prompt_of.reshape(devices, -1) + i * rung.prompts)
            batches += part.batches if i < len(parked) else []
        together = [np.concatenate(x, axis=1) for x in (batch_of, row_of, prompt_of)]
        ladder = make_buckets(parts * rung.prompts, parts * rung.rows, rung.group)
        gather, place = share(
            together[2], together[0] >= 0, Bucket(parts * rung.rows, parts * rung.prompts, rung.group)
        )
        self.count(cohorts=1)
        cohort, state = self.programs.join([(part.cohort, part.state) for part in filled], gather, place)
        running = Running(
            cohort,
            state,
            ladder,
            rung=0,
            age=first.age,
            lengths=first.lengths,
            waiting=[],
            batches=batches,
            batch_of=together[0].reshape(-1),
            row_of=together[1].reshape(-1),
            prompt_of=together[2].reshape(-1),
        )
        self.compact(running)
        return running

    def count(self, **more: int) -> None:
        """Add to the figures."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + value for name, value in more.items()})


def share(prompt_of: np.ndarray, kept: np.ndarray, rung: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """``gather`` and ``place`` of ``types.PrefixCache``, for rows of prompts ``prompt_of`` (``[devices, rows]``)."""
    gather = np.zeros((len(prompt_of), rung.prompts * rung.group), np.int32)
    place = np.zeros(prompt_of.shape, np.int32)
    for d in range(len(prompt_of)):
        number = np.zeros(rung.prompts, np.int32)
        for row in np.flatnonzero(kept[d]):
            prompt = prompt_of[d, row]
            place[d, row] = prompt * rung.group + number[prompt]
            gather[d, place[d, row]] = row
            number[prompt] += 1
    return gather, place
