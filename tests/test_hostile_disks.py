"""A run on a disk that is damaged, read-only and full, whose clock was set back: it ends as the unbroken run."""

import contextlib
import errno
import subprocess
import time

import chex
import pytest

from experiments import grpo
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.loop import run as run_module
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run
from grpo_jax.models import hf
from tests.same_runs import results

FLAGS = (
    "--dataset sums --template {question} --max-prompt-length 12 --max-completion-length 8 --num-steps 3 "
    "--num-prompts 4 --group-size 4 --eval-size 4 --samples-every 1 --save-every 1 --mesh.data 1 --plain"
)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.fixture
def disk(mounted):
    """A file system of eight megabytes."""
    return mounted("8m")


def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.fixture
def start(small, capsys):
    """Runs the experiment in a folder; gives its exit status and what it said."""

    def run(folder):
        args = ["--model", small, *FLAGS.split(), "--run-dir", str(folder)]
        capsys.readouterr()
        status = run_command(GRPOConfig, grpo.main, description="", args=args)
        return status, "".join(capsys.readouterr())

    return run


FULL = {
    "/run/model cannot be written: ": (hf, "save_params"),
    "/run/curves.png: No space left on device": (run_module, "plot_curves"),
    "/run/summary.json: No space left on device": (Run, "write_summary"),
}
"""The message if the disk is full when the function is called: module and name of the function, by message."""


@pytest.mark.slow
def test_a_run_ends_as_the_unbroken_one_on_a_disk_that_is_damaged_read_only_and_full(
    start, disk, tmp_path, monkeypatch
):
    run, log, now = disk / "run", Run.log, time.time

    def failing(self, row):
        if row["step"] == 3:
            raise OSError(errno.EIO, "Input/output error", str(self.metrics_log.path))
        log(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", failing)
        status, said = start(run)
    assert status == 2
    assert "/run/metrics.jsonl: Input/output error" in said
    for name, end in {"metrics.jsonl": b'{"step": 3, "lo', "completions.jsonl": bytes(100)}.items():
        with (run / name).open("ab") as file:
            file.write(end)
    (run / "data.json").write_bytes(b"")
    for path in (run / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    remount(disk, "ro")
    status, said = start(run)
    assert status == 2
    assert f"--run-dir: {run} cannot be written: Read-only file system" in said
    remount(disk, "rw")
    monkeypatch.setattr(time, "time", lambda: now() - 86400)  # the clock was set back
    warned = pytest.warns(UserWarning, match="damaged checkpoint, not used: .*checkpoints/2")
    for message, (owner, name) in FULL.items():
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            fill(disk)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, warned:
            patch.setattr(owner, name, filled)
            status, said = start(run)
        warned = contextlib.nullcontext()
        assert status == 2
        assert message in said
        assert "Traceback" not in said
        (disk / "filler").unlink()
        assert {"2", "3"} - {path.name for path in (run / "checkpoints").iterdir()} == set()
        assert not list(run.glob(".*.partial"))  # it would take space
    assert start(run)[0] == 0
    assert start(tmp_path / "whole")[0] == 0
    (metrics, completions, weights), expected = results(run), results(tmp_path / "whole")
    assert (metrics, completions) == expected[:2]
    chex.assert_trees_all_equal(weights, expected[2])
