"""Plot metrics of several runs of one experiment, one line per run.

python experiments/plot_runs.py runs/seed0 runs/seed1 runs/seed2 --out experiments/grpo.png
python experiments/plot_runs.py runs/dpo0 runs/dpo1 runs/dpo2 --keys eval/accuracy eval/judge --out experiments/dpo.png
python experiments/plot_runs.py runs/r1_0 runs/r1_1 runs/r1_2 --chain --out experiments/r1.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import draw_stages

TITLES = {
    "eval/pass@1": "pass@1, held out",
    "eval/maj@16": "majority of 16, held out",
    "eval/mean_length": "completion length (tokens), held out",
    "eval/accuracy": "pairs in the right order, held out",
    "eval/loss": "loss, held out",
    "eval/judge": "quality of replies, held out",
    "eval/calibration_error": "calibration error, held out",
    "judge": "true quality of replies",
    "reward": "reward",
    "kl": "KL to the reference (nats a token)",
}
SHARES = ("eval/pass@1", "eval/maj@16", "eval/accuracy", "eval/judge", "judge")
COLOURS = ("tab:orange", "tab:purple", "tab:blue")


@dataclass(frozen=True)
class Config:
    """Runs and metrics to plot."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    keys: tuple[str, ...] = ("eval/pass@1", "eval/maj@16", "eval/mean_length")
    """Metrics, one panel each."""
    chain: bool = False
    """Plot runs of r1.py, stage by stage."""
    out: Path = Path("experiments/grpo.png")
    """Image file to write."""


def main(config: Config) -> None:
    if config.chain:
        draw_stages([json.loads((run / "summary.json").read_text())["stages"] for run in config.runs], config.out)
        return
    figure = Figure(figsize=(4 * len(config.keys), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(config.keys), squeeze=False)[0]
    for n, (axes, key) in enumerate(zip(panels, config.keys, strict=True)):
        for run in config.runs:
            rows = [row for row in read_jsonl(run / "metrics.jsonl") if key in row]
            colour = COLOURS[n % len(COLOURS)]
            marks = "o-" if key.startswith("eval/") else "-"
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], marks, color=colour, alpha=0.6)
        axes.set_title(TITLES.get(key, key), loc="left")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.02 if key in SHARES else None)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(config.out, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
