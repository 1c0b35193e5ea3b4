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
from dataclasses import replace
from pathlib import Path

from grpo_jax.config.distill import AFTER, BEFORE, PRESETS, STAGES, TEACHER, DistillConfig
from grpo_jax.config.prompts import with_format
from grpo_jax.loop.batch_inference import PROVENANCE, read_provenance
from grpo_jax.loop.command import run_command
from grpo_jax.loop.eval_report import read_report
from grpo_jax.loop.run import Run
from grpo_jax.loop.stages import Stage, run_stages
from grpo_jax.tasks.toy_config import TOY

SCRIPTS = Path(__file__).parent


def main(config: DistillConfig) -> int:
    """Run or resume; returns exit status 0 if all stages finished, 75 or 130 if one was stopped."""
    return run_stages(config, stages, write_summary, title="distillation")


def stages(config: DistillConfig) -> list[Stage]:
    """The stages in order; the evaluations of the initial models first, as they find incompatible settings early."""
    trained = config.folder("student") / "model"
    teacher = [config.folder("teacher")] if config.model == TOY else []
    samples, student = config.folder("samples"), config.folder("student")
    matched = with_teacher_format(config)
    return [
        *(Stage(SCRIPTS / "sft.py", config.teacher_sft) for _ in teacher),
        Stage(SCRIPTS / "evaluate.py", config.measured(TEACHER, config.teacher), teacher),
        Stage(SCRIPTS / "evaluate.py", matched.measured(BEFORE, config.student, toy=config.student_toy)),
        Stage(SCRIPTS / "rejection_sampling.py", matched.sampled, teacher),
        Stage(SCRIPTS / "sft.py", matched.student_sft, [samples, config.folder(BEFORE)]),
        Stage(SCRIPTS / "evaluate.py", matched.measured(AFTER, str(trained)), [student]),
    ]


def with_teacher_format(config: DistillConfig) -> DistillConfig:
    """``config`` with the teacher's prompt format for the student too, unless the settings choose one."""
    if config.model == TOY or not (config.folder(TEACHER) / PROVENANCE).exists():  # not evaluated yet
        return config
    prompt_format = read_provenance(config.folder(TEACHER))["prompt_format"]
    return replace(config, data=with_format(config.data, prompt_format))


def write_summary(config: DistillConfig, run: Run) -> None:
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
    sys.exit(run_command(DistillConfig, main, presets=PRESETS, description=__doc__))
