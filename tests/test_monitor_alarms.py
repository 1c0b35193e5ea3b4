"""Alarms on synthetic metrics: each fires once when its condition holds, and not otherwise."""

import math
import time

import numpy as np
import pytest

from grpo_jax.monitor.alarms import CONDITIONS, AlarmConfig, Alarms
from grpo_jax.monitor.step_metrics import reward_metrics
from grpo_jax.rewards.repetition import repeated_share

DEFAULT = AlarmConfig()
HEALTHY = {
    "reward": 0.3,
    "pass_rate": 0.3,
    "entropy": 1.0,
    "kl": 0.01,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.02,
    "completions/duplicate_share": 0.1,
    "completions/repeated_share": 0.05,
    "completions/empty_thought_share": 0.0,
    "completions/answer_in_prompt_excess": 0.05,
    "completions/constant_answer_excess": 0.0,
    "completions/hard_coded_share": 0.0,
    "frac_reward_zero_std": 0.2,
    "frac_reward_absent": 0.0,
    "clip_ratio/region_mean": 0.01,
    "sampling/sampling_logp_difference/mean": 1e-6,
    "rewards/language/mean": 0.9,
    "router/dead_experts": 0.05,
}
# A change of the latest metrics that triggers each alarm.
ILLS = {
    "entropy_collapse": {"entropy": 0.01},
    "truncation": {"completions/clipped_ratio": 0.6},
    "zero_variance": {"frac_reward_zero_std": 0.95},
    "kl_drift": {"kl": 1.5},
    "clip_fraction": {"clip_ratio/region_mean": 0.4},
    "sampler_gap": {"sampling/sampling_logp_difference/mean": 0.05},
    "absent_rewards": {"frac_reward_absent": 0.2},
    "duplicates": {"completions/duplicate_share": 0.9},
    "repetition": {"completions/repeated_share": 0.4},
    "empty_thought": {"completions/empty_thought_share": 0.5},
    "answer_in_prompt": {"completions/answer_in_prompt_excess": 0.4},
    "constant_answer": {"completions/constant_answer_excess": 0.5},
    "hard_coded": {"completions/hard_coded_share": 0.3},
    "language": {"rewards/language/mean": 0.5},
    "dead_experts": {"router/dead_experts": 0.2},
}


def fired(changes, settings=DEFAULT, start=1):
    """The alarms of a run: (step, name) of each, in order."""
    alarms = Alarms(settings)
    found = []
    for step, change in enumerate(changes, start):
        found += alarms.update({"step": step, **HEALTHY, **change})
    return [(each.step, each.name) for each in found]


def test_a_healthy_course_raises_no_alarm():
    rng = np.random.default_rng(0)
    wiggle = [{key: value * (1 + 0.2 * rng.standard_normal()) for key, value in HEALTHY.items()} for _ in range(100)]
    assert fired([{}] * 100) == []
    assert fired(wiggle) == []


@pytest.mark.parametrize("name", ILLS)
def test_each_alarm_fires_once_after_its_patience_and_again_when_the_ill_returns(name):
    ill = ILLS[name]
    assert fired([{}] * 10 + [ill] * 2 + [{}] * 5) == []
    assert fired([{}] * 10 + [ill] * 10) == [(13, name)]
    assert fired([{}] * 10 + [ill] * 5 + [{}] + [ill] * 5) == [(13, name), (19, name)]
    assert fired([{}] * 10 + [ill], AlarmConfig(patience=1)) == [(11, name)]
    assert fired([{}] * 10 + [ill] * 10, AlarmConfig(**{name: None})) == []


def test_every_alarm_is_tested_and_has_a_threshold():
    assert set(ILLS) | {"length_explosion", "hacking"} == set(CONDITIONS)
    for name in CONDITIONS:
        assert getattr(AlarmConfig(), name) > 0


