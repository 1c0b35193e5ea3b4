"""The turns of a conversation as a chat template writes them, and where they end."""

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
"""What of a demonstration is learnt: its last turn, every turn of the assistant, or every token."""


@dataclass(frozen=True)
class Demonstration:
    """What is to be imitated.

    Attributes:
        prompt: the question as text, or the messages before the completion; "" where there is only a text.
        completion: the reply as text.
        where: the place it was read from, in words.
        columns: every other column of its row.
        reply: what the completion's message has besides its content, such as ``tool_calls``; for a chat template.
    """

    prompt: str | Messages
    completion: str
    where: str
    columns: Row = field(default_factory=dict)
    reply: Row = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a demonstration's text, and whether it is a turn that is learnt."""

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


def turns(
    demonstrations: Sequence[Demonstration], tokenizer: Any, train_on: TrainOn, rendering: Rendering
) -> list[list[Piece]]:
    """The text of each demonstration in pieces, by the chat template; all conversations are rendered together."""
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
    texts = iter(
        render_chats(
            tokenizer,
            chats,
            today=rendering.get("date"),
            refusal=lambda n, template: f"{demonstrations[owners[n]].where}: {template} refuses the conversation",
        )
    )
    found = []
    for demonstration, conversation, count in zip(demonstrations, conversations, counts, strict=True):
        of_this = [next(texts) for _ in range(count)]
        given = len(conversation.chats())
        prompt, whole = conversation.prompt_text(of_this[:given], demonstration.where), of_this[given]
        if conversation.is_continued:
            whole = prompt + demonstration.completion + around_mark(of_this[0], demonstration.where)[1]
        elif not whole.startswith(prompt) and not demonstration.reply:
            whole = _composed(prompt, demonstration, tokenizer, rendering) or whole
        found.append(_pieces(demonstration, conversation, (prompt, whole), of_this[given + 1 :], train_on))
    return found


def _composed(prompt: str, demonstration: Demonstration, tokenizer: Any, rendering: Rendering) -> str | None:
    """The conversation of a template that opens a thought for a generation, and leaves thoughts out of what it writes.

    The completion follows the prompt as the sampler would have drawn it: without the tag that the prompt opens, which
    it must close. None where that is not the case.
    """
    around = turn_borders(tokenizer, demonstration.prompt, demonstration.columns, **rendering)
    if around is None or not prompt.startswith(around[0]):
        return None
    opened, completion = prompt[len(around[0]) :], demonstration.completion
    tag = re.match(r"\s*<(\w+)>", opened)
    if tag is None or f"</{tag[1]}>" not in completion:
        return None
    if completion.lstrip().startswith(f"<{tag[1]}>"):  # opened twice otherwise
        completion = completion.lstrip().removeprefix(opened) if completion.lstrip().startswith(opened) else ""
    return prompt + completion + around[1] if completion else None


def whole_texts(demonstrations: Sequence[Demonstration], tokenizer: Any, rendering: Rendering) -> list[str]:
    """The text of each demonstration by the chat template, what it writes after the completion included."""
    conversations = [_conversation_of(each, rendering) for each in demonstrations]
    return render_chats(
        tokenizer,
        [each.chat(_whole(each, demonstrations[n])) for n, each in enumerate(conversations)],
        today=rendering.get("date"),
        refusal=lambda n, template: f"{demonstrations[n].where}: {template} refuses the conversation",
    )


def _whole(conversation: Conversation, demonstration: Demonstration) -> Messages:
    """The conversation with its completion."""
    if conversation.is_continued:
        *before, last = conversation.messages
        return [*before, {**last, "content": last["content"] + demonstration.completion}]
    reply = {**demonstration.reply, "role": "assistant", "content": demonstration.completion}
    return [*conversation.messages, *checked_messages([reply], demonstration.where)]


