r"""The training pipeline of DeepSeek-R1: cold start, reasoning RL, rejection sampling, SFT, final RL; and R1-Zero.

Without arguments it runs on a toy model, on one CPU. The base model works out sums in two languages or guesses, and
answers errands carelessly. R1-Zero learns to work out sums but mixes languages; the pipeline should end with a model
that thinks in one language and is also better at errands. For real models:

    python experiments/r1.py
    python experiments/r1.py --model Qwen/Qwen2.5-1.5B --dataset openai/gsm8k --target-language en \
        --cold-start.dataset long_thoughts.jsonl --general chats.jsonl --preferences.dataset preferences.jsonl \
        --general-data.dataset prompts.jsonl --general-data.grader none

Each stage is a run with its own folder in run_dir; the same command resumes at the stage and step where it stopped.
After DeepSeek-AI, arXiv 2501.12948, section 2.3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from grpo_jax.config.data import DataConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import TOY_MODEL, ModelConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.prompts import with_format
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import PipelineConfig, Preset, RunConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import PolicyLossConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.batch_inference import PROVENANCE, read_provenance
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import draw_stages
from grpo_jax.loop.eval_report import read_report
from grpo_jax.loop.offline_data import load_demonstration_sets, load_preference_sets
from grpo_jax.loop.problems import load_problem_sets
from grpo_jax.loop.run import AnyConfig, Run
from grpo_jax.loop.setup import TOY_FOLDER
from grpo_jax.loop.stages import Stage, check_no_models, load_scripts, run_stages, stage_config
from grpo_jax.tasks.errands import ERRANDS, careless_reply, sample_errands
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY, ToyConfig

evaluate, grpo, rejection_sampling, reward_model, sft = load_scripts(
    Path(__file__).parent, "evaluate", "grpo", "rejection_sampling", "reward_model", "sft"
)
TOY_LANGUAGE = "zh"
"""Target language of the toy model, which knows Chinese digits and Arabic digits; the latter have no language."""
TOY_GENERAL = "toy"
CARELESS_REPLIES = 256
REASONING, GENERAL = "reasoning", "general"
STAGES = ("cold_start", "zero", "reasoning", "rejection", "second_sft", "preferences", "final", "evaluation")
MODELS = ("base", "r1_zero", "cold_start", "reasoning", "sft", "final")
FIGURES = {
    (REASONING, "pass@1"): "pass@1",
    (REASONING, "maj@16"): "maj@16",
    (REASONING, "rewards/format"): "format",
    (REASONING, "rewards/language"): "language",
    (REASONING, "mean_length"): "length",
    (GENERAL, "rewards/reward_model"): "reward model",
    (GENERAL, "rewards/accuracy"): "general quality",
}


@dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig, ModelConfig):
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
            raise ValueError(f"general: there is no file {self.general}")
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


def toy() -> Config:
    """The toy preset."""
    grpo, sft, language = preset("grpo"), preset("sft"), TOY_LANGUAGE
    rewards = RewardConfig(format_weight=0.2, language_weight=0.5, target_language=language)
    return Config(
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


PRESETS: dict[str, Preset[Config]] = {
    "toy": Preset(
        toy,
        "the whole pipeline with a toy model that knows sums in two languages and errands; minutes on one CPU",
        paper="DeepSeek-R1 (arXiv 2501.12948, section 2.3) at toy scale",
        hardware="one CPU core",
    ),
}


def main(config: Config) -> int:
    """Run or resume; returns exit status 0 if all stages finished and 130 if one was stopped."""
    return run_stages(config, chain, write_summary, title="R1", check=check_data)


def chain(config: Config) -> list[Stage]:
    """All stages, in order."""
    stage_config, folder = config.stage_config, config.folder
    is_toy = config.general == TOY_GENERAL
    general = config.run_dir / "general.jsonl" if is_toy else Path(str(config.general))
    tasks = write_tasks(config)
    if is_toy:
        write_careless_replies(general, config.seed)

    def reasoned(stage: Any, name: str, start: str, **changes: Any) -> Any:
        return stage_config(stage, name, start, **config.reasoned(stage), **changes)

    sampling = reasoned(config.rejection, "rejection_sampling", "reasoning", demonstrations=(general,))
    judge = [] if config.general_reward_model else [folder("reward_model")]
    return [
        Stage(sft, stage_config(config.cold_start, "cold_start", None)),
        Stage(grpo, reasoned(config.zero, "r1_zero", "base"), config.made_in("base")),
        Stage(grpo, reasoned(config.reasoning, "reasoning", "cold_start"), config.made_in("cold_start")),
        Stage(rejection_sampling, sampling, config.made_in("reasoning")),
        Stage(
            sft,
            stage_config(config.second_sft, "sft", "base", data=second_sft_data(config)),
            [folder("rejection_sampling")],
        ),
        *(
            Stage(reward_model, stage_config(config.preferences, "reward_model", "sft"), config.made_in("sft"))
            for _ in judge
        ),
        Stage(grpo, reasoned(config.final, "final", "sft", tasks=tasks), [*config.made_in("sft"), *judge]),
        *(evaluation_stage(config, model, of) for model in MODELS for of in (REASONING, GENERAL)),
    ]


def check_data(config: Config) -> None:
    """Read the data of all stages, so that errors are found before the first stage starts.

    Raises:
        Exception: as the stage that reads the data.
    """
    for data in (config.data, config.general_data):
        load_problem_sets(data, config.seed)
    load_demonstration_sets(config.cold_start.data, config.seed)
    if config.general != TOY_GENERAL:
        load_demonstrations(str(config.general))
    if config.general_reward_model is None:
        load_preference_sets(config.preferences.data, config.seed)


def second_sft_data(config: Config) -> DemonstrationConfig:
    """Data settings of the second SFT, with the prompt format of its rejection samples."""
    folder = config.folder("rejection_sampling")
    data = replace(config.second_sft.data, dataset=str(folder / "dataset.jsonl"))
    if config.model == TOY or not (folder / PROVENANCE).exists():  # not sampled yet
        return data
    return with_format(data, read_provenance(folder)["prompt_format"])


def evaluation_stage(config: Config, model: str, of: str) -> Stage:
    """Evaluation of a stage's model, that of ``final`` against R1-Zero.

    Args:
        config: the pipeline.
        model: one of ``MODELS``.
        of: ``REASONING`` or ``GENERAL`` problems.
    """
    general_rewards = RewardConfig(accuracy_weight=0.0, reward_model=config.judge)
    general = {"data": config.general_data, "rewards": general_rewards}
    against = config.folder(f"evaluation/r1_zero_{of}") if model == "final" else None
    changes = config.reasoned(config.evaluation) if of == REASONING else general
    judge = [config.folder("reward_model")] if of == GENERAL and not config.general_reward_model else []
    return Stage(
        evaluate,
        config.stage_config(config.evaluation, f"evaluation/{model}_{of}", model, against=against, **changes),
        [*config.made_in(model), *judge, *([] if against is None else [against])],
    )


def write_careless_replies(path: Path, seed: int) -> None:
    """Write the toy preset's general demonstrations: careless replies to errands."""
    rng = np.random.default_rng([seed, 2])
    errands = sample_errands(rng, CARELESS_REPLIES, held_out=False)
    rows = [{"prompt": errand.question, "completion": careless_reply(errand, rng)} for errand in errands]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_tasks(config: Config) -> Path:
    """Write the mixture file of the final RL. Its name has a digest, so that a changed mixture changes the stage."""
    rules = dataclasses.asdict(config.reasoned(config.final)["rewards"])
    general_rewards = dataclasses.asdict(RewardConfig(accuracy_weight=0.0, reward_model=config.judge))
    tasks = {
        REASONING: {**dataclasses.asdict(config.data), **rules},
        GENERAL: {**dataclasses.asdict(config.general_data), **general_rewards},
    }
    data = json.dumps(to_json(tasks), indent=2).encode() + b"\n"
    path = config.run_dir / f"final_tasks_{hashlib.sha256(data).hexdigest()[:8]}.json"
    write_atomically(path, data)
    return path


