"""Slow proofs: the default run learns what it claims, and survives being killed without warning."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GUESSING

from experiments import grpo
from grpo_jax.config.presets import preset
from grpo_jax.config.run import MeshConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.tasks.toy_config import ToyConfig
from grpo_jax.tasks.toy_model import make_toy_model
from tests.runs import count_programs

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.loop.collector.count_compilations", count_programs)
        grpo.main(replace(preset("grpo"), run_dir=folder, mesh=MeshConfig(data=1), plain=True))
    return folder


def test_the_default_run_learns(default_run):
    summary = json.loads((default_run / "summary.json").read_text())
    assert summary["pass_at_1_before"] <= 0.20
    assert summary["pass_at_1_after"] >= 0.85
    assert summary["maj_at_16_after"] >= 0.95
    assert summary["mean_length_after"] > 2 * summary["mean_length_before"]
    assert summary["alarms"] == {}  # an honest run
    rows = [row for row in read_jsonl(default_run / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 60
    assert max(row["sampling/sampling_logp_difference/mean"] for row in rows) < 1e-6
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) <= 1e-5
    # A rollout's smaller batches are compiled as they are met: of 64 rows a device 32, 16 and 8, each with a program
    # that gathers and one that draws. So are those of the evaluations' pools, with one that joins.
    compiled = {"steps": 0, "evaluations": 0}
    for before, row in itertools.pairwise(rows):
        kind = "evaluations" if before["step"] % 10 == 0 else "steps"
        compiled[kind] += row["compilations"] - before["compilations"]
    assert compiled["steps"] <= 6
    assert compiled["evaluations"] <= 9


def test_s1_kill_9_and_the_same_command_again(tmp_path):
    make_toy_model(tmp_path / "base", ToyConfig(**GUESSING))

    def start(run):
        options = "--num-steps 8 --num-prompts 4 --group-size 4 --max-prompt-length 12 --max-completion-length 10"
        options += " --eval-size 4 --eval-samples 4 --save-every 2 --num-epochs 2 --kl-coef 0.01 --plain"
        command = [sys.executable, "experiments/grpo.py", "--model", str(tmp_path / "base"), "--run-dir", str(run)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        return subprocess.Popen(
            [*command, "--dataset", "sums", "--template", "{question}", *options.split()],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "whole").wait(timeout=300) == 0

    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoints" / "4").exists():
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert start(tmp_path / "killed").wait(timeout=300) == 0

    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_planted_hole_is_found_and_noticed(tmp_path):
    """One answer to everything pays; the alarm for it fires, and no problem is solved for it."""
    options = ["--holes", "hard_coded", "--num-steps", "40", "--run-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    subprocess.run(
        [sys.executable, "experiments/reward_hacking.py", *options],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=1800,
    )
    told = json.loads((tmp_path / "table.json").read_text())["hard_coded"]
    assert told["alarms"]["constant_answer"] <= 20
    assert told["reward_at_end"] > 0.9
    assert told["truth_at_end"] < 0.2
    assert (tmp_path / "curves.png").exists()
