"""Preference pairs: a prompt with a chosen and a rejected completion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.columns import check_length, without
from grpo_jax.data.conversations import Demonstration, completion_ids, encode_demonstrations
from grpo_jax.data.files import read_rows
from grpo_jax.data.formats import Row
from grpo_jax.data.iterator import epoch_order
from grpo_jax.data.layouts import as_preference
from grpo_jax.data.messages import Messages, checked_messages, content_text, is_message
from grpo_jax.data.packing import bucket_length
from grpo_jax.data.problems import checked_prompt, checked_text, parsed_rows
from grpo_jax.data.prompts import Rendering, pad_prompts
from grpo_jax.types import Pairs


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected completion.

    Attributes:
        prompt: text, or messages.
        chosen: the preferred completion.
        rejected: the other completion.
        where: source location for error messages, such as ``data.jsonl:3``.
        margin: annotated margin of the preference, in the data set's own units; None if unknown.
        columns: the other columns of the row.
    """

    prompt: str | Messages
    chosen: str
    rejected: str
    where: str
    margin: float | None = None
    columns: Row = field(default_factory=dict)


def load_preferences(
    source: str, *, split: str | None = None, subset: str | None = None, skipped: list[str] | None = None
) -> list[Preference]:
    """Load preferences from a file, a folder or the hub, in any layout of ``docs/data.md``.

    A row has ``prompt``, ``chosen`` and ``rejected`` as texts or messages (``chosen`` and ``rejected`` then contain one
    assistant message each), or only ``chosen`` and ``rejected``, as conversations that differ in the last turn. An
    optional column ``margin`` has the preference margin. ``layouts.as_preference`` converts other layouts.

    Args:
        source: path of a file or folder, or id of a data set on the hub.
        split: split of a folder or data set, by default "train".
        subset: configuration of a folder or data set.
        skipped: if given, unreadable rows are skipped and the reasons appended to it.

    Raises:
        KeyError: a row lacks a column; the message lists its columns.
        ValueError: a row is empty or malformed (its conversations differ before the last turn, its completions are
            equal, its margin is not a number).
        FileNotFoundError: the file, folder, split or data set does not exist.
    """
    preferences = parsed_rows(read_rows(source, split, subset, skipped=skipped), _preference, skipped)
    if not preferences:
        raise ValueError(f"{source} is empty: it has no preferences")
    return preferences


class EncodedPreferences:
    """Tokenized preferences, without those that are too long.

    Attributes:
        preferences: the remaining preferences.
        dropped: number of preferences that were too long.

    Args:
        preferences: preferences to tokenize.
        tokenizer: a transformers tokenizer.
        eos_ids: ids of the tokens that end a completion.
        pad_id: token id of padding.
        max_prompt_length: in tokens.
        max_completion_length: in tokens, the ending token included.
        rendering: fields of ``prompts.Rendering``.

    Raises:
        ValueError: as ``encode_demonstrations``; no pair fits.
    """

    def __init__(
        self,
        preferences: Sequence[Preference],
        tokenizer: Any,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_prompt_length: int,
        max_completion_length: int,
        **rendering: Unpack[Rendering],
    ):
        sides = [
            encode_demonstrations(
                [Demonstration(each.prompt, getattr(each, side), each.where, each.columns) for each in preferences],
                tokenizer,
                eos_ids=eos_ids,
                **rendering,
            )
            for side in ("chosen", "rejected")
        ]
        self._limits = max_prompt_length, max_completion_length
        self._pad_id = pad_id
        self.preferences: list[Preference] = []
        self._prompts: list[list[int]] = []
        self._completions: list[tuple[list[int], list[int]]] = []
        for preference, *pair in zip(preferences, *sides, strict=True):
            prompt = pair[0].token_ids[: pair[0].prompt_length]
            completions = completion_ids(pair[0]), completion_ids(pair[1])
            if len(prompt) <= max_prompt_length and max(map(len, completions)) <= max_completion_length:
                self.preferences.append(preference)
                self._prompts.append(prompt)
                self._completions.append(completions)
        margins = [each.margin for each in self.preferences]
        self._margins = None if None in margins else np.array(margins, np.float32)
        self.dropped = len(preferences) - len(self.preferences)
        if not self.preferences:
            raise ValueError(
                f"none of {len(preferences)} pairs fits into {max_prompt_length} tokens of prompt and "
                f"{max_completion_length} of completion: raise max_prompt_length or max_completion_length"
            )

    def __len__(self) -> int:
        return len(self.preferences)

    @property
    def lengths(self) -> np.ndarray:
        """``[pairs, 2]`` completion lengths in tokens."""
        return np.array([[*map(len, pair)] for pair in self._completions], np.float32)

    @property
    def digest(self) -> str:
        """A hash of the pairs, to check that a resumed run has the same data."""
        return hashlib.sha256(repr((self._prompts, self._completions, self._margins)).encode()).hexdigest()[:16]

    def padded(self, positions: Sequence[int] | np.ndarray | range) -> Pairs:
        """The pairs at ``positions`` of ``preferences``, padded to the length of a bucket.

        Margins are None unless every preference has one.
        """
        limits = self._limits
        max_prompt_length = bucket_length(max(len(self._prompts[i]) for i in positions), limits[0])
        max_completion_length = bucket_length(
            max(len(completion) for i in positions for completion in self._completions[i]), limits[1]
        )
        prompts = pad_prompts(
            [self._prompts[i] for i in positions],
            max_prompt_length=max_prompt_length,
            pad_id=self._pad_id,
            index=range(len(positions)),
        )
        shape = (len(positions), 2, max_completion_length)
        ids, mask = np.full(shape, self._pad_id, np.int32), np.zeros(shape, bool)
        for row, i in enumerate(positions):
            for side, completion in enumerate(self._completions[i]):
                ids[row, side, : len(completion)] = completion
                mask[row, side, : len(completion)] = True
        margins = None if self._margins is None else jnp.asarray(self._margins[np.asarray(positions)])
        return Pairs(prompts.ids, prompts.mask, jnp.asarray(ids), jnp.asarray(mask), margins)


