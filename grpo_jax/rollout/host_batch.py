"""What the host knows of completions that are being drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import Prompts, Rollout

Rows = TypeVar("Rows", Prompts, Rollout)


@dataclass(frozen=True)
class RolloutStats:
    """What drawing a set of completions took.

    Attributes:
        tokens: drawn and kept.
        row_steps: rows times steps that were computed for them.
        dispatches: of ``STEPS`` steps each.
        cohorts: sets of prompts that were read together, and pools of what was left of them.
        cache_bytes: the most that the keys and values of one cohort took in a dispatch.
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
    def of(prompts: Prompts, first_place: int, num_prompts: int, group_size: int, length: int, pad_id: int) -> Batch:
        """Nothing drawn yet; prompts after the first ``num_prompts`` only fill the shape and are not drawn for."""
        B = prompts.ids.shape[0] * group_size
        return Batch(
            prompts,
            first_place,
            num_prompts,
            group_size,
            ids=np.full((B, length), pad_id, np.int32),
            log_probs=np.zeros((B, length), np.float32),
            lengths=np.zeros(B, np.int32),
            living=np.arange(B) < num_prompts * group_size,
            truncated=np.zeros(B, bool),
            handed_on=np.zeros(num_prompts, bool),
        )

    def newly_finished(self) -> list[int]:
        """The prompts all of whose samples have ended since this was last asked."""
        living = self.living.reshape(-1, self.group_size)[: self.num_prompts]
        done = ~np.any(living, axis=1)
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


def cut(prompts: Iterable[Prompts], size: int) -> Iterator[tuple[Prompts, int]]:
    """Prompts in sets of ``size``, the last filled up with some of its own; and how many of each set are real."""
    waiting: list[Prompts] = []
    for each in prompts:
        if not waiting and each.ids.shape[0] == size:
            yield each, size
            continue
        waiting.append(each)
        together = concatenated(waiting)
        while together.ids.shape[0] >= size:
            yield some_prompts(together, np.arange(size)), size
            together = some_prompts(together, np.arange(size, together.ids.shape[0]))
        waiting = [together] if together.ids.shape[0] else []
    for rest in waiting:
        real = rest.ids.shape[0]
        yield some_prompts(rest, np.arange(size) % real), real


def in_parts(prompts: Prompts, parts: int) -> Prompts:
    """Each prompt once for each part of its group, one after the other; as it is where a group is drawn as a whole."""
    if parts == 1:
        return prompts
    N = prompts.ids.shape[0]
    ids, mask, index = (jnp.repeat(x, parts, axis=0) for x in (prompts.ids, prompts.mask, prompts.index))
    return Prompts(ids, mask, index, part=jnp.tile(jnp.arange(parts, dtype=jnp.int32), N))


def joined(drawn: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of a ``Rollout`` of several, one after the other."""
    return {name: np.concatenate([part[name] for part in drawn]) for name in drawn[0]}


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Prompts or rollouts of one length, the rows of one after those of the other."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def some_prompts(prompts: Prompts, index: np.ndarray) -> Prompts:
    """Those at some places."""
    return jax.tree.map(lambda x: np.asarray(x)[index], prompts)
