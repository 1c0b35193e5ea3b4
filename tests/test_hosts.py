"""Several processes: the run of one, stops that all follow, and errors that say who is missing."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import heartbeat
from grpo_jax.config.data import DataConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.heartbeat import connect
from grpo_jax.hosts import (
    agree,
    any_of,
    fetch,
    gather,
    interleaved,
    joined_on_main,
    on_main,
    outcome,
    own_rows,
    portable,
)
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import run, same_start
from grpo_jax.models import hf_sameness
from grpo_jax.models.hf_sameness import check_same_checkpoint, fingerprints
from grpo_jax.rewards.plugin import import_function
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
    assert joined_on_main(3, sum, "a sum") == 3
    assert [*own_rows(3)] == [0, 1, 2]
    assert interleaved([[0, 3], [1, 4], [2]]) == [0, 1, 2, 3, 4]


TALK = """
import sys, time
import jax
from grpo_jax.heartbeat import connect
from grpo_jax.hosts import MissingProcessError, agree, any_of, gather, joined_on_main, on_main, own_rows, set_timeout

number = int(sys.argv[sys.argv.index("--distributed.process-id") + 1])
address = sys.argv[sys.argv.index("--distributed.coordinator") + 1]
connect(address, 2, number)
long = bytes(3_000_000)
for turn in range(3):
    assert gather((number, long), "a long value") == [(0, long), (1, long)]
assert agree(number, "a number") == 0
assert any_of(number == 1, "a flag")
assert joined_on_main(number + 1, lambda values: agree(sum(values), "no exchange"), "a sum") == 3
assert [*own_rows(3)] == [[0, 2], [1]][number]
try:
    joined_on_main(number, lambda values: 1 / values[0], "a quotient")
except ZeroDivisionError:
    pass
try:
    on_main(lambda: 1 / 0, "a division")
except ZeroDivisionError as error:
    print("both know:", error)
try:
    gather(0, "here" if number == 0 else "there")
except RuntimeError as error:
    print(error)
set_timeout(2)
if number == 0:
    try:
        gather(0, "the next step")
    except MissingProcessError as error:
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


LOSE = """
import os, signal, sys, time
import jax.numpy as jnp
from jax.experimental import multihost_utils
from grpo_jax import heartbeat, hosts
from grpo_jax.loop.command import run_command
from dataclasses import dataclass

heartbeat.BEAT, heartbeat.GRACE = 0.2, 2.0
mode = sys.argv.pop(1)
number = int(sys.argv[sys.argv.index("--distributed.process-id") + 1])
address = sys.argv[sys.argv.index("--distributed.coordinator") + 1]
heartbeat.connect(address, 2, number, timeout=2, silence=6)
lost = int(mode[-1])

@dataclass
class Config:
    pass

def main(config):
    for step in range(3):
        hosts.agree(step, f"step {step}")
        if number == lost and step == 2:
            if mode.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if mode.startswith("stop"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if mode.startswith("cut"):
                print("cut", flush=True)
                time.sleep(100)
            if mode.startswith("hang"):
                time.sleep(100)
            if mode.startswith("raise"):
                raise ValueError("its disk is full")
        multihost_utils.process_allgather(jnp.ones(3))  # a computation, which has no timeout
        print("computed", step, flush=True)
    time.sleep(100)

sys.exit(run_command(Config, main, description="", args=[]))
"""


@pytest.mark.slow
def test_a_process_that_is_lost_ends_the_others_with_its_name(tmp_path):
    script = tmp_path / "lose.py"
    script.write_text(LOSE)
    modes = {"kill1": 75, "stop1": 75, "hang1": 75, "raise1": 2, "raise0": 2, "kill0": -signal.SIGABRT}
    started = {mode: processes.start([script, mode], processes=2, devices=1) for mode in modes}
    deadline = time.monotonic() + 90
    with processes.network(2) as namespaces:
        if namespaces is not None:
            modes["cut1"] = 75
            started["cut1"] = processes.start([script, "cut1"], processes=2, devices=1, namespaces=namespaces)
            output = started["cut1"][1][1]
            while "cut\n" not in processes.read(output):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            processes.cut(namespaces, 1)
            assert started["cut1"][1][0].wait(60) == 75
            assert "error: process 0 of 2 on" in processes.read(output)
        ended = {}
        for mode, pair in started.items():
            left = pair[1 - int(mode[-1])][0]
            ended[mode] = left.wait(max(1, deadline - time.monotonic()))
    for pair in started.values():
        for process, _ in pair:
            process.kill()
    outputs = {
        mode: processes.finish(pair)[1 - int(mode[-1])][1].partition("computed 1")[2] for mode, pair in started.items()
    }
    assert ended == modes
    assert "error: process 1 of 2 on" in outputs["kill1"]
    for mode in {"kill1", "stop1", "cut1"} & set(modes):
        assert "has not been heard of for 6 s; it was killed or stopped, or the network was cut" in outputs[mode], mode
    assert "process 1 of 2 on" in outputs["hang1"]
    assert "and this one have both been at or after 'step 2' for 12 s; one of them is hung, or" in outputs["hang1"]
    for mode, number in (("raise1", 1), ("raise0", 0)):
        assert f"error: process {number} of 2 on" in outputs[mode]
        assert "ended with an error: its disk is full" in outputs[mode]


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_say_so(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "import sys\n"
        "from grpo_jax.heartbeat import connect\n"
        "connect('localhost:1' if sys.argv[1] == '1' else sys.argv[3], 2, int(sys.argv[1]), connection_timeout=3)\n"
    )
    for number, text in (
        (0, "not all of the 2 processes connected to process 0 at"),
        (1, "process 0 did not answer at"),
    ):
        started = processes.start([script, number], processes=2, devices=1)
        started[1 - number][0].kill()
        assert started[number][0].wait(60) == 69
        assert text in processes.finish(started)[number][1]


