"""Distillation as of R1's small models: a student learns, by imitation alone, the reasoning of a larger teacher.

Without arguments it does the whole of it with embedded models, on one CPU: the base after sft.py teaches a base of two
thirds of its width. With arguments it is the real thing:

    python experiments/distill.py
    python experiments/distill.py --teacher runs/gsm8k/model --student Qwen/Qwen2.5-0.5B --dataset openai/gsm8k \
        --require format=1 --num-samples 8

Its stages are runs of their own in folders of run_dir, teacher_eval, student_before, samples, student and
student_after, and the same command goes on with the stage that was stopped. The student's own tokenizer is used: texts
go over, not tokens. Teacher and student are asked the same held-out problems in the same form.
After DeepSeek-R1 (arXiv 2501.12948), section 2.4.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import evaluate
import rejection_sampling
import sft
import tyro

from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.prompts import prompt_fields, with_format
from grpo_jax.config.run import require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.loop.batch_inference import PROVENANCE, read_provenance
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run
from grpo_jax.loop.stages import Stage, run_stages
from grpo_jax.tasks.toy_model import ToyConfig


@dataclass(frozen=True, kw_only=True)
class Config(BatchInferenceConfig):
    """What a run is. Fields are checked before anything is computed."""

    run_dir: Path = Path("runs/distill")
    """The distillation's own folder, with one for each stage."""
    model: Annotated[str | None, tyro.conf.arg(name="teacher")] = None
    """Hugging Face id or local folder of the teacher. Default: a small base, taught here by sft.py first."""
    student: str | None = None
    """The same of the student. Default: a smaller base, made here."""
    base: ToyConfig = ToyConfig()
    """How the embedded teacher's base is made; the seed is the run's."""
    base_dir: Path | None = None
    """Folder of an embedded teacher that was made before."""
    student_base: ToyConfig = ToyConfig(hidden_size=64)
    """How the embedded student is made; the seed is the run's."""
    student_stop_tokens: tuple[str, ...] = ()
    """As stop_tokens, of the student."""

    num_samples: int = 2
    """The teacher's completions of each problem."""
    max_problems: int | None = None
    """Problems that the teacher is asked, the first ones. Default: all with a teacher that is named, 2048 without."""
    selection: Annotated[SelectionConfig, tyro.conf.arg(name="")] = SelectionConfig()
    """Which of its completions are taught."""
    demonstrations: tuple[Path, ...] = ()
    """JSONL files of other demonstrations that are taught as well."""
    general_share: float | None = None
    """Share of the rows that come from those files. Default: all of theirs are taken."""

    num_epochs: int = 4
    """How often the student visits each demonstration."""
    num_sequences: int = 16
    """Rows of an update."""
    max_length: int | None = None
    """Tokens of a row, and of the longest demonstration. Default: 2048 with --student, 128 without; less where
    the student has fewer positions."""
    num_micro_batches: int = 1
    """Parts each update is computed in, to save memory; the result is the same."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates. Default learning rate: 1e-5 with --student, 1e-3 without."""
    eval_samples: int = 4
    """Completions of each held-out problem that teacher and student are measured by."""

    def __post_init__(self):
        BatchInferenceConfig.__post_init__(self)
        if (self.model is None) != (self.student is None):
            raise ValueError("name a teacher and a student, or neither: an embedded one knows its own sums only")
        require_at_least(self, eval_samples=1, max_problems=1)
        _ = self.sampled, self.taught  # settings of a later stage are checked now

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.run_dir / stage

    @property
    def shared(self) -> dict[str, Any]:
        """What every stage has of this."""
        names = ("seed", "save_every", "keep_checkpoints", "trackers", "plain", "dtype", "remat", "attention", "mesh")
        drawn = ("max_prompt_length", "max_completion_length", "sampling", "cache_dtype", "cache_bytes")
        return {name: getattr(self, name) for name in (*names, *drawn)}

    @property
    def teacher_dir(self) -> Path | None:
        """Where an embedded teacher lies."""
        return None if self.model else self.base_dir or self.folder("teacher") / "model"

    @property
    def teacher_taught(self) -> sft.Config:
        """How an embedded teacher is made."""
        return sft.Config(**self.shared, run_dir=self.folder("teacher"), base=self.base, eval_every=0)

    @property
    def sampled(self) -> rejection_sampling.Config:
        """How the teacher's completions are drawn and selected."""
        return rejection_sampling.Config(
            **self.shared,
            run_dir=self.folder("samples"),
            model=self.model,
            base_dir=self.teacher_dir,
            stop_tokens=self.stop_tokens,
            data=self.data,
            rewards=self.rewards,
            num_samples=self.num_samples,
            num_prompts=self.num_prompts,
            max_problems=self.max_problems or (None if self.model else 2048),
            selection=self.selection,
            demonstrations=self.demonstrations,
            general_share=self.general_share,
        )

    @property
    def taught(self) -> sft.Config:
        """How the student learns. Its pass@1 is measured apart: what it is taught is of problems the teacher solves."""
        return sft.Config(
            **self.shared,
            run_dir=self.folder("student"),
            model=self.student,
            base_dir=None if self.student else self.folder("student_before") / "base",
            stop_tokens=self.student_stop_tokens,
            data=DemonstrationConfig(
                dataset=str(self.folder("samples") / rejection_sampling.DATASET), **prompt_fields(self.data)
            ),
            num_epochs=self.num_epochs,
            num_sequences=self.num_sequences,
            max_length=self.max_length,
            num_micro_batches=self.num_micro_batches,
            optimizer=self.optimizer,
            eval_every=0,
            num_eval_prompts=0,
        )

    def measured(self, stage: str, model: str | None, **start: Any) -> evaluate.Config:
        """How a model is measured; the student in the end against what it was."""
        return evaluate.Config(
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
"""The measurements."""


def main(config: Config) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop."""
    return run_stages(config, stages, conclude, title="distillation")


def stages(config: Config) -> list[Stage]:
    """What runs, in order.

    The first measurements find out whether models, problems and templates go together before the teacher is sampled.
    """
    student_start = {} if config.student else {"base": config.student_base}
    taught = config.folder("student") / "model"
    after = {"base_dir": taught} if config.student is None else {}
    teacher = [config.folder("teacher")] if config.model is None and config.base_dir is None else []
    samples, student = config.folder("samples"), config.folder("student")
    alike = asked_alike(config)
    return [
        *(Stage(sft, config.teacher_taught) for _ in teacher),
        Stage(evaluate, config.measured(TEACHER, config.model, base_dir=config.teacher_dir), teacher),
        Stage(evaluate, alike.measured(BEFORE, config.student, **student_start)),
        Stage(rejection_sampling, alike.sampled, teacher),
        Stage(sft, alike.taught, [samples, config.folder(BEFORE)]),
        Stage(evaluate, alike.measured(AFTER, str(taught) if config.student else None, **after), [student]),
    ]


def asked_alike(config: Config) -> Config:
    """The same with the format of the teacher's prompts, which is the student's too unless settings say another."""
    if config.model is None or not (config.folder(TEACHER) / PROVENANCE).exists():  # not measured yet
        return config
    asked = read_provenance(config.folder(TEACHER))["prompt_format"]
    return replace(config, data=with_format(config.data, asked))


def conclude(config: Config, run: Run) -> None:
    """Put the figures of the stages side by side."""
    reports = {stage: evaluate.read_report(config.folder(stage)) for stage in STAGES}
    samples, learnt = (
        json.loads((config.folder(stage) / "summary.json").read_text()) for stage in ("samples", "student")
    )
    names = {TEACHER: "teacher", BEFORE: "student before", AFTER: "student distilled"}
    for stage, name in names.items():
        right, length = (reports[stage]["figures"][figure] for figure in ("pass@1", "mean_length"))
        run.say(
            f"{name:>17}: pass@1 {right['mean']:.3f} [{right['low']:.3f}, {right['high']:.3f}], "
            f"{length['mean']:.1f} tokens a completion"
        )
    run.say(
        f"taught: {samples['rows']} demonstrations, {learnt['steps']} updates; {config.folder('student') / 'model'}"
    )
    run.conclude(
        {
            **{stage: {name: reports[stage][name] for name in ("figures", "provenance")} for stage in STAGES},
            "comparison": reports[AFTER]["comparison"],
            "demonstrations": samples["rows"],
            "counts": samples["counts"],
            "updates": learnt["steps"],
            "seed": config.seed,
        }
    )


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
