"""Preferences: a prompt with two completions, of which the first was liked better."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.columns import check_length, without
from grpo_jax.data.conversations import Demonstration, encode_demonstrations, until_end
from grpo_jax.data.files import read_rows
from grpo_jax.data.formats import Row
from grpo_jax.data.layouts import as_preference
from grpo_jax.data.messages import Messages, checked_messages, content_text, is_message
from grpo_jax.data.problems import checked_prompt, checked_text, parsed_rows
from grpo_jax.data.prompts import Rendering, pad_prompts
from grpo_jax.types import Pairs


@dataclass(frozen=True)
class Preference:
    """Two completions of a prompt.

    Attributes:
        prompt: the question as text, or messages.
        chosen: the completion that was liked better.
        rejected: the other one.
        margin: by how much, on a scale of the data set's own; None where it does not say.
        where: the place it was read from, in words.
        columns: every other column of its row.
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
    """The preferences of a file, folder or data set, in any layout of ``docs/data.md``.

    A row has ``prompt``, ``chosen`` and ``rejected``: texts, or messages of which the two last hold the assistant's
    turn alone. Without a ``prompt`` the two are whole conversations that differ in the last turn. A column ``margin``
    says by how much the chosen one is better. ``layouts.as_preference`` brings other layouts into these forms.

    Args:
        source: as of ``sources.load_problems``.
        split: likewise.
        subset: likewise.
        skipped: where given, rows that cannot be read are left out and the reasons are appended to it.

    Raises:
        KeyError: a row lacks a column; the error lists those it has.
        ValueError: a row is empty or malformed: its conversations differ before the last turn, the two completions are
            the same, the margin is no number.
        FileNotFoundError: no such file, folder, split or data set.
    """
    preferences = parsed_rows(read_rows(source, split, subset, skipped=skipped), _preference, skipped)
    if not preferences:
        raise ValueError(f"{source} is empty: it has no preferences")
    return preferences


class EncodedPreferences:
    """Preferences as tokens, those that do not fit left out.

    Attributes:
        preferences: those that are left.
        dropped: how many were left out as too long.

    Args:
        preferences: pairs of completions.
        tokenizer: a transformers tokenizer.
        eos_ids: the tokens that end a completion.
        pad_id: what stands in padding.
        max_prompt_length: in tokens.
        max_completion_length: in tokens, the ending one included.
        rendering: as in ``prompts.Rendering``.

    Raises:
        ValueError: as ``encode_demonstrations``; and where no pair fits.
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
            completions = until_end(pair[0]), until_end(pair[1])
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
        """``[pairs, 2]``, the tokens of each completion."""
        return np.array([[len(each) for each in pair] for pair in self._completions], np.float32)

    @property
    def digest(self) -> str:
        """What tells these pairs from others."""
        return hashlib.sha256(repr((self._prompts, self._completions, self._margins)).encode()).hexdigest()[:16]

    def padded(self, positions: Sequence[int] | np.ndarray | range) -> Pairs:
        """The pairs at these positions of ``preferences``; margins are there where every preference has one."""
        max_prompt_length, max_completion_length = self._limits
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
    """The batches of a whole training, by number: ``batches[step]`` follows from the seed and the step alone.

    Each epoch visits every pair once, in an order of its own, but for those at its end that do not fill a batch.

    Args:
        pairs: what is visited.
        num_pairs: of a batch.
        num_epochs: how often each is visited.
        seed: of the orders.

    Raises:
        ValueError: fewer pairs than a batch has, or a count below 1.
    """

    def __init__(self, pairs: EncodedPreferences, *, num_pairs: int, num_epochs: int = 1, seed: int = 0):
        if num_epochs < 1 or not 1 <= num_pairs <= len(pairs):
            raise ValueError(
                f"num_pairs = {num_pairs} cannot be drawn from {len(pairs)} pairs in {num_epochs} epochs: choose from "
                f"1 to {len(pairs)}, and at least one epoch"
            )
        self._pairs, self._num_pairs = pairs, num_pairs
        self._orders = [np.random.default_rng([seed, epoch]).permutation(len(pairs)) for epoch in range(num_epochs)]

    def __len__(self) -> int:
        return len(self._orders) * self._an_epoch

    def __getitem__(self, step: int) -> Pairs:
        return self._pairs.padded(self.positions(step))

    def positions(self, step: int) -> np.ndarray:
        """Which pairs a batch holds."""
        epoch, place = divmod(step, self._an_epoch)
        return self._orders[epoch][place * self._num_pairs : (place + 1) * self._num_pairs]

    @property
    def digest(self) -> str:
        """What tells these pairs from others."""
        return self._pairs.digest

    @property
    def _an_epoch(self) -> int:
        return len(self._pairs) // self._num_pairs


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
        raise ValueError(f"{where}: the chosen completion and the rejected one are the same, {texts[0]!r:.200}")
    margin = row.get("margin")
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool) and np.isfinite(margin)
    if margin is not None and not is_number:
        raise ValueError(f"{where}, column 'margin': it must be a number, and is {margin!r:.200}")
    others = without(row, "prompt", "chosen", "rejected", "margin")
    return Preference(prompt, texts[0], texts[1], where, None if margin is None else float(margin), others)


def _reply(reply: Any, where: str) -> str:
    if isinstance(reply, list):
        if len(reply) != 1 or not is_message(reply[0]) or reply[0]["role"] != "assistant":
            raise ValueError(f"{where} must be a text, or one message of the assistant; it is {reply!r:.200}")
        reply = content_text(reply[0].get("content"), where)
    return checked_text(reply, where)


def _split_conversations(chosen: Any, rejected: Any, where: str) -> tuple[Messages, list[str]]:
    for name, each in (("chosen", chosen), ("rejected", rejected)):
        if not (isinstance(each, list) and len(each) > 1 and all(is_message(message) for message in each)):
            raise ValueError(f"{where}, column {name!r}: without a column prompt it must hold a whole conversation")
        if each[-1]["role"] != "assistant":
            raise ValueError(
                f"{where}, column {name!r}: the last message is the {each[-1]['role']}'s, not the assistant's"
            )
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: the two conversations differ before their last turn")
    ends = (
        (name, content_text(each[-1].get("content"), where))
        for name, each in (("chosen", chosen), ("rejected", rejected))
    )
    return checked_messages(chosen[:-1], f"{where}, column 'chosen'"), [
        checked_text(content, f"{where}, column {name!r}") for name, content in ends
    ]