def write_summary(config: Config, run: Run) -> None:
    """Print a table of all stages' metrics, plot them, and write the summary."""
    reports = {
        (model, of): read_report(config.folder(f"evaluation/{model}_{of}"))
        for model in MODELS
        for of in (REASONING, GENERAL)
    }
    stages = {
        model: {
            label: reports[model, of]["figures"][name]["mean"]
            for (of, name), label in FIGURES.items()
            if name in reports[model, of]["figures"]
        }
        for model in MODELS
    }
    labels = list(dict.fromkeys(label for figures in stages.values() for label in figures))
    table = Table("model", *labels, title="held-out metrics after each stage")
    for model, figures in stages.items():
        table.add_row(model, *(f"{figures[label]:.3f}" if figures.get(label) is not None else "-" for label in labels))
    run.progress.console.print(table)
    against = {
        of: {
            name: {key: metric[key] for key in ("before", "after", "difference", "low", "high", "p")}
            for name, metric in reports["final", of]["comparison"]["figures"].items()
        }
        for of in (REASONING, GENERAL)
    }
    draw_stages([stages], run.folder / "stages.png")
    run.write_summary({"stages": stages, "final_against_r1_zero": against, "seed": config.seed})


if __name__ == "__main__":
    sys.exit(run_command(Config, main, presets=PRESETS, description=__doc__))
