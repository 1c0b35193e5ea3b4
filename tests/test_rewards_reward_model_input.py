"""A reward model reads the tokens that it was trained on, whatever the policy's prompts look like."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.preferences import EncodedPreferences, Preference
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import encode_prompts, render_prompts
from grpo_jax.data.tokens import decode_following
from grpo_jax.models import from_pretrained
from grpo_jax.rewards.reward_model_input import described_input, reward_model_reader
from tests.families import FAMILIES, family
from tests.test_data_chat_templates import ASSISTANT, USER, tokenizers  # noqa: F401 - a fixture
from tests.test_data_tokens import cached

COMPLETIONS = ["I add.\n\n    2", " It is 2. ", "2"]
PLAIN = ["{question}", "Q: {question}\nA:", "Q: {question} A: ", "Q: {question}\n\n"]


@pytest.fixture(scope="module")
def model(small):
    return from_pretrained(small)


def reward_model_of(model, name, rendering):
    tokenizer = cached(name)
    eos_ids = tuple(tokenizer.convert_tokens_to_ids([*family(name).eos, family(name).turn_end]))
    return replace(model, tokenizer=tokenizer, eos_ids=eos_ids, prompt_format=prompt_format_of(rendering, tokenizer))


def taught(reward_model, prompt, completions, rendering, columns):
    """The tokens of each completion with its prompt as training has them."""
    pairs = EncodedPreferences(
        [Preference(prompt, *completions, "row", None, columns)],
        reward_model.tokenizer,
        eos_ids=reward_model.eos_ids,
        pad_id=0,
        max_prompt_length=400,
        max_completion_length=400,
        **rendering,
    ).padded([0])
    before = np.asarray(pairs.prompt_ids)[0][np.asarray(pairs.prompt_mask)[0]].tolist()
    after = [np.asarray(pairs.completion_ids)[0, n][np.asarray(pairs.completion_mask)[0, n]].tolist() for n in (0, 1)]
    return [before + ids for ids in after]


def check(model, name, rendering, prompt, completions, columns=None):
    if name == "deepseek_r1_qwen" and rendering.get("template") is None:
        completions = [f"hm\n</think>\n\n{each}" for each in completions]
    columns = columns or {}
    reward_model = reward_model_of(model, name, rendering)
    read = reward_model_reader(reward_model)
    of_rows = {key: [each] * 2 for key, each in columns.items()}
    asked = {"problem_prompt": [prompt] * 2, "truncated": [False] * 2, **of_rows}
    expected = taught(reward_model, prompt, completions, rendering, columns)
    assert read(["as the policy was asked"] * 2, [*completions], asked) == expected
    [cut] = read([""], completions[:1], {name: values[:1] for name, values in asked.items()} | {"truncated": [True]})
    assert cut[-1] not in reward_model.eos_ids
    before = encode_prompts([prompt], reward_model.tokenizer, rows=[columns], **rendering)[0]
    assert cut[: len(before)] == before
    assert decode_following(reward_model.tokenizer, [cut[len(before) :]]) == [completions[0]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", ["Add 1 and 1", [USER, ASSISTANT, USER]])
def test_chats_of_every_family_are_read_as_they_were_taught(model, name, prompt):
    check(model, name, {"template": None}, prompt, COMPLETIONS[:2])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("template", PLAIN)
def test_plain_prompts_of_every_family_are_read_as_they_were_taught(model, name, template):
    check(model, name, {"template": template}, "Add 1 and 1", COMPLETIONS[:2])
    tokenizer = cached(name)
    [ids] = reward_model_reader(reward_model_of(model, name, {"template": template}))(
        [""], ["2"], {"problem_prompt": [[USER]]}
    )
    begins = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert not begins or ids.count(tokenizer.bos_token_id) == 1
    assert USER["content"] in tokenizer.decode(ids)  # a conversation of one question is that question


@given(
    name=st.sampled_from(["llama2", "llama3", "qwen25", "qwen3", "phi3", "chatml_llama2"]),
    template=st.sampled_from([None, *PLAIN]),
    system_prompt=st.sampled_from([None, "Be brief."]),
    completions=st.lists(st.text("ab \n.é", min_size=1, max_size=8), min_size=2, max_size=2, unique_by=str.strip),
)
def test_any_completion_is_read_as_it_was_taught(model, name, template, system_prompt, completions):
    rendering = {"template": template} | ({} if template else {"system_prompt": system_prompt})
    if all(each.strip() for each in completions):
        reward_model = reward_model_of(model, name, rendering)
        expected = taught(reward_model, "Add", completions, rendering, {})
        assert reward_model_reader(reward_model)(["x"] * 2, completions, {"problem_prompt": ["Add"] * 2}) == expected


def test_settings_and_columns_of_the_template_are_read_too(model):
    rendering = {"template": None, "system_prompt": "Be kind.", "template_kwargs": {"enable_thinking": False}}
    check(model, "qwen3", rendering, "Add 1 and 1", COMPLETIONS[:2])
    check(
        model, "qwen3", {"template": None}, "Add", COMPLETIONS[:2], {"chat_template_kwargs": {"enable_thinking": False}}
    )
    check(model, "qwen25", {"template": None}, [USER, {**ASSISTANT, "content": "So"}], COMPLETIONS[:2])


def test_without_the_problems_prompt_texts_are_taken_to_be_prompts_in_its_format(model):
    for rendering in ({"template": None}, {"template": PLAIN[2]}):
        reward_model = reward_model_of(model, "llama3", rendering)
        expected = taught(reward_model, "Add", COMPLETIONS[:2], rendering, {})
        texts = render_prompts(["Add"] * 2, reward_model.tokenizer, **rendering)
        given = ["I add.\n\n    2", "It is 2."] if rendering["template"] is None else COMPLETIONS[:2]  # it trims
        assert reward_model_reader(reward_model)(texts, given, {}) == expected


def test_a_model_that_does_not_say_reads_its_chat_template_whole(model):
    reward_model = replace(reward_model_of(model, "qwen25", {"template": None}), prompt_format=None)
    tokenizer = reward_model.tokenizer
    read = reward_model_reader(reward_model)
    conversation = [USER, {"role": "assistant", "content": "2"}]
    expected = tokenizer.apply_chat_template(conversation, return_dict=False)
    assert read(["?"], ["2"], {"problem_prompt": [[USER]]}) == [expected]
    assert read(["?"], ["2"], {"problem_prompt": [USER["content"]]}) == [expected]
    assert described_input(reward_model).endswith("chat template (it has no prompt_format.json)")


def test_a_model_without_format_and_template_reads_what_the_policy_was_given(model):
    reward_model = replace(reward_model_of(model, "qwen25", {"template": None}), prompt_format=None)
    tokenizer = reward_model.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        [ids] = reward_model_reader(reward_model)(["Q: Add A:"], [" 2"], {"problem_prompt": ["Add"]})
    finally:
        tokenizer.chat_template = template
    assert ids == tokenizer("Q: Add A:")["input_ids"] + tokenizer(" 2")["input_ids"] + [reward_model.eos_ids[0]]


def test_a_completion_that_cannot_be_read_is_left_out_alone(model):
    reward_model = reward_model_of(model, "deepseek_r1_qwen", {"template": None})
    read = reward_model_reader(reward_model)
    asked = {"problem_prompt": ["Add"] * 2}
    thought, answer = read(["?"] * 2, ["hm</think>2", "2"], asked)
    assert thought
    assert answer == []  # this template opens a thought, which the completion never ends
    with pytest.raises(ValueError, match="renders the prompt differently"):
        read(["?"] * 2, ["2", "3"], asked)
    cut_off, answer = read(["?"] * 2, ["hm</think>2", "3"], {**asked, "truncated": [True, False]})
    assert cut_off
    assert answer == []
    assert read([], [], {}) == []
