"""What is learnt from where nothing is drawn: the part of an experiment's configuration that says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from grpo_jax.data.conversations import (
    Demonstration,
    Example,
    LearnFrom,
    encode_demonstrations,
    load_demonstrations,
)
from grpo_jax.data.errands import sample_errands, sample_preference
from grpo_jax.data.notes import DataNotes, prompt_key
from grpo_jax.data.preferences import EncodedPreferences, Preference, load_preferences
from grpo_jax.data.prompts import Rendering
from grpo_jax.data.tasks import sample_sums, worked
from grpo_jax.models import Pretrained
from grpo_jax.prompt_settings import PromptSettings
from grpo_jax.settings import HELD_OUT_SEED, default_split, hold_out
from grpo_jax.small_base import Recipe

Read = TypeVar("Read", Demonstration, Preference)


@dataclass(frozen=True)
class TextSettings(PromptSettings):
    """Where texts come from, which are held out, and how they are put before the model."""

    dataset: str | None = None
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), or a folder of them."""
    split: str | None = None
    """Split that is trained on; by default 'train' where there are splits."""
    subset: str | None = None
    """Subset of a folder or of a data set on the hub."""
    eval_dataset: str | None = None
    """Where held-out rows come from. Default: a tenth of the data set."""
    eval_split: str | None = None
    """Their split; by default 'test' where another data set is named that has splits."""
    eval_rows: int = 256
    """How many of them at most."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them; otherwise the first one is an error."""

    def __post_init__(self):
        PromptSettings.__post_init__(self)
        if self.eval_rows < 1:
            raise ValueError(f"eval_rows is {self.eval_rows}; at least 1 is held out")

    def _divided(self, load: Callable[..., list[Read]], notes: DataNotes) -> tuple[list[Read], list[Read]]:
        """Rows to train on and rows held out, none of which has the prompt of one that is trained on."""
        assert self.dataset is not None
        load = partial(load, subset=self.subset, skipped=notes.skipped if self.skip_bad_rows else None)
        rows = load(self.dataset, split=self.split)
        notes.note_duplicates([*map(_whole_of, rows)])
        if self.eval_dataset is None and self.eval_split is None:
            trained_on, held_out = hold_out(rows, self.eval_rows, key=_prompt_of, source=self.dataset)
            notes.note_division(len(rows), len(held_out), self.dataset)
            return trained_on, held_out
        source = self.eval_dataset or self.dataset
        held_out = load(source, split=self.eval_split or default_split(source, self.subset))
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(held_out))
        held_out = [held_out[n] for n in order]
        held_out = notes.without_leaks(held_out, map(_prompt_of, held_out), map(_prompt_of, rows))
        if not held_out:
            raise ValueError(f"every held-out row of {source} is also trained on; name others with eval_dataset")
        return rows, held_out[: self.eval_rows]


