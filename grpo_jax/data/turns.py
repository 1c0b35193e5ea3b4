"""The turns of a conversation within the text of a chat template, and the tokens that end them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Unpack

from grpo_jax.data.chat_templates import Chat, render_chats
from grpo_jax.data.messages import Messages, checked_messages
from grpo_jax.data.prompts import MARK, Conversation, Rendering, around_mark, conversation_of
from grpo_jax.data.tokens import encode_texts

LOGGER = logging.getLogger(__name__)
Row = dict[str, Any]
TrainOn = Literal["completion", "assistant", "all"]
"""Tokens that the SFT loss includes: the last turn, all assistant turns, or all tokens."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a completion to imitate.

    Attributes:
        prompt: text, or the messages before the completion; "" for a text without a prompt.
        completion: the reply as text.
        where: source location for error messages, such as ``data.jsonl:3``.
        columns: the other columns of the row.
        reply: other fields of the completion's message, such as ``tool_calls``, for the chat template.
    """

    prompt: str | Messages
    completion: str
    where: str
    columns: Row = field(default_factory=dict)
    reply: Row = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a demonstration's text; ``is_turn`` for a turn that the loss includes."""

    text: str
    is_turn: bool


def _conversation_of(demonstration: Demonstration, rendering: Rendering) -> Conversation:
    return conversation_of(
        demonstration.prompt,
        demonstration.where,
        system_prompt=rendering.get("system_prompt"),
        template_kwargs=rendering.get("template_kwargs"),
        row=demonstration.columns,
    )


def split_turns(
    demonstrations: Sequence[Demonstration], tokenizer: Any, train_on: TrainOn, rendering: Rendering
) -> list[list[Piece]]:
    """Render demonstrations with the chat template and split the texts at the turns to train on.

    Args:
        demonstrations: demonstrations with a prompt.
        tokenizer: a transformers tokenizer with a chat template.
        train_on: with "assistant", earlier assistant turns are pieces of their own.
        rendering: fields of ``prompts.Rendering``.

    Returns:
        The pieces of each demonstration; concatenated, they are its rendered text.

    Raises:
        ValueError: the chat template rejects a conversation, or renders a turn differently within it than on its own.
    """
    conversations = [_conversation_of(each, rendering) for each in demonstrations]
    chats: list[Chat] = []
    owners: list[int] = []
    counts: list[int] = []
    for n, (demonstration, conversation) in enumerate(zip(demonstrations, conversations, strict=True)):
        needed = [*conversation.chats(), conversation.chat(_whole(conversation, demonstration))]
        for turn in _earlier_turns(conversation, train_on):
            needed.append(conversation.chat(conversation.messages[:turn], opens_turn=True))
            needed.append(conversation.chat(conversation.messages[: turn + 1]))
        chats += needed
        owners += [n] * len(needed)
        counts.append(len(needed))
    # All at once: each call is a round trip to another process.
    texts = iter(
        render_chats(
            tokenizer,
            chats,
            today=rendering.get("date"),
            error_prefix=lambda n, template: f"{demonstrations[owners[n]].where}: {template} rejects the conversation",
        )
    )
    split = []
    for demonstration, conversation, count in zip(demonstrations, conversations, counts, strict=True):
        rendered = [next(texts) for _ in range(count)]
        num_prompt = len(conversation.chats())
        prompt, whole = conversation.prompt_text(rendered[:num_prompt], demonstration.where), rendered[num_prompt]
        if conversation.is_continued:
            whole = prompt + demonstration.completion + around_mark(rendered[0], demonstration.where)[1]
        elif not whole.startswith(prompt) and not demonstration.reply:
            whole = _composed(prompt, demonstration, tokenizer, rendering) or whole
        split.append(_pieces(demonstration, conversation, (prompt, whole), rendered[num_prompt + 1 :], train_on))
    return split


def _composed(prompt: str, demonstration: Demonstration, tokenizer: Any, rendering: Rendering) -> str | None:
    """The text for a template whose generation prompt opens a thought and which strips thoughts from messages.

    Appends the completion to the prompt as the sampler would generate it: without the tag that the prompt opens. None
    unless the prompt opens a tag that the completion closes.
    """
    around = turn_borders(tokenizer, demonstration.prompt, demonstration.columns, **rendering)
    if around is None or not prompt.startswith(around[0]):
        return None
    opened, completion = prompt[len(around[0]) :], demonstration.completion
    tag = re.match(r"\s*<(\w+)>", opened)
    if tag is None or f"</{tag[1]}>" not in completion:
        return None
    if completion.lstrip().startswith(f"<{tag[1]}>"):  # the prompt has opened it
        completion = completion.lstrip().removeprefix(opened) if completion.lstrip().startswith(opened) else ""
    return prompt + completion + around[1] if completion else None


def render_demonstrations(demonstrations: Sequence[Demonstration], tokenizer: Any, rendering: Rendering) -> list[str]:
    """Render demonstrations with the chat template, including what it writes after the completion.

    Args:
        demonstrations: demonstrations with a prompt.
        tokenizer: a transformers tokenizer with a chat template.
        rendering: fields of ``prompts.Rendering``.

    Raises:
        ValueError: the chat template rejects a conversation.
    """
    conversations = [_conversation_of(each, rendering) for each in demonstrations]
    return render_chats(
        tokenizer,
        [each.chat(_whole(each, demonstrations[n])) for n, each in enumerate(conversations)],
        today=rendering.get("date"),
        error_prefix=lambda n, template: f"{demonstrations[n].where}: {template} rejects the conversation",
    )


