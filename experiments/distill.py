"""Distillation as for R1's small models: SFT of a student on completions of a larger teacher.

Without arguments it runs with toy models on one CPU: the teacher is the toy model after sft.py, the student has two
thirds of its width. For real models:

    python experiments/distill.py
    python experiments/distill.py --teacher runs/gsm8k/model --student Qwen/Qwen2.5-0.5B --dataset openai/gsm8k \
        --require format=1 --num-samples 8

Its stages are runs in the folders teacher_eval, student_before, samples, student and student_after of run_dir; the same
command resumes at the stage that was stopped. Texts are passed on, not tokens, so the tokenizers may differ. Teacher
and student are evaluated on the same held-out problems with the same prompt format. After DeepSeek-R1 (arXiv
2501.12948), section 2.4.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.data import DataConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.prompts import prompt_fields, with_format
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.run import PipelineConfig, Preset, require_at_least
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.loop.batch_inference import PROVENANCE, read_provenance
from grpo_jax.loop.command import run_command
from grpo_jax.loop.eval_report import read_report
from grpo_jax.loop.run import Run
from grpo_jax.loop.setup import TOY_FOLDER
from grpo_jax.loop.stages import Stage, load_scripts, run_stages
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY, ToyConfig

DATASET = "dataset.jsonl"
evaluate, rejection_sampling, sft = load_scripts(Path(__file__).parent, "evaluate", "rejection_sampling", "sft")


@dataclass(frozen=True, kw_only=True)
class Config(BatchInferenceConfig, PipelineConfig):
    """Distillation of a teacher into a student."""

    COMMON_FLAGS = (
        "--teacher --student --dataset --run-dir --seed --num-samples --threshold --require --max-problems "
        "--learning-rate --num-epochs --num-sequences --max-length --max-completion-length --eval-samples --dry-run"
    )

    run_dir: Path = Path("runs/distill")
    """Folder of the pipeline, with a run folder for each stage."""
    model: Annotated[str | None, tyro.conf.arg(name="teacher")] = None
    """Hugging Face id or local folder of the teacher; 'toy' trains one with sft.py first."""
    student: str | None = None
    """Hugging Face id or local folder of the student; 'toy' trains a smaller toy model."""
    student_toy: ToyConfig = ToyConfig(hidden_size=64)
    """The toy student."""
    student_stop_tokens: tuple[str, ...] = ()
    """stop_tokens of the student."""

    num_samples: int = 2
    """Completions of the teacher per problem."""
    max_problems: int | None = None
    """Number of problems to sample for. Default: all."""
    selection: Annotated[SelectionConfig, tyro.conf.arg(name="")] = SelectionConfig()
    """Filters on the teacher's completions."""
    demonstrations: tuple[Path, ...] = ()
    """JSONL files of further demonstrations."""
    general_share: float | None = None
    """Share of rows from those files. Default: all of their rows."""

    num_epochs: int = 4
    """Passes over the demonstrations."""
    num_sequences: int = 16
    """Rows per update."""
    max_length: int | None = None
    """Tokens per row, and of the longest demonstration. Default: 2048, or less where the student has fewer
    positions."""
    num_micro_batches: int = 1
    """Gradient accumulation: parts of each update. Results do not depend on it."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig(learning_rate=1e-5)
    """Optimizer."""
    eval_samples: int = 4
    """Completions per held-out problem in evaluations."""

    def __post_init__(self):
        BatchInferenceConfig.__post_init__(self)
        if (self.model is None) != (self.student is None):
            raise ValueError("only one of teacher and student is set; set both")
        if (self.model == TOY) != (self.student == TOY):
            raise ValueError(
                "teacher and student must both be toy models or neither: toy models know the toy tasks only"
            )
        require_at_least(self, eval_samples=1, max_problems=1)
        _ = (
            self.sampled,
            replace(self.student_sft, model=self.student, toy=self.student_toy),
        )  # checks the settings of all stages

    def folder(self, stage: str) -> Path:
        """Run folder of a stage."""
        return self.run_dir / stage

    @property
    def shared(self) -> dict[str, Any]:
        """Fields that all stages share."""
        names = ("seed", "save_every", "keep_checkpoints", "trackers", "plain", "dtype", "remat", "attention", "mesh")
        sampling = ("max_prompt_length", "max_completion_length", "sampling", "cache_dtype", "cache_bytes")
        return {name: getattr(self, name) for name in (*names, *sampling)}

    @property
    def teacher(self) -> str | None:
        """The teacher's folder or id."""
        return str(self.folder("teacher") / "model") if self.model == TOY else self.model

    @property
    def student_start(self) -> str | None:
        """The student's folder or id, before it is trained."""
        return str(self.folder(BEFORE) / TOY_FOLDER) if self.student == TOY else self.student

    @property
    def teacher_sft(self) -> SFTConfig:
        """SFT of a toy teacher."""
        return replace(preset("sft"), **self.shared, run_dir=self.folder("teacher"), toy=self.toy, eval_every=0)

    @property
    def sampled(self) -> RejectionSamplingConfig:
        """Sampling and selection of the teacher's completions."""
        return RejectionSamplingConfig(
            **self.shared,
            run_dir=self.folder("samples"),
            model=self.teacher,
            stop_tokens=self.stop_tokens,
            data=self.data,
            rewards=self.rewards,
            num_samples=self.num_samples,
            num_prompts=self.num_prompts,
            max_problems=self.max_problems,
            selection=self.selection,
            demonstrations=self.demonstrations,
            general_share=self.general_share,
        )

    @property
    def student_sft(self) -> SFTConfig:
        """SFT of the student. Its held-out rows are problems that the teacher solves, so pass@1 is measured apart."""
        return SFTConfig(
            **self.shared,
            run_dir=self.folder("student"),
            model=self.student_start,
            stop_tokens=self.student_stop_tokens,
            data=DemonstrationConfig(dataset=str(self.folder("samples") / DATASET), **prompt_fields(self.data)),
            num_epochs=self.num_epochs,
            num_sequences=self.num_sequences,
            max_length=self.max_length,
            num_micro_batches=self.num_micro_batches,
            optimizer=self.optimizer,
            eval_every=0,
            num_eval_prompts=0,
        )

    def measured(self, stage: str, model: str | None, **start: Any) -> EvaluationConfig:
        """Evaluation of a model; of the trained student against the untrained one."""
        return EvaluationConfig(
            **self.shared,
            run_dir=self.folder(stage),
            model=model,
            stop_tokens=self.stop_tokens if stage == TEACHER else self.student_stop_tokens,
            data=self.data,
            rewards=self.rewards,
            num_samples=self.eval_samples,
            num_prompts=self.num_prompts,
            against=self.folder(BEFORE) if stage == AFTER else None,
            **start,
        )


