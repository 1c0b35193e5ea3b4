import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards.format import format_reward, pattern_reward


def score(completion):
    return format_reward(["p"], [completion])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "<think>a\nb\n\nc</think>\n<answer>\nd\ne\n</answer>",
        "  \n<think>a</think> \n\t <answer>b</answer>\n ",
        "<think></think><answer></answer>",
        "<think>1 < 2 <b>x</b> \\boxed{3}</think><answer>4</answer>",
    ],
)
def test_well_formed(completion):
    """R1."""
    assert score(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "a",
        "<think>a</think>",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think><answer>b</answer><think>a</think><answer>b</answer>",
        "<think>a<think>a</think></think><answer>b</answer>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b<answer>c</answer></answer>",
        "<think>a<answer>b</think></answer>",
        "<think>a</think>text<answer>b</answer>",
        "text<think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>text",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "a</think><answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
        "<think >a</think><answer>b</answer>",
    ],
)
def test_malformed(completion):
    """R1."""
    assert score(completion) == 0.0


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "x", "\n", " "]
TAG = r"</?(?:think|answer)>"
ORACLE = re.compile(rf"\s*<think>((?!{TAG}).)*</think>\s*<answer>((?!{TAG}).)*</answer>\s*", re.DOTALL)


@given(
    st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
    | st.lists(st.sampled_from(["", "", "", "", "x", "\n", "<think>", "</answer>"]), min_size=5, max_size=5).map(
        lambda gaps: "".join(gap + tag for gap, tag in zip(gaps, [*PIECES[:4], ""], strict=True))
    )
)
@settings(max_examples=500)
def test_against_one_regular_expression(completion):
    assert score(completion) == float(ORACLE.fullmatch(completion) is not None)


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<", "</think><answer>", " ", "\n", "<think>a</think>"])
def test_time_is_linear(piece):
    start = time.process_time()
    assert score("<think>" + piece * (1_000_000 // len(piece))) == 0.0
    assert time.process_time() - start < 2


def test_one_score_a_completion_and_other_columns_are_accepted():
    completions = ["<think>a</think><answer>b</answer>", "no"]
    assert format_reward(["p", "p"], completions, answer=["1", "2"]) == [1.0, 0.0]


def test_a_prompt_that_opens_the_thought_opens_it_for_its_completion():
    rest = "2+3=5</think><answer>5</answer>"
    assert format_reward(["2+3? <think>\n", "2+3?"], [rest, rest]) == [1.0, 0.0]
    assert format_reward(["<think>"], [f"<think>{rest}"]) == [0.0]
    assert format_reward(["2+3?\n<think>\nFirst:"], [rest]) == [1.0]
    assert format_reward(["Think in <think> tags: 2+3?"], [rest]) == [0.0]
    assert (
        format_reward(["2+3? <think>\n", "2+3?"], ["2+3=5<answer>5</answer>", "<think>5<answer>5</answer>"])
        == [0.0] * 2
    )


@pytest.mark.parametrize(
    ("completion", "score"), [("Answer: 5", 1.0), (" so\nAnswer: 5\n", 1.0), ("Answer: five", 0.0), ("Answer: 5.", 0.0)]
)
def test_a_pattern_of_ones_own_holds_for_the_whole_completion(completion, score):
    assert pattern_reward([""], [completion], pattern=r".*Answer: \d+") == [score]


def test_what_is_no_pattern():
    with pytest.raises(ValueError, match=r"the pattern '\(' is not a regular expression: missing \)"):
        pattern_reward([""], [""], pattern="(")
