"""Batch-size buckets, cache chunks and memory limits. Few shapes, so that few programs are compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from grpo_jax.devices import planned
from grpo_jax.hosts import gather
from grpo_jax.types import Model, cache_columns

STEPS = 8
"""Decode steps per dispatch; divides ``COLUMNS``."""
BUCKET_DIVISORS = (1, 2, 4, 8, 16)
"""The initial rows of a batch divided by these are the batch sizes it is compacted to as rows finish."""
DEFERRED_BUCKET = 2
"""Bucket at which a batch is deferred; as many deferred batches as its divisor are merged into one of full size."""
SINGLE_CHUNK_BUCKET = 2
"""First bucket whose KV cache is a single chunk, which deferred batches need for their merge."""
assert SINGLE_CHUNK_BUCKET <= DEFERRED_BUCKET
MIN_ROWS = 8


class Bucket(NamedTuple):
    """A batch size on each device: rows, prompts, and places for the rows of each prompt."""

    rows: int
    prompts: int
    group: int


def make_buckets(prompts: int, rows: int, group: int) -> list[Bucket]:
    """The batch-size buckets of one device, the largest first.

    Args:
        prompts: prompts of the initial batch on a device.
        rows: rows of the initial batch on a device.
        group: rows of each prompt.
    """
    sizes = sorted({max(math.ceil(rows / divisor), min(rows, MIN_ROWS)) for divisor in BUCKET_DIVISORS}, reverse=True)
    return [Bucket(size, min(prompts, size), min(group, size)) for size in sizes]


def chunk_lengths(max_completion_length: int) -> tuple[int, ...]:
    """Columns of the KV cache chunks of a large batch: about a quarter of the completion length, then the rest.

    Attention does not read the second chunk until the first is full, and most rows of a long-tailed batch have finished
    by then. More chunks would need more programs.
    """
    columns = cache_columns(max_completion_length)
    first = cache_columns(math.ceil(columns / 4))
    return (first, columns - first) if columns > first else (columns,)


def default_cache_bytes(devices: Sequence[Any]) -> int | None:
    """A fifth of the memory of all devices; None where devices do not report theirs (CPU).

    The limit applies to one batch of prompts. With copies during compaction and deferred batches, the KV cache may take
    up to about half of the memory; the rest is left to parameters and training.
    """
    plan = planned()
    if plan is not None:
        return None if plan.memory is None else plan.memory * len(devices) // 5
    own = [device for device in devices if device.process_index == jax.process_index()]
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in own]
    totals = gather(sum(sizes) if all(sizes) else None, "the memory for KV caches")
    return None if None in totals else sum(filter(None, totals)) // 5


@dataclass(frozen=True)
class MemoryLimits:
    """Splits prompts and groups to fit limits on rows and on bytes of the KV cache, before anything is compiled."""

    model: Model
    group_size: int
    max_completion_length: int
    devices: int
    max_rows: int | None
    cache_bytes: int | None
    cache_dtype: Any = None

    def check_divisible(self, num_prompts: int) -> None:
        """Check that the completions of ``num_prompts`` prompts divide over the mesh.

        Raises:
            ValueError: they do not; the message says how many prompts more would.
        """
        if num_prompts * self.group_size % self.devices:
            raise ValueError(
                f"{num_prompts} prompts x {self.group_size} samples do not divide over data x fsdp = {self.devices} "
                f"devices; {-num_prompts % self.devices} prompts more would"
            )

    def num_group_parts(self, prompt_length: int) -> int:
        """The smallest number of equal parts of a group of which one fits the limits.

        Raises:
            ValueError: a single sample does not fit.
        """
        row, prompt, allowed = self._sizes(prompt_length)
        if row + prompt > allowed:
            raise ValueError(
                f"a sample of {prompt_length} + {self.max_completion_length} tokens takes {mib(row + prompt)} of keys "
                f"and values, and {mib(allowed)} are allowed for each of {self.devices} parts of the batch; increase "
                "cache_bytes, or use a coarser cache_dtype"
            )
        if self.max_rows is not None and self.max_rows < self.devices:
            raise ValueError(f"max_rows is {self.max_rows}; it must be at least 1 for each of {self.devices} devices")
        most = self.group_size if self.max_rows is None else self.max_rows // self.devices
        if allowed < math.inf:
            most = min(most, int((allowed - prompt) // row))
        return next(
            parts
            for parts in range(1, self.group_size + 1)
            if self.group_size % parts == 0 and self.group_size // parts <= most
        )

    def prompts_per_batch(self, num_prompts: int, prompt_length: int) -> int:
        """Prompts of one batch, such that their groups fit; a multiple of the devices.

        Args:
            num_prompts: prompts to sample for; a batch has at most as many, or one for each device.
            prompt_length: P.

        Raises:
            ValueError: ``num_prompts`` is below 1.
        """
        N, G = num_prompts, self.group_size
        if N < 1:
            raise ValueError(f"num_prompts is {N}; it must be at least 1")
        row, prompt, allowed = self._sizes(prompt_length)
        most = N if self.max_rows is None else min(N, self.max_rows // G)
        if allowed < math.inf:
            most = min(most, int(allowed // (G * row + prompt)) * self.devices)
        return max(self.devices, most // self.devices * self.devices)

    def _sizes(self, prompt_length: int) -> tuple[int, int, float]:
        """Bytes of a row's cache and states, of a prompt's cache, and allowed on each device."""
        allowed = math.inf if self.cache_bytes is None else self.cache_bytes / self.devices
        row = sum(self._bytes(length) for length in chunk_lengths(self.max_completion_length))
        init_states = self.model.init_states
        row += 0 if init_states is None else _size(jax.eval_shape(lambda: init_states(1)))
        return row, self._bytes(prompt_length), allowed

    def _bytes(self, length: int) -> int:
        return _size(jax.eval_shape(lambda: self.model.init_cache(1, length, self.cache_dtype, ring=True)))


def _size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def mib(size: int | float) -> str:
    """A number of bytes formatted in MiB."""
    return f"{size / 2**20:.1f} MiB"