TEACHER, BEFORE, AFTER = STAGES = ("teacher_eval", "student_before", "student_after")
"""The evaluations."""


PRESETS: dict[str, Preset[Config]] = {
    "toy": Preset(
        lambda: Config(
            **TOY_POLICY,
            data=DataConfig(dataset=SUMS),
            student=TOY,
            max_problems=2048,
            max_length=128,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        "a toy model after SFT teaches one of two thirds of its width; minutes on one CPU",
        paper="the distilled models of DeepSeek-R1 (arXiv 2501.12948, section 2.4) at toy scale",
        hardware="one CPU core",
    ),
}


def main(config: Config) -> int:
    """Run or resume; returns exit status 0 if all stages finished and 130 if one was stopped."""
    return run_stages(config, stages, write_summary, title="distillation")


def stages(config: Config) -> list[Stage]:
    """The stages in order; the evaluations of the initial models first, as they find incompatible settings early."""
    trained = config.folder("student") / "model"
    teacher = [config.folder("teacher")] if config.model == TOY else []
    samples, student = config.folder("samples"), config.folder("student")
    matched = with_teacher_format(config)
    return [
        *(Stage(sft, config.teacher_sft) for _ in teacher),
        Stage(evaluate, config.measured(TEACHER, config.teacher), teacher),
        Stage(evaluate, matched.measured(BEFORE, config.student, toy=config.student_toy)),
        Stage(rejection_sampling, matched.sampled, teacher),
        Stage(sft, matched.student_sft, [samples, config.folder(BEFORE)]),
        Stage(evaluate, matched.measured(AFTER, str(trained)), [student]),
    ]


def with_teacher_format(config: Config) -> Config:
    """``config`` with the teacher's prompt format for the student too, unless the settings choose one."""
    if config.model == TOY or not (config.folder(TEACHER) / PROVENANCE).exists():  # not evaluated yet
        return config
    prompt_format = read_provenance(config.folder(TEACHER))["prompt_format"]
    return replace(config, data=with_format(config.data, prompt_format))


def write_summary(config: Config, run: Run) -> None:
    """Print the metrics of teacher and student, and write the summary."""
    reports = {stage: read_report(config.folder(stage)) for stage in STAGES}
    samples, training = (
        json.loads((config.folder(stage) / "summary.json").read_text()) for stage in ("samples", "student")
    )
    names = {TEACHER: "teacher", BEFORE: "student before", AFTER: "student distilled"}
    for stage, name in names.items():
        right, length = (reports[stage]["figures"][figure] for figure in ("pass@1", "mean_length"))
        run.say(
            f"{name:>17}: pass@1 {right['mean']:.3f} [{right['low']:.3f}, {right['high']:.3f}], "
            f"{length['mean']:.1f} tokens per completion"
        )
    run.say(
        f"trained on {samples['rows']} demonstrations, {training['steps']} updates; "
        f"{config.folder('student') / 'model'}"
    )
    run.write_summary(
        {
            **{stage: {name: reports[stage][name] for name in ("figures", "provenance")} for stage in STAGES},
            "comparison": reports[AFTER]["comparison"],
            "demonstrations": samples["rows"],
            "counts": samples["counts"],
            "updates": training["steps"],
            "seed": config.seed,
        }
    )


if __name__ == "__main__":
    sys.exit(run_command(Config, main, presets=PRESETS, description=__doc__))