@pytest.mark.parametrize("name", ["entropy_collapse", "zero_variance", "duplicates"])
def test_sameness_and_certainty_are_no_faults_of_a_policy_that_is_right(name):
    ill = ILLS[name]
    assert fired([{}] * 10 + [ill | {"pass_rate": 0.9}] * 10) == []
    assert fired([{}] * 10 + [ill | {"pass_rate": 0.9, "judge": 0.2}] * 10) == [(13, name)]  # accuracy may be gamed


@pytest.mark.parametrize("name", ["repetition", "empty_thought", "answer_in_prompt", "constant_answer"])
def test_what_was_there_from_the_start_is_not_the_policys_doing(name):
    assert fired([ILLS[name]] * 20) == []


def courses(steps, **ends):
    """Metrics that go from one value to another in a straight line, a little noise on top."""
    rng = np.random.default_rng(1)
    return [
        {key: a + (b - a) * i / (steps - 1) + 0.005 * rng.standard_normal() for key, (a, b) in ends.items()}
        for i in range(steps)
    ]


def test_length_explodes_where_it_grows_and_nothing_is_gained():
    growing = {"completions/mean_length": (20, 200)}
    assert "length_explosion" in [name for _, name in fired(courses(40, **growing, pass_rate=(0.3, 0.3)))]
    assert fired(courses(40, **growing, pass_rate=(0.1, 0.9))) == []  # thinking longer, and better: R1-Zero's story
    assert fired(courses(40, **{"completions/mean_length": (20, 30)}, pass_rate=(0.3, 0.3))) == []


def test_hacking_is_reward_up_and_judge_down():
    gamed = courses(30, reward=(0.1, 0.5), judge=(0.1, 0.4)) + courses(30, reward=(0.5, 0.9), judge=(0.4, 0.1))
    (step,) = [step for step, name in fired(gamed) if name == "hacking"]
    assert 30 < step < 45
    assert fired(courses(60, reward=(0.1, 0.9), judge=(0.1, 0.9))) == []
    assert fired(courses(60, reward=(0.9, 0.1), judge=(0.9, 0.1))) == []  # it unlearns, which is another matter
    assert fired(courses(60, reward=(0.1, 0.9), judge=(0.4, 0.4))) == []


def test_levels():
    settings = AlarmConfig(checkpoint_at=("truncation",), stop_at=("hacking",))
    assert [settings.level(name) for name in ("kl_drift", "truncation", "hacking")] == ["warn", "checkpoint", "stop"]
    with pytest.raises(ValueError, match=r"stop_at has unknown alarms \['nonsense'\]; choose from \['absent_rewards'"):
        AlarmConfig(stop_at=("nonsense",))
    with pytest.raises(ValueError, match="patience is 0"):
        AlarmConfig(patience=0)


def test_a_resumed_run_fires_as_if_it_had_never_stopped():
    course = [{}] * 8 + [ILLS["truncation"]] * 10
    rows = [{"step": step, **HEALTHY, **change} for step, change in enumerate(course, 1)]
    evaluation = {"step": 10, "eval/pass@1": 0.4}
    for cut in (5, 9, 10, 11, 15):
        alarms = Alarms(AlarmConfig(), [*rows[:cut], evaluation], {"truncation"} if cut >= 11 else ())
        found = [fired.step for row in rows[cut:] for fired in alarms.update(row)]
        assert found == ([11] if cut < 11 else [])


def test_an_alarm_that_would_have_fired_under_new_thresholds_fires_at_the_next_step():
    rows = [{"step": step, **HEALTHY, "completions/clipped_ratio": 0.4} for step in range(1, 12)]
    alarms = Alarms(AlarmConfig(truncation=0.3), rows[:10])
    assert [(fired.step, fired.name) for fired in alarms.update(rows[10])] == [(11, "truncation")]


def test_replay_takes_time_in_proportion_to_the_steps():
    rows = [{"step": step, **HEALTHY, "judge": 0.3} for step in range(3000)]
    started = time.process_time()
    Alarms(AlarmConfig(), rows)
    assert time.process_time() - started < 20


