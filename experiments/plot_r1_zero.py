"""The README's figure: held-out accuracy and completion length of several runs of r1_zero.py, one line a seed.

python experiments/plot_r1_zero.py runs/seed0 runs/seed1 runs/seed2 --out experiments/r1_zero.png
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_jax.monitor.metrics import read_jsonl

PANELS = (
    ("eval/pass@1", "pass@1, held out", "tab:orange"),
    ("eval/maj@16", "majority of 16, held out", "tab:purple"),
    ("eval/mean_length", "completion length (tokens), held out", "tab:blue"),
)


@dataclass(frozen=True)
class Config:
    """Which runs, and where the picture goes."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path = Path("experiments/r1_zero.png")
    """The picture."""


def main(config: Config) -> None:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, colour) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for run in config.runs:
            rows = [row for row in read_jsonl(run / "metrics.jsonl") if key in row]
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", color=colour, alpha=0.6)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylim(0, None if "length" in key else 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(config.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
