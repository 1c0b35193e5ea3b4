"""Plots of a run's metrics as one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grpo_jax.jsonl import Row, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563eb", "#ea580c", "#059669", "#7c3aed", "#94a3b8"
INK, FAINT = "#1e293b", "#e2e8f0"
COLUMNS, MAX_PANELS = 3, 6


@dataclass(frozen=True)
class Curve:
    """A metric in a panel.

    Attributes:
        key: name of the metric. A ``*`` at the end matches any text and stands for the same text in ``label``.
        label: name in the legend.
        colour: hexadecimal colour.
        points: whether to draw a marker for each value instead of a running mean, for metrics of evaluations.
    """

    key: str
    label: str
    colour: str
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share axes, under one title; ``scale`` is ``linear``, ``log`` or ``percent``."""

    title: str
    curves: tuple[Curve, ...]
    scale: str = "linear"


PANELS = (
    Panel(
        "reward and pass rate",
        (
            Curve("reward", "reward", BLUE),
            Curve("pass_rate", "pass rate", GREEN),
            Curve("eval/pass@1", "pass@1, held out", ORANGE, points=True),
            Curve("eval/maj@*", "maj@*, held out", PURPLE, points=True),
        ),
    ),
    Panel(
        "completion length (tokens)",
        (
            Curve("completions/mean_length", "training", BLUE),
            Curve("eval/mean_length", "held out", ORANGE, points=True),
        ),
    ),
    Panel(
        "pairs in the right order",
        (
            Curve("accuracy", "training", BLUE),
            Curve("rewards/accuracies", "training", BLUE),
            Curve("eval/accuracy", "held out", ORANGE, points=True),
        ),
    ),
    Panel("loss, held out", (Curve("eval/loss", "loss", ORANGE, points=True),)),
    Panel("grade of the judge, held out", (Curve("eval/judge", "grade", PURPLE, points=True),)),
    Panel("entropy (nats a token)", (Curve("entropy", "entropy", BLUE),)),
    Panel("KL to the reference", (Curve("kl", "KL", BLUE),)),
    Panel(
        "sampler/trainer gap in log-probability",
        (
            Curve("sampling/sampling_logp_difference/mean", "mean", BLUE),
            Curve("sampling/sampling_logp_difference/max", "largest", GREY),
        ),
        scale="log",
    ),
    Panel("groups without variance", (Curve("frac_reward_zero_std", "share", BLUE),), scale="percent"),
    Panel("gradient norm", (Curve("grad_norm", "norm", BLUE),)),
    Panel("loss", (Curve("loss", "loss", BLUE),)),
    Panel("learning rate", (Curve("learning_rate", "rate", BLUE),)),
)
"""By priority: a picture shows the first six panels that have data."""


def series(rows: Sequence[Row], key: str, *, positive: bool = False) -> Float[np.ndarray, "N 2"]:
    """``(step, value)`` pairs of the finite values of a metric, by step; with ``positive``, only positive values."""
    pairs = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    kept = sorted(pair for pair in pairs if math.isfinite(pair[1]) and not (positive and pair[1] <= 0))
    return np.asarray(kept, float).reshape(-1, 2)


def running_mean(values: Float[np.ndarray, " N"], window: int) -> Float[np.ndarray, " N"]:
    """The centred moving average over ``window`` (odd) values, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def plot_curves(rows: Sequence[Row], path: str | Path, *, title: str) -> None:
    """Plot the metrics of a run as a PNG that is legible at 900 pixels width.

    Shows the first six of ``PANELS`` that have data: values of every step as thin lines, and bold a running mean over a
    twentieth of the run.

    Args:
        rows: metrics rows with their ``step``.
        path: output file; its folder must exist.
        title: title of the picture.

    Raises:
        ValueError: the rows have none of the plotted metrics; the message lists them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {name for row in rows for name in row}
    panels = [replace(panel, curves=_present(panel.curves, names)) for panel in PANELS]
    shown = [panel for panel in panels if any(len(_points(rows, panel, curve)) for curve in panel.curves)][:MAX_PANELS]
    if not shown:
        raise ValueError(
            f"none of the {len(rows)} rows has a finite value to plot; one of these keys is needed: "
            f"{[curve.key for panel in PANELS for curve in panel.curves]}"
        )
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines + 0.5), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    for place, panel in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, place)
        _draw(axes, panel, rows)
        if place > len(shown) - columns:
            axes.set_xlabel("step", fontsize=10, color=INK)
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomically(Path(path), picture.getvalue())


def _present(curves: Sequence[Curve], names: Collection[str]) -> tuple[Curve, ...]:
    """The curves whose metrics are in ``names``; a ``*`` becomes one curve for every match."""
    matches = []
    for curve in curves:
        start = curve.key.removesuffix("*")
        named = [name for name in names if name == curve.key or (start != curve.key and name.startswith(start))]
        for name in sorted(named):
            matches.append(replace(curve, key=name, label=curve.label.replace("*", name.removeprefix(start))))
    return tuple(matches)


def _points(rows: Sequence[Row], panel: Panel, curve: Curve) -> Float[np.ndarray, "N 2"]:
    return series(rows, curve.key, positive=panel.scale == "log")


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    _style(axes, panel)
    for curve in panel.curves:
        points = _points(rows, panel, curve)
        if len(points) == 0:
            continue
        steps, values = points.T
        look: dict[str, Any] = {"color": curve.colour, "label": curve.label}
        if curve.points or len(points) == 1:
            axes.plot(steps, values, marker="o", markersize=5, linewidth=1.5, zorder=4, **look)
        else:
            window = len(points) // 20 | 1
            axes.plot(steps, values, color=curve.colour, alpha=0.25, linewidth=1)
            axes.plot(steps, running_mean(values, window), linewidth=2, zorder=3, **look)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=9.5, frameon=False, labelcolor=INK)


def _style(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(panel.title, fontsize=11.5, color=INK, loc="left")
    axes.tick_params(labelsize=10, colors=INK, color=GREY)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.tick_params(which="minor", labelsize=8, colors=INK, color=GREY)
    if panel.scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(0, 1)
