"""Figures: panels of curves, and those of a run's metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grpo_jax.jsonl import Row, write_atomically
from grpo_jax.monitor.display import matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563eb", "#ea580c", "#059669", "#7c3aed", "#94a3b8"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#dc2626", "#0891b2", "#ca8a04", "#db2777")
INK, FAINT = "#1e293b", "#e2e8f0"
COLUMNS, MAX_PANELS = 3, 9


@dataclass(frozen=True)
class Curve:
    """A quantity in a panel.

    Attributes:
        key: its name in the rows. In ``PANELS``, a ``*`` matches any text and stands for the same text in ``label``.
        label: name in the legend.
        colour: a colour of matplotlib. In ``PANELS``, "" is a colour of its own for each text, the same in all panels.
        points: whether to draw a marker for each value instead of a running mean, for metrics of evaluations.
        dotted: whether to draw a dotted line, for references.
        runs: the rows of each run: a line for each. Between runs whose points have the same x, the range is shaded.
    """

    key: str
    label: str
    colour: str
    points: bool = False
    dotted: bool = False
    runs: Sequence[Sequence[Row]] = ()


@dataclass(frozen=True)
class Panel:
    """Curves that share axes.

    Attributes:
        title: above the axes.
        curves: the curves.
        scale: ``linear``, ``log`` or ``percent``.
        limits: lower and upper end of the y axis; None for an end that fits the values.
        x: name of the x value in the rows.
        x_label: below the axes; None for ``x``.
        ticks: names of the x values 0, 1, ...; empty for numbers.
        marks: vertical lines, as label -> x.
        min_curves: fewest curves with which ``plot_curves`` shows the panel.
    """

    title: str
    curves: Sequence[Curve]
    scale: str = "linear"
    limits: tuple[float | None, float | None] = (None, None)
    x: str = "step"
    x_label: str | None = None
    ticks: Sequence[str] = ()
    marks: Mapping[str, int] = field(default_factory=dict)
    min_curves: int = 1


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
    Panel("each reward", (Curve("rewards/*/mean", "*", ""),), min_curves=2),
    Panel("reward of each task", (Curve("tasks/*/reward", "*", ""),), min_curves=2),
    Panel(
        "each task, held out (pass@1 or reward)",
        (Curve("eval/*/pass@1", "*", "", points=True), Curve("eval/*/reward", "*", "", points=True)),
        min_curves=2,
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
    Panel("groups without variance", (Curve("frac_reward_zero_std", "share", BLUE),), "percent", (0.0, 1.0)),
    Panel("gradient norm", (Curve("grad_norm", "norm", BLUE),)),
    Panel("loss", (Curve("loss", "loss", BLUE),)),
    Panel("learning rate", (Curve("learning_rate", "rate", BLUE),)),
)
"""By priority: a picture shows the first nine panels that have data."""


def series(rows: Sequence[Row], key: str, *, x: str = "step", positive: bool = False) -> Float[np.ndarray, "N 2"]:
    """``(x, value)`` pairs of the finite values of a metric, by x.

    Args:
        rows: metrics rows.
        key: name of the metric.
        x: name of the x value.
        positive: whether to leave out values that are not positive, for logarithmic axes.
    """
    pairs = [(float(row[x]), float(row[key])) for row in rows if row.get(key) is not None]
    kept = sorted(pair for pair in pairs if math.isfinite(pair[1]) and not (positive and pair[1] <= 0))
    return np.asarray(kept, float).reshape(-1, 2)


def running_mean(values: Float[np.ndarray, " N"], window: int) -> Float[np.ndarray, " N"]:
    """The centred moving average; over fewer values at the ends.

    Args:
        values: the values.
        window: number of values to average, odd.
    """
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def plot_curves(rows: Sequence[Row], path: str | Path, *, title: str) -> None:
    """Plot the metrics of a run as a PNG that is legible at 900 pixels width.

    Shows the first nine of ``PANELS`` that have data.

    Args:
        rows: metrics rows with their ``step``.
        path: output file; its folder must exist.
        title: title of the picture.

    Raises:
        ValueError: the rows have none of the plotted metrics; the message lists them.
    """
    names = sorted({name for row in rows for name in row})
    panels, colours = [], {}

    def colour_of(curve: Curve, text: str) -> str:
        return curve.colour or colours.setdefault(text, PALETTE[len(colours) % len(PALETTE)])

    for panel in PANELS:
        curves = [
            replace(curve, key=name, label=curve.label.replace("*", text), colour=colour_of(curve, text), runs=(rows,))
            for curve in panel.curves
            for name, text in matches(curve.key, names)
        ]
        curves = [curve for curve in curves if _lines(panel, curve)]
        if len(curves) >= panel.min_curves:
            panels.append(replace(panel, curves=curves))
    if not panels:
        raise ValueError(
            f"none of the {len(rows)} rows has a finite value to plot; one of these keys is needed: "
            f"{[curve.key for panel in PANELS for curve in panel.curves]}"
        )
    draw(panels[:MAX_PANELS], path, title=title)


def draw(panels: Sequence[Panel], path: str | Path, *, title: str = "", columns: int = COLUMNS) -> None:
    """Draw panels as one picture.

    Values of every step are thin lines, and bold a running mean over a twentieth of them. A panel has a legend unless
    the first one has the same.

    Args:
        panels: the panels, row by row.
        path: output file, in the format of its suffix; its folder must exist.
        title: title of the picture.
        columns: most panels in a row.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines + 0.5 * bool(title)), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    first: list[str] = []
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        _style(axes, panel)
        for curve in panel.curves:
            _draw(axes, panel, curve)
        axes.set_ylim(*panel.limits)
        labels = axes.get_legend_handles_labels()[1]
        if len(labels) > 1 and labels != first:
            axes.legend(fontsize=9.5, framealpha=0.8, edgecolor="none", labelcolor=INK)
        first = labels if place == 1 else first
        if place > len(panels) - columns:
            axes.set_xlabel(panel.x if panel.x_label is None else panel.x_label, fontsize=10, color=INK)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.removeprefix("."))
    write_atomically(Path(path), picture.getvalue())


