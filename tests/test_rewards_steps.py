"""Process supervision by rule: which steps of a thought are checked, and how."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.compose import RewardOutput, as_reward_outputs
from grpo_jax.rewards.steps import equation_steps_reward
from grpo_jax.rewards.workers.pool import RewardPool


def step_rewards(completion):
    (graded,) = equation_steps_reward([""], [completion])
    return {
        completion[:end].rstrip(";\n").rpartition("\n")[2].rpartition(";")[2]: reward for end, reward in graded.steps
    }


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        ("3+8=11;11+5=15;", {"3+8=11": 1.0, "11+5=15": 0.0}),
        ("So 48/2 = 24 clips.\nThen 24 + 48 = 71.", {"So 48/2 = 24 clips.": 1.0, "Then 24 + 48 = 71.": 0.0}),
        ("48/2 = <<48/2=24>>24 clips", {"48/2 = <<48/2=24>>24 clips": 1.0}),
        ("1,000 \u00d7 2 = 2000; 7 \u00f7 2 = 3.5", {"1,000 \u00d7 2 = 2000": 1.0, " 7 \u00f7 2 = 3.5": 1.0}),
        ("0.1+0.2=0.3", {"0.1+0.2=0.3": 1.0}),
        ("1+1=2=3", {"1+1=2=3": 0.0}),
        ("(1+2)*3=9=10-1", {"(1+2)*3=9=10-1": 1.0}),
        ("-3--5=2", {"-3--5=2": 1.0}),
    ],
)
def test_steps_with_equations_between_numbers_are_judged(completion, steps):
    assert step_rewards(completion) == steps


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "no equation",
        "2x + 3 = 7",
        "x = 4",
        "5*3 = 15x",
        "x^2 + 3 = 5",
        "50% = 0.5",
        "= 3",
        "1/0 = 3",
        "9**99 = 1",
        "9" * 300 + " = 1",
        "(" * 150 + "1" + ")" * 150 + "=1",
        "*".join(["9" * 30] * 5) + "=1",
        "1 = ",
        "3+8=11</think>",
    ],
)
def test_steps_without_are_not(completion):
    if completion == "3+8=11</think>":
        completion = "<think></think>3+8=12"
    assert step_rewards(completion) == {}
    assert equation_steps_reward([""], [completion])[0].score == 0


def test_what_stands_outside_the_thought_is_no_step():
    completion = "1=2\n<think>1+1=2\n3=4</think>5=6<answer>7=8</answer>"
    (graded,) = equation_steps_reward([""], [completion])
    assert graded == RewardOutput(0.5, {"checked": 2.0}, steps=((17, 1.0), (20, 0.0)))
    assert completion[:17].endswith("1+1=2\n")
    assert completion[:20].endswith("3=4")
    (opened,) = equation_steps_reward(["<think>"], ["1=1\n</think>2=3"])
    assert opened.steps == ((4, 1.0),)


@given(st.text(alphabet="0123456789+-*/=().,;\n x<>think", max_size=60))
def test_any_text_has_steps_that_can_be_learnt_from(completion):
    (graded,) = equation_steps_reward([""], [completion])
    assert as_reward_outputs([graded], [completion]) == [graded]
    ends = [end for end, _ in graded.steps]
    assert ends == sorted(set(ends))
    assert len(ends) == graded.details["checked"]


def test_steps_pass_through_a_pool():
    completions = ["3+8=11;1=2;", "none"]
    with RewardPool({"steps": equation_steps_reward}, workers=1) as pool:
        assert pool.rewards["steps"](["", ""], completions) == equation_steps_reward(["", ""], completions)
