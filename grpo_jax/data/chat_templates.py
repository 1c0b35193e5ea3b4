"""Chat templates, rendered in a separate process with limits on time and memory."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from itertools import groupby
from typing import Any, NamedTuple

from grpo_jax.data.messages import Messages, plain_data
from grpo_jax.data.template_worker import LENGTH

MAX_CHATS = 256
MAX_CHARACTERS = 1 << 22
"""Limits of one request to the worker."""
CPU_SECONDS = 5.0
"""Limit of CPU time for one conversation."""
WALL_SECONDS = 600.0
"""Limit of wall-clock time for one request, generous for a busy machine; the worker limits CPU time."""
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "tokenize")
"""Variables of a template that users cannot set."""


class Chat(NamedTuple):
    """A conversation to render.

    Attributes:
        messages: messages, normalized by ``messages.checked_messages``.
        tools: JSON schemas, or None.
        variables: further arguments of the template, such as ``enable_thinking``.
        opens_turn: whether to add the generation prompt (the opening of the assistant's turn).
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    opens_turn: bool


def render_chats(
    tokenizer: Any, chats: Sequence[Chat], *, today: str | None = None, error_prefix: Callable[[int, str], str]
) -> list[str]:
    """Render conversations with the tokenizer's chat template, with the result of ``apply_chat_template``.

    Templates come from checkpoints and are not trusted: they run in another process, limited to 5 seconds of CPU time
    for a conversation and 2 GiB of memory. The text depends on the arguments alone: ``strftime_now`` returns ``today``,
    and random filters are seeded.

    Args:
        tokenizer: a transformers tokenizer.
        chats: the conversations.
        today: date for ``strftime_now``, such as "2026-11-27"; None is the current date.
        error_prefix: ``(index, template) -> text``, the beginning of the error message for a conversation.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects a conversation, fails, or exceeds a
            limit.
    """
    if not chats:
        return []
    check_has_template(tokenizer)
    special = plain_data(tokenizer.special_tokens_map)
    today = today or date.today().isoformat()
    texts: list[str] = []
    sources = [tokenizer.get_chat_template(None, chat.tools) for chat in chats]
    for first, last in _requests(sources, chats):
        variables = [special | _variables(chat) for chat in chats[first:last]]
        rendered, error = _renderer().render(sources[first], today, variables)
        texts += rendered
        if error is not None:
            path = getattr(tokenizer, "name_or_path", "")
            template = f"the chat template of {path}" if path else "the chat template"
            raise ValueError(f"{error_prefix(len(texts), template)}: {error}")
    return texts


def check_has_template(tokenizer: Any) -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: for a base model pass a plain template, such as "
            "template=grpo_jax.data.prompts.R1_ZERO or any text with {question}"
        )


def uses_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes a date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def _variables(chat: Chat) -> dict[str, Any]:
    variables = {"messages": chat.messages, "tools": chat.tools, **chat.variables}
    # apply_chat_template always defines documents.
    return {"documents": None, **plain_data(variables), "add_generation_prompt": chat.opens_turn}


def _requests(sources: Sequence[str], chats: Sequence[Chat]) -> Iterator[tuple[int, int]]:
    """Split the conversations into ranges with one template, limited in number and characters."""
    first = 0
    for _, same in groupby(sources):
        end = first + len(list(same))
        while first < end:
            last, size = first, 0
            while last < min(end, first + MAX_CHATS) and (last == first or size < MAX_CHARACTERS):
                size += sum(len(message["content"]) for message in chats[last].messages)
                last += 1
            yield first, last
            first = last


class Renderer:
    """The rendering process. It is started on first use, and restarted after a request that it did not survive."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, today: str, chats: list[dict[str, Any]]) -> tuple[list[str], str | None]:
        """Render conversations with a template.

        Args:
            source: the chat template.
            today: date for ``strftime_now``, such as "2026-11-27".
            chats: variables of the template, for each conversation.

        Returns:
            The texts before the first error, and that error or None.
        """
        with self._lock:
            answer = self._ask((source, today, CPU_SECONDS, chats))
            if answer is not None:
                return answer["texts"], answer["error"]
            texts: list[str] = []
            for chat in chats:  # one at a time, to find the one that ended the process
                answer = self._ask((source, today, CPU_SECONDS, [chat]))
                if answer is None:
                    return texts, "it exceeds the limit of time or memory"
                texts += answer["texts"]
                if answer["error"] is not None:
                    return texts, answer["error"]
            return texts, None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    assert stream is not None
                    stream.close()
            self._process = None

    def _ask(self, request: tuple[str, str, float, list[dict[str, Any]]]) -> dict[str, Any] | None:
        """The answer to a request; None if the process ended or timed out without one."""
        if self._process is None:
            command = [sys.executable, "-P", "-m", "grpo_jax.data.template_worker"]
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # not interrupted by Ctrl-C
            )
            if self._ask(("", "", 0.0, [])) is None:
                raise RuntimeError(f"the process that renders chat templates could not be started: {' '.join(command)}")
        process, body = self._process, pickle.dumps(request)
        assert process.stdin is not None
        try:
            process.stdin.write(LENGTH.pack(len(body)) + body)
            process.stdin.flush()
            answer = self._receive(process)
        except OSError:
            answer = None
        if answer is None:
            self.close()
        return answer

    @staticmethod
    def _receive(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        assert process.stdout is not None
        descriptor, received, wanted = process.stdout.fileno(), bytearray(), LENGTH.size
        while len(received) < wanted:
            if not select.select([descriptor], [], [], WALL_SECONDS)[0]:
                return None
            part = os.read(descriptor, 1 << 20)
            if not part:
                return None
            received += part
            if wanted == LENGTH.size and len(received) >= LENGTH.size:
                wanted += LENGTH.unpack_from(received)[0]
        return json.loads(received[LENGTH.size :])


_renderers: dict[int, Renderer] = {}


def _renderer() -> Renderer:
    """The renderer of this process. Forks need their own: they must not share the parent's pipes."""
    if os.getpid() not in _renderers:
        _renderers.clear()
        _renderers[os.getpid()] = Renderer()
        atexit.register(_renderers[os.getpid()].close)
    return _renderers[os.getpid()]
