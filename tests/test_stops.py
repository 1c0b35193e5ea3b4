"""Runs of every experiment that are stopped or meet a bad batch: what they end with, and what they go on to."""

import importlib
import json
import os
import signal
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from experiments import grpo
from grpo_jax.config.presets import preset
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run
from tests.same_runs import results, write_files

SUMS = "--dataset sums --template {question}"
LENGTHS = "--max-prompt-length 12 --max-completion-length 8"
ONLINE = f"{SUMS} {LENGTHS} --num-steps 3 --save-every 1 --num-prompts 4 --eval-size 8"
ONLINE += " --reward tests.batch_rewards:brevity --reward-workers 0"  # which tells completions of any model apart
PAIRS = f"--dataset pairs.jsonl --template {{question}} --num-pairs 16 --num-epochs 1 {LENGTHS}"
FLAGS = {
    "grpo": f"{ONLINE} --group-size 4",
    "ppo": ONLINE,
    "sft": f"{SUMS} --num-generated 32 --num-epochs 1 --max-length 64 --num-sequences 8 {LENGTHS} --num-eval-prompts 0",
    "dpo": f"{PAIRS} --num-eval-prompts 0",
    "reward_model": PAIRS,
    "rejection_sampling": f"{SUMS} --max-problems 24 --num-samples 4 --num-prompts 2 --threshold 0 {LENGTHS}",
    "evaluate": f"{SUMS} --eval-size 24 --num-samples 2 --num-prompts 2 {LENGTHS}",
}


@pytest.fixture
def start(small, tmp_path):
    """Runs an experiment by its command, in a folder of that name; gives its exit status."""
    files = write_files(tmp_path)

    def run(name, folder, *more):
        module = importlib.import_module(f"experiments.{name}")
        flags = [files.get(flag, flag) for flag in FLAGS[name].split()]
        args = ["--model", small, *flags, "--run-dir", str(tmp_path / folder), "--mesh.data", "1", "--plain", *more]
        return run_command(type(preset(name)), module.main, description="", args=args)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "grpo"])  # which test_grpo.py stops
def test_every_experiment_ends_with_75_after_sigterm_and_goes_on_to_the_same_results(
    name, start, tmp_path, monkeypatch
):
    assert start(name, "whole") == 0
    log, rows = Run.log, []

    def stopping(self, row):
        log(self, row)
        rows.append(row)
        if len([row for row in rows if "loss" in row or "num_problems" in row]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stopping)
        assert start(name, "stopped") == 75
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert not (stopped / "summary.json").exists()
    if name not in ("rejection_sampling", "evaluate"):  # whose state is what they have written
        assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["1"]
    written = "completions.jsonl" if name == "evaluate" else "metrics.jsonl"  # which it writes anew at the end
    assert 0 < len(read_jsonl(stopped / written)) < len(read_jsonl(whole / written))
    assert start(name, "stopped") == 0
    (metrics, completions, weights), expected = results(stopped), results(whole)
    assert (metrics, completions) == expected[:2]
    chex.assert_trees_all_equal(weights, expected[2])
    for file in {"dataset.jsonl"} & {path.name for path in whole.iterdir()}:
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()


@pytest.fixture
def bad_second_batch(monkeypatch):
    """The advantages of the second batch of a process are infinite."""
    make, made = grpo.make_train_batch, []

    def make_bad(*args, **kwargs):
        batch = make(*args, **kwargs)
        made.append(batch)
        return replace(batch, advantages=batch.advantages + np.float32(np.inf)) if len(made) == 2 else batch

    monkeypatch.setattr(grpo, "make_train_batch", make_bad)


def test_a_bad_batch_is_skipped_by_choice_and_the_run_goes_on_as_if_it_were_not_there(
    start, tmp_path, monkeypatch, bad_second_batch, capsys
):
    save, states = Run.save, {}

    def keep(self, step, state, position):
        states[step] = jax.tree.map(np.array, state)
        save(self, step, state, position)

    monkeypatch.setattr(Run, "save", keep)
    assert start("grpo", "run", "--bad-updates", "skip", "--kl-coef", "0.05") == 0
    chex.assert_trees_all_equal(states[2], states[1])  # parameters, moments and counters
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), states[3].params, states[1].params)
    assert any(jax.tree.leaves(differ))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0]
    assert "ALARM at step 2: bad_updates" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["alarms"]["bad_updates"] == 2


@pytest.mark.slow
def test_a_bad_batch_is_refused_by_default_and_the_same_command_goes_on_from_the_last_checkpoint(
    start, tmp_path, capsys, bad_second_batch
):
    assert start("grpo", "run", "--kl-coef", "0.05") == 2
    said = capsys.readouterr().err
    assert "error: step 2: grad_norm is nan, loss is -inf, in 1 of 1 updates. Such an update is not applied." in said
    assert "complete checkpoints: [1]. The same command resumes" in said
    assert "set --bad-updates to skip" in said
    assert "Traceback" not in said
    assert start("grpo", "run", "--kl-coef", "0.05") == 0  # the batch of step 2 is sound this time
    assert start("grpo", "whole", "--kl-coef", "0.05") == 0
    (metrics, completions, weights), expected = results(tmp_path / "run"), results(tmp_path / "whole")
    assert (metrics, completions) == expected[:2]
    chex.assert_trees_all_equal(weights, expected[2])
