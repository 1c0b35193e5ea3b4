"""Plots of a run's metrics."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from grpo_jax.monitor import plots
from grpo_jax.monitor.plots import plot_curves, running_mean, series

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
def titles(monkeypatch):
    """The titles of the panels of the last picture."""
    found = []
    original = plots._draw

    def draw(axes, panel, rows):
        original(axes, panel, rows)
        found.append((axes.get_title("left"), [text.get_text() for text in (axes.get_legend() or Figure()).texts]))

    monkeypatch.setattr(plots, "_draw", draw)
    return found


def rows(count, **extra):
    return [
        {"step": step, **{key: value * (1 + 0.1 * math.sin(step)) for key, value in ALL.items()}, **extra}
        for step in range(count)
    ]


def names(titles):
    return [title for title, _ in titles]


def test_six_panels(tmp_path, titles):
    evaluated = [row | {"eval/pass@1": 0.3, "eval/maj@8": 0.4} if row["step"] % 10 == 0 else row for row in rows(40)]
    plot_curves(evaluated, tmp_path / "curves.png", title="a run: $5 for 100_000 tokens")
    assert names(titles) == [
        "reward and pass rate",
        "completion length (tokens)",
        "entropy (nats a token)",
        "KL to the reference",
        "sampler/trainer gap in log-probability",
        "groups without variance",
    ]
    assert titles[0][1] == ["reward", "pass rate", "pass@1, held out", "maj@8, held out"]
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert width == 1800
    assert 900 <= height <= 1000
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_without_a_reference_the_gradient_norm_takes_the_place(tmp_path, titles):
    plot_curves(rows(5, kl=None), tmp_path / "curves.png", title="a run")
    assert "KL to the reference" not in names(titles)
    assert names(titles)[-1] == "gradient norm"


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows(tmp_path, count):
    before = plt.get_fignums()
    plot_curves(rows(count), tmp_path / "curves.png", title="a run")
    picture = imread(tmp_path / "curves.png")
    assert picture[..., :3].min() < 0.5
    assert plt.get_fignums() == before


def test_missing_keys_and_values_that_cannot_be_drawn(tmp_path, titles):
    mixed = [{"step": 1, "reward": None, "loss": 1.0}, {"step": 2, "reward": math.nan}, {"step": 3, "loss": math.inf}]
    gap = {"step": 4, "sampling/sampling_logp_difference/mean": 0.0}
    plot_curves([*mixed, gap], tmp_path / "curves.png", title="a run")
    assert names(titles) == ["loss"]


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
    assert series([], "a").shape == (0, 2)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 5))
def test_running_mean(values, half):
    half = min(half, (len(values) - 1) // 2)
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(running_mean(np.array(values), 2 * half + 1), expected, atol=1e-9)