def _lines(panel: Panel, curve: Curve) -> list[Float[np.ndarray, "N 2"]]:
    """The points of each run that has any."""
    lines = (series(rows, curve.key, x=panel.x, positive=panel.scale == "log") for rows in curve.runs)
    return [points for points in lines if len(points)]


def _draw(axes: Axes, panel: Panel, curve: Curve) -> None:
    lines = _lines(panel, curve)
    for number, points in enumerate(lines):
        x, y = points.T
        look: dict[str, Any] = {"color": curve.colour, "label": None if number else curve.label}
        look["alpha"] = 1 if len(lines) == 1 else 0.7
        if curve.dotted:
            axes.plot(x, y, linestyle=":", linewidth=1.5, **look)
        elif curve.points or len(points) == 1:
            size = 5 if len(lines) == 1 else 3
            axes.plot(x, y, marker="o", markersize=size, linewidth=1.5, zorder=4, **look)
        else:
            axes.plot(x, y, color=curve.colour, alpha=0.25, linewidth=1)
            axes.plot(x, running_mean(y, len(y) // 20 | 1), linewidth=2, zorder=3, **look)
    if len(lines) > 1 and all(np.array_equal(points[:, 0], lines[0][:, 0]) for points in lines):
        values = np.stack(lines)[:, :, 1]
        axes.fill_between(lines[0][:, 0], values.min(0), values.max(0), color=curve.colour, alpha=0.12, linewidth=0)


def _style(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(panel.title, fontsize=11.5, color=INK, loc="left")
    axes.tick_params(labelsize=10, colors=INK, color=GREY)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=45)
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.tick_params(which="minor", labelsize=8, colors=INK, color=GREY)
    if panel.scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for place, (label, x) in enumerate(panel.marks.items()):
        axes.axvline(x, color=GREY, linewidth=1)
        height = 0.97 - 0.09 * place
        axes.text(x, height, f" {label}", fontsize=8, va="top", color=INK, transform=axes.get_xaxis_transform())
