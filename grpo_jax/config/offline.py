"""Settings of offline training: SFT, DPO and reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from grpo_jax.config.memory import check_memory, fewest_micro_batches
from grpo_jax.config.model import ModelConfig
from grpo_jax.config.prompts import PromptConfig
from grpo_jax.config.run import Export, RunConfig, require_at_least
from grpo_jax.config.training import GUARD_FIELDS, BadUpdates, OptimizerConfig
from grpo_jax.data.conversations import TrainOn
from grpo_jax.models.lora_config import LoRA
from grpo_jax.tasks.toy_config import TOY


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


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(RunConfig, ModelConfig):
    """Passes over the data, updates and evaluation of offline training.

    Attributes:
        ROWS: the field with the number of rows per update.
    """

    ROWS: ClassVar[str] = "num_pairs"
    RESUMABLE_FIELDS = ("num_micro_batches", "cache_bytes", "eval_every", "offload", *GUARD_FIELDS)
    EXTENDABLE_FIELDS = ("num_epochs", "export")

    data: Annotated[OfflineDataConfig, tyro.conf.arg(name="")] = OfflineDataConfig()
    """Training and held-out texts."""
    num_epochs: int = 1
    """Passes over the data. A finished run continues when this is raised; with a decaying learning rate, later steps
    follow the new schedule."""
    num_micro_batches: int | None = None
    """Gradient accumulation: parts of each update. Results do not depend on it. Default: as few as the devices' memory
    allows by an estimate; where it is unknown (CPU), as few as keep a part within 16,384 tokens per device."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig(learning_rate=1e-5)
    """Optimizer."""
    lora: LoRA = LoRA()
    """LoRA adapters."""
    offload: Annotated[tuple[Literal["optimizer"], ...], tyro.conf.Suppress] = ()
    """optimizer: its state lies in the host's memory; during the optimizer's update, all of it is on the devices."""
    eval_every: int = 20
    """Steps between evaluations; 0 for only those before the first and after the last step, which always run."""
    bad_updates: Annotated[BadUpdates, tyro.conf.Suppress] = "refuse"
    """Updates with a loss or gradient that is not finite, or a gradient above skip_grad_norm, are never applied. refuse
    ends the run at the first with an error; skip goes on without them, for up to 10 steps in a row."""
    export: Export = "last"
    """Checkpoint to export to model/: the last, or the one with the best held-out evaluation. May be changed after the
    run."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        require_at_least(self, num_epochs=1, num_micro_batches=1, eval_every=0, **{self.ROWS: 1})
        if self.num_rows % (self.num_micro_batches or 1):
            raise ValueError(f"{self.ROWS} = {self.num_rows} do not divide into {self.num_micro_batches} micro-batches")
        if self.model == TOY and self.data.chat_template:
            raise ValueError("the toy model has no chat template; name a model, or leave chat_template out")

    @property
    def trained_models(self) -> int:
        """The model."""
        return 1

    @property
    def num_rows(self) -> int:
        """Rows per update: sequences of SFT, pairs of DPO and reward models."""
        return getattr(self, self.ROWS)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update in effect."""
        sequences = 2 if self.ROWS == "num_pairs" else 1
        return self.num_micro_batches or fewest_micro_batches(self, self.num_rows, sequences_per_row=sequences)

    def check(self) -> None:
        """As ``ModelConfig.check``, and check the optimizer, the devices' memory and the rows of a micro-batch."""
        ModelConfig.check(self)
        self.check_lora(self.lora)
        self.check_offload(self.offload)
        self.optimizer.check()
        check_memory(self)
        unit = self.ROWS.removeprefix("num_")
        self.mesh.check_divides(self.num_rows // self.micro_batches, f"the {unit} of a micro-batch")
