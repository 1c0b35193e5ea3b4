"""Dataset settings for offline training: SFT, DPO and reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.conversations import (
    Demonstration,
    TrainOn,
)
from grpo_jax.data.preferences import Preference

Read = TypeVar("Read", Demonstration, Preference)


@dataclass(frozen=True)
class OfflineDataConfig(PromptConfig):
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
    eval_size: int = 256
    """How many of them at most."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them; otherwise the first one is an error."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        if self.eval_size < 1:
            raise ValueError(f"eval_size is {self.eval_size}; at least 1 is held out")


@dataclass(frozen=True)
class DemonstrationConfig(OfflineDataConfig):
    """What is imitated. Default: worked sums of the embedded base."""

    prompt_column: str | None = None
    """Column with the prompt, instead of 'prompt'."""
    completion_column: str | None = None
    """Column with the completion, instead of 'completion'; alone, a text without a prompt."""
    train_on: TrainOn = "completion"
    """What is learnt: the last turn, every turn of the assistant, or every token."""
    long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a demonstration that is too long: left out and counted, cut at its end, or an error."""
    worked_sums: int = 256
    """Of the default, how many there are."""
    in_chinese: bool = False
    """Of the default, whether thoughts are in Chinese digits."""


@dataclass(frozen=True)
class PreferenceConfig(OfflineDataConfig):
    """What is preferred to what. Default: replies to errands of the embedded base."""

    errand_pairs: int = 2048
    """Of the default, how many pairs there are."""