def test_an_address_without_port_is_refused():
    with pytest.raises(ValueError, match="it must be host:port"):
        connect("host0", 2, 0)


def test_a_cluster_that_is_not_known_is_said(monkeypatch):
    def initialize(*args, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(ValueError, match=r"distributed.auto is set, and JAX finds no cluster .* set distributed.coord"):
        connect(None, None, None)
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("seen", "moved", "own_moved", "progress", "ended", "message"),
    [
        (50, 3000, 0, 4, False, None),
        (70, 70, 0, 4, False, "process 1 of 2 on host1 has not been heard of for 60 s"),
        (70, 70, 0, 4, True, None),  # it waits until this one ends too
        (1, 3700, 0, 4, False, "has been at or after 'there' for 3600 s, while this one is at or after 'here'"),
        (1, 3700, 0, 5, False, None),  # this one works on
        (1, 3700, 3700, 5, False, "process 1 of 2 on host1 and this one have both been at or after 'here' for 3600 s"),
        (1, 3500, 3700, 5, False, None),
        (1, 3700, 3700, 6, False, None),  # the other one waits for this one, and will say so
    ],
)
def test_what_beats_say_of_another_process(monkeypatch, seen, moved, own_moved, progress, ended, message):
    """Seconds since its last beat and since it came further; its progress, where this one's is 5."""
    now = 1e6
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    monkeypatch.setattr(heartbeat.hosts, "progress", lambda: (5, "here", 600.0))
    value = {"progress": progress, "place": "there", "host": "host1", "error": None, "has_ended": ended}
    watch, said = object.__new__(heartbeat.Watch), []
    watch.silence, watch._own, watch._error, watch._moved = 60.0, 0, None, (5, now - own_moved)
    watch._beats = {0: heartbeat.Beat(value, 0.0, 0.0), 1: heartbeat.Beat(value, now - seen, now - moved)}
    watch._leave = lambda text, status: said.append(text)
    watch._judge()
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


def test_processes_with_other_facts_are_listed(monkeypatch):
    """Also a fact that only one of them has."""

    def gather(value, name):
        return [value, ("other", {"code": {"grpo_jax": "abc"}, "devices": "2 x cpu"}), value]

    monkeypatch.setattr(same_start, "gather", gather)
    with pytest.raises(ValueError, match=r"process 1 \(other\) was started differently from process 0") as error:
        same_start.check_same("was started differently from", {"code": {"grpo_jax": "abd"}, "devices": "4 x cpu"})
    assert str(error.value).splitlines()[1:] == [
        "  code.grpo_jax: 'abd' -> 'abc'",
        "  devices: '4 x cpu' -> '2 x cpu'",
    ]


