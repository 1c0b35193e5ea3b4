"""The live view and its plain lines."""

import io
import re
import time

import pytest
from rich.console import Console

from grpo_jax.monitor.display import DisplayMetric
from grpo_jax.monitor.progress import Progress

METRICS = {
    "step": 1,
    "reward": 0.5,
    "reward_std": 0.4,
    "rewards/accuracy/mean": 0.4,
    "rewards/accuracy/std": 0.1,
    "rewards/format/mean": 0.1,
    "frac_reward_zero_std": 0.25,
    "pass_rate": 0.4,
    "completions/mean_length": 210.0,
    "completions/clipped_ratio": 0.1,
    "kl": 0.01,
    "entropy": 1.25,
    "clip_ratio/low_mean": 0.001,
    "clip_ratio/region_mean": 0.002,
    "sampling/sampling_logp_difference/mean": 0.0023,
    "sampling/sampling_logp_difference/max": 0.08,
    "loss": 0.003,
    "grad_norm": 0.4,
    "learning_rate": 1e-6,
    "num_tokens": 1.2e6,
    "tokens_per_second": 12300.0,
    "step_time": 1.6,
    "compilations": 4.0,
    "eval/pass@1": 0.2,
    "eval/maj@16": 0.3,
    "eval/mean_length": 190.0,
}


class Clock:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Screen:
    """A console on a file, and what it shows."""

    def __init__(self, *, terminal, width=120, height=40, encoding="utf-8"):
        self.file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        self.console = Console(
            file=self.file, force_terminal=terminal, width=width, height=height, color_system=None, _environ={}
        )

    @property
    def raw(self):
        return self.file.buffer.getvalue().decode(self.file.encoding)

    @property
    def text(self):
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.raw)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def plain():
    return Screen(terminal=False)


@pytest.fixture
def terminal():
    return Screen(terminal=True)


def fail(screen, error):
    with Progress("a run", console=screen.console) as progress, progress.phase("GRPO", 300) as phase:
        phase.update(120, {"loss": 1.0})
        raise error


def last_panel(screen):
    lines = screen.text.replace("\r", "\n").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("╭"))
    return lines[start : next(i for i in range(start, len(lines)) if lines[i].startswith("╰")) + 1]


def test_plain_lines_a_step(plain, clock):
    with (
        Progress("a run", console=plain.console, clock=clock) as progress,
        progress.phase("GRPO", 10, start=8) as phase,
    ):
        clock.now = 100
        phase.update(9, {"step": 9, "reward": 0.5, "entropy": 1.25, "reward_std": 0.1})
        clock.now = 160
        phase.update(10, {"step": 10, "reward": -0.25, "entropy": 1.5, "eval/pass@1": 0.5})
    assert plain.raw == (
        "a run\n"
        "GRPO: from 8 to 10\n"
        "GRPO  9/10  left -:--:--  reward   0.5000  entropy    1.250\n"
        "GRPO 10/10  left 0:00:00  reward  -0.2500  entropy    1.500  eval pass@1    50.0%\n"
        "GRPO: done, 10 of 10 in 0:02:40, resumed at 8, reward 0.5000 -> -0.2500\n"
    )


def test_a_plain_line_has_the_main_metrics_and_is_not_wrapped(plain, clock):
    with Progress("a run", console=plain.console, clock=clock) as progress, progress.phase("GRPO", 300) as phase:
        phase.update(1, METRICS)
    (line,) = [line for line in plain.raw.splitlines() if line.startswith("GRPO   1/300")]
    for word in ["reward", "pass rate", "length", "KL", "entropy", "clip fraction", "zero-var groups", "sampler gap"]:
        assert f"  {word} " in line
    assert "tokens/s    12.3k" in line
    assert "eval maj@16    30.0%" in line
    assert "learning rate" not in line


def test_time_left_is_that_of_the_steps_of_this_process_without_the_first(plain, clock):
    with (
        Progress("a run", console=plain.console, clock=clock) as progress,
        progress.phase("GRPO", 100, start=50) as phase,
    ):
        for step, now in [(51, 500), (52, 510), (53, 520)]:
            clock.now = now
            phase.update(step, {"reward": 1.0})
    assert re.findall(r"left (\S+)", plain.raw) == ["-:--:--", "0:08:00", "0:07:50"]


def test_steps_of_many_minutes_get_an_estimate(plain, clock):
    with Progress("a run", console=plain.console, clock=clock) as progress, progress.phase("GRPO", 10) as phase:
        for step in (1, 2):
            clock.now += 1500
            phase.update(step, {"reward": 1.0})
    assert "left 3:20:00" in plain.raw


def test_updates_without_metrics_print_no_line(plain):
    with Progress("a run", console=plain.console) as progress, progress.phase("evaluating", 3) as phase:
        phase.update(1)
        phase.update(2, {})
        phase.update(3, {"note": "text", "kl": None})
    assert len(plain.raw.splitlines()) == 3


