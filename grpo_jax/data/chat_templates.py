"""Chat templates rendered in a process of their own, within limits of time and memory."""

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

CHATS_OF_A_REQUEST = 256
CHARACTERS_OF_A_REQUEST = 1 << 22
CPU_SECONDS = 5.0
"""Processor time for one conversation."""
WALL_SECONDS = 600.0
"""Time for one request on a machine that does something else; processor time is limited in the worker."""
RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now", "tokenize")
"""Variables of a template that are not arguments of the user's."""


class Chat(NamedTuple):
    """A conversation to be rendered.

    Attributes:
        messages: as ``messages.checked_messages`` gives them.
        tools: JSON schemas, or None.
        variables: further arguments of the template, such as ``enable_thinking``.
        opens_turn: whether the opening of the assistant's turn follows.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    opens_turn: bool


def render_chats(
    tokenizer: Any, chats: Sequence[Chat], *, today: str | None = None, refusal: Callable[[int, str], str]
) -> list[str]:
    """The text of each conversation by the tokenizer's chat template, as ``apply_chat_template`` writes it.

    Rendering happens in another process, with 5 seconds of processor time for a conversation and 2 GiB of memory. It
    depends on the arguments alone: ``strftime_now`` gives ``today``, and random filters are seeded.

    Args:
        tokenizer: a transformers tokenizer.
        chats: the conversations.
        today: the date for ``strftime_now``, such as "2026-11-27"; None is the current date.
        refusal: from the number of a conversation and the template's name to the words before the reason in an error.

    Raises:
        ValueError: the tokenizer has no chat template; the template refuses a conversation, fails on it, or exceeds a
            limit. The error names template and conversation.
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
        found, error = _renderer().render(sources[first], today, variables)
        texts += found
        if error is not None:
            path = getattr(tokenizer, "name_or_path", "")
            of = f" of {path}" if path else ""
            raise ValueError(f"{refusal(len(texts), f'the chat template{of}')}: {error}")
    return texts


def check_has_template(tokenizer: Any) -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: for a base model pass a plain one, such as "
            "template=grpo_jax.data.prompts.R1_ZERO or any text that holds {question}"
        )


def uses_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes a date."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def _variables(chat: Chat) -> dict[str, Any]:
    of_chat = {"messages": chat.messages, "tools": chat.tools, **chat.variables}
    # As in apply_chat_template, where documents are always defined.
    return {"documents": None, **plain_data(of_chat), "add_generation_prompt": chat.opens_turn}


def _requests(sources: Sequence[str], chats: Sequence[Chat]) -> Iterator[tuple[int, int]]:
    """Ranges of conversations with the same template, of a bounded number and size."""
    first = 0
    for _, same in groupby(sources):
        end = first + len(list(same))
        while first < end:
            last, size = first, 0
            while last < min(end, first + CHATS_OF_A_REQUEST) and (last == first or size < CHARACTERS_OF_A_REQUEST):
                size += sum(len(message["content"]) for message in chats[last].messages)
                last += 1
            yield first, last
            first = last


class Renderer:
    """The process that renders, started when it is first needed and again after one that had to be ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, today: str, chats: list[dict[str, Any]]) -> tuple[list[str], str | None]:
        """The texts up to the first conversation with an error, and that error."""
        with self._lock:
            answer = self._ask((source, today, CPU_SECONDS, chats))
            if answer is not None:
                return answer["texts"], answer["error"]
            texts: list[str] = []
            for chat in chats:  # one of them ended the process: which is found out one by one
                answer = self._ask((source, today, CPU_SECONDS, [chat]))
                if answer is None:
                    return texts, "it takes more time or memory than it may"
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
        """The answer to a request; None where the process ended without one."""
        if self._process is None:
            command = [sys.executable, "-P", "-m", "grpo_jax.data.template_worker"]
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C is for the run
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
    """That of this process: a fork does not share the pipes of its parent."""
    if os.getpid() not in _renderers:
        _renderers.clear()
        _renderers[os.getpid()] = Renderer()
        atexit.register(_renderers[os.getpid()].close)
    return _renderers[os.getpid()]
