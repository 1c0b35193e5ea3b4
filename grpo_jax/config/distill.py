"""Settings and presets of distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.data import DataConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.pipeline import SHARED_FIELDS, PipelineConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.prompts import prompt_fields
from grpo_jax.config.rejection_sampling import DATASET, RejectionSamplingConfig
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY, TOY_FOLDER, ToyConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(BatchInferenceConfig, PipelineConfig):
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
    student_toy: Annotated[ToyConfig, tyro.conf.Suppress] = ToyConfig(hidden_size=64)
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
    num_micro_batches: int | None = None
    """Gradient accumulation: parts of each update. Results do not depend on it. Default: by the devices' memory."""
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
        sampling = ("max_prompt_length", "max_completion_length", "sampling", "cache_dtype", "cache_bytes")
        return {name: getattr(self, name) for name in (*SHARED_FIELDS, *sampling)}

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
        """Evaluation of a model; of the trained student against the untrained one.

        Args:
            stage: ``TEACHER``, ``BEFORE`` or ``AFTER``.
            model: folder or id of the model.
            start: further fields of ``EvaluationConfig``.
        """
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


PRESETS: dict[str, Preset[DistillConfig]] = {
    "toy": Preset(
        lambda: DistillConfig(
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
