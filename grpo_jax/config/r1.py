"""Settings and presets of the training pipeline of DeepSeek-R1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import TOY_MODEL, ModelConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.pipeline import PipelineConfig, check_no_models, stage_config
from grpo_jax.config.presets import preset
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import AnyConfig, Preset, RunConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import PolicyLossConfig
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.tasks.errands import ERRANDS
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY, TOY_FOLDER, ToyConfig

TOY_LANGUAGE = "zh"
"""Target language of the toy model, which knows Chinese digits and Arabic digits; the latter have no language."""
TOY_GENERAL = "toy"
STAGES = ("cold_start", "zero", "reasoning", "rejection", "second_sft", "preferences", "final", "evaluation")


@dataclass(frozen=True, kw_only=True)
class R1Config(PipelineConfig, ModelConfig):
    """The pipeline. Its data, model, folder, seed and devices apply to all stages."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --target-language --general --cold-start.dataset --preferences.dataset "
        "--general-data.dataset --general-data.grader --general-reward-model --mesh.fsdp --dry-run"
    )

    run_dir: Path = Path("runs/r1")
    """Folder of the pipeline, with a run folder for each stage."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """Reasoning problems."""
    target_language: str = "en"
    """Language of thoughts, such as en or zh."""
    general: str | None = None
    """JSONL file of general demonstrations for the second SFT; 'toy' generates careless replies to errands."""
    general_data: DataConfig = DataConfig()
    """General prompts for the final RL."""
    general_reward_model: str | None = None
    """Hugging Face id or folder of the reward model for general prompts. Default: trained on the preferences."""

    cold_start: SFTConfig = SFTConfig(eval_every=0)
    """SFT of the base model on a few long thoughts."""
    zero: GRPOConfig = GRPOConfig(rewards=RewardConfig(format_weight=0.2), eval_every=0)
    """R1-Zero for comparison: RL from the base model."""
    reasoning: GRPOConfig = GRPOConfig(
        rewards=RewardConfig(format_weight=0.2, language_weight=0.5, target_language="en"), num_steps=40, eval_every=0
    )
    """RL from the cold start, on accuracy, format and language."""
    rejection: RejectionSamplingConfig = RejectionSamplingConfig(
        selection=SelectionConfig(require=("accuracy=1", "format=1", "language=0.95")),
        rewards=RewardConfig(target_language="en"),
    )
    """Rejection sampling from the reasoning model."""
    second_sft: SFTConfig = SFTConfig(num_epochs=3, eval_every=0)
    """SFT of the base model on the selected completions and on general demonstrations."""
    preferences: RewardModelConfig = RewardModelConfig(eval_every=0)
    """Training of the reward model, from the SFT model."""
    final: GRPOConfig = GRPOConfig(
        rewards=RewardConfig(format_weight=0.2, language_weight=0.5, target_language="en"),
        policy=PolicyLossConfig(kl_coef=0.05),
        num_steps=40,
        eval_every=0,
    )
    """RL on reasoning problems with rule-based rewards and on general prompts with the reward model."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation of each stage's model."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        check_no_models(self, STAGES)
        missing = {
            "dataset (reasoning problems)": self.data.dataset,
            "cold_start.dataset (long thoughts)": self.cold_start.data.dataset,
            "general (demonstrations)": self.general,
            "preferences.dataset, or general_reward_model": self.preferences.data.dataset or self.general_reward_model,
            "general_data.dataset (prompts)": self.general_data.dataset,
        }
        if self.model is not None and not all(missing.values()):
            raise ValueError(f"the pipeline needs more data: {', '.join(n for n in missing if not missing[n])}")
        if self.general not in (None, TOY_GENERAL) and not Path(str(self.general)).is_file():
            raise ValueError(f"general: the file {self.general} does not exist")
        for name in STAGES:  # checks each stage against the base model
            stage = getattr(self, name)
            self.stage_config(stage, name, None, **(self.reasoned(stage) if hasattr(stage, "rewards") else {}))
        check_known(self.model, [self.general_data])

    def folder(self, stage: str) -> Path:
        """Run folder of a stage."""
        return self.run_dir / stage

    def stage_config(self, stage: AnyConfig, name: str, start: str | None, **changes: Any) -> AnyConfig:
        """``stage`` with its own run folder, the pipeline's shared fields and ``changes``.

        Args:
            stage: settings of the stage.
            name: name of its folder.
            start: the stage whose model it starts from; None for the pipeline's base model.
            changes: further fields.
        """
        return stage_config(stage, self, self.folder(name), None if start is None else self.model_of(start), **changes)

    def model_of(self, stage: str) -> Path | str | None:
        """Folder of the model that a stage produces; for ``base``, the pipeline's base model."""
        if stage == "base":
            return self.folder("cold_start") / TOY_FOLDER if self.model == TOY else self.model
        return self.folder(stage) / "model"

    def made_in(self, stage: str) -> list[Path]:
        """Run folders that the model of a stage depends on; empty for an existing base model."""
        if stage == "base":
            return [self.folder("cold_start")] if self.model == TOY else []
        return [self.folder(stage)]

    def reasoned(self, stage: Any) -> dict[str, Any]:
        """Fields of a stage on reasoning problems: data, and rewards with the target language."""
        return {"data": self.data, "rewards": replace(stage.rewards, target_language=self.target_language)}

    @property
    def judge(self) -> str:
        """The reward model for general prompts."""
        return self.general_reward_model or str(self.folder("reward_model") / "model")


def toy() -> R1Config:
    """The toy preset."""
    grpo, sft, language = preset("grpo"), preset("sft"), TOY_LANGUAGE
    rewards = RewardConfig(format_weight=0.2, language_weight=0.5, target_language=language)
    return R1Config(
        **TOY_MODEL,
        toy=ToyConfig(skill_steps=700, errand_share=0.25, chinese_share=0.5),
        data=DataConfig(dataset=SUMS),
        target_language=language,
        general=TOY_GENERAL,
        general_data=DataConfig(dataset=ERRANDS),
        cold_start=replace(
            sft, data=DemonstrationConfig(dataset="sums-chinese", num_generated=128), num_epochs=4, eval_every=0
        ),
        zero=replace(grpo, rewards=RewardConfig(format_weight=0.2), eval_every=0),
        reasoning=replace(grpo, rewards=rewards, num_steps=40, eval_every=0),
        rejection=replace(
            preset("rejection_sampling"),
            selection=SelectionConfig(require=("accuracy=1", "format=1", "language=0.95")),
            rewards=RewardConfig(target_language=language),
            max_problems=1024,
        ),
        second_sft=replace(sft, num_epochs=3, eval_every=0),
        preferences=replace(preset("reward_model"), eval_every=0),
        final=replace(grpo, rewards=rewards, policy=PolicyLossConfig(kl_coef=0.05), num_steps=40, eval_every=0),
        evaluation=preset("evaluate"),
    )


PRESETS: dict[str, Preset[R1Config]] = {
    "toy": Preset(
        toy,
        "the whole pipeline with a toy model that knows sums in two languages and errands; minutes on one CPU",
        paper="DeepSeek-R1 (arXiv 2501.12948, section 2.3) at toy scale",
        hardware="one CPU core",
    ),
}
