"""How prompts are made: by settings, else as the model was trained; said, stored and read back."""

from dataclasses import replace

import pytest

from grpo_jax.config.prompts import PromptConfig, parse_template_kwargs, prompt_flags, with_format
from grpo_jax.data.prompt_format import prompt_format_of, read_prompt_format
from grpo_jax.data.prompts import R1_ZERO, render_prompts
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.models import from_pretrained
from tests.test_data_turns import chatml

TODAY = "2026-11-27"
DATED = "{{ strftime_now('%d %b') }}: {{ messages[-1].content }}"
CHAT = {"kind": "chat", "system_prompt": "Be kind.", "template_kwargs": {"enable_thinking": False}}
PLAIN = {"kind": "plain", "template": "Q: {question}"}
NOTHING_SAID = {"template": None, "system_prompt": None, "template_kwargs": {}, "date": None}
CHAT_RENDERING = {"template": None, "system_prompt": "Be kind.", "template_kwargs": {"enable_thinking": False}}


def rendering(prompt_format=None, of_chats="{{ messages[0].content }}", **settings):
    return PromptConfig(**settings).rendering(prompt_format, chatml(of_chats), today=TODAY)


@pytest.mark.parametrize(
    ("prompt_format", "settings", "expected"),
    [
        (None, {}, {"template": R1_ZERO}),
        (PLAIN, {}, {"template": "Q: {question}"}),
        (CHAT, {}, {**CHAT_RENDERING, "date": None}),
        (CHAT, {"template": "{question}"}, {"template": "{question}"}),
        (
            PLAIN,
            {"chat_template": True},
            {"template": None, "system_prompt": None, "template_kwargs": {}, "date": None},
        ),
        (CHAT, {"chat_template": True}, {**CHAT_RENDERING, "date": None}),
        (CHAT, {"system_prompt": "Be brief."}, {**CHAT_RENDERING, "system_prompt": "Be brief.", "date": None}),
        (CHAT, {"system_prompt": ""}, {**CHAT_RENDERING, "system_prompt": None, "date": None}),
        (
            CHAT,
            {"template_kwargs": ('{"enable_thinking": true}', "tone=dry")},
            {**CHAT_RENDERING, "template_kwargs": {"enable_thinking": True, "tone": "dry"}, "date": None},
        ),
    ],
)
def test_the_default_is_what_the_model_was_trained_with(prompt_format, settings, expected):
    assert rendering(prompt_format, **settings) == expected


@pytest.mark.parametrize("settings", [{"system_prompt": "x"}, {"template_kwargs": ("a=1",)}, {"template_date": TODAY}])
@pytest.mark.parametrize("prompt_format", [None, PLAIN])
def test_settings_of_chats_are_refused_for_a_model_trained_without(settings, prompt_format):
    with pytest.raises(
        ValueError, match=rf"{next(iter(settings))} needs chat_template, but the prompt template is plain"
    ):
        rendering(prompt_format, **settings)


def test_the_date_is_the_models_or_the_day_the_run_began_and_only_where_the_template_writes_one():
    assert rendering(CHAT, DATED)["date"] == TODAY
    assert rendering({**CHAT, "date": "2025-01-01"}, DATED)["date"] == "2025-01-01"
    assert rendering({**CHAT, "date": "2025-01-01"}, DATED, template_date="2024-02-02")["date"] == "2024-02-02"
    tokenizer = chatml(DATED)
    found = rendering(None, DATED, chat_template=True)
    assert render_prompts(["Hi"], tokenizer, **found) == ["27 Nov: Hi"]
    assert prompt_format_of(found, tokenizer) == {"kind": "chat", "date": TODAY}
    assert prompt_format_of(found, chatml()) == {"kind": "chat"}


