"""Conversion of the row layouts of published data sets: prompts, conversations, multiple choice, preferences.

All functions are pure functions of a row. ``docs/data.md`` lists the layouts.
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
"""Message roles by their names in ShareGPT and derived data sets."""
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""The beginning of a conversation stored as JSON text, as in CSV files."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):[ \t]?")
HH_ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


# Messages -------------------------------------------------------------------------------------------------------------


def as_messages(value: Any) -> list[Row] | None:
    """Messages with ``role`` and ``content``, from these fields or ShareGPT's ``from`` and ``value``.

    Args:
        value: a list of messages, a single message, or JSON text of either.

    Returns:
        The messages, with their other fields unless null; None if ``value`` is not a conversation.
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
    """Messages from a text in HH-RLHF's layout, with turns that begin with ``Human:`` and ``Assistant:``; or None."""
    if not isinstance(text, str) or not HH_TURN.match(text.lstrip()):
        return None
    _, *parts = HH_TURN.split(text.lstrip())
    roles, contents = parts[::2], parts[1::2]
    return [{"role": HH_ROLES[role], "content": each.strip()} for role, each in zip(roles, contents, strict=True)]


def _with_system(messages: list[Row], row: Mapping[str, Any]) -> list[Row]:
    """The messages, preceded by the column ``system`` of the row unless they begin with a system message."""
    system = row.get("system")
    has_system = messages[0]["role"] in ("system", "developer")
    if has_system or not isinstance(system, str) or not system.strip():
        return messages
    return [{"role": "system", "content": system}, *messages]


def _with_system_before(prompt: Any, row: Mapping[str, Any]) -> Any:
    """As ``_with_system``, for a prompt that is a text or messages; a text stays a text without a system prompt."""
    if not isinstance(row.get("system"), str) or not row["system"].strip() or not prompt:
        return prompt
    return _with_system([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, row)


def prompt_of(row: Row, name: str, where: str) -> Any:
    """The prompt of a row, as text or messages.

    Combines the prompt's column with others: Alpaca's ``instruction`` with ``input``, a question with its ``passage``
    or ``context`` and its ``choices``, a programming problem with its starter code or with MBPP's tests (which have the
    function's name). An assistant message at the end of a conversation is removed.

    Args:
        row: the row.
        name: column of the prompt.
        where: source location, for errors.

    Raises:
        KeyError: the row has no such column.
    """
    prompt = required_column(row, name, where, "prompt_column=")
    is_conversation = name in CONVERSATION_COLUMNS
    messages = as_messages(prompt) if not isinstance(prompt, str) or prompt.lstrip()[:1] == "[" else None
    if messages is not None:
        messages = _with_system(messages, row) if is_conversation else messages
        ends_with_reply = is_conversation and len(messages) > 1 and messages[-1]["role"] == "assistant"
        return messages[:-1] if ends_with_reply else messages
    if not isinstance(prompt, str):
        return prompt
    if name == "instruction":
        prompt = _with_input(row, prompt)
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
        # Unless the question already contains them.
        return prompt if all(text in prompt for text in texts) else "\n".join([prompt.rstrip(), *lines])
    starter = row.get("starter_code")
    if isinstance(starter, str) and starter.strip() and starter.strip() not in prompt:
        return f"{prompt.rstrip()}\n\nStart from this code:\n\n```python\n{starter.strip()}\n```"
    tests = row.get("test_list")
    if isinstance(tests, list) and tests and all(isinstance(each, str) for each in tests) and tests[0] not in prompt:
        return "\n".join([prompt.rstrip(), "", "The program should pass these tests:", "", *tests])
    return prompt


def _with_input(row: Mapping[str, Any], instruction: str) -> str:
    """The instruction, followed by the column ``input`` (Alpaca) or ``context`` (Dolly)."""
    added = next((row[name] for name in ("input", "context") if isinstance(row.get(name), str)), "")
    return f"{instruction.rstrip()}\n\n{added.strip()}" if added.strip() else instruction


def with_history(prompt: str, history: Any, where: str) -> str | list[Row]:
    """The prompt after the earlier turns of its conversation, as messages; a text without earlier turns.

    Args:
        prompt: the last user turn.
        history: pairs of an instruction and a reply.
        where: source location, for the error.

    Raises:
        ValueError: the history has another layout.
    """
    if not history:
        return prompt
    if not isinstance(history, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(each, str) for each in pair)
        for pair in history
    ):
        raise ValueError(f"{where}, column 'history': it must be a list of pairs of texts; it is {history!r:.200}")
    messages = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [*messages, {"role": "user", "content": prompt}]