def test_only_outermost_phases_get_lines_of_their_own(plain):
    with (
        Progress("a run", console=plain.console) as progress,
        progress.phase("GRPO", 3),
        progress.phase("e", 2) as inner,
    ):
        inner.update(2)
    assert [line.split(":")[0] for line in plain.raw.splitlines()] == ["a run", "GRPO", "GRPO"]


def test_missing_and_changing_keys(plain):
    with Progress("a run", console=plain.console) as progress, progress.phase("GRPO", 3) as phase:
        phase.update(1, {"reward": 1.0})
        phase.update(2, {"kl": float("nan")})
        phase.update(3, {"unknown": 1.0})
    lines = plain.raw.splitlines()
    assert "reward" in lines[2]
    assert "reward" not in lines[3]
    assert re.search(r"KL +nan", lines[3])


def test_an_error_passes_and_is_said_in_the_log(plain):
    with pytest.raises(KeyboardInterrupt):
        fail(plain, KeyboardInterrupt())
    assert "GRPO: stopped, 120 of 300 in 0:00:00, loss 1.000 -> 1.000" in plain.raw


def test_no_terminal_no_control_sequences_and_no_other_alphabet():
    screen = Screen(terminal=False, encoding="ascii")
    with Progress("é \x1b[31m", console=screen.console) as progress, progress.phase("[b]漢", 2) as phase:
        phase.update(1, {"rewards/[red]é/mean": 1.0, "eval/[red]é": 2.0})
    assert screen.raw.startswith("\\xe9 \\x1b[31m\n[b]\\u6f22: from 0 to 2\n")
    assert "eval [red]\\xe9" in screen.raw
    assert "\x1b" not in screen.raw


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch):
    ascii_terminal = Screen(terminal=True, encoding="ascii")
    assert Progress("a run", console=ascii_terminal.console).plain
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert Progress("a run", console=dumb).plain
    assert not Progress("a run", console=Screen(terminal=True).console).plain
    assert Progress("a run", console=Screen(terminal=True).console, plain=True).plain


def test_a_quiet_console_shows_nothing(capsys):
    with Progress("a run", console=Console(quiet=True)) as progress, progress.phase("GRPO", 1) as phase:
        phase.update(1, METRICS)
    assert capsys.readouterr() == ("", "")


def test_panel(terminal, clock):
    with Progress("a [run]", console=terminal.console, clock=clock) as progress, progress.phase("[GRPO]", 300) as phase:
        for step in range(1, 11):
            clock.now += 2
            phase.update(step, METRICS | {"reward": step / 10})
        with progress.phase("evaluating", 8) as inner:
            inner.update(3)
            progress._live.refresh()
            panel = "\n".join(last_panel(terminal))
    assert "a [run]" in panel
    assert re.search(r"\[GRPO\] .* 10/300 0:00:20 left 0:09:40", panel)
    assert re.search(r"  evaluating .* 3/8 ", panel)
    assert re.search(r"reward +1\.000 +0\.1000 +▁▂▃▃▄▅▆▆▇█", panel)
    assert re.search(r"- accuracy +0\.4000 +0\.4000 +▁▁▁", panel)
    assert re.search(r"eval maj@16 +30\.0% +30\.0%", panel)
    assert re.search(r"clip fraction +0\.20%", panel)
    assert re.search(r"zero-var groups +25\.0%", panel)
    assert re.search(r"tokens/s +12\.3k", panel)


@pytest.mark.parametrize(("width", "height"), [(50, 40), (76, 24), (80, 24), (107, 24), (108, 24), (200, 24)])
def test_the_panel_fits_the_terminal(width, height, clock):
    screen = Screen(terminal=True, width=width, height=height)
    with Progress("a run", console=screen.console, clock=clock) as progress, progress.phase("GRPO", 300) as phase:
        phase.update(1, METRICS)
        with progress.phase("evaluating", 8):
            progress._live.refresh()
            panel = last_panel(screen)
    assert len(panel) <= height
    assert {len(line) for line in panel} == {width}
    text = "\n".join(panel)
    for piece in ["reward ", "pass rate", "zero-var groups", "sampler gap", "tokens/s", "8.0e-02", "12.3k"]:
        assert piece in text
    assert ("▁" in text) == (width >= 108)


def test_metrics_stay_while_a_phase_without_any_runs_and_after_the_end(terminal):
    with Progress("a run", console=terminal.console) as progress:
        with progress.phase("GRPO", 2) as phase:
            phase.update(2, {"reward": 0.75})
        with progress.phase("evaluating", 2) as phase:
            phase.update(1)
            progress._live.refresh()
            assert any("reward" in line and "0.7500" in line for line in last_panel(terminal))
    assert any("reward" in line and "0.7500" in line for line in last_panel(terminal))
    assert "GRPO: done, 2 of 2 in 0:00:00, reward 0.7500 -> 0.7500" in terminal.text


def test_a_panel_without_anything_in_it_is_wiped_off_in_the_end(terminal):
    with Progress("a run", console=terminal.console) as progress:
        with progress.phase("completions", 2) as phase:
            phase.update(2)
        progress.console.print("the report")
    after = terminal.raw.rpartition("╰")[2]
    assert after.count("\x1b[2K") >= 2  # its lines, erased one by one


