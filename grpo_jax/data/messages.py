"""Validation and normalization of chat messages and tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Messages = list[dict[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning field; templates read the first."""


def is_message(message: Any) -> bool:
    """Whether ``message`` has a text ``role`` and as ``content`` a text, a list of parts, or null with tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, (str, list)) or (content is None and bool(message.get("tool_calls")))


def content_text(content: Any, where: str) -> str:
    """The content of a message as text.

    Args:
        content: a text, null (the empty text), or a list of parts to join, such as ``{"type": "text", "text": "Hi"}``.
        where: source location, for the error.

    Raises:
        ValueError: a part is not text; the message names its type.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(
                f'{where}: content must be text or a list of parts such as {{"type": "text", "text": "..."}}; '
                f"part {number} is {part!r:.200}"
            )
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: part {number} of the content has the type {part['type']!r}; only text is supported"
            )
        texts.append(part["text"])
    return "".join(texts)


def checked_messages(messages: Sequence[Any], where: str) -> Messages:
    """Messages in the form that chat templates expect: content as text, fields with null removed.

    Args:
        messages: messages of a data set.
        where: source location, for errors.

    Raises:
        ValueError: there are no messages, or one has no role or content, has parts other than text, or a ``weight``
            other than 0 (context only) and 1; the message names it.
    """
    if not messages:
        raise ValueError(f"{where}: a conversation must have at least one message")
    checked = []
    for number, message in enumerate(messages):
        if not is_message(message):
            raise ValueError(
                f"{where}, message {number}: it must have a text as role, and as content a text or parts of type text "
                f"(null with tool_calls); it is {message!r:.200}"
            )
        present = {name: value for name, value in message.items() if value is not None}
        if present.get("weight", 1) not in (0, 1):
            raise ValueError(f"{where}, message {number}: weight must be 0 or 1, not {present['weight']!r:.50}")
        present["content"] = content_text(message.get("content"), f"{where}, message {number}")
        reasoning = next((present[name] for name in REASONING if name in present), None)
        if reasoning is not None:
            present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
        checked.append(present)
    return checked


def checked_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools of a row as a list of JSON schemas; None without tools.

    Args:
        tools: a list of JSON schemas, or JSON text of one.
        where: source location, for errors.

    Raises:
        ValueError: ``tools`` is neither.
    """
    schemas = tools
    if isinstance(tools, str):
        try:
            schemas = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}, column 'tools': it is not JSON ({error})") from error
    if not schemas:
        return None
    if not isinstance(schemas, list) or not all(isinstance(tool, dict) for tool in schemas):
        raise ValueError(f"{where}, column 'tools': it must be a list of JSON schemas; it is {tools!r:.200}")
    return schemas


def plain_data(value: Any) -> Any:
    """``value`` as JSON types only, so that an untrusted template cannot call methods of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_data(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(each) for each in value]
    return plain_data(value.item()) if isinstance(value, np.generic) else str(value)