@pytest.mark.parametrize("prompt_format", [PLAIN, CHAT, {"kind": "chat"}, {**CHAT, "date": TODAY}])
def test_a_format_is_read_back_and_asked_for_by_flags(prompt_format):
    tokenizer = chatml(DATED)
    again = prompt_format_of(read_prompt_format(prompt_format), tokenizer)
    assert again == prompt_format
    settings = with_format(PromptConfig(), prompt_format)
    found = settings.rendering(None, tokenizer, today=TODAY)
    assert prompt_format_of(found, tokenizer) == {
        **prompt_format,
        **({"date": TODAY} if "template" not in prompt_format else {}),
    }
    flags = prompt_flags(prompt_format)
    assert ("--chat-template" in flags) == (prompt_format["kind"] == "chat")
    assert with_format(PromptConfig(template="{question}"), prompt_format) == PromptConfig(template="{question}")


@pytest.mark.parametrize(
    ("prompt_format", "reason"),
    [
        ({}, "kind must be 'chat' or 'plain'; it is None"),
        ({"kind": ["chat"]}, "kind must be"),
        ({"kind": "plain"}, r"template must be text with \{question\}; it is None"),
        ({"kind": "plain", "template": "Q"}, "template must be text with"),
        ({"kind": "chat", "system_prompt": 3}, "system_prompt must be text; it is 3"),
        ({"kind": "chat", "template_kwargs": [1]}, "template_kwargs: it must be an object"),
        ({"kind": "chat", "template_kwargs": {"messages": []}}, r"template_kwargs: \['messages'\] cannot be set"),
        ({"kind": "chat", "date": "today"}, "date is 'today'; it must be a date such as 2026-11-27"),
        ({"kind": "chat", "date": 7}, "date is 7"),
    ],
)
def test_a_malformed_format_is_refused(prompt_format, reason):
    with pytest.raises(ValueError, match=rf"^prompt_format.json: {reason}"):
        read_prompt_format(prompt_format)


def test_arguments_of_the_template_are_json_or_name_and_value():
    texts = ['{"a": [1], "b": null}', "c=false", "d=low", 'e="low"', "f=1=2"]
    assert parse_template_kwargs(texts) == {"a": [1], "c": False, "d": "low", "e": "low", "f": "1=2"}
    assert parse_template_kwargs(["a=True", "b=False", "c=None", "d=falsely"]) == {
        "a": True,
        "b": False,
        "d": "falsely",
    }


def test_an_argument_that_the_chat_template_does_not_read_is_refused(small):
    policy = from_pretrained(small)
    policy.tokenizer.chat_template = "{% if enable_thinking %}{% endif %}{{ messages[0].content }}"
    policy = replace(policy, prompt_format=None)
    settings = PromptConfig(chat_template=True, template_kwargs=("enable_thinking=False",))
    assert resolve_rendering(settings, policy, say=str, today=TODAY)["template_kwargs"] == {"enable_thinking": False}
    misspelt = replace(settings, template_kwargs=("enable_thnking=False",))
    with pytest.raises(
        ValueError, match="template_kwargs: the chat template does not read a variable 'enable_thnking'"
    ):
        resolve_rendering(misspelt, policy, say=str, today=TODAY)


def test_what_is_in_effect_is_said_with_what_the_model_was_trained_with(small):
    policy = from_pretrained(small)
    said = []
    for prompt_format, settings in (
        (policy.prompt_format, PromptConfig()),
        (None, PromptConfig()),
        (policy.prompt_format, PromptConfig(template="1+{question}")),
        (None, PromptConfig(chat_template=True)),
    ):
        resolve_rendering(settings, replace(policy, prompt_format=prompt_format), say=said.append, today=TODAY)
    assert said[0] == "prompts: the plain template '{question}', as the model was trained"
    assert said[1].startswith("prompts: the plain template 'Below, a user")
    assert said[1].endswith(", the default: the model has no prompt_format.json")
    assert said[2:] == [
        "prompts: the plain template '1+{question}'; the model was trained with the plain template '{question}'",
        "prompts: the tokenizer's chat template",
    ]
