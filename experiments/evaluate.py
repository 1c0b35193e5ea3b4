"""Evaluation of a checkpoint on a dataset, with confidence intervals and paired comparison with another evaluation.

Completions are sampled for every problem of the dataset's test split, or of the whole dataset if it has one split or
file. Without arguments it evaluates the toy model on sums, on one CPU in a minute or two. For real models:

    python experiments/evaluate.py
    python experiments/evaluate.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --run-dir runs/a
    python experiments/evaluate.py --model runs/gsm8k/model --dataset openai/gsm8k --run-dir runs/b --against runs/a
    python experiments/evaluate.py --model path/to/folder --dataset chats.jsonl --sampling.temperature 0 --num-samples 1

When it is run again, it prints the report without sampling; ``--k`` and ``--against`` may then differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.config.evaluation import PRESETS, EvaluationConfig
from grpo_jax.config.run import LAYOUT_FIELDS
from grpo_jax.data.problems import Problem
from grpo_jax.hosts import LONG_TIMEOUT, on_main
from grpo_jax.loop.batch_inference import read_provenance, read_samples, run_batch_inference
from grpo_jax.loop.command import run_command
from grpo_jax.loop.eval_report import (
    COMPARISON,
    FIGURES,
    Key,
    applicable_metrics,
    check_same_problems,
    compare_metrics,
    estimate_metric,
    metrics_per_problem,
    print_report,
    problem_keys,
    read_report,
)
from grpo_jax.loop.problems import same_answers_of
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.run_folder import differences

SETTINGS_WITHOUT_EFFECT = ("against", "k", "cache_bytes", "num_prompts")


def main(config: EvaluationConfig) -> int:
    """Evaluate or resume; returns exit status 0 if the evaluation finished, 75 or 130 if it was stopped."""
    return run_experiment(config, evaluate, title="Evaluation", again=True)


def evaluate(config: EvaluationConfig, run: Run) -> None:
    report = on_main(lambda: read_report(run.folder), "reading the report") if run.is_finished else None
    if report is None or differences(report["config"], run.settings, LAYOUT_FIELDS):
        report = make_report(config, run, report)
    print_report(run, report)


def make_report(config: EvaluationConfig, run: Run, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sample completions unless there is a report of them; compute and write the report.

    Args:
        config: settings.
        run: receives completions and report.
        before: the finished report to replace, with other ``k`` or ``against``; None to sample.
    """
    against = None if config.against is None else read_report(config.against)
    others = [] if config.against is None else problem_keys(samples.problem for samples in read_samples(config.against))

    def check(problems: Iterable[Problem]) -> None:
        if config.against is not None:
            check_same_problems(problem_keys(problems), others, run.folder, config.against)

    if before is None:
        problem_set = "held_out" if config.held_out else "evaluation"
        run_batch_inference(config, run, config.mesh.build(), problem_set=problem_set, check=check)
    return on_main(
        lambda: write_report(config, run, before, against, others), "writing the report", timeout=LONG_TIMEOUT
    )


def write_report(
    config: EvaluationConfig,
    run: Run,
    before: Mapping[str, Any] | None,
    against: Mapping[str, Any] | None,
    others: Sequence[Key],
) -> dict[str, Any]:
    """Compute and write the report of the run's completions.

    Args:
        config, run, before: as in ``make_report``.
        against: report of the run to compare with; None for none.
        others: keys of its problems.
    """
    keys = problem_keys(samples.problem for samples in read_samples(run.folder))
    figures = applicable_metrics(
        config, run.folder, metrics_per_problem(read_samples(run.folder), config.ks, same_answers_of(config.data))
    )
    report: dict[str, Any] = {FIGURES: {name: estimate_metric(name, values) for name, values in figures.items()}}
    if config.against is not None and against is not None:
        check_same_problems(keys, others, run.folder, config.against)
        place = {key: n for n, key in enumerate(others)}
        paired = [place[key] for key in keys]
        baseline = metrics_per_problem(read_samples(config.against), config.ks, same_answers_of(config.data))
        report[COMPARISON] = {
            "against": config.against,
            "settings": differences(against["config"], run.settings, (*LAYOUT_FIELDS, *SETTINGS_WITHOUT_EFFECT)),
            "provenance": read_provenance(config.against),
            FIGURES: compare_metrics({name: values[paired] for name, values in baseline.items()}, figures),
        }
    report |= {"num_problems": len(keys), "num_samples": config.num_samples, "provenance": read_provenance(run.folder)}
    if before is not None:  # of the run that sampled the completions
        report |= {name: before[name] for name in ("seconds", "device", "versions")}
    run.metrics_log.rewind(-1)
    run.log({"step": 0, **{f"eval/{name}": metric["mean"] for name, metric in report[FIGURES].items()}})
    run.write_summary(report)
    return read_report(run.folder)


if __name__ == "__main__":
    sys.exit(run_command(EvaluationConfig, main, presets=PRESETS, description=__doc__))
