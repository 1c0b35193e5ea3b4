"""Plots of a run's metrics."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from grpo_jax.monitor.plots import Curve, Panel, draw, plot_curves, running_mean, series

ALL = {
    "reward": 0.5,
    "pass_rate": 0.4,
    "completions/mean_length": 210.0,
    "entropy": 1.25,
    "kl": 0.01,
    "sampling/sampling_logp_difference/mean": 0.0023,
    "sampling/sampling_logp_difference/max": 0.08,
    "frac_reward_zero_std": 0.25,
    "grad_norm": 0.4,
    "loss": 0.003,
    "learning_rate": 1e-6,
}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture."""
    axes = []

    def savefig(self, *args, **settings):
        axes[:] = self.axes
        return original(self, *args, **settings)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return axes


def names(drawn):
    return [axes.get_title("left") for axes in drawn]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().texts]


def rows(count, **extra):
    return [
        {"step": step, **{key: value * (1 + 0.1 * math.sin(step)) for key, value in ALL.items()}, **extra}
        for step in range(count)
    ]


def test_panels(tmp_path, drawn):
    evaluated = [row | {"eval/pass@1": 0.3, "eval/maj@8": 0.4} if row["step"] % 10 == 0 else row for row in rows(40)]
    plot_curves(evaluated, tmp_path / "curves.png", title="a run: $5 for 100_000 tokens")
    assert names(drawn) == [
        "reward and pass rate",
        "completion length (tokens)",
        "entropy (nats a token)",
        "KL to the reference",
        "sampler/trainer gap in log-probability",
        "groups without variance",
        "gradient norm",
        "loss",
        "learning rate",
    ]
    assert legend(drawn[0]) == ["reward", "pass rate", "pass@1, held out", "maj@8, held out"]
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert width == 1800
    assert 1400 <= height <= 1500
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_at_most_nine_panels_by_priority(tmp_path, drawn):
    parts = {"rewards/accuracy/mean": 0.5, "rewards/format/mean": 0.9}
    plot_curves(rows(5, **parts), tmp_path / "curves.png", title="a run")
    assert len(drawn) == 9
    assert names(drawn)[-1] == "loss"
    plot_curves(rows(5, kl=None, **parts), tmp_path / "curves.png", title="a run")
    assert names(drawn)[-1] == "learning rate"


def test_a_curve_for_each_reward_and_each_task_in_its_own_colour(tmp_path, drawn):
    mixture = {"rewards/accuracy/mean": 0.5, "rewards/format/mean": 0.9, "rewards/format/std": 0.1}
    mixture |= {"tasks/chat/reward": 0.1, "tasks/maths/reward": 0.6, "tasks/maths/reward_std": 0.2}
    mixture |= {"eval/maths/pass@1": 0.4, "eval/maths/pass@1_stderr": 0.1, "eval/chat/reward": 0.2}
    plot_curves(rows(5, **mixture), tmp_path / "curves.png", title="a run")
    panels = dict(zip(names(drawn), drawn, strict=True))
    assert legend(panels["each reward"]) == ["accuracy", "format"]
    assert legend(panels["reward of each task"]) == ["chat", "maths"]
    assert legend(panels["each task, held out (pass@1 or reward)"]) == ["maths", "chat"]
    colours = [
        {line.get_label(): line.get_color() for line in axes.lines if not line.get_label().startswith("_")}
        for axes in list(panels.values())[1:4]
    ]
    assert len({*colours[0].values(), *colours[1].values()}) == 4
    assert colours[1] == colours[2]


def test_a_single_reward_has_no_panel_of_its_own(tmp_path, drawn):
    plot_curves(rows(5, **{"rewards/accuracy/mean": 0.5}), tmp_path / "curves.png", title="a run")
    assert "each reward" not in names(drawn)


def test_runs_are_lines_with_one_label_and_a_band_where_they_share_their_steps(tmp_path, drawn):
    runs = [[{"step": n, "time": n * k, "reward": n / k} for n in range(3)] for k in (1, 2)]
    panels = [
        Panel("a", [Curve("reward", "ours", "tab:blue", points=True, runs=runs), Curve("reward", "b", "k", runs=[])]),
        Panel("b", [Curve("reward", "ours", "tab:blue", points=True, runs=runs)], x="time", x_label="seconds"),
    ]
    draw(panels, tmp_path / "figure.png")
    assert [len(axes.lines) for axes in drawn] == [2, 2]
    assert drawn[0].get_legend_handles_labels()[1] == ["ours"]
    (band,) = drawn[0].collections
    low, high = band.get_datalim(drawn[0].transData).intervaly
    assert (low, high) == (0, 2)
    assert [len(axes.collections) for axes in drawn] == [1, 0]
    assert [axes.get_xlabel() for axes in drawn] == ["step", "seconds"]


def test_limits_ticks_marks_and_a_legend_that_is_not_repeated(tmp_path, drawn):
    run = [[{"step": n, "x": 2.0 + n, "y": 3.0} for n in range(2)]]
    curves = [Curve("x", "x", "tab:blue", runs=run), Curve("y", "y", "tab:red", dotted=True, runs=run)]
    panels = [Panel("first", curves, limits=(0.0, None), ticks=("base", "final"), marks={"an alarm": 1})]
    draw([*panels, Panel("second", curves)], tmp_path / "figure.svg", columns=1)
    first, second = drawn
    assert first.get_ylim() == (0, pytest.approx(3.05))
    assert [text.get_text() for text in first.get_xticklabels()] == ["base", "final"]
    assert first.texts[0].get_text() == " an alarm"
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")
    assert legend(first) == ["x", "y"]
    assert second.get_legend() is None
    assert second.get_xlabel() == "step"
    assert first.get_position().y0 > second.get_position().y1


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows(tmp_path, count):
    before = plt.get_fignums()
    plot_curves(rows(count), tmp_path / "curves.png", title="a run")
    picture = imread(tmp_path / "curves.png")
    assert picture[..., :3].min() < 0.5
    assert plt.get_fignums() == before


def test_missing_keys_and_values_that_cannot_be_drawn(tmp_path, drawn):
    mixed = [{"step": 1, "reward": None, "loss": 1.0}, {"step": 2, "reward": math.nan}, {"step": 3, "loss": math.inf}]
    gap = {"step": 4, "sampling/sampling_logp_difference/mean": 0.0}
    plot_curves([*mixed, gap], tmp_path / "curves.png", title="a run")
    assert names(drawn) == ["loss"]


@pytest.mark.parametrize("empty", [[], [{"step": 1}], [{"step": 1, "reward": math.nan}]])
def test_nothing_to_draw(tmp_path, empty):
    with pytest.raises(ValueError, match=rf"none of the {len(empty)} rows .*'reward'.*'loss'"):
        plot_curves(empty, tmp_path / "curves.png", title="a run")
    assert list(tmp_path.iterdir()) == []


def test_series_are_sorted_and_finite():
    mixed = [
        {"step": 2, "a": 1.0},
        {"step": 1, "a": 0.0},
        {"step": 3, "a": math.inf},
        {"step": 4},
        {"step": 5, "a": None},
    ]
    np.testing.assert_array_equal(series(mixed, "a"), [[1, 0], [2, 1]])
    np.testing.assert_array_equal(series(mixed, "a", positive=True), [[2, 1]])
    np.testing.assert_array_equal(series(mixed[:2], "step", x="a"), [[0, 1], [1, 2]])
    assert series([], "a").shape == (0, 2)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 5))
def test_running_mean(values, half):
    half = min(half, (len(values) - 1) // 2)
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(running_mean(np.array(values), 2 * half + 1), expected, atol=1e-9)