def choices_of(row: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """The letters and texts of the choices, from a list or ARC's object; None if the row is not multiple choice."""
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
    """The answer as a letter if the row is multiple choice, otherwise unchanged.

    Args:
        row: the row.
        answer: the letter, the text of a choice, or its number from 0.
        where: source location, for the error.

    Raises:
        ValueError: the answer is not one of the choices, or ambiguous.
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
                f"{letters[int(answer)]}; use the letter"
            )
        return letters[place]
    number = int(answer) if isinstance(answer, str) and answer.strip().isdigit() else answer
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(letters):
        return letters[number]
    raise ValueError(
        f"{where} must be one of {letters}, the text of one of the {len(letters)} choices, or its number from 0; it is "
        f"{answer!r:.200}"
    )


# Demonstrations -------------------------------------------------------------------------------------------------------


def as_demonstration(row: Row, where: str) -> Row:
    """Convert a row to ``messages``, to ``prompt`` and ``completion``, or to ``text``, plus its other columns.

    Args:
        row: the row.
        where: source location, for errors.

    Raises:
        KeyError: the layout is unknown; the message lists the row's columns.
        ValueError: a conversation has fewer than two messages or is malformed.
    """
    for name in CONVERSATION_COLUMNS:
        messages = as_messages(row.get(name))
        if messages is not None and len(messages) > 1:
            return {"messages": _with_system(messages, row), **without(row, name, "messages", "system")}
        if row.get(name) is not None:
            raise ValueError(
                f"{where}, column {name!r}: it must have at least two messages with role and content, or with from and "
                f"value; it is {row[name]!r:.200}"
            )
    if "chosen" in row and "rejected" in row:
        raise KeyError(
            f"{where} is a preference (chosen, rejected), the input of dpo.py and reward_model.py; to train on "
            f"one of the two completions, set completion_column to it; the row has {listed(row)}"
        )
    if isinstance(row.get("label"), bool) and "completion" in row:
        raise KeyError(
            f"{where} has a completion with a boolean label (unpaired preferences); keep the rows to imitate, and set "
            "prompt_column and completion_column"
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
            f"({', '.join(prompts)}) with a completion ({', '.join(COMPLETION_COLUMNS)}), and this row has "
            f"{listed(row)}; set prompt_column and completion_column to other names"
        )
    question = row[prompt]
    if prompt == "instruction" and isinstance(question, str):
        question = with_history(_with_input(row, question), row.get("history"), where)
    question, reply = (as_messages(each) or each for each in (question, row[completion]))
    with_instruction = ("input", "context", "history") if prompt == "instruction" else ()
    rest = without(row, prompt, completion, "system", *with_instruction)
    return {**rest, "prompt": _with_system_before(question, row), "completion": reply}


# Preferences ----------------------------------------------------------------------------------------------------------


def as_preference(row: Row, where: str) -> Row:
    """Convert a row to TRL's ``chosen``, ``rejected`` and optional ``prompt``, plus its other columns.

    Args:
        row: the row.
        where: source location, for errors.

    Raises:
        KeyError: the layout is unknown; the message lists the row's columns.
        ValueError: a conversation does not begin with the row's prompt.
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
    # Next to complete conversations, the column messages is a copy of the chosen one.
    are_conversations = all(isinstance(each, list) and len(each) > 1 for each in sides)
    if are_conversations and prompt in CONVERSATION_COLUMNS:
        prompt = None
    question = None if prompt is None else as_messages(row[prompt]) or row[prompt]
    rest = without(row, chosen, rejected, prompt, "system", *(("input", "context") if prompt == "instruction" else ()))
    if prompt == "instruction" and isinstance(question, str):
        question = _with_input(row, question)
    if are_conversations and question is not None:
        _check_begins_with(sides, question, where)
        single = isinstance(question, str) and all(len(each) == 2 for each in sides)
        question, sides = (question, [each[-1:] for each in sides]) if single else (None, sides)
    question = _with_system_before(question, row)
    if question is None and all(isinstance(each, str) for each in sides):
        raise KeyError(
            f"{where}: chosen and rejected are texts without a prompt: no column is known as a prompt, and they are "
            f"not dialogues with 'Human:' and 'Assistant:'; the row has {listed(row)}"
        )
    return {**rest, **({} if question is None else {"prompt": question}), "chosen": sides[0], "rejected": sides[1]}


def _side(value: Any) -> Any:
    return as_messages(value) or hh_messages(value) or value


def _check_begins_with(sides: list[list[Row]], prompt: Any, where: str) -> None:
    """Check that both conversations begin with the row's prompt."""
    for name, messages in zip(("chosen", "rejected"), sides, strict=True):
        before = [each for each in messages[:-1] if each["role"] not in ("system", "developer")]
        if isinstance(prompt, str):
            fits = any(" ".join(prompt.split()) == " ".join(str(each["content"]).split()) for each in before)
        else:
            fits = messages[:-1] == prompt or before == prompt
        if not fits:
            raise ValueError(f"{where}, column {name!r}: the conversation does not begin with the row's prompt")


def _other_preference(row: Row) -> str:
    """The likely layout of a row without chosen and rejected, and what is expected, for an error message."""
    if isinstance(row.get("label"), (bool, int)) and "completion" in row:
        kind = "a completion with a label is an unpaired preference (KTO), which is not supported; "
    elif isinstance(row.get("completions"), list):
        kind = "convert a list of rated completions to pairs first; "
    else:
        kind = ""
    return f"{kind}a preference has prompt, chosen and rejected, and this row has {listed(row)}"


def kind_of(row: Mapping[str, Any]) -> Literal["problems", "demonstrations", "preferences"]:
    """The kind of a row by its columns; without any known column, "problems"."""
    if all(find_column(row, name) or f"{name}_response" in row for name in ("chosen", "rejected")):
        return "preferences"
    answers = [name for name in ANSWER_COLUMNS if name not in COMPLETION_COLUMNS]
    is_graded = any(find_column(row, name) for name in (*answers, "tests", "test_list", "input_output", "test"))
    has_completion = any(find_column(row, name) for name in (*CONVERSATION_COLUMNS, *COMPLETION_COLUMNS, "text"))
    return "demonstrations" if has_completion and not is_graded else "problems"