class PairBatches:
    """The sequence of all training batches; ``batches[step]`` depends on the seed and the step alone.

    Every epoch is a new permutation of the pairs, without the last ones that do not fill a batch.

    Args:
        pairs: tokenized preferences.
        num_pairs: pairs per batch.
        num_epochs: number of epochs.
        seed: seed of the permutations.

    Raises:
        ValueError: there are fewer pairs than ``num_pairs``, or a count is below 1.
    """

    def __init__(self, pairs: EncodedPreferences, *, num_pairs: int, num_epochs: int = 1, seed: int = 0):
        if num_epochs < 1 or not 1 <= num_pairs <= len(pairs):
            raise ValueError(
                f"num_pairs is {num_pairs} and num_epochs {num_epochs}; with {len(pairs)} pairs num_pairs must be from "
                f"1 to {len(pairs)}, and num_epochs at least 1"
            )
        self._pairs = pairs
        orders = [epoch_order(len(pairs), seed=seed, epoch=epoch) for epoch in range(num_epochs)]
        full = len(pairs) - len(pairs) % num_pairs
        self._positions = np.concatenate([order[:full] for order in orders]).reshape(-1, num_pairs)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, step: int) -> Pairs:
        return self._pairs.padded(self.positions(step))

    def positions(self, step: int) -> np.ndarray:
        """``[num_pairs]`` positions of a batch's pairs in ``pairs.preferences``."""
        return self._positions[step]

    @property
    def digest(self) -> str:
        """The hash of the pairs."""
        return self._pairs.digest


def _preference(row: Row, where: str) -> Preference:
    row = as_preference(row, where)
    for name in ("prompt", "chosen", "rejected"):
        check_length(row.get(name), f"{where}, column {name!r}")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = checked_prompt(row["prompt"], f"{where}, column 'prompt'")
        texts = [
            _reply(each, f"{where}, column {name!r}") for name, each in (("chosen", chosen), ("rejected", rejected))
        ]
    else:
        prompt, texts = _split_conversations(chosen, rejected, where)
    if texts[0] == texts[1]:
        raise ValueError(f"{where}: the chosen and the rejected completion are equal: {texts[0]!r:.200}")
    margin = row.get("margin")
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool) and np.isfinite(margin)
    if margin is not None and not is_number:
        raise ValueError(f"{where}, column 'margin': it must be a number; it is {margin!r:.200}")
    others = without(row, "prompt", "chosen", "rejected", "margin")
    return Preference(prompt, texts[0], texts[1], where, None if margin is None else float(margin), others)


def _reply(reply: Any, where: str) -> str:
    if isinstance(reply, list):
        if len(reply) != 1 or not is_message(reply[0]) or reply[0]["role"] != "assistant":
            raise ValueError(f"{where} must be text or a single assistant message; it is {reply!r:.200}")
        reply = content_text(reply[0].get("content"), where)
    return checked_text(reply, where)


def _split_conversations(chosen: Any, rejected: Any, where: str) -> tuple[Messages, list[str]]:
    for name, each in (("chosen", chosen), ("rejected", rejected)):
        if not (isinstance(each, list) and len(each) > 1 and all(is_message(message) for message in each)):
            raise ValueError(f"{where}, column {name!r}: without a column 'prompt' it must be a conversation")
        if each[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}, column {name!r}: the last message has the role {each[-1]['role']!r}, not assistant"
            )
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: the two conversations differ before the last turn")
    ends = (
        (name, content_text(each[-1].get("content"), where))
        for name, each in (("chosen", chosen), ("rejected", rejected))
    )
    return checked_messages(chosen[:-1], f"{where}, column 'chosen'"), [
        checked_text(content, f"{where}, column {name!r}") for name, content in ends
    ]
