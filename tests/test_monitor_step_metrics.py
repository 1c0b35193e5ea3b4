"""Metrics of a step's completions and rewards, against values computed by hand."""

import math

import numpy as np
import pytest

from grpo_jax.monitor.step_metrics import completion_metrics, reward_metrics, routing_metrics


def test_rewards_within_and_across_groups():
    total = np.array([1.0, 0.0, 2.0, 2.0])
    metrics = reward_metrics(total, {"accuracy": np.array([1.0, 0.0, 1.0, math.nan])}, group_size=2)
    assert metrics["reward"] == 1.25
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)  # deviations sqrt(1/2) (ddof 1) and 0
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["frac_reward_absent"] == 0
    assert metrics["rewards/accuracy/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/accuracy/std"] == pytest.approx(math.sqrt(1 / 3))


def test_absent_rewards_are_left_out():
    total = np.array([math.nan, 3.0, 1.0, 0.0, math.nan, math.nan])
    metrics = reward_metrics(total, {"a": np.full(6, math.nan)}, group_size=2)
    assert metrics["frac_reward_absent"] == 0.5
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)  # a single reward has no deviation
    assert not any(name.startswith("rewards/") for name in metrics)
    assert reward_metrics(np.full(2, math.nan), {}, group_size=2) == {"frac_reward_absent": 1.0}


def test_lengths():
    lengths, truncated = np.array([2, 4, 9]), np.array([False, False, True])
    assert completion_metrics(lengths, truncated) == {
        "completions/mean_length": 5.0,
        "completions/min_length": 2.0,
        "completions/max_length": 9.0,
        "completions/clipped_ratio": pytest.approx(1 / 3),
        "completions/mean_terminated_length": 3.0,
    }
    assert "completions/mean_terminated_length" not in completion_metrics(lengths, truncated | True)


def test_groups_of_one_say_nothing_of_variance():
    assert "frac_reward_zero_std" not in reward_metrics(np.array([1.0, 0.0]), {}, group_size=1)


def test_the_use_of_experts():
    """Two layers of four experts: one with equal loads, one whose choices are all of two experts."""
    experts = np.array([[[[0, 1], [2, 3]], [[2, 3], [2, 3]]], [[[-1, -1], [-1, -1]], [[0, 0], [0, 0]]]], np.int16)
    mask = np.array([[True, True], [True, False]])
    assert routing_metrics(experts, mask, 4) == {"router/dead_experts": 2 / 8, "router/max_load": 2.0}
    assert routing_metrics(experts, mask & False, 4) == {}


def test_experts_that_are_hardly_chosen_are_dead():
    experts = np.zeros((1, 1000, 1, 1), np.int16)
    experts[0, :5], experts[0, 5:505] = 1, 2
    assert routing_metrics(experts, np.ones((1, 1000), bool), 4)["router/dead_experts"] == 1 / 4
    experts[0, 0] = 3
    assert routing_metrics(experts, np.ones((1, 1000), bool), 4)["router/dead_experts"] == 1 / 4
