"""The frame of a run: its folder is its own, its logs rewind, its signals stop it between steps."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import run as run_module
from grpo_jax.loop.compilation import count_compilations, processor
from grpo_jax.loop.run import Run
from grpo_jax.loop.run_folder import differences
from grpo_jax.loop.stop import Stopped, StopSignals, first_reason
from grpo_jax.monitor.alarms import Alarm
from grpo_jax.monitor.samples import Sample
from grpo_jax.rewards.workers.pool import RewardError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Config:
    steps: int = 3
    where: str = "here"
    inner: Inner = field(default_factory=Inner)


def open_run(folder, config=Config(), **options):
    console = Console(width=100, file=io.StringIO(), record=True)
    return Run(folder, config, title="a test", resumable_fields=["where"], plain=True, console=console, **options)


def test_s6_another_configuration_is_refused_with_the_differences(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log({"step": 0, "reward": 0.0})
    with pytest.raises(ValueError, match="another configuration") as error:
        open_run(tmp_path / "run", Config(steps=4, inner=Inner(0.2)))
    assert "steps: 3 -> 4" in str(error.value)
    assert "inner.rate: 0.1 -> 0.2" in str(error.value)
    assert "where" not in str(error.value)


def test_a_run_that_failed_before_anything_was_computed_may_be_started_differently(tmp_path):
    with pytest.raises(KeyError, match="no such data"), open_run(tmp_path / "run"):
        raise KeyError("no such data")
    (tmp_path / "run" / "data.json").write_text("{}")  # of the data that were read before it failed
    with open_run(tmp_path / "run", Config(steps=4)):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 4


def test_what_changes_no_result_may_change(tmp_path):
    with open_run(tmp_path / "run"):
        pass
    with open_run(tmp_path / "run", Config(where="there")):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["where"] == "there"


def test_a_folder_that_holds_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_folder(tmp_path):
    with open_run(tmp_path / "run"), pytest.raises(RuntimeError, match="another process is running"):
        open_run(tmp_path / "run")
    with open_run(tmp_path / "run"):
        pass


def test_a_missing_tracker_is_known_at_once_and_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="unknown trackers"):
        open_run(tmp_path / "run", trackers=["mlflow"])
    with open_run(tmp_path / "run"):
        pass


def test_resume_goes_on_from_the_checkpoint_and_rewinds_the_logs(tmp_path):
    state = {"x": jnp.arange(3.0)}
    sample = Sample("p", "c", {"accuracy": 1.0}, 1.0, 0.5)
    with open_run(tmp_path / "run") as run:
        assert run.resume(state) == (0, state, {})
        for step in (1, 2, 3):
            run.log({"step": step, "reward": step / 10})
            run.log_samples(step, [sample], shown=[sample])
            if step == 2:
                run.save(step, {"x": state["x"] + step}, {"batches": 5})
    with open_run(tmp_path / "run") as run:
        step, restored, position = run.resume(state)
        assert (step, position) == (2, {"batches": 5})
        assert restored["x"].tolist() == [2, 3, 4]
        assert [row["step"] for row in read_jsonl(run.metrics_log.path)] == [1, 2]
        assert [row["step"] for row in read_jsonl(run.completions_log.path)] == [1, 2]
        assert "resumed at step 2" in run.progress.console.export_text()
        assert run.seconds > 0


def test_a_run_killed_before_its_first_checkpoint_starts_with_empty_logs(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.resume({"x": jnp.zeros(1)})
        run.log({"step": 0, "reward": 1.0})
    with open_run(tmp_path / "run") as run:
        assert run.resume({"x": jnp.zeros(1)})[0] == 0
        assert read_jsonl(run.metrics_log.path) == []


class Listener:
    """A tracker that keeps what it receives."""

    def __init__(self):
        self.tables = []

    def log_samples(self, rows, step):
        self.tables.append((step, [row["completion"] for row in rows]))


def test_all_samples_are_written_and_the_shown_ones_printed_and_tracked(tmp_path):
    samples = [Sample("p", f"completion {i}", {}, 0.0, 0.0, why=f"reason {i}", note="a note") for i in range(5)]
    with open_run(tmp_path / "run") as run:
        run.trackers.append(listener := Listener())
        run.log_samples(1, samples, shown=samples[2:4])
        run.log_samples(2, [], shown=[])
        said = run.progress.console.export_text()
        rows = read_jsonl(run.completions_log.path)
    assert [(row["completion"], row["why"], row["note"]) for row in rows] == [
        (f"completion {i}", f"reason {i}", "a note") for i in range(5)
    ]
    assert [line[-1] for line in said.splitlines() if "completion:" in line] == ["2", "3"]
    assert listener.tables == [(1, ["completion 2", "completion 3"])]
    assert "reason 2" in said
    assert "a note" in said


def test_alarms_are_said_and_written_and_may_ask_for_a_checkpoint_or_a_stop(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert not run.raise_alarms([])
        assert not run.raise_alarms([Alarm(1, "truncation", "warn", "too long")])
        assert run.raise_alarms([Alarm(2, "hacking", "checkpoint", "it pays")])
        run.stop_if_requested()
        assert run.raise_alarms([Alarm(3, "hacking", "stop", "it pays")])
        with pytest.raises(Stopped) as stopped:
            run.stop_if_requested()
        assert stopped.value.status == 130
        assert [row["level"] for row in read_jsonl(run.alarms_log.path)] == ["warn", "checkpoint", "stop"]
        assert "ALARM at step 2: hacking (checkpoint): it pays" in run.progress.console.export_text()


def test_faults_are_written_and_the_first_is_said(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log_reward_errors(1, [])
        run.log_reward_errors(
            2, [RewardError("math", "raised", "Traceback\nZeroDivisionError: by zero", "p", "the culprit")] * 3
        )
        rows = read_jsonl(run.reward_errors_log.path)
        said = run.progress.console.export_text()
    assert [(row["step"], row["completion"]) for row in rows] == [(2, "the culprit")] * 3
    assert (
        "step 2: 3 scores are absent (reward_errors.jsonl); the first: math raised: ZeroDivisionError: by zero" in said
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_ask_for_a_stop_after_the_step(tmp_path, number, status):
    before = signal.getsignal(number)
    with open_run(tmp_path / "run") as run:
        run.stop_if_requested()
        os.kill(os.getpid(), number)
        assert run.save_is_due(False)
        with pytest.raises(Stopped) as stopped:
            run.stop_if_requested()
        assert stopped.value.status == status
        assert "stopping at the next safe place" in run.progress.console.export_text()
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_of_several_reasons_to_stop_the_users_counts():
    assert first_reason([None, None]) is None
    assert first_reason([None, "SIGTERM"]) == "SIGTERM"
    assert first_reason(["SIGTERM", "alarm"]) == "alarm"
    assert first_reason(["SIGTERM", "alarm", "SIGINT"]) == "SIGINT"


def test_a_signal_after_the_question_whether_to_save_stops_the_run_after_the_next_step(tmp_path):
    """Otherwise the step would not have been saved."""
    with open_run(tmp_path / "run") as run:
        assert not run.save_is_due(False)
        os.kill(os.getpid(), signal.SIGTERM)
        run.stop_if_requested()
        assert run.save_is_due(False)
        with pytest.raises(Stopped):
            run.stop_if_requested()


def test_minutes_between_checkpoints_are_of_a_clock_that_is_not_set(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: now, time=lambda: pytest.fail("the system's clock was read"))
    now = 1000.0
    monkeypatch.setattr(run_module, "time", clock)
    with open_run(tmp_path / "run", save_minutes=2.0) as run:
        assert run.save_is_due(True)
        assert not run.save_is_due(False)
        now += 119
        assert not run.save_is_due(False)
        now += 1
        assert run.save_is_due(False)
        run.save(1, {"x": jnp.zeros(1)}, {})
        assert not run.save_is_due(False)
        now += 121
        assert run.save_is_due(False)
        assert run.seconds == 241


def save_in_vain(run, monkeypatch):
    """Start to write a checkpoint that fails when it is complete."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.checkpoints._manager._checkpointer.handler, "finalize", full)
    run.save(1, {"x": jnp.zeros(1)}, {})


