import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.rewards.compose import Outputs, RewardOutput, combined, weighted
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.math.answer import answer_reward


def constant(values):
    return lambda prompts, completions, **columns: values


def score(values, count=1):
    return weighted({"mine": constant(values)}, {"mine": 1.0})(["p"] * count, ["the completion"] * count)


def test_total_is_the_weighted_sum_and_parts_are_unweighted():
    compose = weighted({"right": answer_reward, "form": format_reward}, {"right": 1.0, "form": 0.25})
    completions = ["<think>a</think><answer>5</answer>", "<answer>5</answer>", "<think>a</think><answer>4</answer>"]
    columns = reward_columns([Problem("p", "5", {"level": 1})], group_size=3)
    scores = compose(["p"] * 3, completions, **columns)
    np.testing.assert_array_equal(scores.parts["right"], [1, 1, 0])
    np.testing.assert_array_equal(scores.parts["form"], [1, 0, 1])
    np.testing.assert_array_equal(scores.total, [1.25, 1, 0.25])
    assert list(scores.parts) == ["right", "form"]
    assert {array.dtype for array in (scores.total, *scores.parts.values())} == {np.dtype(np.float32)}


rewards_of_three = st.lists(st.none() | st.floats(-10, 10), min_size=3, max_size=3)


@given(rewards_of_three, rewards_of_three, st.floats(-2, 2), st.floats(0.1, 2))
def test_against_a_loop(first, second, first_weight, second_weight):
    weights = {"a": first_weight, "b": second_weight}
    scores = weighted({"a": constant(first), "b": constant(second)}, weights)(["p"] * 3, ["c"] * 3)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if (first_weight != 0 and a is None) or b is None:
            assert np.isnan(scores.total[i])
        else:
            expected = second_weight * b + (first_weight * a if first_weight else 0)
            np.testing.assert_allclose(scores.total[i], expected, rtol=1e-5, atol=1e-6)
        assert np.isnan(scores.parts["a"][i]) == (a is None)


def test_an_absent_part_makes_the_total_absent_unless_its_weight_is_0():
    rewards = {"a": constant([None, 1.0, float("nan")]), "b": constant([2.0, 2.0, 2.0])}
    watched = weighted(rewards, {"a": 0.0, "b": 1.0})(["p"] * 3, ["c"] * 3)
    np.testing.assert_array_equal(watched.total, [2, 2, 2])
    np.testing.assert_array_equal(watched.parts["a"], [np.nan, 1, np.nan])
    np.testing.assert_array_equal(
        weighted(rewards, {"a": 1.0, "b": 1.0})(["p"] * 3, ["c"] * 3).total, [np.nan, 3, np.nan]
    )


def test_rewards_get_prompts_completions_and_every_column():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0]

    weighted({"spy": spy}, {"spy": 1.0})(["p"], ["c"], answer=["5"], level=[1])
    assert seen == {"prompts": ["p"], "completions": ["c"], "answer": ["5"], "level": [1]}


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(1), np.int64(2), np.bool_(True)])
def test_numbers_of_any_kind(value):
    assert score([value]).total[0] == float(value)


def test_arrays_and_tuples_of_numbers():
    np.testing.assert_array_equal(score(np.array([1.0, 2.0]), 2).total, [1, 2])
    np.testing.assert_array_equal(score((1.0, 2.0), 2).total, [1, 2])


def test_reward_that_raises_is_named_and_chained():
    def broken(prompts, completions, **columns):
        raise ZeroDivisionError("by zero")

    compose = weighted({"mine": broken}, {"mine": 1.0})
    with pytest.raises(ValueError, match=r"reward 'mine' raised ZeroDivisionError: by zero.*\['answer'\]") as error:
        compose(["p"], ["c"], answer=["5"])
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_column_that_is_missing():
    compose = weighted({"right": lambda prompts, completions, *, gold, **_: [0.0]}, {"right": 1.0})
    with pytest.raises(ValueError, match=r"reward 'right' needs the column 'gold'; the columns are \['level'\]"):
        compose(["p"], ["c"], level=[1])


@pytest.mark.parametrize(("values", "count"), [([], 0), ([1.0], 1), ([1.0, 2.0, 3.0], 3)])
def test_wrong_count(values, count):
    with pytest.raises(ValueError, match=f"reward 'mine' must return one entry for each completion: 2, not {count}"):
        score(values, 2)


@pytest.mark.parametrize("values", [None, 1.0, "1", {0: 1.0}])
def test_not_a_list(values):
    with pytest.raises(ValueError, match=f"reward 'mine' must return a list, and returned {type(values).__name__}"):
        score(values)


@pytest.mark.parametrize("value", ["1", [1.0], 1j, float("inf"), -float("inf"), 1e39, 10**400, np.float64("inf")])
def test_not_a_number_that_float32_can_hold(value):
    with pytest.raises(ValueError, match=r"reward 'mine' returned .* must be None or a number .* 'the completion'"):
        score([value])


