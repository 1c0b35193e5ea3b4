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
"""Figures by name; ``[N]``, NaN where a problem does not count."""
Key = tuple[str, str | None, int]
"""What tells a problem: its prompt before any template, its answer, and which of those that are the same it is."""


def read_report(folder: Path) -> dict[str, Any]:
    """What an evaluation found, as it stands in ``summary.json`` of its run's folder.

    ``report["figures"]["pass@1"]`` has ``mean``, ``low``, ``high`` and ``problems``, and so have ``pass@<k>``,
    ``maj@<num_samples>``, ``rewards/<part>``, ``mean_length``, ``truncated`` and ``ungraded``, as far as they say
    something of the problems; of a part that is absent everywhere the first three are None. With ``against``,
    ``report["comparison"]["figures"]`` has ``before``, ``after``, ``difference``, ``low``, ``high``, ``p`` and
    ``problems`` of each.

    Raises:
        ValueError: the folder holds no finished evaluation.
    """
    path = folder / "summary.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    if FIGURES not in report or not (folder / "completions.jsonl").is_file():
        raise ValueError(f"{folder} holds no finished evaluation (summary.json with figures, and completions.jsonl)")
    return report


def applicable_metrics(config: EvaluationConfig, folder: Path, figures: PerProblem) -> PerProblem:
    """The figures that say something of these problems.

    Without answers that completions end in there is no majority vote; where nothing is graded, no accuracy and no share
    of problems that could not be; and no format where prompts do not ask for it and no completion has it.
    """
    problems = [each.problem for each in read_samples(folder)]
    without = () if has_final_answers(config.data, problems) else ("maj@",)
    without += ("rewards/accuracy", "ungraded") if config.data.grader == "none" else ()
    if not asks_for_format(config.data) and not np.nansum(figures["rewards/format"]):
        without += ("rewards/format",)
    return {name: values for name, values in figures.items() if not name.startswith(tuple(without))}


def metrics_per_problem(
    collected: Iterable[ProblemSamples], ks: Sequence[int], same: Callable[[str, str], bool] = same_text
) -> PerProblem:
    """The figures of each problem, in their order: those that are told are means of them.

    A completion is right if its part ``accuracy`` is 1. A problem with a sample that could not be graded counts in
    none of pass@k and the majority vote, and in the mean of a part of the reward with those samples that have one.

    Args:
        collected: the problems with their completions, of one number G.
        ks: for pass@k; those above G are passed over.
        same: whether two answers are the same for the majority vote.
    """
    rows: list[dict[str, float]] = []
    scores: list[list[float | None]] = []
    answers: list[list[str | None]] = []
    has_answers = False
    for each in collected:
        scores.append(each.rewards["accuracy"])
        answers.append([extract_answer(completion, each.prompt) for completion in each.completions])
        has_answers |= each.problem.answer is not None
        parts = {f"rewards/{name}": mean_of_present(values) for name, values in each.rewards.items()}
        lengths = {"mean_length": float(np.mean(each.lengths)), "truncated": float(np.mean(each.truncated))}
        rows.append({**parts, **lengths, "ungraded": float(None in each.rewards["accuracy"])})
    figures: PerProblem = {}
    graded = np.array([None not in row for row in scores])
    if graded.any():
        right = jnp.array([[score == 1 for score in row] for row in scores if None not in row])
        G = right.shape[1]
        of_graded = {f"pass@{k}": pass_at_k_per_problem(right, k) for k in ks if k <= G}
        if has_answers:
            chosen = identify_answers([row for row, is_graded in zip(answers, graded, strict=True) if is_graded], same)
            of_graded[f"maj@{G}"] = maj_at_k_per_problem(chosen, right, G)
        for name, values in of_graded.items():
            figures[name] = np.full(len(rows), np.nan)
            figures[name][graded] = np.asarray(values)
    names = dict.fromkeys(name for row in rows for name in row)
    return figures | {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}