def test_an_error_of_a_checkpoint_that_is_being_written_ends_the_run_after_the_step(tmp_path, monkeypatch):
    def go_on(run):
        for _ in range(600):
            run.save_is_due(False)
            time.sleep(0.1)

    with open_run(tmp_path / "run") as run:
        save_in_vain(run, monkeypatch)
        with pytest.raises(OSError, match=r"step 1 could not be written .* No space left on device"):
            go_on(run)


def test_an_error_of_the_last_checkpoint_is_raised_and_does_not_hide_that_of_the_loop(tmp_path, monkeypatch):
    def train(run, *errors):
        with run:
            save_in_vain(run, monkeypatch)
            for error in errors:
                raise error

    with pytest.raises(OSError, match=r"step 1 could not be written .* No space left on device"):
        train(open_run(tmp_path / "first"))
    with pytest.raises(KeyError, match="of the loop"):
        train(run := open_run(tmp_path / "second"), KeyError("of the loop"))
    assert "error: the checkpoint of step 1 could not be written" in run.progress.console.export_text()


def test_finish_writes_curves_and_summary_and_says_what_was_gained(tmp_path):
    with open_run(tmp_path / "run") as run:
        rows = [{"step": i, "reward": i / 3, "eval/pass@1": i / 3} for i in range(4)]
        for row in rows:
            run.log(row)
        run.finish(rows[0], rows[-1], steps=3, summary={"pass_at_1_after": 1.0, "gap": float("nan")})
        said = run.progress.console.export_text()
    assert "0.0% -> 100.0% (+100.0 points)" in said
    assert "curves.png" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pass_at_1_after"] == 1.0
    assert summary["gap"] is None
    assert summary["config"] == {"steps": 3, "where": "here", "inner": {"rate": 0.1}}
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["seconds"] > 0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_write_summary_finishes_a_run_without_steps(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert not run.is_finished
        run.write_summary({"selected": 3, "gap": float("nan")})
        assert run.is_finished
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: summary[name] for name in ("selected", "gap")} == {"selected": 3, "gap": None}
    assert summary["config"] == {"steps": 3, "where": "here", "inner": {"rate": 0.1}}
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["seconds"] > 0
    assert "steps" not in summary
    assert not (tmp_path / "run" / "curves.png").exists()


