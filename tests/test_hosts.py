"""Several processes: the run of one, stops that all follow, and errors that say who is missing."""

import json
import signal
import time

import numpy as np
import pytest

from grpo_jax.hosts import agree, any_of, fetch, gather, on_main, outcome, portable
from grpo_jax.jsonl import read_jsonl
from tests import processes
from tests.runs import TIMING


class UnportableError(Exception):
    """Cannot be unpickled: its argument is named."""

    def __init__(self, *, reason):
        super().__init__(reason)


def test_one_process_agrees_with_itself():
    assert gather(3, "a number") == [3]
    assert agree("x", "a text") == "x"
    assert any_of(True, "a flag")
    assert not any_of(False, "a flag")
    assert on_main(lambda: 5, "a call") == 5
    with pytest.raises(KeyError, match="missing"):
        on_main(lambda: {}["missing"], "a call")
    assert outcome(lambda: 5) == (5, None)
    result, error = outcome(lambda: 1 / 0)
    assert result is None
    assert portable(error) is error
    assert str(portable(UnportableError(reason="a lock"))) == "UnportableError: a lock"
    np.testing.assert_array_equal(fetch({"x": np.arange(3)})["x"], [0, 1, 2])


TALK = """
import sys, time
import jax
from grpo_jax.hosts import agree, any_of, connect, gather, on_main

number = int(sys.argv[sys.argv.index("--distributed.process-id") + 1])
address = sys.argv[sys.argv.index("--distributed.coordinator") + 1]
connect(address, 2, number)
long = bytes(3_000_000)
for turn in range(3):
    assert gather((number, long), "a long value") == [(0, long), (1, long)]
assert agree(number, "a number") == 0
assert any_of(number == 1, "a flag")
try:
    on_main(lambda: 1 / 0, "a division")
except ZeroDivisionError as error:
    print("both know:", error)
try:
    gather(0, "here" if number == 0 else "there")
except RuntimeError as error:
    print(error)
if number == 0:
    try:
        gather(0, "the next step", timeout=2)
    except RuntimeError as error:
        print(error, flush=True)
else:
    time.sleep(4)
"""


@pytest.mark.slow
def test_processes_talk_and_say_who_is_missing(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(TALK)
    (status, first), (_, second) = processes.finish(processes.start([script], processes=2, devices=1))
    assert status == 0, first
    for output in (first, second):
        assert "both know: division by zero" in output
    assert "out of step: process 0 is at 'here', process 1 at 'there'" in first
    assert "process 1 of 2 did not come to 'the next step' within 2 s" in first


def grpo(base, folder, **flags):
    settings = {
        "model": base,
        "dataset": "sums",
        "template": "{question}",
        "num-steps": 3,
        "num-prompts": 8,
        "group-size": 4,
        "max-prompt-length": 12,
        "max-completion-length": 10,
        "eval-size": 8,
        "eval-every": 2,
        "save-every": 1,
        "format-weight": 0.5,
        "reward": "tests.batch_rewards:brevity",
        "kl-coef": 0.05,
        "num-minibatches": 2,
        "learning-rate": 3e-3,
        "run-dir": folder,
        **flags,
    }
    return ["experiments/grpo.py", *(x for name, value in settings.items() for x in (f"--{name}", value)), "--plain"]


def results(folder):
    rows = read_jsonl(folder / "metrics.jsonl")
    files = ("completions.jsonl", "model/model.safetensors")
    return (
        [{name: value for name, value in row.items() if name not in TIMING} for row in rows],
        [(folder / name).read_bytes() for name in files],
    )


@pytest.mark.slow
def test_two_processes_do_what_one_does_also_after_a_stop(base, tmp_path):
    """Bit for bit, on as many devices; SIGTERM to the second stops both after a step, and they go on from there."""
    processes.run(grpo(base, tmp_path / "one"), processes=1, devices=2)
    processes.run(grpo(base, tmp_path / "two"), processes=2, devices=1)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert "distributed" not in json.loads((tmp_path / "two" / "config.json").read_text())

    stopped = tmp_path / "stopped"
    started = processes.start(grpo(base, stopped), processes=2, devices=1)
    deadline = time.monotonic() + 120
    while not (stopped / "checkpoints" / "1").is_dir():
        assert time.monotonic() < deadline
        assert started[0][0].poll() is None
        time.sleep(0.1)
    started[1][0].send_signal(signal.SIGTERM)
    ended = processes.finish(started)
    assert [status for status, _ in ended] == [75, 75], ended
    assert "stopped; checkpoints of steps" in ended[0][1]
    processes.run(grpo(base, stopped), processes=2, devices=1)
    assert results(stopped) == results(tmp_path / "one")


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(base, tmp_path):
    started = processes.start(
        grpo(base, tmp_path / "run"), processes=2, devices=1, more=[["--seed", "0"], ["--seed", "1"]]
    )
    for status, output in processes.finish(started):
        assert status == 2, output
        assert "process 1 was started differently from process 0" in output
        assert "settings.seed: 0 -> 1" in output
    assert not (tmp_path / "run").exists()
