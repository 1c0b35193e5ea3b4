"""Settings and presets of reward-model training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.model import PROMPT_AND_COMPLETION, TOY_POLICY, fitting_lengths
from grpo_jax.config.offline import OfflineConfig, PreferenceConfig
from grpo_jax.config.ppo import TOY_ERRANDS
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.tasks.errands import ERRANDS
from grpo_jax.tasks.toy_config import TOY


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(OfflineConfig):
    """A reward model trained on preferences."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --chat-template --learning-rate --num-epochs --num-pairs "
        "--max-prompt-length --max-completion-length --eval-every --mesh.fsdp --trackers"
    )

    data: Annotated[PreferenceConfig, tyro.conf.arg(name="")] = PreferenceConfig()
    """Preferences."""
    run_dir: Path = Path("runs/reward_model")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    num_pairs: int = 32
    """Pairs per update."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens; pairs with longer ones are dropped. Default: 512, or less where the model has fewer
    positions."""
    max_completion_length: int | None = None
    """Longest completion in tokens; pairs with longer ones are dropped. Default: 1024, or less where the model has
    fewer positions."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, in addition to the model's own, such as '<|im_end|>'."""
    centring: float = 0.01
    """Coefficient of the squared sum of a pair's scores, which keeps scores around 0."""
    use_margins: bool = True
    """Use the margins of pairs in the loss, where every pair has one."""

    def __post_init__(self):
        OfflineConfig.__post_init__(self)
        require_at_least(self, max_prompt_length=1, max_completion_length=1, centring=0)
        self.check_positions(sum(self.lengths), PROMPT_AND_COMPLETION)
        if self.model == TOY and (self.data.dataset != ERRANDS or self.data.template):
            raise ValueError(
                f"the toy model knows the data set {ERRANDS} only, without a template; with another dataset or a "
                "template, name a model with --model"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        """The prompt and completion lengths in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return sum(self.lengths)


PRESETS: dict[str, Preset[RewardModelConfig]] = {
    "toy": Preset(
        lambda: RewardModelConfig(
            **TOY_POLICY,
            toy=TOY_ERRANDS,
            data=PreferenceConfig(dataset=ERRANDS),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        "pairs of replies to errands with the toy model; minutes on one CPU",
        hardware="one CPU core",
    ),
}