def test_differences_name_what_came_and_what_went():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"d": 2}}) == [
        "b.c: 2 -> '(absent)'",
        "b.d: '(absent)' -> 2",
    ]


@pytest.mark.usefixtures("empty_compilation_cache")
def test_compilations_are_counted():
    count = count_compilations()
    f = jax.jit(lambda x: x * 3 + 1)
    x = jnp.zeros(17)
    before = count()
    f(x)
    f(x)
    assert count() == before + 1


def test_programs_are_found_again_by_a_second_run_that_compiles_nothing(tmp_path):
    code = """
import jax
from grpo_jax.loop import run as run_module
from grpo_jax.loop.compilation import count_compilations, enable_compilation_cache
enable_compilation_cache()
count = count_compilations()
jax.jit(lambda x: x * 3 + 1)(jax.numpy.zeros(17))
print(count())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment |= {"HOME": str(tmp_path)}

    def run():
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert run() > 0
    assert run() == 0
    assert list((tmp_path / ".cache" / "grpo_jax").iterdir())


def test_a_summary_keeps_what_it_says_itself_and_finishes_the_run(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert not run.is_finished
        run.write_summary({"pass@1": 0.5, "seconds": 7.0})
        assert run.is_finished
        summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["pass@1"], summary["seconds"]) == (0.5, 7.0)
    assert summary["config"]["inner"] == {"rate": 0.1}
    assert summary["versions"]["jax"] == jax.__version__
    assert "cpu" in summary["device"]


def test_programs_are_kept_apart_for_processors_that_differ(tmp_path):
    def named(text):
        (tmp_path / "cpuinfo").write_text(text)
        return processor(tmp_path / "cpuinfo")

    old = "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu avx\ncpu MHz\t\t: 1000\n"
    assert named(old) == named(old.replace("1000", "2000")) == named(old + old.replace(": 0", ": 1"))
    others = [old.replace("avx", "avx avx512f"), old.replace("model name\t: A", "model name\t: B")]
    assert len({named(text) for text in (old, *others)}) == 3
    assert processor(tmp_path / "none") == processor(tmp_path / "none")


def test_a_folder_that_cannot_be_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"run_dir: .*file is a file; name a folder"):
        open_run(tmp_path / "file")
    with pytest.raises(OSError, match=r"run_dir: .*file/run cannot be written: Not a directory"):
        open_run(tmp_path / "file" / "run")
    with open_run(tmp_path / "run") as run:
        run.log({"step": 0})
    (tmp_path / "run" / "config.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        open_run(tmp_path / "run")


def test_a_run_killed_before_its_settings_were_written_may_be_started_again(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "begun.txt").write_text("2026-11-27\n")
    (tmp_path / ".config.json.part").write_text('{"steps')
    with open_run(tmp_path, Config(steps=4)) as run:
        assert run.previous is None


@pytest.mark.parametrize(("name", "text"), [("begun.txt", ""), ("begun.txt", "x"), ("summary.json", '{"config"')])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text):
    with open_run(tmp_path / "run") as run:
        run.log({"step": 0})
        run.write_summary({})
    (tmp_path / "run" / name).write_text(text)
    with open_run(tmp_path / "run") as run, pytest.raises(ValueError, match=rf"/run/{name} is damaged"):
        run.start_date if name == "begun.txt" else run.is_finished_with(["steps"])


def test_a_signal_that_cannot_be_told_stops_the_run_all_the_same():
    def say(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with StopSignals(say) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.reason == "SIGTERM"


def test_without_locks_of_files_a_folder_is_claimed_while_its_process_lives(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("grpo_jax.loop.run_folder.fcntl.flock", unsupported)
    monkeypatch.setattr("grpo_jax.loop.claim.BEAT", 0.05)
    monkeypatch.setattr("grpo_jax.loop.claim.WATCH", 0.5)
    with (
        open_run(tmp_path),
        pytest.raises(RuntimeError, match=rf"another process is running .*process {os.getpid()} on"),
    ):
        open_run(tmp_path)
    assert not (tmp_path / ".claim").exists()
    (tmp_path / ".claim").write_text("process 1 on a host, killed")
    with open_run(tmp_path):
        pass