def _earlier_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """Messages of the assistant before the completion that are trained on.

    One that is continued is not, nor one with a ``weight`` of 0, as data sets mark replies that are context alone.
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
    """The text in pieces, and of each whether it is a turn that is learnt.

    Args:
        demonstration: what the text is of.
        conversation: its prompt.
        last: the text before the completion, and all of it.
        rest: the same of each earlier turn.
        train_on: which turns are learnt.
    """
    where, whole = demonstration.where, last[1]
    turns = [*_earlier_turns(conversation, train_on), len(conversation.messages)]
    spans = [*zip(rest[::2], rest[1::2], strict=True), last]
    offset = len(conversation.messages) - len(demonstration.prompt) if isinstance(demonstration.prompt, list) else 0
    pieces, written = [], 0
    for turn, (opening, through) in zip(turns, spans, strict=True):
        if not (whole.startswith(opening) and whole.startswith(through) and written <= len(opening) < len(through)):
            raise ValueError(
                f"{where}: the chat template writes message {turn - offset} otherwise in the whole "
                "conversation than as a turn of its own, so its tokens cannot be marked; learn from the completion "
                "alone, or use a template that leaves earlier turns as they are"
                if turn != turns[-1] or len(turns) > 1
                else f"{where}: the chat template does not write the prompt as it opens a generation, so "
                "the completion's tokens cannot be marked; use another template"
            )
        pieces += [Piece(whole[written : len(opening)], False), Piece(whole[len(opening) : len(through)], True)]
        written = len(through)
    return [piece for piece in [*pieces, Piece(whole[written:], False)] if piece.text]


def check_turn_end(
    tokenizer: Any, eos_ids: Sequence[int], prompt: str | Messages, row: Row, **rendering: Unpack[Rendering]
) -> None:
    """Check that a model stops at what the chat template writes after the assistant's turn.

    A template that writes no special token there passes, and so does, with a warning, one that cannot write such a
    conversation.

    Args:
        tokenizer: a transformers tokenizer.
        eos_ids: the tokens at which the model stops.
        prompt: any prompt of the data.
        row: the columns of its row.
        rendering: as in ``prompts.Rendering``.

    Raises:
        ValueError: the turn ends with a special token that is not one of ``eos_ids``; names it.
    """
    around = turn_borders(tokenizer, prompt, row, **rendering)
    if around is None:
        if rendering.get("template") is None:
            LOGGER.warning(
                "whether the model stops where the chat template ends a turn is not checked: the template refuses a "
                "conversation with a reply, or does not write the reply as it is"
            )
        return
    ids = encode_texts([around[1]], tokenizer)[0]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}
    if any(token in special for token in ids) and not any(token in eos_ids for token in ids):
        raise ValueError(no_end(tokenizer, ids, eos_ids))


def turn_borders(
    tokenizer: Any, prompt: str | Messages, row: Row, **rendering: Unpack[Rendering]
) -> tuple[str, str] | None:
    """What the chat template writes before and after a reply to a prompt; None where that cannot be found out."""
    if rendering.get("template") is not None:
        return None
    conversation = _conversation_of(Demonstration(prompt, "", "prompt 0", row), rendering)
    before = conversation.messages[:-1] if conversation.is_continued else conversation.messages
    try:
        marked = conversation.chat([*before, {"role": "assistant", "content": MARK}])
        [text] = render_chats(tokenizer, [marked], today=rendering.get("date"), refusal=lambda _, template: template)
        return around_mark(text, "prompt 0")
    except ValueError:
        return None


def no_end(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """Why a turn of these tokens has no end that a model stops at, and what to do."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}
    last = next((token for token in reversed(ids) if token in special), None)
    names = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in eos_ids)
    remedy = (
        "name what it writes as a stop token (--stop-tokens)"
        if last is None
        else f"give --stop-tokens '{tokenizer.convert_ids_to_tokens(last)}'"
    )
    return (
        f"the chat template writes none of the ending tokens {list(eos_ids)} ({names}) after the assistant's turn, "
        f"so that the model would not learn to stop, and completions would be cut off; {remedy}"
    )
