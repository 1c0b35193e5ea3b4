"""Reports of evaluations: metrics with confidence intervals, comparisons, tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.data.problems import Problem
from grpo_jax.data.selection import ProblemSamples
from grpo_jax.evaluate import estimate, maj_at_k_per_problem, paired_test, pass_at_k_per_problem
from grpo_jax.loop.batch_inference import read_samples
from grpo_jax.loop.run import Run
from grpo_jax.loop.task_runtime import asks_for_format, has_final_answers
from grpo_jax.monitor.display import number
from grpo_jax.monitor.samples import printable, shorten
from grpo_jax.rewards.math.answer import extract_answer, same_text
from grpo_jax.rewards.math.vote import identify_answers

FIGURES, COMPARISON = "figures", "comparison"
SHARES = ("truncated", "ungraded", "rewards/accuracy", "rewards/format", "rewards/language")

PerProblem = dict[str, np.ndarray]
"""Metric name -> ``[N]``, one value per problem; NaN where the problem is excluded."""
Key = tuple[str, str | None, int]
"""Identity of a problem: prompt before any template, answer, and its number among problems that share both."""


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished evaluation, from ``summary.json`` in its run folder.

    ``report["figures"]`` maps each applicable metric (``pass@<k>``, ``maj@<num_samples>``, ``rewards/<part>``,
    ``mean_length``, ``truncated``, ``ungraded``) to ``mean``, ``low``, ``high`` and ``problems``; the first three are
    None where the metric is absent for every problem. With ``against``, ``report["comparison"]["figures"]`` maps it to
    ``before``, ``after``, ``difference``, ``low``, ``high``, ``p`` and ``problems``.

    Raises:
        ValueError: the folder has no finished evaluation.
    """
    path = folder / "summary.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    if FIGURES not in report or not (folder / "completions.jsonl").is_file():
        raise ValueError(f"{folder} holds no finished evaluation (summary.json with figures, and completions.jsonl)")
    return report


def applicable_metrics(config: EvaluationConfig, folder: Path, figures: PerProblem) -> PerProblem:
    """The metrics that apply to these problems.

    Leaves out the majority vote where completions do not end in a short answer, accuracy and ``ungraded`` without a
    grader, and the format where prompts do not ask for it and no completion has it.

    Args:
        config: data settings of the evaluation.
        folder: its run folder.
        figures: its metrics per problem.
    """
    problems = [sample.problem for sample in read_samples(folder)]
    excluded = () if has_final_answers(config.data, problems) else ("maj@",)
    excluded += ("rewards/accuracy", "ungraded") if config.data.grader == "none" else ()
    if not asks_for_format(config.data) and not np.nansum(figures["rewards/format"]):
        excluded += ("rewards/format",)
    return {name: values for name, values in figures.items() if not name.startswith(excluded)}


def metrics_per_problem(
    samples: Iterable[ProblemSamples], ks: Sequence[int], same: Callable[[str, str], bool] = same_text
) -> PerProblem:
    """The metrics of each problem; reports give their means.

    A completion is right if its ``accuracy`` is 1. A problem with an ungraded sample is excluded from pass@k and the
    majority vote; a reward is averaged over the samples that have one.

    Args:
        samples: problems with G completions each.
        ks: the k of pass@k; values above G are ignored.
        same: equality of two answers in the majority vote.
    """
    rows: list[dict[str, float]] = []
    scores: list[list[float | None]] = []
    answers: list[list[str | None]] = []
    has_answers = False
    for sample in samples:
        scores.append(sample.rewards["accuracy"])
        answers.append([extract_answer(completion, sample.prompt) for completion in sample.completions])
        has_answers |= sample.problem.answer is not None
        parts = {f"rewards/{name}": mean_of_present(values) for name, values in sample.rewards.items()}
        lengths = {"mean_length": float(np.mean(sample.lengths)), "truncated": float(np.mean(sample.truncated))}
        rows.append({**parts, **lengths, "ungraded": float(None in sample.rewards["accuracy"])})
    figures: PerProblem = {}
    graded = np.array([None not in row for row in scores])
    if graded.any():
        right = jnp.array([[score == 1 for score in row] for row in scores if None not in row])
        G = right.shape[1]
        defined = {f"pass@{k}": pass_at_k_per_problem(right, k) for k in ks if k <= G}
        if has_answers:
            chosen = identify_answers([row for row, is_graded in zip(answers, graded, strict=True) if is_graded], same)
            defined[f"maj@{G}"] = maj_at_k_per_problem(chosen, right, G)
        for name, values in defined.items():
            figures[name] = np.full(len(rows), np.nan)
            figures[name][graded] = np.asarray(values)
    names = dict.fromkeys(name for row in rows for name in row)
    return figures | {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}


