"""Settings and presets of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.model import TOY_POLICY, PolicyConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.run import Export, Preset, RunConfig, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY

ROW_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig, PolicyConfig):
    """Supervised fine-tuning."""

    RESUMABLE_FIELDS = ("num_micro_batches", "cache_bytes", "eval_every")
    EXTENDABLE_FIELDS = ("num_epochs", "export")
    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --chat-template --train-on --learning-rate --num-epochs "
        "--num-sequences --max-length --eval-every --mesh.fsdp --trackers"
    )

    data: Annotated[DemonstrationConfig, tyro.conf.arg(name="")] = DemonstrationConfig()
    """Demonstrations."""
    run_dir: Path = Path("runs/sft")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    num_epochs: int = 4
    """Passes over the demonstrations. A finished run continues when this is raised; with a decaying learning rate,
    later steps follow the new schedule."""
    num_sequences: int = 16
    """Rows per update."""
    max_length: int | None = None
    """Tokens per row, and of the longest demonstration. Default: 2048, or less where the model has fewer positions."""
    packing: bool = True
    """Pack several demonstrations into a row; they do not attend to each other."""
    num_micro_batches: int = 1
    """Gradient accumulation: parts of each update. Results do not depend on it."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig(learning_rate=1e-5)
    """Optimizer."""
    eval_every: int = 20
    """Steps between evaluations; 0 for only those before the first and after the last step, which always run."""
    export: Export = "last"
    """Checkpoint to export to model/: the last, or the one with the best held-out evaluation. May be changed after the
    run."""
    num_eval_prompts: int = 64
    """Held-out prompts to sample completions for at an evaluation; 0 for none."""
    eval_samples: int = 4
    """Completions per such prompt."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_epochs=1, num_sequences=1, max_length=2, num_micro_batches=1)
        require_at_least(self, eval_every=0, num_eval_prompts=0, eval_samples=1)
        if self.num_sequences % self.num_micro_batches:
            raise ValueError(
                f"num_sequences = {self.num_sequences} do not divide into {self.num_micro_batches} micro-batches"
            )
        self.check_positions(self.row_length, "max_length")
        if self.model == TOY and self.data.chat_template:
            raise ValueError("the toy model has no chat template; name a model, or leave chat_template out")

    @property
    def row_length(self) -> int:
        """Tokens per row in effect."""
        return self.max_length or min(ROW_LENGTH, self.positions or ROW_LENGTH)


PRESETS: dict[str, Preset[SFTConfig]] = {
    "toy": Preset(
        lambda: SFTConfig(
            **TOY_POLICY,
            data=DemonstrationConfig(dataset=SUMS, num_generated=256),
            max_length=128,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        "teaches the toy model to work sums out, from 256 demonstrations; minutes on one CPU",
        hardware="one CPU core",
    ),
}
