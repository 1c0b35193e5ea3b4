"""The layouts in which published data sets write prompts, conversations, choices and preferences.

Pure functions of a row; ``docs/data.md`` lists the layouts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any, Literal

from grpo_jax.data.columns import (
    ANSWER_COLUMNS,
    COMPLETION_COLUMNS,
    CONVERSATION_COLUMNS,
    PROMPT_COLUMNS,
    Row,
    _parsed,
    find_column,
    listed,
    required_column,
    without,
)

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
    "tool": "tool",
}
"""Roles of messages by what ShareGPT's descendants call them."""
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a conversation begins that is kept as text, such as in CSV files."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]?")
HH_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


# Messages -------------------------------------------------------------------------------------------------------------


def as_messages(value: Any) -> list[Row] | None:
    """A conversation as messages with role and content, from ``role``/``content`` or ShareGPT's ``from``/``value``.

    Args:
        value: a list of messages, one message, or their JSON.

    Returns:
        The messages; None where ``value`` is not a conversation. Other fields of a message stay unless they are null.
    """
    if isinstance(value, str) and WRITTEN_MESSAGES.match(value):
        value = _parsed(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        return None
    messages = []
    for each in value:
        role = next((each[name] for name in ("role", "from") if each.get(name) is not None), None)
        names = [name for name in ("content", "value", "text") if name in each]
        if not isinstance(role, str) or not (names or each.get("tool_calls")):
            return None
        content = next((each[name] for name in names if each[name] is not None), None)
        others = {
            name: field
            for name, field in each.items()
            if field is not None and name not in ("role", "from", "content", "value", "text")
        }
        messages.append({"role": ROLES.get(role.lower(), role), "content": content, **others})
    return messages


def hh_messages(text: Any) -> list[Row] | None:
    """A dialogue as messages, from the text of HH-RLHF: turns that begin with ``Human:`` and ``Assistant:``."""
    if not isinstance(text, str) or not HH_TURN.match(text.lstrip()):
        return None
    _, *parts = HH_TURN.split(text.lstrip())
    roles, contents = parts[::2], parts[1::2]
    return [{"role": HH_ROLES[role], "content": each.strip()} for role, each in zip(roles, contents, strict=True)]


def with_system(messages: list[Row], row: Mapping[str, Any]) -> list[Row]:
    """Messages after the text of the row's column ``system``, unless they begin with a system message."""
    system = row.get("system")
    has_system = messages[0]["role"] in ("system", "developer")
    if has_system or not isinstance(system, str) or not system.strip():
        return messages
    return [{"role": "system", "content": system}, *messages]


def with_system_before(prompt: Any, row: Mapping[str, Any]) -> Any:
    """As ``with_system`` for a prompt that may be a text; it stays a text where there is nothing to add."""
    if not isinstance(row.get("system"), str) or not row["system"].strip() or not prompt:
        return prompt
    return with_system([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, row)


def prompt_of(row: Row, name: str, where: str) -> Any:
    """The prompt of a row: text, or messages up to the reply.

    Alpaca's ``input`` follows its ``instruction``; a programming problem is followed by the code to start from, or by
    MBPP's tests, without which the function's name is unknown; a dialogue loses the assistant's reply at its end; a
    question with ``choices`` is followed by them with letters, and follows its ``passage`` or ``context``.

    Raises:
        KeyError: the row has no such column.
    """
    prompt = required_column(row, name, where, "prompt_column=")
    is_conversation = name in CONVERSATION_COLUMNS
    messages = as_messages(prompt) if not isinstance(prompt, str) or prompt.lstrip()[:1] == "[" else None
    if messages is not None:
        messages = with_system(messages, row) if is_conversation else messages
        ends_with_reply = is_conversation and len(messages) > 1 and messages[-1]["role"] == "assistant"
        return messages[:-1] if ends_with_reply else messages
    if not isinstance(prompt, str):
        return prompt
    if name == "instruction":
        prompt = with_input(row, prompt)
    if name == "question":
        passages = [row[each].strip() for each in ("passage", "context") if isinstance(row.get(each), str)]
        prompt = "\n\n".join([*(each for each in passages if each and each not in prompt), prompt])
    choices = choices_of(row)
    if choices is not None:
        letters, texts = choices
        lines = [
            text if re.match(rf"\(?{letter}[).:]", text) else f"{letter}. {text}"
            for letter, text in zip(letters, texts, strict=True)
        ]
        # Not again where the question holds them already.
        return prompt if all(text in prompt for text in texts) else "\n".join([prompt.rstrip(), *lines])
    starter = row.get("starter_code")
    if isinstance(starter, str) and starter.strip() and starter.strip() not in prompt:
        return f"{prompt.rstrip()}\n\nStart from this code:\n\n```python\n{starter.strip()}\n```"
    tests = row.get("test_list")
    if isinstance(tests, list) and tests and all(isinstance(each, str) for each in tests) and tests[0] not in prompt:
        return "\n".join([prompt.rstrip(), "", "The program should pass these tests:", "", *tests])
    return prompt


def with_input(row: Mapping[str, Any], instruction: str) -> str:
    """An instruction with the input (Alpaca) or context (Dolly) that it is about."""
    added = next((row[name] for name in ("input", "context") if isinstance(row.get(name), str)), "")
    return f"{instruction.rstrip()}\n\n{added.strip()}" if added.strip() else instruction


def with_history(asked: str, history: Any, where: str) -> str | list[Row]:
    """A question after the earlier turns of its row, pairs of an instruction and a reply.

    Raises:
        ValueError: the history is something else.
    """
    if not history:
        return asked
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(each, str) for each in pair)
        for pair in history
    ):
        raise ValueError(f"{where}, column 'history': it must hold pairs of texts; it is {history!r:.200}")
    roles = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*roles, {"role": "user", "content": asked}]