def mean_of_present(values: Sequence[float | None]) -> float:
    """Mean of the values that are not None; NaN if there are none."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else math.nan


def metric_bounds(name: str) -> tuple[float, float] | None:
    """Smallest and largest possible value of a metric; None if unknown."""
    return (0.0, 1.0) if name in SHARES or name.startswith(("pass@", "maj@", "rewards/accuracy/")) else None


def estimate_metric(name: str, values: np.ndarray) -> dict[str, Any]:
    """``mean``, ``low``, ``high`` and ``problems`` of a metric; the first three are None if no problem has it.

    Args:
        name: name of the metric.
        values: ``[N]``, one per problem; NaN where absent.
    """
    present = values[~np.isnan(values)]
    if not len(present):
        return {"mean": None, "low": None, "high": None, "problems": 0}
    return dataclasses.asdict(estimate(present, bounds=metric_bounds(name)))


def compare_metrics(before: PerProblem, after: PerProblem) -> dict[str, dict[str, Any]]:
    """Paired tests of the metrics in both evaluations, over the problems that have a value in both.

    Args:
        before: metrics of the earlier evaluation.
        after: metrics of the later evaluation, for the same problems in the same order.
    """
    tests = {}
    for name in (name for name in after if name in before):
        both = ~np.isnan(before[name]) & ~np.isnan(after[name])
        if both.any():
            test = paired_test(before[name][both], after[name][both], bounds=metric_bounds(name))
            tests[name] = dataclasses.asdict(test)
    return tests


def problem_keys(problems: Iterable[Problem]) -> list[Key]:
    """Identities of problems, which do not depend on the prompt template."""
    seen: Counter[tuple[str, str | None]] = Counter()
    keys = []
    for problem in problems:
        prompt = problem.prompt if isinstance(problem.prompt, str) else json.dumps(problem.prompt, sort_keys=True)
        keys.append((prompt, problem.answer, seen[prompt, problem.answer]))
        seen[prompt, problem.answer] += 1
    return keys


def check_same_problems(keys: Sequence[Key], others: Sequence[Key], folder: Path, against: Path) -> None:
    """Check that two evaluations have the same problems.

    Args:
        keys: identities of the problems in ``folder``.
        others: identities of the problems in ``against``.
        folder, against: run folders, for the error.

    Raises:
        ValueError: they differ; the error counts the problems in one evaluation only, with examples.
    """

    def only_in(where: Path, keys: Sequence[Key], others: set[Key]) -> str:
        extra = [key for key in keys if key not in others]
        examples = ", ".join(repr(shorten(prompt, 60)) + f" (answer {answer!r:.30})" for prompt, answer, _ in extra[:3])
        return f"{len(extra)} only in {where}" + (f", such as {examples}" if extra else "")

    if set(keys) != set(others):
        raise ValueError(
            f"the two evaluations have different problems: {only_in(folder, keys, set(others))}; "
            f"{only_in(against, others, set(keys))}. Evaluate both with the same data, or leave against out"
        )


def print_report(run: Run, report: Mapping[str, Any]) -> None:
    """Print the metrics with their intervals, and the comparison if there is one.

    Args:
        run: the run, whose console is printed to.
        report: contents of the report.
    """
    config, samples = report["config"], report["num_samples"]
    run.say(
        f"{report['provenance']['model']}: {report['num_problems']} problems of "
        f"{config['data']['eval_dataset'] or config['data']['dataset']}, {samples} "
        f"sample{'s' if samples > 1 else ''} each, temperature {config['sampling']['temperature']:g}"
    )
    rows = [
        (name, _format_value(name, metric["mean"]), format_interval(name, metric), str(metric["problems"]))
        for name, metric in report[FIGURES].items()
        if name != "ungraded" or metric["mean"]
    ]
    run.say(format_table([("", "mean", "95% interval", "problems"), *rows]))
    comparison = report.get(COMPARISON)
    if comparison:
        run.say(f"\nagainst {comparison['against']}, problem by problem")
        changes = [
            (
                name,
                *(_format_value(name, metric[column]) for column in ("before", "after", "difference")),
                *(format_interval(name, metric), f"{metric['p']:.4f}", str(metric["problems"])),
            )
            for name, metric in comparison[FIGURES].items()
            if name != "ungraded" or metric["before"] or metric["after"]
        ]
        run.say(format_table([("", "before", "after", "difference", "95% interval", "p", "problems"), *changes]))
        if comparison["settings"]:
            run.say("settings that differ: " + "; ".join(comparison["settings"]))
    run.say(f"everything is in {run.folder}")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned lines of any width, so that a narrow console does not cut numbers off."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _format_value(name: str, value: float | None) -> str:
    """A metric as text: four decimals for shares, significant digits for others."""
    if value is None:
        return "absent"
    return number(value) if metric_bounds(name) is None else f"{value:.4f}"


def format_interval(name: str, metric: Mapping[str, Any]) -> str:
    """A confidence interval as text; empty if there is none.

    Args:
        name: name of the metric.
        metric: has ``low`` and ``high``.
    """
    low, high = metric["low"], metric["high"]
    return "" if low is None else f"[{_format_value(name, low)}, {_format_value(name, high)}]"