def test_a_digest_of_the_code_follows_the_script(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("1")
    first = same_start.code_digest(script)
    script.write_text("2")
    second = same_start.code_digest(script)
    assert first["grpo_jax"] == second["grpo_jax"]
    assert first["run.py"] != second["run.py"]


def test_a_digest_of_the_code_follows_modules_of_the_user_and_not_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def reward(completions): return [1.0 for _ in completions]")
    monkeypatch.syspath_prepend(tmp_path)
    assert callable(import_function("my_own_rewards:reward", "reward"))
    first = same_start.module_digests()
    (tmp_path / "my_own_rewards.py").write_text("def reward(completions): return [2.0 for _ in completions]")
    second = same_start.module_digests()
    assert [name for name in first if first[name] != second[name]] == ["my_own_rewards"]
    assert not {"jax", "numpy", "json", "grpo_jax.hosts"} & {*first}


def test_modules_of_rewards_are_compared_once_they_are_imported(base, tmp_path, monkeypatch):
    (tmp_path / "my_late_rewards.py").write_text("def reward(completions): return [1.0 for _ in completions]")
    monkeypatch.syspath_prepend(tmp_path)

    class ComparedError(Exception):
        pass

    def compare():
        raise ComparedError(same_start.module_digests()["my_late_rewards"])

    monkeypatch.setattr(run, "check_same_modules", compare)
    config = GRPOConfig(
        model=base,
        data=DataConfig(dataset="sums"),
        rewards=RewardConfig(reward=("my_late_rewards:reward",)),
        run_dir=tmp_path / "run",
    )
    with pytest.raises(ComparedError):
        run.run_experiment(config, lambda config, run: None, title="")


def test_compiler_options_that_change_a_program_are_compared(monkeypatch):
    first = same_start.compiler_options()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_dump_to=/tmp/here " + first["XLA_FLAGS"])
    changed = {**jax.config.values, "jax_debug_nans": True, "jax_compilation_cache_dir": "/elsewhere"}
    monkeypatch.setattr(type(jax.config), "values", changed)
    second = same_start.compiler_options()
    assert [name for name in first if first[name] != second[name]] == ["jax_debug_nans", "XLA_FLAGS"]
    assert "fast_math" in second["XLA_FLAGS"]
    assert "dump" not in second["XLA_FLAGS"]


def test_another_checkpoint_of_the_same_shapes_is_refused(base, tmp_path, monkeypatch):
    """Of one process: the same shapes and another value somewhere in each matrix, another template, a file less."""
    base = Path(base)
    first = fingerprints(base)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, other / "model.safetensors")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "tokenizer_config.json").unlink()
    monkeypatch.setattr(hf_sameness.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hf_sameness, "gather", lambda value, name: [value, ("other", fingerprints(other))])
    with pytest.raises(ValueError, match=r"process 1 \(other\) has another checkpoint in .* than process 0 ") as error:
        check_same_checkpoint(base)
    assert str(error.value).count("chat_template.jinja, model.safetensors, tokenizer_config.json;") == 1
    assert fingerprints(base) == first
    monkeypatch.setattr(hf_sameness, "gather", lambda value, name: [value, ("other", fingerprints(base))])
    check_same_checkpoint(base)


@pytest.mark.parametrize("sees", [True, False])
def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path, monkeypatch, sees):
    monkeypatch.setattr(same_start.jax, "process_count", lambda: 2)
    monkeypatch.setattr(same_start, "VISIBLE_WITHIN", 0.2)
    monkeypatch.setattr(same_start, "agree", lambda value, name: "token")
    monkeypatch.setattr(same_start, "gather", lambda value, name, **options: [value])
    if sees:
        (tmp_path / ".probe-token-1").touch()
        same_start.check_folder_is_shared(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".probe-token-1"]  # the other process removes its own
    else:
        with pytest.raises(ValueError, match="does not see the file of process 1 there; name a folder on storage"):
            same_start.check_folder_is_shared(tmp_path)
        with pytest.raises(ValueError, match="cannot write there"):
            same_start.check_folder_is_shared(tmp_path / "absent")


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
    """Bit for bit, on as many devices; SIGTERM to the second stops both after a step, and they go on from there.

    The run that is stopped samples a step ahead, and scores in the background. Where it is allowed, each process has a
    network and an address of its own.
    """
    processes.run(grpo(base, tmp_path / "one"), processes=1, devices=2)
    with processes.network(2) as namespaces:
        processes.run(grpo(base, tmp_path / "two"), processes=2, devices=1, namespaces=namespaces)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert "distributed" not in json.loads((tmp_path / "two" / "config.json").read_text())

    processes.run(grpo(base, tmp_path / "ahead", staleness=1), processes=1, devices=2)
    stopped = tmp_path / "stopped"
    started = processes.start(grpo(base, stopped, staleness=1), processes=2, devices=1)
    deadline = time.monotonic() + 120
    while not (stopped / "checkpoints" / "1").is_dir():
        assert time.monotonic() < deadline
        assert started[0][0].poll() is None
        time.sleep(0.1)
    started[1][0].send_signal(signal.SIGTERM)
    ended = processes.finish(started)
    assert [status for status, _ in ended] == [75, 75], ended
    assert "stopped; checkpoints of steps" in ended[0][1]
    processes.run(grpo(base, stopped, staleness=1), processes=2, devices=1)
    assert results(stopped) == results(tmp_path / "ahead")
    assert results(stopped) != results(tmp_path / "one")


@pytest.mark.slow
def test_processes_that_were_started_differently_are_refused(base, tmp_path):
    started = processes.start(
        grpo(base, tmp_path / "run"), processes=2, devices=1, more=[["--seed", "0"], ["--seed", "1"]]
    )
    for status, output in processes.finish(started):
        assert status == 2, output
        assert re.search(r"process 1 \(.+\) was started differently from process 0", output)
        assert "settings.seed: 0 -> 1" in output
    assert not (tmp_path / "run").exists()
