"""The loop on the host: which rows are computed, for how long, and with how large a cache.

Rows of one age are advanced some tokens at a time. Between two dispatches the host looks at what was drawn; once few
enough rows live they are gathered into a smaller batch. Batch sizes and cache lengths come from a short ladder, so that
few programs are compiled. What is drawn does not depend on any of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from grpo_jax.rollout.steps import (
    UNUSED,
    Cohort,
    State,
    check_lengths,
    draw_tokens,
    join,
    start_cohort,
    take,
)
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH, replicated
from grpo_jax.types import COLUMNS, Cache, Model, Params, Prompts, Rollout, cache_columns

StopFn = Callable[[Sequence[int], int], int | None]
STEPS = 8
LADDER = (1, 2, 4, 8, 16)
MIN_ROWS = 8
MAX_CHUNKS = 4
PARKED_RUNG = 2


@dataclass(frozen=True)
class RolloutStats:
    """What drawing a set of completions took.

    Attributes:
        tokens: drawn and kept.
        row_steps: rows times steps that were computed for them.
        dispatches: of ``STEPS`` steps each.
        cohorts: sets of prompts that were read together, and pools of what was left of them.
        cache_bytes: the most that keys and values took at a time.
    """

    tokens: int = 0
    row_steps: int = 0
    dispatches: int = 0
    cohorts: int = 0
    cache_bytes: int = 0

    @property
    def useful(self) -> float:
        """The share of row-steps that drew a token that was kept."""
        return self.tokens / max(self.row_steps, 1)


class Rung(NamedTuple):
    """Rows and prompts of a batch size, and places for each prompt's rows; all for one device."""

    rows: int
    prompts: int
    group: int


def make_ladder(prompts: int, rows: int, group: int) -> list[Rung]:
    """The batch sizes that a cohort of this size passes through, for one device."""
    sizes = sorted({max(math.ceil(rows / part), min(rows, MIN_ROWS)) for part in LADDER}, reverse=True)
    return [Rung(size, min(prompts, size), min(group, size)) for size in sizes]


