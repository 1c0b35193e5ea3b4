"""Reward function that runs a reward model in batches on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.hosts import fetch
from grpo_jax.sharding import num_row_shards, shard_rows
from grpo_jax.train import reward_model_scores
from grpo_jax.types import Model, Params

SHORTEST = 64
Encode = Callable[[list[str], list[str], Mapping[str, list[Any]]], list[list[int]]]
"""``(prompts, completions, columns) -> token_ids``, the reward model's input for each completion; empty if none."""


def encode_text(
    tokenizer: Any, eos_id: int | None, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> list[list[int]]:
    """Tokens of each prompt and completion as one text, followed by ``eos_id``.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        eos_id: appended unless the column ``truncated`` is true; None appends nothing.
        prompts, completions: ``[B]`` texts.
        columns: by name; ``truncated`` is optional.
    """
    if not completions:
        return []
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    truncated = columns.get("truncated") or [False] * len(texts)
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        ids if cut_off or eos_id is None else [*ids, eos_id] for ids, cut_off in zip(token_ids, truncated, strict=True)
    ]


class LearnedReward:
    """A reward function (``RewardFn``) that returns the score of a reward model.

    It runs on the devices that hold the model's parameters, so it cannot run in a ``RewardPool``. Sequences are padded
    to a power of two and scored in batches of fixed size, so that few programs are compiled. Up to rounding, a score
    does not depend on the other completions of its batch.

    Args:
        model: a model with a scalar head, as ``models.from_pretrained`` returns for a classifier with one label.
        params: parameters of the model.
        tokenizer: the reward model's transformers tokenizer, which may differ from the policy's.
        max_length: length in tokens of the longest sequence that is scored. Longer ones have no score (None), because
            the score of a truncated sequence is that of a different text.
        batch_size: sequences scored at once.
        encode: maps prompts, completions and columns to token ids. Default: prompt and completion as one text, without
            special tokens.
        eos_id: for the default ``encode``, the token to append to completions that are not ``truncated`` (a column);
            None appends nothing.
        mesh: the mesh over which batches are sharded.

    Raises:
        ValueError: the model's head is not scalar, or ``batch_size`` is not divisible by the mesh's data axes.
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
        if model.vocab_size != 1:
            raise ValueError(f"the model's head has {model.vocab_size} outputs; that of a reward model has one")
        if mesh is not None and batch_size % num_row_shards(mesh):
            raise ValueError(f"batch_size {batch_size} must be divisible by data x fsdp of the mesh {dict(mesh.shape)}")
        self._params, self._mesh = params, mesh
        self._encode = encode or partial(encode_text, tokenizer, eos_id)
        self._max_length, self._batch_size = max_length, batch_size
        self._score = jax.jit(
            lambda params, ids, mask: reward_model_scores(model, model.preparation.prepare(params), ids, mask)
        )

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """The score of each completion; None if its sequence is empty or longer than ``max_length``.

        Args:
            prompts, completions: ``[B]`` texts.
            columns: ``[B]`` values each, for ``encode``.

        Raises:
            FloatingPointError: a score is NaN or infinite.
        """
        if not completions:
            return []
        token_ids = self._encode(prompts, completions, columns)
        scores: list[float | None] = [None] * len(completions)
        # Sorted by length, so that short sequences are not padded to the longest.
        order = [i for i in np.argsort([len(ids) for ids in token_ids]) if 0 < len(token_ids[i]) <= self._max_length]
        for first in range(0, len(order), self._batch_size):
            rows = order[first : first + self._batch_size]
            batch = self._batch([token_ids[row] for row in rows])
            if not np.isfinite(batch).all():
                raise FloatingPointError("the reward model returned a score that is not finite")
            for row, score in zip(rows, batch, strict=True):
                scores[row] = float(score)
        return scores

    def _batch(self, token_ids: list[list[int]]) -> np.ndarray:
        longest = max(map(len, token_ids))
        length = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self._max_length)
        ids = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, sequence in enumerate(token_ids):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = True
        batch = (ids, mask) if self._mesh is None else shard_rows((ids, mask), self._mesh)
        return fetch(self._score(self._params, *batch))[: len(token_ids)]
