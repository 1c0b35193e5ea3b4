"""Settings and presets of reward-model training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.model import PROMPT_AND_COMPLETION, TOY_POLICY, ModelConfig, fitting_lengths
from grpo_jax.config.offline import PreferenceConfig
from grpo_jax.config.ppo import TOY_ERRANDS
from grpo_jax.config.run import Export, Preset, RunConfig, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.tasks.errands import ERRANDS
from grpo_jax.tasks.toy_config import TOY


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(RunConfig, ModelConfig):
    """A reward model trained on preferences."""

    RESUMABLE_FIELDS = ("num_micro_batches", "eval_every")
    EXTENDABLE_FIELDS = ("num_epochs", "export")
    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --chat-template --learning-rate --num-epochs --num-pairs "
        "--max-prompt-length --max-completion-length --eval-every --mesh.fsdp --trackers"
    )

    data: Annotated[PreferenceConfig, tyro.conf.arg(name="")] = PreferenceConfig()
    """Preferences."""
    run_dir: Path = Path("runs/reward_model")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    num_epochs: int = 1
    """Passes over the pairs. A finished run continues when this is raised; with a decaying learning rate, later steps
    follow the new schedule."""
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
    num_micro_batches: int = 1
    """Gradient accumulation: parts of each update. Results do not depend on it."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig(learning_rate=1e-5)
    """Optimizer."""
    eval_every: int = 20
    """Steps between evaluations; 0 for only those before the first and after the last step, which always run."""
    export: Export = "last"
    """Checkpoint to export to model/: the last, or the one with the best held-out evaluation. May be changed after the
    run."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        require_at_least(self, num_epochs=1, num_pairs=1, max_prompt_length=1, max_completion_length=1)
        require_at_least(self, num_micro_batches=1, eval_every=0, centring=0)
        self.check_positions(sum(self.lengths), PROMPT_AND_COMPLETION)
        if self.num_pairs % self.num_micro_batches:
            raise ValueError(f"num_pairs = {self.num_pairs} do not divide into {self.num_micro_batches} micro-batches")
        if self.model == TOY and (self.data.dataset != ERRANDS or self.data.template or self.data.chat_template):
            raise ValueError(
                f"the toy model knows the data set {ERRANDS} only, without a template; with another dataset or a "
                "template, name a model with --model"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        """The prompt and completion lengths in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)


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
