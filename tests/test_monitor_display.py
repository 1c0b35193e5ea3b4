"""Formats of numbers, the choice of displayed metrics, and sparklines."""

import math
from array import array

import pytest

from grpo_jax.monitor.display import (
    DISPLAY_METRICS,
    DisplayMetric,
    count,
    duration,
    number,
    one_decimal,
    percent,
    scientific,
    select_metrics,
    small_percent,
    sparkline,
)


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (number, 0.0, "0.0000"),
        (number, 0.51234, "0.5123"),
        (number, -0.00512, "-0.0051"),
        (number, 1.23456, "1.235"),
        (number, 123.456, "123.5"),
        (number, 9999.0, "9999.0"),
        (number, 12345.0, "1.2e+04"),
        (number, 0.00034, "3.4e-04"),
        (number, math.nan, "nan"),
        (number, -math.inf, "-inf"),
        (scientific, 1e-6, "1.0e-06"),
        (one_decimal, 1234.56, "1,234.6"),
        (percent, 0.125, "12.5%"),
        (percent, math.nan, "nan%"),
        (small_percent, 0.00123, "0.12%"),
        (count, 4.0, "4"),
        (count, 950.0, "950"),
        (count, 12345.0, "12.3k"),
        (count, 1234567.0, "1.2M"),
        (count, 3.4e9, "3.4B"),
        (count, math.nan, "nan"),
        (duration, 3723.4, "1:02:03"),
        (duration, 59.7, "0:01:00"),
        (duration, None, "-:--:--"),
        (duration, math.inf, "-:--:--"),
    ],
)
def test_writing(show, value, text):
    assert show(value) == text


def test_what_is_there_is_selected_in_order_and_once():
    keys = [
        "kl",
        "unknown",
        "rewards/format/mean",
        "eval/pass@1",
        "rewards/accuracy/mean",
        "eval/loss",
        "reward",
        "tasks/maths/reward",
        "eval/maths/pass@1",
        "step",
    ]
    labels = {metric.key: metric.label for metric in select_metrics(DISPLAY_METRICS, keys)}
    assert labels == {
        "reward": "reward",
        "rewards/format/mean": "- format",
        "rewards/accuracy/mean": "- accuracy",
        "tasks/maths/reward": "- task maths",
        "eval/pass@1": "eval pass@1",
        "eval/maths/pass@1": "eval maths pass@1",
        "eval/loss": "eval loss",
        "kl": "KL",
    }
    assert next(iter(labels)) == "reward"
    assert list(labels)[-1] == "kl"


def test_a_star_fits_any_text_but_not_overlapping_ends():
    metrics = (DisplayMetric("a/*/a", "*"),)
    assert [metric.label for metric in select_metrics(metrics, ["a/x/y/a", "a/a", "a/b", "a//a"])] == ["x/y", ""]


def test_the_metrics_the_view_promises():
    promised = {
        "reward",
        "pass_rate",
        "completions/mean_length",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "frac_reward_zero_std",
        "sampling/sampling_logp_difference/max",
        "tokens_per_second",
    }
    assert promised <= {metric.key for metric in DISPLAY_METRICS if metric.main}


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 8, "█▁"),
        ([0, 0, 7, 7, 3, 4], 3, "▁█▅"),
        ([0, math.nan, 7], 3, "▁ █"),
        ([0, math.inf, 7, math.nan], 2, "▁█"),
        ([1e-6] * 1000, 4, "▁▁▁▁"),
        ([0.1, 0.1 + 1e-17, 0.1], 3, "▁▁▁"),
        ([math.nan], 3, " "),
    ],
)
def test_sparklines(values, width, text):
    assert sparkline(array("d", values), width) == text
