"""Which metrics are shown, how they are formatted, and the closing line of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grpo_jax.jsonl import Row


def number(value: float) -> str:
    """Four digits after the point, fewer from 1 on; an exponent where those would not tell it from 0 or be too long."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and not 0.001 <= size < 10000:
        return f"{value:.1e}"
    return f"{value:.{4 if size < 1 else 3 if size < 100 else 1}f}"


def scientific(value: float) -> str:
    """One decimal and an exponent."""
    return f"{value:.1e}"


def one_decimal(value: float) -> str:
    """One decimal and separated thousands."""
    return f"{value:,.1f}"


def percent(value: float) -> str:
    """A share, in percent with one decimal."""
    return f"{100 * value:.1f}%"


def small_percent(value: float) -> str:
    """A small share, in percent with two decimals."""
    return f"{100 * value:.2f}%"


def count(value: float) -> str:
    """A count in three or four digits and a unit: ``950``, ``12.3k``, ``1.2M``, ``3.4B``."""
    for limit, scale, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit:
            return f"{value / scale:.1f}{unit}" if unit else f"{value:.0f}"
    return f"{value / 1e9:.1f}B" if math.isfinite(value) else str(value)


def duration(seconds: float | int | None) -> str:
    """``1:02:03`` for a number of seconds; ``-:--:--`` where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@dataclass(frozen=True)
class Figure:
    """One figure that people see.

    Attributes:
        key: the metric's name. One ``*`` stands for any text, and for the same text in the label.
        label: what it is called on the screen.
        show: the value as text.
        main: whether it is part of the one line a step gets without a terminal.
    """

    key: str
    label: str
    show: Callable[[float], str] = number
    main: bool = False


FIGURES = (
    Figure("reward", "reward", main=True),
    Figure("rewards/*/mean", "- *"),
    Figure("rewards/accuracies", "pairs won", percent, main=True),
    Figure("rewards/margins", "margin", main=True),
    Figure("accuracy", "accuracy", percent, main=True),
    Figure("pass_rate", "pass rate", percent, main=True),
    Figure("eval/pass@*", "eval pass@*", percent, main=True),
    Figure("eval/maj@*", "eval maj@*", percent, main=True),
    Figure("eval/accuracy", "eval accuracy", percent, main=True),
    Figure("eval/mean_length", "eval length", one_decimal, main=True),
    Figure("eval/*", "eval *", main=True),
    Figure("completions/mean_length", "length", one_decimal, main=True),
    Figure("completions/clipped_ratio", "truncated", percent),
    Figure("judge", "judge", main=True),
    Figure("frac_reward_absent", "no reward", percent),
    Figure("completions/duplicate_share", "duplicates", percent),
    Figure("completions/repeated_share", "repetition", percent),
    Figure("frac_reward_zero_std", "zero-var groups", percent, main=True),
    Figure("entropy", "entropy", main=True),
    Figure("kl", "KL", main=True),
    Figure("clip_ratio/region_mean", "clip fraction", small_percent, main=True),
    Figure("sampling/sampling_logp_difference/max", "sampler gap", scientific, main=True),
    Figure("sampling/sampling_logp_difference/mean", "- mean", scientific),
    Figure("loss", "loss", main=True),
    Figure("grad_norm", "gradient norm"),
    Figure("learning_rate", "learning rate", scientific),
    Figure("tokens_per_second", "tokens/s", count, main=True),
    Figure("rollout_tokens_per_second", "- sampling alone", count),
    Figure("reshard_time", "- seconds of moving weights"),
    Figure("reshard_bytes", "- bytes moved", count),
    Figure("num_tokens", "tokens", count),
    Figure("step_time", "seconds a step", one_decimal),
    Figure("compilations", "compilations", count),
)
"""What is shown, in this order, of the metrics that are there."""
NOT_SHOWN = "_stderr"


def select_figures(figures: Iterable[Figure], keys: Iterable[str]) -> list[Figure]:
    """The figures that have a value, in their order, each once; a ``*`` becomes one figure for every key it fits.

    Standard errors are left out.
    """
    remaining = [key for key in keys if not key.endswith(NOT_SHOWN)]
    selected = []
    for figure in figures:
        start, star, end = figure.key.partition("*")
        for key in [key for key in remaining if key == figure.key or (star and _fits(key, start, end))]:
            remaining.remove(key)
            text = key[len(start) : len(key) - len(end)]
            selected.append(replace(figure, key=key, label=figure.label.replace("*", text)))
    return selected


def _fits(key: str, start: str, end: str) -> bool:
    return key.startswith(start) and key.endswith(end) and len(key) >= len(start) + len(end)


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of ``values`` as ``width`` bars from their least to their greatest.

    A bar stands for the mean of its share of the values; where none of them is finite there is a space. There are no
    more bars than values; a constant stays at the lowest.
    """
    parts = np.array_split(np.asarray(values, float), min(width, len(values)) or 1)
    means = [float(np.mean(part[np.isfinite(part)])) if np.isfinite(part).any() else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # A constant's means differ by rounding, and that is no course.
    span = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else math.inf
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] if math.isfinite(mean) else " " for mean in means)


RANKED_BY = {"eval/pass@1": 1, "eval/reward": 1, "eval/judge": 1, "eval/accuracy": 1, "eval/loss": -1}
"""Held-out figures that rank the checkpoints of a run, the first that is there; -1 where less is better."""


def ranking_figure(rows: Sequence[Row]) -> str | None:
    """The name of the held-out figure that ranks the evaluations among these rows; None without evaluations."""
    return next((name for name in RANKED_BY if any(row.get(name) is not None for row in rows)), None)


def best_evaluation(rows: Sequence[Row]) -> Row | None:
    """The evaluation with the best held-out figure, the latest of equal ones; None without evaluations.

    Args:
        rows: metrics with their ``step``, as ``read_jsonl`` returns them.
    """
    name = ranking_figure(rows)
    measured = [row for row in rows if name is not None and row.get(name) is not None]
    return max(measured, key=lambda row: (RANKED_BY[name] * row[name], row["step"]), default=None) if name else None


def closing_line(before: Row, after: Row, *, steps: int, seconds: float, run_dir: str | Path) -> str:
    """What changed between two evaluations of a run, and the files it leaves behind.

    Only figures that both have are compared; a share is compared in percentage points.

    Args:
        before: metrics before training, such as ``eval/pass@1``.
        after: the same after it.
        steps: how many steps were taken.
        seconds: how long the run took.
        run_dir: the folder of the run; what it holds is listed, hidden files left out.
    """
    both = [key for key, value in before.items() if value is not None and after.get(key) is not None]
    changes = []
    for figure in select_figures(FIGURES, both):
        old, new = float(before[figure.key]), float(after[figure.key])
        gain = f"{100 * (new - old):+.1f} points" if figure.show is percent else f"{new - old:+.4g}"
        changes.append(f"{figure.label} {figure.show(old)} -> {figure.show(new)} ({gain})")
    gained = ", ".join(changes) or "no figure was measured both before and after"
    return f"{gained}; {steps} steps in {duration(seconds)}\n{_contents(Path(run_dir))}"


def _contents(run_dir: Path) -> str:
    paths = [path for path in run_dir.iterdir() if not path.name.startswith(".")]
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in paths)
    return f"everything is in {run_dir}: {', '.join(names)}"