def test_missing_and_null_metrics_are_passed_over():
    assert fired([{"entropy": None, "kl": math.nan, "judge": math.nan}] * 20) == []
    alarms = Alarms(AlarmConfig())
    assert [alarms.update({"step": step, "reward": 1.0}) for step in range(20)] == [[]] * 20


def test_what_an_alarm_says():
    alarms = Alarms(AlarmConfig(patience=1))
    alarms.update({"step": 1, **HEALTHY})
    (found,) = alarms.update({"step": 2, **HEALTHY, "completions/clipped_ratio": 0.75})
    assert found.row() == {"step": 2, "alarm": "truncation", "level": "warn", "text": found.text}
    assert found.text.startswith("75% of completions are truncated")
    assert "\n" not in found.text


def test_the_metrics_have_the_names_that_alarms_read():
    metrics = reward_metrics(np.array([1.0, 0.0]), {"language": np.array([1.0, 0.5])}, group_size=2)
    assert {"reward", "frac_reward_absent", "frac_reward_zero_std", "rewards/language/mean"} <= set(metrics)
    assert repeated_share("a a a a a a") > 0.5


def of_evaluations(*values, settings=DEFAULT, name="eval/pass@1"):
    """The alarms of evaluations with these values; a pair has the standard error."""
    alarms, found = Alarms(settings), []
    for step, value in enumerate(values):
        value, error = value if isinstance(value, tuple) else (value, None)
        errors = {} if error is None else {f"{name}_stderr": error}
        found += alarms.update({"step": 10 * step, name: value, **errors})
    return [(each.step, each.name) for each in found]


FALLEN = [(10, "held_out_fall")]


def test_held_out_metrics_that_fall_are_an_alarm():
    assert of_evaluations(0.188, 0.062) == FALLEN
    assert of_evaluations((0.188, 0.02), (0.062, 0.015)) == FALLEN
    assert of_evaluations((0.1, 0.02), (0.5, 0.02), (0.6, 0.02), (0.4, 0.02), (0.4, 0.02)) == [(30, "held_out_fall")]
    assert of_evaluations((0.5, 0.02), (0.3, 0.02), (0.5, 0.02), (0.3, 0.02)) == [*FALLEN, (30, "held_out_fall")]
    assert of_evaluations((0.9, 0.01), (0.5, 0.01), name="eval/chats/reward") == FALLEN


def test_noise_and_gains_of_held_out_metrics_are_none():
    assert of_evaluations((0.5, 0.03), (0.43, 0.03)) == []  # 1.6 standard errors
    assert of_evaluations((0.5, 0.001), (0.49, 0.001)) == []  # less than the threshold
    assert of_evaluations((0.0625, 0.0625), (0.0, 0.0)) == []  # one right answer of sixteen, and then none
    assert of_evaluations((0.1875, 0.1008), (0.0625, 0.0625)) == FALLEN  # three and one: to less than half
    assert of_evaluations(0.1, 0.2, 0.3) == []
    assert of_evaluations(0.188, 0.062, settings=AlarmConfig(held_out_fall=None)) == []
    assert of_evaluations((40.0, 1.0), (10.0, 1.0), name="eval/mean_length") == []


def test_a_held_out_fall_may_stop_a_run_and_is_not_told_twice_by_a_resumed_one():
    settings = AlarmConfig(stop_at=("held_out_fall",))
    rows = [{"step": 0, "eval/pass@1": 0.5}, {"step": 10, "eval/pass@1": 0.1}]
    alarms = Alarms(settings)
    (alarm,) = [each for row in rows for each in alarms.update(row)]
    assert alarm.level == "stop"
    assert "pass@1 fell from 0.500 at step 0 to 0.100" in alarm.text
    later = {"step": 20, "eval/pass@1": 0.1}
    assert Alarms(settings, rows, {"held_out_fall"}).update(later) == []
    assert [each.name for each in Alarms(settings, rows).update(later)] == ["held_out_fall"]
