import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.prompts import R1_ZERO
from grpo_jax.rewards.thought import THOUGHTS, after_thought, opened_by

TAGS = {
    "think": ("<think>", "</think>"),
    "thinking": ("<thinking>", "</thinking>"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    **{name: (f"<{name}>", f"</{name}>") for name in ("thoughts", "scratchpad", "reflection", "analysis")},
    "seed": ("<seed:think>", "</seed:think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "kimi": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "open_thoughts": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "gpt_oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}


def test_every_kind_is_tried():
    assert TAGS.keys() == THOUGHTS.keys()


@pytest.mark.parametrize(("opening", "closing"), TAGS.values(), ids=TAGS)
def test_thoughts_of_every_kind(opening, closing):
    assert after_thought("", f"{opening}a{closing}b") == "b"
    assert after_thought("", f"{opening}a") is None
    assert after_thought("", f"b {opening}a") is None
    assert after_thought("", f"{opening}a{closing}b{opening}c") is None
    assert after_thought("", f"{opening}a{closing}b{opening}c{closing}d") == "d"
    assert after_thought("", f"a{closing}b") == "b"
    assert after_thought(f"q {opening}\n", "a") is None
    assert after_thought(f"q {opening}\n", f"a{closing}b") == "b"
    assert after_thought(f"q\n{opening}\n\n{closing}\n\n", "b") == "b"


@pytest.mark.parametrize(
    ("completion", "rest"),
    [
        ("", ""),
        ("5", "5"),
        ("<think>", None),
        ("<think></think>", ""),
        ("<think>a</think>b</think>c", "c"),
        ("<think>a<think>b</think>c", "c"),
        ("<Think>a", None),
        ("<THINK>a</think>b", "b"),
        ("<think>a</thinking>b", None),
        ("<think>a</reasoning><answer>5</answer>", None),
        ("<think>by <reasoning> I mean</think>b", "b"),
        ("<think>a<answer>5</answer>", None),
        ("<thinker>a", "<thinker>a"),
        ("think: a", "think: a"),
    ],
)
def test_what_follows_the_thought(completion, rest):
    assert after_thought("q", completion) == rest


@pytest.mark.parametrize(
    "prompt",
    [
        "<think>",
        "Assistant: <think>\n",
        "<|im_start|>assistant\n<think>\n",
        "<|im_start|>assistant\n<think>\nFirst:",
        "<|im_start|>assistant\n<think>\nFirst, 2 < 3:\n- so",
        "<\uff5cAssistant\uff5c><think>\n",
        "<\uff5cAssistant\uff5c><think>\nOkay",
        "<start_of_turn>model\n<think>Well",
        "User: 1+1?\n\nAssistant: <think> Let me see.",
        "User: 1+1?\n\nAssistant: Let me solve this step by step.\n<think>",
        "### Response: <think>So",
        "<think>a</think>b\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n",
        R1_ZERO.replace("{question}", "1+1?") + " <think>",
        R1_ZERO.replace("{question}", "1+1?") + " <think>\nWe add",
    ],
)
def test_prompts_that_open_the_thought(prompt):
    assert opened_by(prompt) == "think"
    assert after_thought(prompt, r"maybe \boxed{12}") is None
    assert after_thought(prompt, "<think>a") is None
    assert after_thought(prompt, "a</think>b") == "b"
    assert after_thought(prompt, "<think>a</think>b") == "b"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "1+1?",
        R1_ZERO.replace("{question}", "1+1?"),
        "Think between <think> and </think>. What is 1+1?",
        "Think in <think> tags. What is 1+1?",
        "Write your thought as <think>thought</think>.",
        "Respond in the following format:\n<think>\n...\n</think>\n<answer>\n...\n</answer>\n1+1?",
        "System: begin with\n<think>\nUser: 1+1?\nAssistant:",
        "Begin with <think>\n\nUser: 1+1?\n\nAssistant:",
        "<|im_start|>system\n<think> opens a thought<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nBegin with <think><|im_end|>\n<|im_start|>assistant\n",
        "[INST] Begin with\n<think> [/INST]",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "q <think>a</think>b\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_prompts_that_do_not_open_the_thought(prompt):
    assert opened_by(prompt) is None
    assert after_thought(prompt, r"\boxed{12}") == r"\boxed{12}"
    assert after_thought(prompt, "<think>a") is None
    assert after_thought(prompt, "<think>a</think>b") == "b"


PIECES = [tag for pair in TAGS.values() for tag in pair] + ["a", "\n", "<", ">"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(PIECES))
def test_what_follows_is_the_end_of_the_completion_without_an_opening_tag(completion, end):
    rest = after_thought(end, completion)
    if rest is not None:
        assert completion.endswith(rest)
        assert after_thought("", rest) == rest
    for opening, _ in TAGS.values():
        assert after_thought("", f"{rest or ''}{opening}a") is None


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>", "<think></think>", "<", "[", "<|channel|>final ", "<|channel|>analysis", "\n", "\u25c1"],
)
def test_time_is_linear(piece):
    text = piece * (500_000 // len(piece))
    start = time.process_time()
    after_thought(text, text)
    after_thought(text + "<think>" + text, text)
    assert time.process_time() - start < 2