@dataclass(frozen=True)
class DemonstrationSettings(TextSettings):
    """What is imitated. Default: worked sums of the embedded base."""

    prompt_column: str | None = None
    """Column with the prompt, instead of 'prompt'."""
    completion_column: str | None = None
    """Column with the completion, instead of 'completion'; alone, a text without a prompt."""
    learn_from: LearnFrom = "completion"
    """What is learnt: the last turn, every turn of the assistant, or every token."""
    long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a demonstration that is too long: left out and counted, cut at its end, or an error."""
    worked_sums: int = 256
    """Of the default, how many there are."""
    in_chinese: bool = False
    """Of the default, whether thoughts are in Chinese digits."""

    def load(self, seed: int, notes: DataNotes | None = None) -> tuple[list[Demonstration], list[Demonstration]]:
        """Demonstrations to train on, and some held out; see ``conversations.load_demonstrations`` for errors.

        Args:
            seed: of the embedded default's sums.
            notes: filled in with skipped rows, duplicates, leaks and the held-out share.
        """
        if self.dataset is None:
            demonstrated = partial(worked_sums, in_chinese=self.in_chinese)
            return (
                demonstrated(np.random.default_rng(seed), self.worked_sums, held_out=False),
                demonstrated(np.random.default_rng(HELD_OUT_SEED), self.eval_rows, held_out=True),
            )

        def load(source: str, **where: Any) -> list[Demonstration]:
            return load_demonstrations(
                source, prompt_column=self.prompt_column, completion_column=self.completion_column, **where
            )

        return self._divided(load, DataNotes() if notes is None else notes)

    def encode(
        self, demonstrations: Sequence[Demonstration], policy: Pretrained, *, max_length: int, rendering: Rendering
    ) -> tuple[list[Example], int]:
        """The demonstrations as tokens, and how many were left out as too long.

        Raises:
            ValueError: none is left, or one is too long and that is an error; and as ``encode_demonstrations``.
        """
        examples = encode_demonstrations(
            demonstrations,
            policy.tokenizer,
            eos_ids=policy.eos_ids,
            learn_from=self.learn_from,
            **rendering,
        )
        fitting = [each for each in examples if len(each.token_ids) <= max_length]
        if self.long == "truncate":
            cut = [Example(ids[:max_length], learnt[:max_length], start) for ids, learnt, start in examples]
            fitting = [each for each in cut if any(each.learnt)]
        too_long = len(examples) - len(fitting)
        if not fitting or (too_long and self.long == "error"):
            raise ValueError(
                f"{too_long} of {len(examples)} demonstrations do not fit into max_length = {max_length} tokens; the "
                f"longest has {max(len(each.token_ids) for each in examples)}. Raise max_length, or choose --long drop "
                "or truncate"
            )
        return fitting, too_long


@dataclass(frozen=True)
class PreferenceSettings(TextSettings):
    """What is preferred to what. Default: replies to errands of the embedded base."""

    errand_pairs: int = 2048
    """Of the default, how many pairs there are."""

    def load(self, seed: int, notes: DataNotes | None = None) -> tuple[list[Preference], list[Preference]]:
        """Preferences to train on, and some held out; see ``preferences.load_preferences`` for errors.

        Args:
            seed: of the embedded default's errands.
            notes: filled in with skipped rows, duplicates, leaks and the held-out share.
        """
        if self.dataset is None:
            return (
                errand_preferences(np.random.default_rng(seed), self.errand_pairs, held_out=False),
                errand_preferences(np.random.default_rng(HELD_OUT_SEED), self.eval_rows, held_out=True),
            )
        return self._divided(load_preferences, DataNotes() if notes is None else notes)

    def encode(
        self,
        preferences: Sequence[Preference],
        policy: Pretrained,
        *,
        max_prompt_length: int,
        max_completion_length: int,
        rendering: Rendering,
    ) -> EncodedPreferences:
        """The preferences as tokens; see ``EncodedPreferences`` for errors."""
        return EncodedPreferences(
            preferences,
            policy.tokenizer,
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            **rendering,
        )


def worked_sums(
    rng: np.random.Generator, count: int, *, held_out: bool, in_chinese: bool = False
) -> list[Demonstration]:
    """The embedded default's demonstrations: sums with their running totals."""
    recipe = Recipe()
    sums = sample_sums(rng, count, min_terms=recipe.min_terms, max_terms=recipe.max_terms, held_out=held_out)
    return [
        Demonstration(each.question, worked(each, in_chinese=in_chinese), each.question, {"answer": each.answer})
        for each in sums
    ]


def errand_preferences(rng: np.random.Generator, count: int, *, held_out: bool) -> list[Preference]:
    """The embedded default's preferences: two careless replies to an errand."""
    errands = sample_errands(rng, count, held_out=held_out)
    pairs = [(each, *sample_preference(each, rng)) for each in errands]
    return [Preference(errand.question, better, worse, errand.question) for errand, better, worse in pairs]


def _prompt_of(row: Demonstration | Preference) -> str:
    return prompt_key(row.prompt) or prompt_key(getattr(row, "completion", ""))


def _whole_of(row: Demonstration | Preference) -> str:
    """A key of everything in a row that is trained on; one prompt with several completions is no duplicate."""
    texts = [row.completion] if isinstance(row, Demonstration) else [row.chosen, row.rejected]
    return "\0".join(map(prompt_key, [row.prompt, *texts]))
