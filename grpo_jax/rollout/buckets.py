"""Batch sizes and cache lengths: from short lists, so that few programs are compiled, and within what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from grpo_jax.types import Model, cache_columns

STEPS = 8
"""Tokens a dispatch; they divide ``COLUMNS``."""
BUCKET_DIVISORS = (1, 2, 4, 8, 16)
"""What a cohort's rows are divided by as they end."""
DEFERRED_BUCKET = 2
"""Where a cohort waits for others: as many as its divisor make up a whole one again."""
JOINED_BUCKET = 2
"""From here on a batch has its cache in one piece; a larger one in chunks. A parked batch has it in one."""
assert JOINED_BUCKET <= DEFERRED_BUCKET
MIN_ROWS = 8


class Bucket(NamedTuple):
    """Rows and prompts of a batch size, and places for each prompt's rows; all for one device."""

    rows: int
    prompts: int
    group: int


def make_buckets(prompts: int, rows: int, group: int) -> list[Bucket]:
    """The batch sizes that a cohort of this size passes through, for one device."""
    sizes = sorted({max(math.ceil(rows / part), min(rows, MIN_ROWS)) for part in BUCKET_DIVISORS}, reverse=True)
    return [Bucket(size, min(prompts, size), min(group, size)) for size in sizes]


def chunk_lengths(max_completion_length: int) -> tuple[int, ...]:
    """Columns of the chunks that the cache of a large batch is cut into: a quarter of a completion, then the rest.

    Attention does not read the second until the first is full, and most rows of a long-tailed batch have ended by then.
    More chunks would be more programs.
    """
    columns = cache_columns(max_completion_length)
    first = cache_columns(math.ceil(columns / 4))
    return (first, columns - first) if columns > first else (columns,)


def default_cache_bytes(devices: Sequence[Any]) -> int | None:
    """What keys and values may take where nothing else is said: a fifth of the memory of devices that tell theirs.

    Of one set of prompts, that is; with what is beside it (see ``Sampler``) it may come to about half by reckoning, and
    the rest is the parameters' and the training's.
    """
    told = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return sum(told) // 5 if all(told) else None


@dataclass(frozen=True)
class MemoryLimits:
    """What a set of prompts must keep to: checked before anything is compiled."""

    model: Model
    group_size: int
    max_completion_length: int
    devices: int
    max_rows: int | None
    cache_bytes: int | None
    cache_dtype: Any = None

    def check_rows(self, num_prompts: int) -> None:
        """Refuse so many prompts if their completions do not divide over the mesh.

        Raises:
            ValueError: it names how many prompts more would.
        """
        if num_prompts * self.group_size % self.devices:
            raise ValueError(
                f"{num_prompts} prompts x {self.group_size} samples do not divide over data x fsdp = {self.devices} "
                f"devices; {-num_prompts % self.devices} prompts more would"
            )

    def parts_of_a_group(self, prompt_length: int) -> int:
        """Into how many equal parts a group is divided so that one of them fits; the fewest.

        Raises:
            ValueError: not even a single sample fits.
        """
        row, prompt, allowed = self._sizes(prompt_length)
        if row + prompt > allowed:
            raise ValueError(
                f"a sample of {prompt_length} + {self.max_completion_length} tokens takes {mib(row + prompt)} of keys "
                f"and values, and {mib(allowed)} are allowed for each of {self.devices} parts of the batch; "
                "cache_bytes allows more, and cache_dtype takes less"
            )
        if self.max_rows is not None and self.max_rows < self.devices:
            raise ValueError(f"max_rows is {self.max_rows}; there must be a row for each of {self.devices} devices")
        most = self.group_size if self.max_rows is None else self.max_rows // self.devices
        if allowed < math.inf:
            most = min(most, int((allowed - prompt) // row))
        return next(
            parts
            for parts in range(1, self.group_size + 1)
            if self.group_size % parts == 0 and self.group_size // parts <= most
        )

    def prompts_at_once(self, num_prompts: int, prompt_length: int) -> int:
        """How many of so many prompts are drawn for together, each with a group that fits.

        Raises:
            ValueError: fewer than one prompt.
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
        """Bytes that a row and a prompt take, and those that are allowed on a device."""
        allowed = math.inf if self.cache_bytes is None else self.cache_bytes / self.devices
        return self._bytes(cache_columns(self.max_completion_length)), self._bytes(prompt_length), allowed

    def _bytes(self, columns: int) -> int:
        cache = jax.eval_shape(lambda: self.model.init_cache(1, columns, self.cache_dtype))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def mib(size: int | float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**20:.1f} MiB"
