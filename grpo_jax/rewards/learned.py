"""A reward that was learnt: a reward model, read from a checkpoint and asked in batches on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.sharding import shard_rows
from grpo_jax.train import reward_model_scores
from grpo_jax.types import Model, Params

SHORTEST = 64
Encode = Callable[[list[str], list[str], Mapping[str, list[Any]]], list[list[int]]]
"""``(prompts, completions, columns) -> token ids``, what a reward model reads of each; empty for nothing."""


def joined(
    tokenizer: Any, eos_id: int | None, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> list[list[int]]:
    """The tokens of each prompt and completion as one text, and the ending token."""
    if not completions:
        return []
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    truncated = columns.get("truncated") or [False] * len(texts)
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        ids if cut_off or eos_id is None else [*ids, eos_id] for ids, cut_off in zip(token_ids, truncated, strict=True)
    ]


class LearnedReward:
    """A reward function that gives the score of a reward model; see ``RewardFn`` for its form.

    It runs where the model's parameters lie, so it belongs into no ``RewardPool``. Sequences are padded to a power of
    two of tokens and scored in batches of one size: few programs are compiled, and a score does not depend on which
    other completions it was computed with, beyond rounding.

    Args:
        model: one with a scalar head, as ``models.from_pretrained`` gives for a classifier with one label.
        params: its parameters.
        tokenizer: its own, a transformers tokenizer; it need not be the policy's.
        max_length: tokens of the longest sequence that is scored. Of a longer one there is no score (None): cut, it
            would be the score of something else.
        batch_size: sequences scored at once.
        encode: from prompts, completions and columns to the tokens that the model reads. Default: those of prompt and
            completion as one text, without special tokens.
        eos_id: with that default, the ending token, which is read after it but where the column ``truncated`` says that
            the completion never ended; None for none.
        mesh: that batches are split over.

    Raises:
        ValueError: the model's head is not a scalar one; batch_size does not divide over the mesh.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int = 32,
        encode: Encode | None = None,
        eos_id: int | None = None,
        mesh: Mesh | None = None,
    ):
        outputs = jax.eval_shape(model.head, params).shape[0]
        if outputs != 1:
            raise ValueError(f"the model gives {outputs} numbers for each position; a reward model gives one")
        if mesh is not None and batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
            raise ValueError(f"batch_size {batch_size} does not divide over the mesh {dict(mesh.shape)}")
        self._params, self._mesh = params, mesh
        self._encode = encode or partial(joined, tokenizer, eos_id)
        self._max_length, self._batch_size = max_length, batch_size
        self._score = jax.jit(partial(reward_model_scores, model))

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """The score of each; None for a text without tokens, or with too many.

        Raises:
            FloatingPointError: a score is NaN or infinite.
        """
        if not completions:
            return []
        token_ids = self._encode(prompts, completions, columns)
        scores: list[float | None] = [None] * len(completions)
        # Like lengths together, so that short ones are not padded to the longest.
        order = [i for i in np.argsort([len(ids) for ids in token_ids]) if 0 < len(token_ids[i]) <= self._max_length]
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            batch = self._batch([token_ids[row] for row in rows])
            if not np.isfinite(batch).all():
                raise FloatingPointError("the reward model gave a score that is not finite")
            for row, score in zip(rows, batch, strict=True):
                scores[row] = float(score)
        return scores

    def _batch(self, token_ids: list[list[int]]) -> np.ndarray:
        longest = max(map(len, token_ids))
        length = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self._max_length)
        ids = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, each in enumerate(token_ids):
            ids[row, : len(each)] = each
            mask[row, : len(each)] = True
        batch = (ids, mask) if self._mesh is None else shard_rows((ids, mask), self._mesh)
        return np.asarray(self._score(self._params, *batch))[: len(token_ids)]