def test_columns_of_other_lengths():
    compose = weighted({"form": format_reward}, {"form": 1.0})
    with pytest.raises(ValueError, match=r"must have the same length: .*'completions': 2.*'answer': 1"):
        compose(["p", "p"], ["c", "c"], answer=["5"])
    with pytest.raises(ValueError, match=r"'prompts': 1, 'completions': 2"):
        compose(["p"], ["c", "c"])


@pytest.mark.parametrize(
    ("rewards", "weights"), [({}, {}), ({"a": format_reward}, {"b": 1.0}), ({"a": format_reward}, {"a": 1.0, "b": 1.0})]
)
def test_names_must_agree(rewards, weights):
    with pytest.raises(ValueError, match="one entry for each reward: rewards"):
        weighted(rewards, weights)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_must_be_of_use(weight):
    with pytest.raises(ValueError, match="weights must be finite and not all 0"):
        weighted({"a": format_reward}, {"a": weight})


def test_a_gate_counts_a_part_only_where_another_one_holds():
    rewards = {
        "right": lambda p, c, **_: [1.0, 1.0, 0.0, None, 1.0],
        "form": lambda p, c, **_: [1.0, 0.0, 1.0, 1.0, None],
    }
    compose = weighted(rewards, {"right": 2.0, "form": 0.5}, gates={"right": "form"})
    scores = compose(["p"] * 5, ["c"] * 5)
    np.testing.assert_array_equal(scores.total, [2.5, 0.0, 0.5, np.nan, np.nan])
    np.testing.assert_array_equal(scores.parts["right"], [1, 1, 0, np.nan, 1])
    np.testing.assert_array_equal(scores.counted["right"], [1, 0, 0, np.nan, np.nan])
    # A gate needs no weight of its own.
    compose = weighted(rewards, {"right": 1.0, "form": 0.0}, gates={"right": "form"})
    np.testing.assert_array_equal(compose(["p"] * 5, ["c"] * 5).total, [1, 0, 0, np.nan, np.nan])
    assert list(compose(["p"] * 5, ["c"] * 5).counted) == ["right"]


@pytest.mark.parametrize("gates", [{"a": "b"}, {"b": "a"}, {"a": "a"}])
def test_a_gate_is_of_two_rewards(gates):
    with pytest.raises(ValueError, match=r"the gate .* must name two of the rewards \['a'\]"):
        weighted({"a": format_reward}, {"a": 1.0}, gates=gates)


def test_totals_are_clipped():
    compose = weighted({"a": lambda p, c, **_: [-3.0, 0.5, 3.0, None]}, {"a": 1.0}, clip=(-1.0, 1.0))
    np.testing.assert_array_equal(compose(["p"] * 4, ["c"] * 4).total, [-1, 0.5, 1, np.nan])
    with pytest.raises(ValueError, match=r"clip must be .lower bound, upper bound"):
        weighted({"a": format_reward}, {"a": 1.0}, clip=(1.0, 1.0))


def test_details_and_notes_stand_beside_the_parts():
    graded = [
        RewardOutput(1.0, {"runnable": 1.0}),
        RewardOutput(0.0, {"runnable": 0.0, "tests": 3.0}, "it crashed"),
        RewardOutput(None),
    ]
    scores = weighted({"code": lambda p, c, **_: graded, "b": lambda p, c, **_: [0.0] * 3}, {"code": 1.0, "b": 1.0})(
        ["p"] * 3, ["c"] * 3
    )
    np.testing.assert_array_equal(scores.total, [1, 0, np.nan])
    np.testing.assert_array_equal(scores.parts["code/runnable"], [1, 0, np.nan])
    np.testing.assert_array_equal(scores.parts["code/tests"], [np.nan, 3, np.nan])
    assert scores.notes == ["", "code: it crashed", ""]
    assert list(scores.counted) == ["code", "b"]


def test_outputs_of_processes_that_take_turns_are_those_of_one():
    """Also the order of details, which is that of the files' columns."""
    outputs = [
        RewardOutput(1.0, {"late": 1.0}),
        RewardOutput(None, note="it hangs", failed=True),
        RewardOutput(0.5, {"tests": 2.0, "late": 3.0}, steps=[(1, 0.5)]),
        RewardOutput(None),
        RewardOutput(0.0, {"early": np.nan}, "", [(2, 1.0), (3, 1.0)]),
    ]
    whole = Outputs.of(outputs)
    assert whole.steps == {2: [(1, 0.5)], 4: [(2, 1.0), (3, 1.0)]}
    for count in (1, 2, 3, 7):
        parts = Outputs.interleaved([Outputs.of(outputs[turn::count]) for turn in range(count)])
        rules = {"gates": {}, "clip": None, "may_abstain": ["a"]}
        one, several = (combined({"a": each}, {"a": 2.0}, 5, **rules) for each in (whole, parts))
        assert [*several.parts] == [*one.parts] == ["a", "a/late", "a/tests", "a/early"]
        for name, part in one.parts.items():
            np.testing.assert_array_equal(several.parts[name], part)
        np.testing.assert_array_equal(several.total, one.total)
        assert (several.notes, several.steps) == (one.notes, one.steps)