def test_what_is_printed_appears_above_the_panel(terminal):
    with Progress("a run", console=terminal.console) as progress, progress.phase("GRPO", 2) as phase:
        phase.update(1, {"reward": 0.75})
        progress.console.print("on the console")
        print("with [b]print")
    lines = terminal.text.splitlines()
    panel = max(i for i, line in enumerate(lines) if line.startswith("╭"))
    for said in ["on the console", "with [b]print"]:
        assert [i < panel for i, line in enumerate(lines) if line.strip() == said] == [True]


def test_metrics_start_anew_in_a_phase(terminal):
    with Progress("a run", console=terminal.console) as progress:
        with progress.phase("training the base model", 1) as phase:
            phase.update(1, {"loss": 2.0, "grad_norm": 1.0})
        with progress.phase("GRPO", 1) as phase:
            phase.update(1, {"loss": 0.5})
    panel = "\n".join(last_panel(terminal))
    assert re.search(r"loss +0\.5000 +0\.5000", panel)
    assert "gradient norm" not in panel


def test_an_error_leaves_the_terminal_clean(terminal):
    with pytest.raises(RuntimeError, match="out of memory"):
        fail(terminal, RuntimeError("out of memory"))
    hidden, shown = terminal.raw.rfind("\x1b[?25l"), terminal.raw.rfind("\x1b[?25h")
    assert 0 <= hidden < shown
    assert "GRPO: stopped, 120 of 300" in terminal.text
    before = terminal.raw
    time.sleep(0.4)
    assert terminal.raw == before


def test_the_panel_is_drawn_twice_a_second_at_most_and_updates_are_cheap(terminal):
    drawn = []

    class Counted(Progress):
        def _panel(self):
            drawn.append(time.monotonic())
            return super()._panel()

    updates = 500
    with Counted("a run", console=terminal.console) as progress, progress.phase("GRPO", updates) as phase:
        start = time.monotonic()
        for step in range(updates):
            phase.update(step, METRICS)
        spent = time.monotonic() - start
        during = [moment for moment in drawn if start <= moment <= start + spent]
    assert len(during) <= 2 * spent + 1
    assert spent / updates < 1e-3


def test_long_runs_are_drawn_too(terminal):
    with Progress("a run", console=terminal.console) as progress, progress.phase("GRPO", 3000) as phase:
        for step in range(3000):
            phase.update(step, {"reward": float(step)})
    assert re.search(r"reward +2999\.0 +0\.0000 +▁▂▂▃▃▄▄▅▅▆▆▇▇█", "\n".join(last_panel(terminal)))


def test_custom_metrics(plain):
    own = (DisplayMetric("accuracy", "accuracy", main=True),)
    with Progress("a run", console=plain.console, metrics=own) as progress, progress.phase("RM", 1) as phase:
        phase.update(1, {"accuracy": 0.5, "reward": 1.0})
    assert "accuracy   0.5000" in plain.raw
    assert "reward" not in plain.raw


def test_metrics_of_a_resumed_phase_start_with_the_runs_own_beginning(terminal, plain):
    earlier = [{"step": 0, "eval/pass@1": 0.1}, {"step": 1, "reward": 0.2, "note": "text", "kl": None}]
    with (
        Progress("a run", console=terminal.console) as progress,
        progress.phase("GRPO", 3, start=1, earlier=earlier) as phase,
    ):
        phase.update(2, {"reward": 0.4})
        phase.update(3, {"reward": 0.6, "eval/pass@1": 0.9})
    rows = {line.split("  ")[0].strip("│ "): line for line in last_panel(terminal)}
    assert re.search(r"0\.6000 +0\.2000", rows["reward"])
    assert any(re.search(r"eval pass@1 +90\.0% +10\.0%", line) for line in last_panel(terminal))
    with Progress("a run", console=plain.console) as progress, progress.phase("GRPO", 2, start=1, earlier=earlier) as p:
        p.update(2, {"reward": 0.4})
    assert "reward 0.2000 -> 0.4000" in plain.text


def test_a_program_that_is_being_compiled_is_shown(terminal, plain, monkeypatch):
    with Progress("a run", console=terminal.console) as progress, progress.phase("GRPO", 2) as phase:
        progress.compiling("train_step")
        progress._live.refresh()
        assert "compiling train_step ..." in "\n".join(last_panel(terminal))
        progress.compiling(None)
        phase.update(1, {"reward": 0.4})
        progress._live.refresh()
    assert "compiling" not in "\n".join(last_panel(terminal))

    monkeypatch.setattr("grpo_jax.monitor.progress.SECONDS_UNTIL_SAID", 0.02)
    with Progress("a run", console=plain.console) as progress, progress.phase("GRPO", 2):
        progress.compiling("quick")
        progress.compiling(None)
        for name in ("first", "second"):
            progress.compiling(name)
            time.sleep(0.1)
            progress.compiling(None)
    assert [line.split(" ...")[0] for line in plain.text.splitlines() if "compiling" in line] == ["compiling first"]
