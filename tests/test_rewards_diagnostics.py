"""What completions give away, on examples that can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.monitor.samples import disagreement, spot_checks
from grpo_jax.rewards import diagnostics
from grpo_jax.rewards.diagnostics import (
    TextFacts,
    duplicate_share,
    hard_coded,
    has_empty_thought,
    occurs_in,
    text_facts,
)
from grpo_jax.tasks.sums import Sum, worked


def text_metrics(prompts, completions, *, group_size, **columns):
    """Those of one process, which are also those of three that take turns."""

    def facts(rows):
        chosen = {name: values[rows] for name, values in columns.items()}
        return text_facts(prompts[rows], completions[rows], **chosen)

    metrics = diagnostics.text_metrics(facts(slice(None)), group_size=group_size)
    parts = TextFacts.interleaved([facts(slice(turn, None, 3)) for turn in range(3)])
    assert diagnostics.text_metrics(parts, group_size=group_size) == metrics
    return metrics


def tagged(thought, answer):
    return f"<think>{thought}</think><answer>{answer}</answer>"


def test_duplicates_are_counted_within_groups():
    assert duplicate_share(["a", "b", "a", "c"]) == 0.5
    metrics = text_metrics(["p"] * 4, ["a", "b", "a", "b"], group_size=2)
    assert metrics["completions/duplicate_share"] == 0
    assert text_metrics(["p"] * 4, ["a", "a", "b", "b"], group_size=2)["completions/duplicate_share"] == 1


def test_an_unfinished_thought_has_no_answer_to_count():
    completions = ["<think><answer>5</answer>", "<think>\\boxed{5}", "<answer>4</answer>", "<answer>3</answer>"]
    metrics = text_metrics(["5"] * 4, completions, group_size=2, answers=["6", "6", "6", "so \\boxed{5}"])
    assert metrics["completions/answer_in_prompt_excess"] == pytest.approx(-1 / 2)  # 4 and 3 are not in the prompt
    assert "completions/answer_in_prompt_excess" not in text_metrics(
        ["q <think>"], ["\\boxed{5}"], group_size=1, answers=["5"]
    )


def test_empty_thoughts_are_those_with_the_format_and_nothing_in_it():
    completions = [tagged("", 5), tagged("  \n", 5), tagged("...", 5), tagged("5", 5), tagged("2+3=5", 5), "5"]
    assert has_empty_thought([""] * 6, completions) == [True, True, True, True, False, False]
    assert has_empty_thought(["<think>"], ["</think><answer>5</answer>"]) == [True]


@pytest.mark.parametrize(
    ("answer", "prompt", "expected"),
    [
        ("16", "3+8+5=", False),
        ("8", "3+8+5=", True),
        ("38", "3+8+5=", False),
        ("1.5", "He has 1.5 apples", True),
        ("5", "He has 1.5 apples", False),
        ("blue whale", "The Blue Whale is large", True),
        ("whale blue", "The Blue Whale is large", False),
        ("", "anything", False),
        ("+", "1 + 1", False),
    ],
)
def test_an_answer_that_occurs_in_its_prompt(answer, prompt, expected):
    assert occurs_in(answer, prompt) == expected


def test_answers_taken_from_prompts_and_given_to_everything_are_seen_against_what_is_right():
    prompts, gold = ["4 and 5?", "6 and 7?"] * 2, ["9", "13", "9", "13"]
    honest = text_metrics(prompts, [tagged("a b", each) for each in gold], group_size=2, answers=gold)
    assert honest["completions/answer_in_prompt_excess"] == 0
    assert honest["completions/constant_answer_excess"] == 0
    copied = text_metrics(prompts, [tagged("a b", each) for each in "4648"], group_size=2, answers=gold)
    assert copied["completions/answer_in_prompt_excess"] == 0.75
    constant = text_metrics(prompts, [tagged("a b", "9.0")] * 4, group_size=2, answers=gold)
    assert constant["completions/constant_answer_excess"] == 0.5
    silent = text_metrics(prompts, ["I do not know"] * 4, group_size=2, answers=gold)
    assert "completions/constant_answer_excess" not in silent


TESTS = [
    {"fn_name": "f", "input": [1], "output": 1234},
    {"fn_name": "f", "input": [2], "output": [5, 6]},
    "assert f(3) == 'abc'",
]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x):\n  return {1: 1234, 2: [5, 6], 3: 'abc'}[x]", True),
        ("def f(x):\n  if x == 1: return 1234\n  return [5, 6]", True),
        ("def f(x):\n  return 1234", False),
        ("def f(x):\n  return x * 617 * 2", False),
        ("def f(x): return (5, 6) if x else 'abc'", True),
        ("def f(:", False),
        ("", False),
    ],
)
def test_programs_that_spell_out_what_is_expected(program, expected):
    assert hard_coded(program, TESTS) == expected
    metrics = text_metrics(["p"], [f"```python\n{program}\n```"], group_size=1, tests=[TESTS])
    assert metrics["completions/hard_coded_share"] == expected


def test_what_is_expected_of_any_program_is_no_sign():
    tests = [f"assert f({i}) == {i % 3}" for i in range(9)] + [{"input": "1", "output": "1"}]
    assert not hard_coded("def f(x):\n  return [0, 1, 2][x % 3]", tests)


def test_odd_tests_are_no_error():
    tests = ["assert f(1) == {'abc'} and f(2) == {[1]: 2}", "assert f(1) < 1000", "assert f(", 5, {"input": "1"}]
    assert not hard_coded("def f(x):\n  return 1000 if x else {'abc'}", tests)


@given(st.lists(st.text(), min_size=1, max_size=4), st.text(), st.text())
def test_no_text_crashes(completions, prompt, gold):
    count = len(completions)
    metrics = text_metrics([prompt] * count, completions, group_size=1, answers=[gold] * count, tests=[[gold]] * count)
    assert all(-1 <= value <= 1 for value in metrics.values())


def test_an_honest_completion_of_the_built_in_task_gives_nothing_away():
    sums = [Sum((3, 8, 5, 6)), Sum((9, 9, 1, 4, 2))]
    metrics = text_metrics(
        [each.question for each in sums],
        [worked(each) for each in sums],
        group_size=1,
        answers=[s.answer for s in sums],
    )
    assert max(metrics.values()) < 0.1, metrics


# Spot checks --------------------------------------------------------------------------------------------------------


def test_the_surprising_are_chosen_and_one_at_random():
    total, a, b = np.full((3, 8), 0.1)
    total[2] = a[2] = b[2] = 0.9
    a[5], b[5] = 0.0, 1.0
    total[6] = a[6] = b[6] = -0.5
    chosen = spot_checks(total, {"a": a, "b": b}, group_size=4, seed=0)
    assert [*chosen.items()][:3] == [
        (2, "highest reward above its group"),
        (5, "largest disagreement between parts"),
        (6, "lowest reward below its group"),
    ]
    assert [*chosen.values()][3] == "at random"
    assert chosen == spot_checks(total, {"a": a, "b": b}, group_size=4, seed=0)


def test_a_jump_is_one_above_the_group_and_not_above_the_rest():
    easy, hard = [1.0] * 4, [0.0, 0.0, 0.0, 0.5]
    assert next(iter(spot_checks(np.array(easy + hard), {}, group_size=4, seed=0))) == 7


def test_without_surprise_or_rewards_there_is_the_random_one():
    assert [*spot_checks(np.ones(4), {}, group_size=2, seed=3).values()] == ["at random"]
    assert [*spot_checks(np.full(4, np.nan), {}, group_size=2, seed=3).values()] == ["at random"]
    assert disagreement({"a": np.array([1.0, 0.0])}) == 0
    assert disagreement({"a": np.array([np.nan, 0.0]), "b": np.array([1.0, 0.0])}) == 0