def _whole(conversation: Conversation, demonstration: Demonstration) -> Messages:
    """The messages of the conversation, completion included."""
    if conversation.is_continued:
        *before, last = conversation.messages
        return [*before, {**last, "content": last["content"] + demonstration.completion}]
    reply = {**demonstration.reply, "role": "assistant", "content": demonstration.completion}
    return [*conversation.messages, *checked_messages([reply], demonstration.where)]


def _earlier_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """Indices of the earlier assistant messages to train on.

    Excludes the message that the completion continues, and messages with ``weight`` 0, the usual mark of replies that
    are context only.
    """
    if train_on != "assistant":
        return []
    messages = conversation.messages[:-1] if conversation.is_continued else conversation.messages
    return [n for n, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1) != 0]


def _pieces(
    demonstration: Demonstration,
    conversation: Conversation,
    last: tuple[str, str],
    rest: list[str],
    train_on: TrainOn,
) -> list[Piece]:
    """Split the rendered text of a demonstration at its turns.

    Args:
        demonstration: the demonstration.
        conversation: its prompt.
        last: rendered prompt, and rendered demonstration.
        rest: for each earlier turn in order, the text before it and the text through it.
        train_on: with "assistant", earlier turns are split off too.
    """
    where, whole = demonstration.where, last[1]
    turns = [*_earlier_turns(conversation, train_on), len(conversation.messages)]
    spans = [*zip(rest[::2], rest[1::2], strict=True), last]
    offset = len(conversation.messages) - len(demonstration.prompt) if isinstance(demonstration.prompt, list) else 0
    pieces, written = [], 0
    for turn, (opening, through) in zip(turns, spans, strict=True):
        if not (whole.startswith(opening) and whole.startswith(through) and written <= len(opening) < len(through)):
            raise ValueError(
                f"{where}: the chat template renders message {turn - offset} differently within the conversation than "
                "on its own, so its tokens cannot be marked; train on the completion alone, or use a template that "
                "keeps earlier turns as they are"
                if turn != turns[-1] or len(turns) > 1
                else f"{where}: the chat template renders the prompt differently within the conversation than before a "
                "generation, so the completion's tokens cannot be marked; use another template"
            )
        pieces += [Piece(whole[written : len(opening)], False), Piece(whole[len(opening) : len(through)], True)]
        written = len(through)
    return [piece for piece in [*pieces, Piece(whole[written:], False)] if piece.text]


def check_turn_end(
    tokenizer: Any, eos_ids: Sequence[int], prompt: str | Messages, row: Row, **rendering: Unpack[Rendering]
) -> None:
    """Check that the model stops at the token with which the chat template ends an assistant turn.

    Passes a template that writes no special token there and, with a warning, one that cannot render such a
    conversation.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: ids of the tokens at which the model stops.
        prompt: any prompt of the data.
        row: the columns of its row.
        rendering: fields of ``prompts.Rendering``.

    Raises:
        ValueError: the turn ends with a special token that is not in ``eos_ids``; the message names it.
    """
    around = turn_borders(tokenizer, prompt, row, **rendering)
    if around is None:
        if rendering.get("template") is None:
            LOGGER.warning(
                "cannot check that the model stops where the chat template ends a turn: the template rejects a "
                "conversation with a reply, or changes the reply"
            )
        return
    ids = encode_texts([around[1]], tokenizer)[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}
    if any(token in special for token in ids) and not any(token in eos_ids for token in ids):
        raise ValueError(missing_end(tokenizer, ids, eos_ids))


def turn_borders(
    tokenizer: Any, prompt: str | Messages, row: Row, **rendering: Unpack[Rendering]
) -> tuple[str, str] | None:
    """The text that the chat template writes before and after a reply; None if it cannot be determined.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text or messages.
        row: the columns of the prompt's row.
        rendering: fields of ``prompts.Rendering``; a plain template gives None.
    """
    if rendering.get("template") is not None:
        return None
    conversation = _conversation_of(Demonstration(prompt, "", "prompt 0", row), rendering)
    before = conversation.messages[:-1] if conversation.is_continued else conversation.messages
    try:
        marked = conversation.chat([*before, {"role": "assistant", "content": MARK}])
        [text] = render_chats(
            tokenizer, [marked], today=rendering.get("date"), error_prefix=lambda _, template: template
        )
        return around_mark(text, "prompt 0")
    except ValueError:
        return None


def missing_end(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """The error message for a turn without an ending token.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids of the turn; the message proposes the last special token among them.
        eos_ids: ids of the ending tokens.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}
    last = next((token for token in reversed(ids) if token in special), None)
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in eos_ids)
    remedy = (
        "name the token that it writes with --stop-tokens"
        if last is None
        else f"pass --stop-tokens '{tokenizer.convert_ids_to_tokens(last)}'"
    )
    return (
        f"the chat template writes none of the ending tokens {list(eos_ids)} ({names}) after the assistant's turn, "
        f"so that the model would not learn to stop, and completions would be truncated; {remedy}"
    )