def choices_of(row: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """The letters and texts of a multiple-choice question, from a list or from ARC's object; None for other rows."""
    if "choices" not in row and "options" not in row:
        return None
    value = row.get("choices") or row.get("options")
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        labels, texts = [str(each) for each in value["label"]], value["text"]
    elif isinstance(value, Mapping) and all(len(str(name)) == 1 for name in value):
        labels, texts = [str(name) for name in value], [*value.values()]
    elif isinstance(value, list) and len(value) <= len(string.ascii_uppercase):
        labels, texts = [*string.ascii_uppercase[: len(value)]], value
    else:
        return None
    is_choice = len(texts) > 1 and len(labels) == len(texts) and all(isinstance(each, str) for each in texts)
    return (labels, texts) if is_choice else None


def choice_answer(row: Mapping[str, Any], answer: Any, where: str) -> Any:
    """The letter of the right choice where the answer of a multiple-choice question is a number or the choice's text.

    Raises:
        ValueError: it is none of the choices.
    """
    choices = choices_of(row)
    if choices is None:
        return answer
    letters, texts = choices
    if isinstance(answer, str) and answer.strip() in letters:
        return answer.strip()
    if isinstance(answer, str) and answer.strip() in texts:
        place = texts.index(answer.strip())
        if answer.strip().isdigit() and int(answer) != place and int(answer) < len(letters):
            raise ValueError(
                f"{where} is {answer!r}, which is both the text of choice {letters[place]} and the number of choice "
                f"{letters[int(answer)]}; give the letter"
            )
        return letters[place]
    number = int(answer) if isinstance(answer, str) and answer.strip().isdigit() else answer
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(letters):
        return letters[number]
    raise ValueError(
        f"{where} is the answer to a question with {len(letters)} choices and must be one of {letters}, the text of a "
        f"choice or its number from 0; it is {answer!r:.200}"
    )


# Demonstrations -------------------------------------------------------------------------------------------------------


def as_demonstration(row: Row, where: str) -> Row:
    """A row with ``messages``, with ``prompt`` and ``completion``, or with ``text``, and its other columns.

    Raises:
        KeyError: it is in none of the known layouts; the error lists its columns.
    """
    for name in CONVERSATION_COLUMNS:
        messages = as_messages(row.get(name))
        if messages is not None and len(messages) > 1:
            return {"messages": with_system(messages, row), **without(row, name, "messages", "system")}
        if row.get(name) is not None:
            raise ValueError(
                f"{where}, column {name!r}: it must hold at least two messages with role and content, or with from and "
                f"value; it is {row[name]!r:.200}"
            )
    if "chosen" in row and "rejected" in row:
        raise KeyError(
            f"{where} is a preference (chosen, rejected), which dpo.py and reward_model.py train on; to imitate one of "
            f"the two, name it with completion_column=; the row has {listed(row)}"
        )
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise KeyError(
            f"{where} has a completion with a label, true or false (unpaired preferences); keep those that are to be "
            "imitated, and name prompt_column= and completion_column="
        )
    if "text" in row and not any(name in row for name in COMPLETION_COLUMNS):
        return row
    prompts = (*PROMPT_COLUMNS, "instruction", "query", "input")
    prompt = next((found for name in prompts if (found := find_column(row, name))), None)
    completion = next((found for name in COMPLETION_COLUMNS if (found := find_column(row, name))), None)
    if prompt is None or completion is None:
        missing = "completion" if prompt is not None else "prompt"
        raise KeyError(
            f"{where} has no column {missing!r}; a demonstration has messages or conversations, or text, or a prompt "
            f"({', '.join(prompts)}) with a completion ({', '.join(COMPLETION_COLUMNS)}), and this one has "
            f"{listed(row)}; name others with prompt_column= and completion_column="
        )
    asked = row[prompt]
    if prompt == "instruction" and isinstance(asked, str):
        asked = with_history(with_input(row, asked), row.get("history"), where)
    asked, replied = (as_messages(each) or each for each in (asked, row[completion]))
    with_instruction = ("input", "context", "history") if prompt == "instruction" else ()
    rest = without(row, prompt, completion, "system", *with_instruction)
    return {**rest, "prompt": with_system_before(asked, row), "completion": replied}


# Preferences ----------------------------------------------------------------------------------------------------------


def as_preference(row: Row, where: str) -> Row:
    """A row with ``chosen``, ``rejected`` and perhaps ``prompt``, as TRL has them, and its other columns.

    Raises:
        KeyError: it is in none of the known layouts; the error lists its columns.
        ValueError: its parts contradict each other.
    """
    chosen, rejected = (
        next(
            (found for name in (side, f"{side}_response", f"response_{side}") if (found := find_column(row, name))),
            None,
        )
        for side in ("chosen", "rejected")
    )
    if chosen is None or rejected is None:
        raise KeyError(
            f"{where} has no column {'chosen' if chosen is None else 'rejected'!r}; {_other_preference(row)}"
        )
    sides = [_side(row[name]) for name in (chosen, rejected)]
    names = (*PROMPT_COLUMNS, "instruction", "query", "input", *CONVERSATION_COLUMNS)
    prompt = next((found for name in names if (found := find_column(row, name))), None)
    # Beside whole conversations, messages is a copy of the chosen one.
    whole = all(isinstance(each, list) and len(each) > 1 for each in sides)
    if whole and prompt in CONVERSATION_COLUMNS:
        prompt = None
    asked = None if prompt is None else as_messages(row[prompt]) or row[prompt]
    rest = without(row, chosen, rejected, prompt, "system", *(("input", "context") if prompt == "instruction" else ()))
    if prompt == "instruction" and isinstance(asked, str):
        asked = with_input(row, asked)
    if whole and asked is not None:
        _check_begins_with(sides, asked, where)
        single = isinstance(asked, str) and all(len(each) == 2 for each in sides)
        asked, sides = (asked, [each[-1:] for each in sides]) if single else (None, sides)
    asked = with_system_before(asked, row)
    if asked is None and all(isinstance(each, str) for each in sides):
        raise KeyError(
            f"{where}: chosen and rejected are texts, and no column is known as their prompt; a dialogue has turns "
            f"that begin with 'Human:' and 'Assistant:'; the row has {listed(row)}"
        )
    return {**rest, **({} if asked is None else {"prompt": asked}), "chosen": sides[0], "rejected": sides[1]}


def _side(value: Any) -> Any:
    return as_messages(value) or hh_messages(value) or value


def _check_begins_with(sides: list[list[Row]], prompt: Any, where: str) -> None:
    """Check that whole conversations begin with what a row gives as their prompt."""
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        before = [each for each in messages[:-1] if each["role"] not in ("system", "developer")]
        if isinstance(prompt, str):
            fits = any(" ".join(prompt.split()) == " ".join(str(each["content"]).split()) for each in before)
        else:
            fits = messages[:-1] == prompt or before == prompt
        if not fits:
            raise ValueError(
                f"{where}, column {name!r}: it is a whole conversation that does not begin with the prompt"
            )


def _other_preference(row: Row) -> str:
    """What a row without chosen and rejected seems to be, and what would do."""
    if isinstance(row.get("label"), (bool, int)) and "completion" in row:
        kind = "a completion with a label is an unpaired preference (KTO), which no script here trains on; "
    elif isinstance(row.get("completions"), list):
        kind = "a list of rated completions has to be made into pairs first; "
    else:
        kind = ""
    return f"{kind}a preference has prompt, chosen and rejected, and this row has {listed(row)}"


def kind_of(row: Mapping[str, Any]) -> Literal["problems", "demonstrations", "preferences"]:
    """The use of a row by its columns: a pair of completions, a question with answer or tests, or a demonstration."""
    if all(find_column(row, name) or f"{name}_response" in row for name in ("chosen", "rejected")):
        return "preferences"
    answers = [name for name in ANSWER_COLUMNS if name not in COMPLETION_COLUMNS]
    is_graded = any(find_column(row, name) for name in (*answers, "tests", "test_list", "input_output", "test"))
    has_completion = any(find_column(row, name) for name in (*CONVERSATION_COLUMNS, *COMPLETION_COLUMNS, "text"))
    return "demonstrations" if has_completion and not is_graded else "problems"
