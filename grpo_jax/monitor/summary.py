"""The closing line of a run: what was gained, and where everything lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo_jax.monitor.figures import FIGURES, duration, percent, select_figures
from grpo_jax.monitor.metrics import Row

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
