"""The sampled tokens of a batch of prompts, on the host."""

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
    """The work done for a rollout.

    Attributes:
        tokens: sampled tokens that were kept.
        row_steps: decode steps times rows of the batch, summed over dispatches.
        dispatches: calls on the device of ``STEPS`` decode steps each.
        batches: batches that were prefilled, and batches merged from deferred ones.
        cache_bytes: the largest KV cache of a batch at a dispatch.
    """

    tokens: int = 0
    row_steps: int = 0
    dispatches: int = 0
    batches: int = 0
    cache_bytes: int = 0

    @property
    def useful(self) -> float:
        """The fraction of row-steps whose token was kept."""
        return self.tokens / max(self.row_steps, 1)


@dataclass
class HostBatch:
    """The completions of prompts that were prefilled together; B = prompts * group_size rows.

    Attributes:
        prompts: the prompts; those after the first ``num_prompts`` only fill the shape.
        first_prompt: number of the first prompt in the call's stream of prompts.
        num_prompts: prompts to sample for.
        group_size: rows of each prompt.
        ids: sampled tokens ``[B, T]``, the pad id elsewhere.
        log_probs: their log-probabilities ``[B, T]``, 0 elsewhere.
        lengths: tokens of each row.
        unfinished: True at rows that go on.
        truncated: True at rows that reached T without an EOS token.
        is_yielded: True at prompts that ``newly_finished`` has returned.
        experts: of the sampled tokens ``[B, T, L, k]``; None if not recorded.
        prompt_experts: of the prompts' tokens ``[N, P, L, k]``.
    """

    prompts: Prompts
    first_prompt: int
    num_prompts: int
    group_size: int
    ids: np.ndarray
    log_probs: np.ndarray
    lengths: np.ndarray
    unfinished: np.ndarray
    truncated: np.ndarray
    is_yielded: np.ndarray
    experts: np.ndarray | None = None
    prompt_experts: jax.Array | None = None

    @staticmethod
    def empty(
        prompts: Prompts,
        first_prompt: int,
        num_prompts: int,
        group_size: int,
        max_length: int,
        pad_id: int,
        experts_shape: tuple[int, int] | None = None,
        prompt_experts: jax.Array | None = None,
    ) -> HostBatch:
        """A batch without sampled tokens.

        Args:
            prompts, first_prompt, num_prompts, group_size: as in ``HostBatch``.
            max_length: T.
            pad_id: token id of padding.
            experts_shape: L and k; None if experts are not recorded.
            prompt_experts: as in ``HostBatch``.
        """
        B = prompts.ids.shape[0] * group_size
        return HostBatch(
            prompts,
            first_prompt,
            num_prompts,
            group_size,
            ids=np.full((B, max_length), pad_id, np.int32),
            log_probs=np.zeros((B, max_length), np.float32),
            lengths=np.zeros(B, np.int32),
            unfinished=np.arange(B) < num_prompts * group_size,
            truncated=np.zeros(B, bool),
            is_yielded=np.zeros(num_prompts, bool),
            experts=None if experts_shape is None else np.full((B, max_length, *experts_shape), -1, np.int16),
            prompt_experts=prompt_experts,
        )

    def newly_finished(self) -> list[int]:
        """The prompts whose samples have all finished since the last call."""
        unfinished = self.unfinished.reshape(-1, self.group_size)[: self.num_prompts]
        new = np.flatnonzero(~unfinished.any(axis=1) & ~self.is_yielded)
        self.is_yielded[new] = True
        return new.tolist()

    def rollout_fields(self, prompts: slice) -> dict[str, np.ndarray]:
        """The fields of the ``Rollout`` of a slice of the prompts."""
        rows = slice(prompts.start * self.group_size, prompts.stop * self.group_size)
        recorded = {}
        if self.experts is not None:
            of_prompts = np.asarray(self.prompt_experts)[prompts]
            recorded["prompt_experts"] = np.repeat(of_prompts, self.group_size, axis=0)
            recorded["completion_experts"] = self.experts[rows]
        return recorded | {
            "prompt_ids": np.repeat(np.asarray(self.prompts.ids)[prompts], self.group_size, axis=0),
            "prompt_mask": np.repeat(np.asarray(self.prompts.mask)[prompts], self.group_size, axis=0),
            "completion_ids": self.ids[rows],
            "completion_mask": np.arange(self.ids.shape[1])[None] < self.lengths[rows, None],
            "rollout_log_probs": self.log_probs[rows],
            "truncated": self.truncated[rows],
        }


def batched(prompts: Iterable[Prompts], size: int) -> Iterator[tuple[Prompts, int]]:
    """Prompts regrouped into batches of one size, each with the number of its prompts that are real.

    The last batch is filled up by repeating its prompts.

    Args:
        prompts: prompts of one length, any number at a time.
        size: prompts of a batch.
    """
    waiting: list[Prompts] = []
    for more in prompts:
        if not waiting and more.ids.shape[0] == size:
            yield more, size
            continue
        waiting.append(more)
        joined = concatenated(waiting)
        while joined.ids.shape[0] >= size:
            yield _select_prompts(joined, np.arange(size)), size
            joined = _select_prompts(joined, np.arange(size, joined.ids.shape[0]))
        waiting = [joined] if joined.ids.shape[0] else []
    for rest in waiting:
        num_real = rest.ids.shape[0]
        yield _select_prompts(rest, np.arange(size) % num_real), num_real


def split_groups(prompts: Prompts, num_parts: int) -> Prompts:
    """Every prompt repeated, once for each part of its group; unchanged for one part.

    Args:
        prompts: the prompts.
        num_parts: parts of a group.
    """
    if num_parts == 1:
        return prompts
    N = prompts.ids.shape[0]
    ids, mask, index = (jnp.repeat(x, num_parts, axis=0) for x in (prompts.ids, prompts.mask, prompts.index))
    return Prompts(ids, mask, index, part=jnp.tile(jnp.arange(num_parts, dtype=jnp.int32), N))


def concatenated_fields(rollouts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of several rollouts, concatenated along rows."""
    return {name: np.concatenate([fields[name] for fields in rollouts]) for name in rollouts[0]}


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Prompts or rollouts of one length, concatenated along rows."""
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _select_prompts(prompts: Prompts, index: np.ndarray) -> Prompts:
    """The prompts at some positions."""
    return jax.tree.map(lambda x: np.asarray(x)[index], prompts)