def test_a_detail_that_is_no_number_names_the_reward():
    with pytest.raises(ValueError, match="reward 'mine' returned inf"):
        score([RewardOutput(1.0, {"tests": float("inf")})])


def test_steps_are_weighted_added_up_where_they_end_together_and_in_order():
    rewards = {
        "a": lambda p, c, **_: [RewardOutput(1.0, steps=[(5, 1.0), (2, 0.5)]), RewardOutput(0.5, steps=[(3, 0.25)])],
        "b": lambda p, c, **_: [RewardOutput(2.0, steps=[(5, -1.0)]), 4.0],
        "watched": lambda p, c, **_: [RewardOutput(1.0, steps=[(1, 9.0)])] * 2,
        "whole": lambda p, c, **_: [1.0, None],
    }
    scores = weighted(rewards, {"a": 2.0, "b": 0.5, "watched": 0.0, "whole": 3.0})(["p"] * 2, ["the text"] * 2)
    assert scores.steps == [((2, 1.0), (5, 1.5)), ((3, 0.5),)]
    np.testing.assert_array_equal(scores.total, [6, np.nan])
    np.testing.assert_array_equal(scores.outcome, [3, np.nan])


def test_the_outcome_leaves_out_what_judged_the_completions_own_steps_whatever_else_is_scored():
    entries = {"x": RewardOutput(0.5, steps=[(1, 0.5)]), "y": RewardOutput(0.25), "z": RewardOutput(None)}
    steps = lambda p, completions, **_: [entries[each] for each in completions]  # noqa: E731
    beside = weighted({"steps": steps, "b": lambda p, c, **_: [1.0] * len(c)}, {"steps": 2.0, "b": 1.0})
    alone = weighted({"steps": steps, "b": lambda p, c, **_: [1.0] * len(c)}, {"steps": 2.0, "b": 0.0})
    for compose, expected in ((beside, [1, 1.5, np.nan]), (alone, [np.nan, 0.5, np.nan])):
        np.testing.assert_array_equal(compose([""] * 3, [*"xyz"]).outcome, expected)
        for row, each in enumerate("xyz"):
            np.testing.assert_array_equal(compose([""], [each]).outcome, expected[row : row + 1])
    np.testing.assert_array_equal(beside([""] * 3, [*"xyz"]).total, [2, 1.5, np.nan])


def test_the_outcome_is_clipped_as_the_total_is():
    compose = weighted(
        {"a": lambda p, c, **_: [9.0, -9.0], "s": lambda p, c, **_: [RewardOutput(1.0, steps=[(1, 1.0)])] * 2},
        {"a": 1.0, "s": 1.0},
        clip=(-1.0, 2.0),
    )
    np.testing.assert_array_equal(compose(["p"] * 2, ["c"] * 2).outcome, [2, -1])


def graded_with(steps):
    """As rewards make them, whose annotations nobody checks outside of these tests."""
    graded = RewardOutput(1.0)
    object.__setattr__(graded, "steps", steps)
    return graded


@pytest.mark.parametrize("end", [1, 14, np.int64(3)])
def test_ends_of_steps_of_any_kind(end):
    ((found,),) = score([graded_with([[end, np.float32(0.5)]])]).steps
    assert found == (end, 0.5)
    assert [type(each) for each in found] == [int, float]


@pytest.mark.parametrize(
    "step", [(0, 1.0), (15, 1.0), (-1, 1.0), (True, 1.0), (1.0, 1.0), (1, None), (1, float("nan")), (1,), 1, "ab", None]
)
def test_what_is_no_step_names_the_reward(step):
    with pytest.raises(ValueError, match=r"reward 'mine' returned .* as a step; a step must be .* 'the completion'"):
        score([graded_with([(1, 1.0), step])])


@pytest.mark.parametrize("steps", [None, 3, "ab", {1: 0.5}])
def test_steps_that_are_no_list_name_the_reward(steps):
    with pytest.raises(ValueError, match=r"reward 'mine' returned .* as steps; they must be a list.* 'the completion'"):
        score([graded_with(steps)])


@pytest.mark.parametrize("worth", [float("inf"), 1e39, "1"])
def test_a_step_that_is_worth_no_number_names_the_reward(worth):
    with pytest.raises(ValueError, match=r"reward 'mine' returned .* must be None or a number"):
        score([graded_with([(1, worth)])])
