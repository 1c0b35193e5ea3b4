"""Chat templates: the same text as from transformers, limits of time and memory, and determinism."""

import os
import signal
import time

import pytest

from grpo_jax.data import chat_templates
from grpo_jax.data.chat_templates import Chat, render_chats
from grpo_jax.data.messages import checked_messages
from grpo_jax.data.prompts import encode_prompts, render_prompts
from grpo_jax.models.tokenizers import read_tokenizer
from tests.families import FAMILIES, write_tokenizer_files
from tests.test_data_prompts import make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "It is 2."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CONVERSATIONS = [[USER], [USER, ASSISTANT, USER], [{"role": "system", "content": "Be <brief> & kind."}, USER]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in FAMILIES:
        write_tokenizer_files(folder / name, name)
    return {name: read_tokenizer(folder / name) for name in FAMILIES}


def rendered(template, messages=(USER,), *, today="2026-11-27", **variables):
    chats = [Chat([*messages], None, variables, True)]
    return render_chats(
        make_tokenizer(template), chats, today=today, error_prefix=lambda n, of: f"{of} rejects prompt {n}"
    )[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_every_family_write_what_transformers_writes(tokenizers, name):
    tokenizer = tokenizers[name]
    options = {"enable_thinking": False}
    without_system = name in ("gemma2", "mistral_v1", "mistral_v3")  # they refuse such a message
    for messages in CONVERSATIONS[: 2 if without_system else 3]:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        assert render_prompts([messages], tokenizer, template_kwargs=options) == [expected]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
        assert encode_prompts([messages], tokenizer, template_kwargs=options) == [ids]


def test_extras_of_messages_tools_and_arguments_reach_the_template(tokenizers):
    qwen = tokenizers["qwen3"]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I add.", "name": None},
        {
            "role": "tool",
            "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "!"}],
            "tool_call_id": "7",
        },
    ]
    plain = [USER, {**messages[1], "content": ""}, {**messages[2], "content": "2!"}]
    expected = qwen.apply_chat_template(plain, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert '"b": null' in expected
    assert '"name": "add"' in expected
    for tools in ([TOOL], chat_templates.json.dumps([TOOL])):
        assert render_prompts([messages], qwen, rows=[{"tools": tools}]) == [expected]
    rows = [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": '{"enable_thinking": true}'},
        {},
    ]
    off, on, by_settings = render_prompts(["Hi"] * 3, qwen, template_kwargs={"enable_thinking": False}, rows=rows)
    assert off == by_settings == on + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part 0 of the content has the type 'image'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part 0 of the content has the type 'text'; only text"),
        ({"role": "user", "content": ["Hi"]}, "part 0 is 'Hi'"),
        ({"role": "user", "content": None}, "must have a text as role"),
        ({"content": "Hi"}, "must have a text as role"),
    ],
)
def test_messages_that_cannot_be_read_are_named(message, reason):
    with pytest.raises(ValueError, match=rf"^prompt 1, message 1.*{reason}"):
        render_prompts(["Hi", [USER, message]], make_tokenizer("{{ messages[0].content }}"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "[{"}, "column 'tools': it is not JSON"),
        ({"tools": ["add"]}, "column 'tools': it must be a list of JSON schemas"),
        ({"chat_template_kwargs": "{"}, "column 'chat_template_kwargs': it is not JSON"),
        ({"chat_template_kwargs": {"messages": []}}, r"column 'chat_template_kwargs': \['messages'\] cannot be set"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs': it must be an object"),
    ],
)
def test_columns_for_the_template_that_cannot_be_read_are_named(row, reason):
    with pytest.raises(ValueError, match=rf"^prompt 0, {reason}"):
        render_prompts(["Hi"], make_tokenizer("{{ messages[0].content }}"), rows=[row])


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (NESTED, "it takes more than 0.2 seconds"),
        ("{{ 10 ** (10 ** 9) }}", "it takes more than 0.2 seconds"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", "it takes more than 2 GiB of memory"),
        ("{{ '{:>9999999999}'.format(1) }}", "it takes more than 2 GiB of memory"),
        ("{{ 'a' * 10 ** 7 * 2 }}", "it writes 20,000,000 characters; the limit is 16,777,216"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply, or recurses without end"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "it is nested too deeply"),
        ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
        ("{{ messages[7].content + 'x' }}", "has no element 7"),
        ("{% if %}", "syntax error in line 1: Expected an expression"),
        ("{{ raise_exception('one at a time') }}", "one at a time"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "private attribute"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_one_error(monkeypatch, template, reason):
    if "seconds" in reason:
        monkeypatch.setattr(chat_templates, "CPU_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^the chat template rejects prompt 0: .*{reason}"):
        rendered(template)
    assert time.monotonic() - started < 20
    assert rendered("{{ messages[0].content }}") == USER["content"]  # and the next one is rendered


def test_the_error_names_template_and_prompt(tokenizers):
    tokenizer = make_tokenizer("{{ raise_exception('too long') if messages[0].content == 'long' }}ok")
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"^the chat template of some/model rejects prompt 300: too long"):
        render_prompts(["short"] * 300 + ["long"] + ["short"] * 300, tokenizer)


def test_a_renderer_that_was_killed_is_started_again():
    assert rendered("{{ messages[0].content }}") == USER["content"]
    process = chat_templates._renderer()._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rendered("{{ messages[0].content }}") == USER["content"]


def test_a_renderer_that_cannot_be_started_says_so(monkeypatch):
    monkeypatch.setattr(chat_templates.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the process that renders chat templates could not be started"):
        chat_templates.Renderer().render("", "2026-11-27", [{}])


def test_a_conversation_that_ends_the_renderer_is_found(monkeypatch):
    renderer = chat_templates.Renderer()
    ask = renderer._ask
    dies = lambda request: None if any(chat["messages"] == "bad" for chat in request[3]) else ask(request)  # noqa: E731
    monkeypatch.setattr(renderer, "_ask", dies)
    chats = [{"messages": "good"}, {"messages": "fine"}, {"messages": "bad"}, {"messages": "good"}]
    assert renderer.render("{{ messages }}", "2026-11-27", chats) == (
        ["good", "fine"],
        "it exceeds the limit of time or memory",
    )
    renderer.close()


def test_what_a_template_writes_does_not_depend_on_the_day_or_on_chance():
    template = "{{ strftime_now('%d %b %Y %H:%M') }} {{ [1, 2, 3, 4, 5, 6, 7, 8] | random }} {{ lipsum(n=1) }}"
    text = rendered(template)
    assert text.startswith("27 Nov 2026 00:00 ")
    assert rendered(template) == text
    assert rendered(template, today="2026-11-28").startswith("28 Nov 2026")
    assert rendered("{{ strftime_now('%Y-%m-%d') }}", today=None) == chat_templates.date.today().isoformat()
    assert render_prompts(["Hi"], make_tokenizer("{{ strftime_now('%Y') }}"), date="1999-01-01") == ["1999"]


def test_requests_are_bounded_and_stay_in_order(monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_CHATS", 3)
    monkeypatch.setattr(chat_templates, "MAX_CHARACTERS", 20)
    texts = [f"{n}" * (1 + 7 * (n % 4)) for n in range(30)]
    assert render_prompts(texts, make_tokenizer("{{ messages[0].content }}")) == texts


def test_a_tokenizer_with_several_templates_uses_that_of_tools_where_there_are_some():
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    rows = [{}, {"tools": [TOOL]}, {"tools": []}]
    assert render_prompts(["Hi"] * 3, tokenizer, rows=rows) == ["plain", "1 tools", "plain"]


def test_messages_are_copied_and_names_of_thoughts_are_alike():
    given = [{"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": "hm", "name": None}]
    [found] = checked_messages(given, "row 1")
    assert found == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
        "thinking": "hm",
        "reasoning_content": "hm",
    }
    assert "name" in given[0]
    for messages, reason in (
        ([], ": a conversation must have at least one"),
        (["Hi"], ", message 0: it must have a text"),
    ):
        with pytest.raises(ValueError, match=f"row 1{reason}"):
            checked_messages(messages, "row 1")