@dataclass(frozen=True)
class Chunks:
    """How the cache of a whole batch is cut; a smaller one has it in one piece.

    Attributes:
        length: columns of a chunk.
        count: chunks of a whole completion.
    """

    length: int
    count: int

    @staticmethod
    def of(max_completion_length: int) -> Chunks:
        """One where more would not pay."""
        columns = cache_columns(max_completion_length)
        count = min(columns // COLUMNS, MAX_CHUNKS)
        length = cache_columns(math.ceil(columns / count))
        return Chunks(length, math.ceil(columns / length))

    def held(self, opened: int) -> int:
        """Chunks that are computed with when so many hold anything: a power of two, for fewer programs."""
        return min(2 ** math.ceil(math.log2(opened)), self.count)


@dataclass
class Batch:
    """What has been drawn for the prompts that were read together."""

    prompts: Prompts
    first_place: int
    num_prompts: int
    group_size: int
    ids: np.ndarray
    log_probs: np.ndarray
    lengths: np.ndarray
    living: np.ndarray
    truncated: np.ndarray
    handed_on: np.ndarray

    @staticmethod
    def of(prompts: Prompts, first_place: int, num_prompts: int, group_size: int, T: int, pad_id: int) -> Batch:
        """Nothing drawn yet; prompts after the first ``num_prompts`` only fill the shape and are not drawn for."""
        B = prompts.ids.shape[0] * group_size
        return Batch(
            prompts,
            first_place,
            num_prompts,
            group_size,
            ids=np.full((B, T), pad_id, np.int32),
            log_probs=np.zeros((B, T), np.float32),
            lengths=np.zeros(B, np.int32),
            living=np.arange(B) < num_prompts * group_size,
            truncated=np.zeros(B, bool),
            handed_on=np.zeros(num_prompts, bool),
        )

    def newly_finished(self) -> list[int]:
        """The prompts all of whose samples have ended since this was last asked."""
        done = ~self.living.reshape(-1, self.group_size).any(1)[: self.num_prompts]
        new = np.flatnonzero(done & ~self.handed_on)
        self.handed_on[new] = True
        return new.tolist()

    def drawn(self, prompts: slice) -> dict[str, np.ndarray]:
        """The fields of the ``Rollout`` of some of the prompts."""
        rows = slice(prompts.start * self.group_size, prompts.stop * self.group_size)
        return {
            "prompt_ids": np.repeat(np.asarray(self.prompts.ids)[prompts], self.group_size, axis=0),
            "prompt_mask": np.repeat(np.asarray(self.prompts.mask)[prompts], self.group_size, axis=0),
            "completion_ids": self.ids[rows],
            "completion_mask": np.arange(self.ids.shape[1])[None] < self.lengths[rows, None],
            "rollout_log_probs": self.log_probs[rows],
            "truncated": self.truncated[rows],
        }


@dataclass
class Running:
    """A cohort on the device, and what the host knows of it.

    Attributes:
        cohort, state: as of the last dispatch.
        ladder: batch sizes it may have.
        rung: the one it has.
        age: tokens dispatched.
        opened: chunks of the whole batch that hold anything.
        pooled: whether it was made of the rest of others; its cache is in one piece then.
        batch_of: for each row the batch it belongs to, in ``batches``; -1 for a row that only fills the shape.
        row_of: its row there.
        prompt_of: its prompt, counted within its device.
        unread: dispatches whose tokens the host has not looked at: ``(tokens, log-probabilities, age, batch_of,
            row_of)``.
    """

    cohort: Cohort
    state: State
    ladder: list[Rung]
    rung: int
    age: int
    opened: int
    pooled: bool
    batches: list[Batch]
    batch_of: np.ndarray
    row_of: np.ndarray
    prompt_of: np.ndarray
    unread: list[tuple[Array, Array, int, np.ndarray, np.ndarray]] = field(default_factory=list)

    def living(self) -> np.ndarray:
        """Which rows have not ended, as far as was looked."""
        result = np.zeros(len(self.batch_of), bool)
        for number, batch in enumerate(self.batches):
            mine = self.batch_of == number
            result[mine] = batch.living[self.row_of[mine]]
        return result


class Engine:
    """What ``make_rollout`` and ``make_stream`` share: the compiled functions, and the loop over them."""

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
        mesh: Mesh | None,
        ahead: int | None,
        report: Callable[[RolloutStats], None] | None,
    ):
        check_lengths(group_size, max_completion_length, eos_ids)
        self.group_size, self.T, self.pad_id = group_size, max_completion_length, pad_id
        self.eos_ids, self.stop, self.mesh, self.report = np.array(eos_ids), stop, mesh, report
        self.devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.ahead = (0 if jax.default_backend() == "cpu" else 1) if ahead is None else ahead
        self.chunks = chunks = Chunks.of(max_completion_length)
        self.stats = RolloutStats()

        @jax.jit
        def begin(params: Params, prompts: Prompts, key: Key[Array, ""]):
            return self.laid_out(
                start_cohort(model, params, prompts, key, sampling, group_size=group_size, chunk=chunks.length)
            )

        @partial(jax.jit, donate_argnums=2)
        def advance(params: Params, cohort: Cohort, state: State):
            state, tokens, log_probs = draw_tokens(model, params, cohort, state, sampling, eos_ids=eos_ids, count=STEPS)
            return self.laid_out(state), tokens, log_probs

        self.begin, self.advance = begin, advance
        self.take = jax.jit(lambda *args: self.laid_out(take(model, *args)))
        self.join = jax.jit(lambda *args: self.laid_out(join(*args)))

    def laid_out(self, tree: Any) -> Any:
        """Cohort and state with rows and prompts split over the mesh, and heads where they divide."""
        if self.mesh is None:
            return tree
        mesh = self.mesh

        def place(x):
            if x.ndim == 0:
                return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
            if x.ndim == 1 and x.shape[0] < self.devices:  # the starts of chunks
                return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
            heads = "tensor" if x.ndim == 4 and x.shape[1] % mesh.shape["tensor"] == 0 else None
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*BATCH, heads) if heads else BATCH))

        return jax.tree.map(place, tree)

    def everywhere(self, numbers: int | list[int]) -> Array:
        """Numbers of the host on every device."""
        return jax.device_put(np.array(numbers, np.int32), None if self.mesh is None else replicated(self.mesh))

    def run(
        self, params: Params, prompts: Iterable[tuple[Prompts, int]], key: Key[Array, ""]
    ) -> Iterator[tuple[Batch, int]]:
        """Draw for one set of prompts after the other; what is left of several is pooled. Gives each prompt that ends.

        Args:
            params: the policy's.
            prompts: sets of one shape, each with how many of its prompts are to be drawn for.
            key: of this step.
        """
        self.stats = RolloutStats()
        parked: list[Running] = []
        parking_age = None
        first_place = 0
        coming = iter(prompts)
        current = next(coming, None)
        while current is not None:
            running = self.launch(params, *current, first_place, key)
            first_place += current[1]
            current = next(coming, None)
            may_park = current is not None or bool(parked)
            yield from self.drive(params, running, parking_age if may_park else -1)
            if running.living().any():
                parked.append(running)
                parking_age = running.age
            if len(parked) == LADDER[PARKED_RUNG] or (current is None and len(parked) > 1):
                pool = self.pool(parked)
                parked = []
                yield from self.drive(params, pool, -1)
        for running in parked:
            yield from self.drive(params, running, -1)
        if self.report is not None:
            self.report(self.stats)

    def launch(
        self, params: Params, prompts: Prompts, num_prompts: int, first_place: int, key: Key[Array, ""]
    ) -> Running:
        """Read a set of prompts."""
        N = prompts.ids.shape[0]
        if N % self.devices:
            raise ValueError(f"{N} prompts do not divide over data x fsdp = {self.devices} devices")
        B = N * self.group_size
        self.count(cohorts=1)
        return Running(
            *self.begin(params, prompts, key),
            make_ladder(N // self.devices, B // self.devices, self.group_size),
            rung=0,
            age=0,
            opened=1,
            pooled=False,
            batches=[Batch.of(prompts, first_place, num_prompts, self.group_size, self.T, self.pad_id)],
            batch_of=np.where(np.arange(B) < num_prompts * self.group_size, 0, -1),
            row_of=np.arange(B),
            prompt_of=np.arange(B) // self.group_size % (N // self.devices),
        )

    def drive(self, params: Params, running: Running, parking_age: int | None) -> Iterator[tuple[Batch, int]]:
        """Advance a cohort until all its rows have ended, or until it is small enough to be parked.

        Args:
            params: the policy's.
            running: the cohort.
            parking_age: the age at which it may be parked; None for any, -1 for none.
        """
        while running.living().any():
            parkable = len(running.ladder) > PARKED_RUNG and running.rung == PARKED_RUNG and not running.unread
            if parkable and parking_age in (None, running.age):
                return
            if running.age < self.T:
                self.dispatch(params, running)
            if running.unread and (len(running.unread) > self.ahead or running.age >= self.T):
                self.read(running)
                yield from ((batch, n) for batch in running.batches for n in batch.newly_finished())
                self.compact(running)

    def dispatch(self, params: Params, running: Running) -> None:
        """Draw the next tokens of all rows."""
        if running.rung == 0 and not running.pooled and running.age == running.opened * self.chunks.length:
            self.open_chunk(running)
        running.state, tokens, log_probs = self.advance(params, running.cohort, running.state)
        running.unread.append((tokens, log_probs, running.age, running.batch_of, running.row_of))
        running.age += STEPS
        caches = (running.cohort.prompt.cache, running.cohort.closed, running.state.active)
        size = sum(x.nbytes for x in jax.tree.leaves(caches))
        self.count(dispatches=1, row_steps=len(running.batch_of) * STEPS)
        self.stats = replace(self.stats, cache_bytes=max(self.stats.cache_bytes, size))

    def read(self, running: Running) -> None:
        """Look at the oldest dispatch that was not looked at: keep what was drawn before each row's end."""
        tokens, log_probs, age, batch_of, row_of = running.unread.pop(0)
        count = min(STEPS, self.T - age)
        tokens, log_probs = np.asarray(tokens).T[:, :count], np.asarray(log_probs).T[:, :count]
        for number, batch in enumerate(running.batches):
            mine = np.flatnonzero(batch_of == number)
            mine = mine[batch.living[row_of[mine]]]
            rows, drawn = row_of[mine], tokens[mine]
            ends = np.isin(drawn, self.eos_ids)
            ended = ends.any(1)
            kept = np.where(ended, ends.argmax(1) + 1, count)
            if self.stop is not None:
                for i, row in enumerate(rows):
                    sequence = [*batch.ids[row, :age].tolist(), *drawn[i, : kept[i]].tolist()]
                    length = self.stop(sequence, age)
                    if length is not None:
                        kept[i], ended[i] = length - age, True
            within = np.arange(count)[None] < kept[:, None]
            batch.ids[rows, age : age + count] = np.where(within, drawn, self.pad_id)
            batch.log_probs[rows, age : age + count] = np.where(within, log_probs[mine], 0)
            batch.lengths[rows] = age + kept
            batch.truncated[rows] = ~ended & (age + count == self.T)
            batch.living[rows] = ~ended & (age + count < self.T)
            self.count(tokens=int(kept.sum()))

    def compact(self, running: Running) -> None:
        """Gather the living rows into the smallest batch that holds them."""
        living = running.living().reshape(self.devices, -1)
        most = living.sum(1).max()
        while most and running.rung + 1 < len(running.ladder) and most <= running.ladder[running.rung + 1].rows:
            running.rung += 1
            rows, indices = self.choose(running, running.ladder[running.rung])
            chunks = self.all_chunks(running)
            running.cohort, running.state = self.take(running.cohort, running.state, chunks, *indices)
            running.batch_of, running.row_of, running.prompt_of = rows

    def choose(self, running: Running, rung: Rung) -> tuple[tuple, tuple]:
        """The rows and prompts that go to a rung, as the host's arrays and as the indices of ``take``."""
        living = running.living().reshape(self.devices, -1)
        old = [x.reshape(self.devices, -1) for x in (running.batch_of, running.row_of, running.prompt_of)]
        rows = np.zeros((self.devices, rung.rows), np.int32)
        prompts = np.zeros((self.devices, rung.prompts), np.int32)
        prompt_of = np.zeros((self.devices, rung.rows), np.int32)
        kept = np.zeros((self.devices, rung.rows), bool)
        for d in range(self.devices):
            chosen = np.flatnonzero(living[d])
            rows[d, : len(chosen)], kept[d, : len(chosen)] = chosen, True
            present, prompt_of[d, : len(chosen)] = np.unique(old[2][d, chosen], return_inverse=True)
            prompts[d, : len(present)] = present
        batch_of = np.where(kept, np.take_along_axis(old[0], rows, 1), -1)
        row_of = np.take_along_axis(old[1], rows, 1)
        members, place = share(prompt_of, kept, rung)
        return (batch_of.reshape(-1), row_of.reshape(-1), prompt_of.reshape(-1)), (rows, prompts, members, place)

    def open_chunk(self, running: Running) -> None:
        """Close the active chunk and begin another."""
        real = (*running.cohort.closed[: running.opened - 1], running.state.active)
        starts = [i * self.chunks.length for i in range(running.opened)]
        running.opened += 1
        unused = self.chunks.held(running.opened) - running.opened
        running.cohort = replace(
            running.cohort,
            closed=(*real, *[real[0]] * unused),
            closed_starts=self.everywhere(starts + [UNUSED] * unused),
            active_start=self.everywhere(starts[-1] + self.chunks.length),
        )
        running.state = replace(running.state, active=empty_chunk(running.state.active))

    def all_chunks(self, running: Running) -> list[Cache]:
        """The own keys and values of a cohort in order, as long as a whole completion's."""
        if running.rung > 1 or running.pooled:
            return [running.state.active]
        written = [*running.cohort.closed[: running.opened - 1], running.state.active]
        missing = self.chunks.count - running.opened
        return written + [empty_chunk(running.state.active)] * missing

    def pool(self, parked: list[Running]) -> Running:
        """One cohort of several that are left with a part of their rows at the same age."""
        first = parked[0]
        parts = LADDER[PARKED_RUNG]
        rung = first.ladder[PARKED_RUNG]
        filled = [*parked, *[first] * (parts - len(parked))]
        batch_of, row_of, prompt_of = [], [], []
        batches: list[Batch] = []
        for i, part in enumerate(filled):
            real = part.batch_of if i < len(parked) else np.full_like(part.batch_of, -1)
            batch_of.append(np.where(real >= 0, real + len(batches), -1).reshape(self.devices, -1))
            row_of.append(part.row_of.reshape(self.devices, -1))
            prompt_of.append(part.prompt_of.reshape(self.devices, -1) + i * rung.prompts)
            batches += part.batches if i < len(parked) else []
        together = [np.concatenate(x, axis=1) for x in (batch_of, row_of, prompt_of)]
        ladder = make_ladder(parts * rung.prompts, parts * rung.rows, rung.group)
        members, place = share(together[2], together[0] >= 0, Rung(parts * rung.rows, parts * rung.prompts, rung.group))
        self.count(cohorts=1)
        running = Running(
            *self.join([(part.cohort, part.state) for part in filled], members, place),
            ladder,
            rung=0,
            age=first.age,
            opened=first.opened,
            pooled=True,
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


def share(prompt_of: np.ndarray, kept: np.ndarray, rung: Rung) -> tuple[np.ndarray, np.ndarray]:
    """``members`` and ``place`` of ``types.Context`` for rows of the prompts ``prompt_of``, both ``[devices, rows]``."""
    members = np.zeros((len(prompt_of), rung.prompts * rung.group), np.int32)
    place = np.zeros(prompt_of.shape, np.int32)
    for d in range(len(prompt_of)):
        number = np.zeros(rung.prompts, np.int32)
        for row in np.flatnonzero(kept[d]):
            prompt = prompt_of[d, row]
            place[d, row] = prompt * rung.group + number[prompt]
            members[d, place[d, row]] = row
            number[prompt] += 1
    return members, place


def empty_chunk(like: Cache) -> Cache:
    """A chunk of the same shape. What it holds is finite, and is not looked at before it is written over."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)


@dataclass(frozen=True)
class Limits:
    """What a set of prompts must keep to: checked before anything is compiled."""

    model: Model
    group_size: int
    max_completion_length: int
    devices: int
    max_rows: int | None
    cache_bytes: int | None

    def prompts_at_once(self, prompts: Prompts) -> int:
        """How many prompts are drawn for together.

        Raises:
            ValueError: a prompt without room for its completion, or a group that does not fit.
        """
        N, P = prompts.ids.shape
        T, G = self.max_completion_length, self.group_size
        lengths = np.asarray(prompts.mask).sum(1)
        if self.model.max_length is not None and lengths.max(initial=0) + T > self.model.max_length:
            n = int(lengths.argmax())
            raise ValueError(
                f"prompt {n} has {lengths[n]} tokens: with a completion of up to {T} it does not fit the model's "
                f"{self.model.max_length} positions; shorten it, or set max_completion_length to at most "
                f"{self.model.max_length - lengths[n]}"
            )
        row, prompt = (self._bytes(length) for length in (cache_columns(T), P))
        allowed = math.inf if self.cache_bytes is None else self.cache_bytes / self.devices
        if G * row + prompt > allowed:
            raise ValueError(
                f"a group of {G} samples of {P} + {T} tokens takes {mib(G * row + prompt)} of keys and values, and "
                f"{mib(allowed)} are allowed on each device; at most {max(0, int((allowed - prompt) // row))} samples "
                "of a prompt fit"
            )
        if self.max_rows is not None and self.max_rows < G * self.devices:
            raise ValueError(
                f"max_rows is {self.max_rows}; a group of {G} on each of {self.devices} devices takes at least "
                f"{G * self.devices}"
            )
        most = N if self.max_rows is None else min(N, self.max_rows // G)
        if allowed < math.inf:
            most = min(most, int(allowed // (G * row + prompt)) * self.devices)
        return max(self.devices, most // self.devices * self.devices)

    def _bytes(self, columns: int) -> int:
        cache = jax.eval_shape(lambda: self.model.init_cache(1, columns))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def mib(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**20:.1f} MiB"


def make_rollout(
    model: Model,
    sampling: Sampling,
    *,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopFn | None = None,
    max_rows: int | None = None,
    cache_bytes: int | None = None,
    mesh: Mesh | None = None,
    ahead: int | None = None,
    report: Callable[[RolloutStats], None] | None = None,
) -> Callable[[Params, Prompts, Key[Array, ""]], Rollout]:
    """A function ``(params, prompts, key) -> Rollout`` that draws what ``generate`` draws, and computes little else.

    Prompts are read once for their group, and their keys and values are held once for it. Rows that have ended are left
    out of the batch, and the cache is as long as it needs to be. Prompts that do not fit at once are drawn for one set
    after the other, and what is left of several sets is drawn together.

    Args:
        model: see ``types.Model``.
        sampling: temperature, filters, penalties.
        group_size: G, samples for each prompt.
        max_completion_length: T, in tokens, the ending one included.
        eos_ids: any of these ends a completion.
        pad_id: what ``completion_ids`` holds after the end; it has no other meaning.
        stop: ends completions by what they say, such as ``data.prompts.stop_strings``: from the ids of a completion and
            the number of them that were looked at before, to its length where it ends, or None. The ids stay as drawn.
        max_rows: the most completions that are drawn at once.
        cache_bytes: the most that their keys and values may take, over all devices; while a batch is made smaller the
            old and the new one are there together, which takes up to half as much again.
        mesh: rows are split over its ``data`` and ``fsdp`` axes, heads over ``tensor`` where they divide.
        ahead: dispatches that are sent before the host looks at what an earlier one drew, so that a device need not
            wait. Default: none on CPU, one elsewhere.
        report: called after each rollout with what it took.

    Returns:
        A function that raises ``ValueError``, before anything is compiled, for prompts that leave no room for a
        completion, for a group that does not fit, and for prompts that do not divide over the mesh.

    Raises:
        ValueError: a group_size or max_completion_length below 1, or no eos_ids.
    """
    engine = Engine(
        model,
        sampling,
        group_size=group_size,
        max_completion_length=max_completion_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        stop=stop,
        mesh=mesh,
        ahead=ahead,
        report=report,
    )
    limits = Limits(model, group_size, max_completion_length, engine.devices, max_rows, cache_bytes)

    def rollout(params: Params, prompts: Prompts, key: Key[Array, ""]) -> Rollout:
        sets = cut([prompts], limits.prompts_at_once(prompts))
        batches = {batch.first_place: batch for batch, _ in engine.run(params, sets, key)}
        parts = [batches[place].drawn(slice(0, batches[place].num_prompts)) for place in sorted(batches)]
        fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Rollout(**jax.device_put(fields, None if mesh is None else NamedSharding(mesh, BATCH)))

    return rollout


def make_stream(
    model: Model,
    sampling: Sampling,
    *,
    num_prompts: int,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopFn | None = None,
    mesh: Mesh | None = None,
    ahead: int | None = None,
    report: Callable[[RolloutStats], None] | None = None,
) -> Callable[[Params, Iterable[Prompts], Key[Array, ""]], Iterator[tuple[int, Rollout]]]:
    """A function ``(params, prompts, key) -> (place, rollout), ...`` for more prompts than fit: data sets, evaluations.

    ``prompts`` is any iterable of ``Prompts`` of one length, read as it is needed. Each prompt is handed on once all
    its samples have ended, with its place in the stream and a ``Rollout`` of G rows; the order is that in which they
    end, and the same in every run. What is drawn for a prompt is what ``make_rollout`` draws.

    Args:
        model: see ``types.Model``.
        sampling: see ``make_rollout``, as the rest.
        num_prompts: prompts that are drawn for at once; what is left of four such sets is drawn together.
        group_size: G.
        max_completion_length: T.
        eos_ids: any of these ends a completion.
        pad_id: fills ``completion_ids``.
        stop: see ``make_rollout``.
        mesh: see ``make_rollout``.
        ahead: see ``make_rollout``.
        report: see ``make_rollout``; called at the stream's end.
    """
    engine = Engine(
        model,
        sampling,
        group_size=group_size,
        max_completion_length=max_completion_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        stop=stop,
        mesh=mesh,
        ahead=ahead,
        report=report,
    )
    limits = Limits(model, group_size, max_completion_length, engine.devices, None, None)

    def stream(params: Params, prompts: Iterable[Prompts], key: Key[Array, ""]) -> Iterator[tuple[int, Rollout]]:
        def checked() -> Iterator[Prompts]:
            for each in prompts:
                limits.prompts_at_once(each)
                yield each

        for batch, n in engine.run(params, cut(checked(), num_prompts), key):
            yield batch.first_place + n, Rollout(**jax.device_put(batch.drawn(slice(n, n + 1))))

    return stream


def cut(prompts: Iterable[Prompts], size: int) -> Iterator[tuple[Prompts, int]]:
    """Prompts in sets of ``size``, the last filled up with some of its own; and how many of each set are real."""
    waiting: list[Prompts] = []
    for each in prompts:
        if not waiting and each.ids.shape[0] == size:
            yield each, size
            continue
        waiting.append(each)
        together = merge_prompts(waiting)
        while together.ids.shape[0] >= size:
            yield some_prompts(together, np.arange(size)), size
            together = some_prompts(together, np.arange(size, together.ids.shape[0]))
        waiting = [together] if together.ids.shape[0] else []
    for rest in waiting:
        real = rest.ids.shape[0]
        yield some_prompts(rest, np.arange(size) % real), real


def merge_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Prompts of one length, one set after the other."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def some_prompts(prompts: Prompts, index: np.ndarray) -> Prompts:
    """Those at some places."""
    return jax.tree.map(lambda x: np.asarray(x)[index], prompts)