def mean_of_present(values: Sequence[float | None]) -> float:
    """The mean of the values that are not None; NaN if all are."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else math.nan


def metric_bounds(name: str) -> tuple[float, float] | None:
    """The least and the greatest that a figure can be, where that is known."""
    return (0.0, 1.0) if name in SHARES or name.startswith(("pass@", "maj@", "rewards/accuracy/")) else None


def estimate_metric(name: str, values: np.ndarray) -> dict[str, Any]:
    """Mean and confidence interval of a metric, as a dict; None where it is absent everywhere.

    Args:
        name: of the metric.
        values: ``[N]``, one per problem; NaN where absent.
    """
    present = values[~np.isnan(values)]
    if not len(present):
        return {"mean": None, "low": None, "high": None, "problems": 0}
    return dataclasses.asdict(estimate(present, bounds=metric_bounds(name)))


def compare_metrics(before: PerProblem, after: PerProblem) -> dict[str, dict[str, Any]]:
    """What changed in each figure that both have, over the problems that count in both."""
    found = {}
    for name in (name for name in after if name in before):
        both = ~np.isnan(before[name]) & ~np.isnan(after[name])
        if both.any():
            tested = paired_test(before[name][both], after[name][both], bounds=metric_bounds(name))
            found[name] = dataclasses.asdict(tested)
    return found


def problem_keys(problems: Iterable[Problem]) -> list[Key]:
    """What problems are told apart by; in whatever template, they are the same."""
    seen: Counter[tuple[str, str | None]] = Counter()
    keys = []
    for problem in problems:
        prompt = problem.prompt if isinstance(problem.prompt, str) else json.dumps(problem.prompt, sort_keys=True)
        keys.append((prompt, problem.answer, seen[prompt, problem.answer]))
        seen[prompt, problem.answer] += 1
    return keys


def check_same_problems(own: Sequence[Key], others: Sequence[Key], folder: Path, against: Path) -> None:
    """Check that two evaluations can be compare_metrics problem by problem.

    Raises:
        ValueError: one has problems that the other has not; it says how many, and shows some.
    """

    def alone(keys: Sequence[Key], without: set[Key], where: Path) -> str:
        left = [key for key in keys if key not in without]
        examples = ", ".join(repr(shorten(prompt, 60)) + f" (answer {answer!r:.30})" for prompt, answer, _ in left[:3])
        return f"{len(left)} in {where} alone" + (f", such as {examples}" if left else "")

    if set(own) != set(others):
        raise ValueError(
            f"the problems of the two evaluations are not the same: {alone(own, set(others), folder)}; "
            f"{alone(others, set(own), against)}. Evaluate both with the same data, or leave against out"
        )


def print_report(run: Run, report: Mapping[str, Any]) -> None:
    """Print figures with their intervals, and what changed where that was asked."""
    config, samples = report["config"], report["num_samples"]
    run.say(
        f"{report['provenance']['model']}: {report['num_problems']} problems of "
        f"{config['data']['eval_dataset'] or config['data']['dataset']}, {samples} "
        f"sample{'s' if samples > 1 else ''} each, temperature {config['sampling']['temperature']:g}"
    )
    rows = [
        (name, format_value(name, each["mean"]), format_interval(name, each), str(each["problems"]))
        for name, each in report[FIGURES].items()
        if name != "ungraded" or each["mean"]
    ]
    run.say(format_table([("", "mean", "95% interval", "problems"), *rows]))
    comparison = report.get(COMPARISON)
    if comparison:
        run.say(f"\nagainst {comparison['against']}, problem by problem")
        changes = [
            (
                *(
                    name,
                    format_value(name, each["before"]),
                    format_value(name, each["after"]),
                    format_value(name, each["difference"]),
                ),
                *(format_interval(name, each), f"{each['p']:.4f}", str(each["problems"])),
            )
            for name, each in comparison[FIGURES].items()
            if name != "ungraded" or each["before"] or each["after"]
        ]
        run.say(format_table([("", "before", "after", "difference", "95% interval", "p", "problems"), *changes]))
        if comparison["settings"]:
            run.say("settings that differ: " + "; ".join(comparison["settings"]))
    run.say(f"everything is in {run.folder}")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned lines, of whatever width: no console cuts a figure off."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def format_value(name: str, value: float | None) -> str:
    """A figure as text: shares with one number of digits, others with as many as they need."""
    if value is None:
        return "absent"
    return number(value) if metric_bounds(name) is None else f"{value:.4f}"


def format_interval(name: str, each: Mapping[str, Any]) -> str:
    """A confidence interval as text.

    Args:
        name: of the metric.
        each: with ``low`` and ``high``.
    """
    return "" if each["low"] is None else f"[{format_value(name, each['low'])}, {format_value(name, each['high'])}]"
