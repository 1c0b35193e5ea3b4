"""Staleness: time of a step and held-out accuracy where scoring is as slow as training.

    python experiments/bench/staleness.py
    python experiments/bench/staleness.py --seconds 2 --seeds 0 1 2

The toy preset of grpo.py, with a further reward that sleeps and is always 0, as a judge on another machine would be
waited for. Prints one JSON line: for each staleness the median seconds of a step, of them those that it waited for
scores and for sampling, and the curve of pass@1 on held-out problems, one entry for each seed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.tasks.toy_config import TOY_FOLDER

SCRIPTS = Path(__file__).parent.parent
SECONDS = "STALENESS_SECONDS"
FIRST_STEPS = 5
"""Steps at the start that are left out of times: programs are compiled."""


@dataclass(frozen=True)
class Config:
    """Runs of the comparison."""

    seconds: float = 1.0
    """Time that scoring a batch takes."""
    staleness: tuple[int, ...] = (0, 1, 2)
    """Values to compare."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each."""
    num_steps: int = 60
    """Steps of each run."""
    folder: Path | None = None
    """Where the runs are kept, and found again. Default: a temporary folder."""


def slow(completions: list[str], **columns: list[Any]) -> list[float]:
    """A reward of 0 that takes its time and no processor."""
    time.sleep(float(os.environ[SECONDS]))
    return [0.0] * len(completions)


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary)
        result = {}
        for staleness in config.staleness:
            runs = [run(config, folder, staleness, seed) for seed in config.seeds]
            result[f"staleness_{staleness}"] = {name: [run[name] for run in runs] for name in runs[0]}
    print(json.dumps({"scoring_seconds": config.seconds, **result}))


def run(config: Config, folder: Path, staleness: int, seed: int) -> dict[str, Any]:
    """Times and accuracies of one run; runs of a seed start from the same toy model."""
    name = f"{seed}-{staleness}"
    base = folder / f"{seed}-{config.staleness[0]}" / TOY_FOLDER
    command = [
        *(sys.executable, SCRIPTS / "grpo.py", "toy", "--staleness", staleness, "--seed", seed, "--plain"),
        *("--reward", f"{Path(__file__).stem}:slow", "--reward-workers", 0, "--num-steps", config.num_steps),
        *("--run-dir", folder / name),
        *(("--model", base) if staleness != config.staleness[0] else ()),
    ]
    paths = [str(SCRIPTS.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), SECONDS: str(config.seconds)}
    subprocess.run([str(part) for part in command], env=environment, check=True, stdout=sys.stderr)
    rows = read_jsonl(folder / name / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row and row["step"] > FIRST_STEPS]
    accuracies = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    waits = {"scoring_seconds": "scoring_wait", "rollout_seconds": "rollout_wait"}
    on_policy = {"scoring_wait": "scoring_time", "rollout_wait": "rollout_time"}
    return {
        "step_seconds": round(median(row["step_time"] for row in steps), 2),
        **{
            name: round(median(row.get(wait, row[on_policy[wait]]) for row in steps), 2) for name, wait in waits.items()
        },
        "pass_at_1": [round(accuracy, 3) for accuracy in accuracies],
    }


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
