"""The metrics that are displayed, their formats, and the closing line of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grpo_jax.jsonl import Row


def number(value: float) -> str:
    """A number with four decimals, fewer from 1 on; with an exponent below 0.001 and from 10,000 on."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and not 0.001 <= size < 10000:
        return f"{value:.1e}"
    return f"{value:.{4 if size < 1 else 3 if size < 100 else 1}f}"


def scientific(value: float) -> str:
    """A number with one decimal and an exponent."""
    return f"{value:.1e}"


def one_decimal(value: float) -> str:
    """A number with one decimal and thousands separators."""
    return f"{value:,.1f}"


def percent(value: float) -> str:
    """A fraction in percent, with one decimal."""
    return f"{100 * value:.1f}%"


def small_percent(value: float) -> str:
    """A small fraction in percent, with two decimals."""
    return f"{100 * value:.2f}%"


def count(value: float) -> str:
    """A count in three or four digits and a unit: ``950``, ``12.3k``, ``1.2M``, ``3.4B``."""
    for limit, scale, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            return f"{value / scale:.1f}{unit}" if unit else f"{value:.0f}"
    return f"{value / 1e9:.1f}B" if math.isfinite(value) else str(value)


def duration(seconds: float | int | None) -> str:
    """Seconds as ``h:mm:ss``; ``-:--:--`` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@dataclass(frozen=True)
class DisplayMetric:
    """How a metric is displayed.

    Attributes:
        key: name of the metric. One ``*`` matches any text and stands for the same text in ``label``.
        label: name on the screen.
        show: formats the value.
        main: whether plain output, one line for each step, includes it.
    """

    key: str
    label: str
    show: Callable[[float], str] = number
    main: bool = False


DISPLAY_METRICS = (
    DisplayMetric("reward", "reward", main=True),
    DisplayMetric("rewards/*/mean", "- *"),
    DisplayMetric("tasks/*/reward", "- task *"),
    DisplayMetric("rewards/accuracies", "pairs won", percent, main=True),
    DisplayMetric("rewards/margins", "margin", main=True),
    DisplayMetric("accuracy", "accuracy", percent, main=True),
    DisplayMetric("pass_rate", "pass rate", percent, main=True),
    DisplayMetric("eval/pass@*", "eval pass@*", percent, main=True),
    DisplayMetric("eval/maj@*", "eval maj@*", percent, main=True),
    DisplayMetric("eval/*/pass@1", "eval * pass@1", percent, main=True),
    DisplayMetric("eval/accuracy", "eval accuracy", percent, main=True),
    DisplayMetric("eval/mean_length", "eval length", one_decimal, main=True),
    DisplayMetric("eval/*", "eval *", main=True),
    DisplayMetric("completions/mean_length", "length", one_decimal, main=True),
    DisplayMetric("completions/clipped_ratio", "truncated", percent),
    DisplayMetric("judge", "judge", main=True),
    DisplayMetric("frac_reward_absent", "no reward", percent),
    DisplayMetric("completions/duplicate_share", "duplicates", percent),
    DisplayMetric("completions/repeated_share", "repetition", percent),
    DisplayMetric("frac_reward_zero_std", "zero-var groups", percent, main=True),
    DisplayMetric("entropy", "entropy", main=True),
    DisplayMetric("kl", "KL", main=True),
    DisplayMetric("clip_ratio/region_mean", "clip fraction", small_percent, main=True),
    DisplayMetric("sampling/sampling_logp_difference/max", "sampler gap", scientific, main=True),
    DisplayMetric("sampling/sampling_logp_difference/mean", "- mean", scientific),
    DisplayMetric("loss", "loss", main=True),
    DisplayMetric("grad_norm", "gradient norm"),
    DisplayMetric("learning_rate", "learning rate", scientific),
    DisplayMetric("tokens_per_second", "tokens/s", count, main=True),
    DisplayMetric("rollout_tokens_per_second", "- sampling alone", count),
    DisplayMetric("update_tokens_per_second", "- training alone", count),
    DisplayMetric("mfu", "MFU of training", percent),
    DisplayMetric("peak_memory_bytes", "peak memory, bytes", count),
    DisplayMetric("reshard_time", "- seconds of moving weights"),
    DisplayMetric("reshard_bytes", "- bytes moved", count),
    DisplayMetric("staleness", "staleness in steps", count),
    DisplayMetric("rollout_wait", "- seconds waited for samples", one_decimal),
    DisplayMetric("scoring_wait", "- seconds waited for scores", one_decimal),
    DisplayMetric("num_tokens", "tokens", count),
    DisplayMetric("step_time", "seconds a step", one_decimal),
    DisplayMetric("compilations", "compilations", count),
)
"""In display order; metrics without a value are left out."""
NOT_SHOWN = "_stderr"


def select_metrics(metrics: Iterable[DisplayMetric], keys: Iterable[str]) -> list[DisplayMetric]:
    """The metrics that have a value, in the order of ``metrics``; a ``*`` becomes one metric for every match.

    Args:
        metrics: metrics to display. A key is matched by the first that fits it.
        keys: names of the metrics that have values. Standard errors (``..._stderr``) are left out.
    """
    remaining = [key for key in keys if not key.endswith(NOT_SHOWN)]
    selected = []
    for metric in metrics:
        for key, text in matches(metric.key, remaining):
            remaining.remove(key)
            selected.append(replace(metric, key=key, label=metric.label.replace("*", text)))
    return selected


def matches(pattern: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """``(name, text)`` for each name that matches a pattern.

    Args:
        pattern: a name, in which one ``*`` stands for any text, the ``text`` of the pair.
        names: names of metrics.
    """
    start, star, end = pattern.partition("*")
    return [
        (name, name[len(start) : len(name) - len(end)])
        for name in names
        if name == pattern
        or (star and name.startswith(start) and name.endswith(end) and len(name) >= len(start) + len(end))
    ]


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """A bar chart of one line, scaled from the minimum to the maximum of the bars.

    Args:
        values: the values in order. Non-finite ones are ignored.
        width: maximum number of bars. Each is the mean of an equal part of the values, or a space if none is finite.

    Returns:
        At most ``len(values)`` characters. A constant is drawn with the lowest bar.
    """
    parts = np.array_split(np.asarray(values, float), min(width, len(values)) or 1)
    means = [float(np.mean(part[np.isfinite(part)])) if np.isfinite(part).any() else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # The means of a constant differ by rounding errors.
    span = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else math.inf
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] if math.isfinite(mean) else " " for mean in means)


RANKED_BY = {"eval/pass@1": 1, "eval/reward": 1, "eval/judge": 1, "eval/accuracy": 1, "eval/loss": -1}
"""Held-out metrics that rank checkpoints, by priority; -1 if lower is better."""


def ranking_metric(rows: Sequence[Row]) -> str | None:
    """The held-out metric that ranks the evaluations among ``rows``; None without evaluations."""
    return next((name for name in RANKED_BY if any(row.get(name) is not None for row in rows)), None)


def best_evaluation(rows: Sequence[Row]) -> Row | None:
    """The evaluation with the best ranking metric, the latest on ties; None without evaluations.

    Args:
        rows: metrics rows with their ``step``, evaluations among them.
    """
    name = ranking_metric(rows)
    measured = [row for row in rows if name is not None and row.get(name) is not None]
    return max(measured, key=lambda row: (RANKED_BY[name] * row[name], row["step"]), default=None) if name else None


def closing_line(before: Row, after: Row, *, steps: int, seconds: float, run_dir: str | Path) -> str:
    """The changes between two evaluations of a run, and the files in its folder.

    Args:
        before: metrics before training, such as ``eval/pass@1``.
        after: metrics after training. Only metrics in both are compared, fractions in percentage points.
        steps: number of training steps.
        seconds: wall-clock time of the run.
        run_dir: folder of the run; hidden files are not listed.
    """
    both = [key for key, value in before.items() if value is not None and after.get(key) is not None]
    changes = []
    for metric in select_metrics(DISPLAY_METRICS, both):
        old, new = float(before[metric.key]), float(after[metric.key])
        change = f"{100 * (new - old):+.1f} points" if metric.show is percent else f"{new - old:+.4g}"
        changes.append(f"{metric.label} {metric.show(old)} -> {metric.show(new)} ({change})")
    text = ", ".join(changes) or "no metric was measured both before and after"
    return f"{text}; {steps} steps in {duration(seconds)}\n{_contents(Path(run_dir))}"


def _contents(run_dir: Path) -> str:
    paths = [path for path in run_dir.iterdir() if not path.name.startswith(".")]
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in paths)
    return f"everything is in {run_dir}: {', '.join(names)}"
