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

from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import draw_stages
from grpo_jax.monitor.plots import Curve, Panel, draw

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
    runs = [read_jsonl(run / "metrics.jsonl") for run in config.runs]
    panels = [
        Panel(
            TITLES.get(key, key),
            (Curve(key, "", COLOURS[n % len(COLOURS)], points=key.startswith("eval/"), runs=runs),),
            limits=(0.0, 1.02 if key in SHARES else None),
        )
        for n, key in enumerate(config.keys)
    ]
    draw(panels, config.out, columns=len(panels))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
