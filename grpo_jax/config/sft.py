"""Settings and presets of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.model import TOY_POLICY, PolicyConfig
from grpo_jax.config.offline import DemonstrationConfig, OfflineConfig
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.tasks.generated import SUMS

ROW_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig, PolicyConfig):
    """Supervised fine-tuning."""

    ROWS = "num_sequences"
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
    num_eval_prompts: int = 64
    """Held-out prompts to sample completions for at an evaluation; 0 for none."""
    eval_samples: int = 4
    """Completions per such prompt."""

    def __post_init__(self):
        OfflineConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, max_length=2, num_eval_prompts=0, eval_samples=1)
        self.check_positions(self.row_length, "max_length")

    @property
    def row_length(self) -> int:
        """Tokens per row in effect."""
        return self.max_length or min(ROW_LENGTH, self.positions or ROW_LENGTH)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.row_length

    @property
    def has_sampler(self) -> bool:
        """Whether completions are sampled."""
        return self.num_eval_prompts > 0


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
