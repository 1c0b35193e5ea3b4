"""Dataset settings for offline training: SFT, DPO and reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.conversations import TrainOn


@dataclass(frozen=True)
class OfflineDataConfig(PromptConfig):
    """Training and held-out texts, and how their prompts are rendered."""

    dataset: str | None = None
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of them, or a toy data set (sums
    or sums-chinese for demonstrations, errands for preferences)."""
    split: str | None = None
    """Training split. Default: 'train' where there are splits."""
    subset: str | None = None
    """Configuration of a hub dataset or folder that has several."""
    eval_dataset: str | None = None
    """Source of held-out rows. Default: a tenth of the dataset."""
    eval_split: str | None = None
    """Held-out split. Default: 'test' where another dataset is named that has splits."""
    eval_size: int = 256
    """Largest number of held-out rows."""
    skip_bad_rows: bool = False
    """Leave out and count rows that cannot be read. By default the first such row is an error."""
    num_generated: int = 2048
    """Training rows to generate of a toy data set."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        if self.eval_size < 1:
            raise ValueError(f"eval_size is {self.eval_size}; it must be at least 1")
        if self.num_generated < 1:
            raise ValueError(f"num_generated is {self.num_generated}; it must be at least 1")


@dataclass(frozen=True)
class DemonstrationConfig(OfflineDataConfig):
    """Demonstrations for SFT."""

    prompt_column: str | None = None
    """Column of the prompt, instead of 'prompt'."""
    completion_column: str | None = None
    """Column of the completion, instead of 'completion'; without a prompt column, of texts."""
    train_on: TrainOn = "completion"
    """Tokens in the loss: completion (the last turn), assistant (every assistant turn), or all."""
    long: Literal["drop", "truncate", "error"] = "drop"
    """Demonstrations that are too long: drop (and count), truncate, or error."""


@dataclass(frozen=True)
class PreferenceConfig(OfflineDataConfig):
    """Pairs of a chosen and a rejected completion, for DPO and reward models."""
