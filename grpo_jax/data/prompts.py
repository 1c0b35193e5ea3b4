"""Prompts: a question or a conversation to text, to token ids, to left-padded arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.chat_templates import RESERVED, Chat, check_has_template, render_chats
from grpo_jax.data.messages import Messages, checked_messages, checked_tools
from grpo_jax.data.tokens import encode_texts
from grpo_jax.types import Prompts

R1_ZERO = (
    "Below, a user puts a question to an assistant. Before it replies, the assistant works the problem out step by "
    "step; then it states its result. The working stands between <think> and </think>, and the result alone stands "
    "between <answer> and </answer>: <think> working </think> <answer> result </answer>.\n\n"
    "User: {question}\n\nAssistant:"
)
"""A plain template for base models, in the style of R1-Zero."""

MARK = "@@last message@@"
"""Stands for the content of a message to find out where a template writes it."""


class Rendering(TypedDict, total=False):
    """How prompts become text.

    Attributes:
        template: a text in which ``{question}`` stands for the prompt, such as ``R1_ZERO``; None for the tokenizer's
            chat template.
        system_prompt: a system message put before each conversation that does not begin with one; chat only.
        template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        date: the date that ``strftime_now`` gives to a chat template, such as "2026-11-27"; None is today.
    """

    template: str | None
    system_prompt: str | None
    template_kwargs: Mapping[str, Any]
    date: str | None


Overlong = Literal["drop", "truncate", "error"]
"""What ``fit_prompts`` can do to a prompt that is too long, for the configuration of an experiment."""


class Conversation(NamedTuple):
    """A prompt as a chat template takes it.

    Attributes:
        messages: as ``messages.checked_messages`` gives them.
        tools: JSON schemas, or None.
        variables: further arguments of the template.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]

    @property
    def is_continued(self) -> bool:
        """Whether the last message is the assistant's, so that the completion continues it."""
        return self.messages[-1]["role"] == "assistant"

    def chat(self, messages: Messages, *, opens_turn: bool = False) -> Chat:
        """Other messages with the same tools and arguments."""
        return Chat(messages, self.tools, self.variables, opens_turn)

    def chats(self) -> list[Chat]:
        """What has to be rendered for ``prompt_text``."""
        if not self.is_continued:
            return [self.chat(self.messages, opens_turn=True)]
        *before, last = self.messages
        marked = self.chat([*before, {**last, "content": MARK}])
        return [marked, self.chat(before, opens_turn=True)] if before else [marked]

    def prompt_text(self, texts: Sequence[str], where: str) -> str:
        """The text of the prompt, from those of ``chats``: the last message is continued if it is the assistant's.

        Raises:
            ValueError: the template does not write the content of the last message exactly once.
        """
        if not self.is_continued:
            return texts[0]
        content = self.messages[-1]["content"]
        head, _ = around_mark(texts[0], where)
        opening = texts[1] if len(texts) > 1 else head
        # A template that opens thoughts by itself, for a message that brings its own opening.
        added = head[len(opening) :].split() if head.startswith(opening) else []
        return (opening if added and content.lstrip().startswith(added[0]) else head) + content


def around_mark(text: str, where: str) -> tuple[str, str]:
    """What a chat template writes before and after the content of the message that ``MARK`` stands for.

    Raises:
        ValueError: it does not write it exactly once.
    """
    if text.count(MARK) != 1:
        raise ValueError(
            f"{where}: the chat template does not write the last message as it is given, so that it cannot be "
            "continued; end the prompt with another message, or use another template"
        )
    head, _, tail = text.partition(MARK)
    return head, tail


def conversation_of(
    prompt: str | Messages,
    where: str,
    *,
    system_prompt: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    row: Mapping[str, Any] | None = None,
) -> Conversation:
    """A prompt as a conversation; a question is a conversation of one user message.

    Args:
        prompt: a question, or messages.
        where: its place, for errors.
        system_prompt: put before it unless it begins with a system message; empty for none.
        template_kwargs: further arguments of the chat template.
        row: columns of its row: ``tools``, and ``chat_template_kwargs``, which come before ``template_kwargs``.

    Raises:
        ValueError: a message, the tools or the arguments are malformed; the last message has tool calls.
    """
    row = row or {}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else checked_messages(prompt, where)
    if messages[-1]["role"] == "assistant" and messages[-1].get("tool_calls"):
        raise ValueError(
            f"{where}: it ends with the assistant's tool calls, after which the tools reply; add what they do"
        )
    if system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    own = row.get("chat_template_kwargs") or {}
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except ValueError as error:
            raise ValueError(f"{where}, column 'chat_template_kwargs': it is not JSON ({error})") from error
    variables = {**(template_kwargs or {}), **checked_variables(own, f"{where}, column 'chat_template_kwargs'")}
    return Conversation(messages, checked_tools(row.get("tools"), where), variables)


def of_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """Those columns of a row that a chat template takes."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}


def checked_variables(variables: Any, where: str) -> dict[str, Any]:
    """Arguments of a chat template, those that are null left out.

    Raises:
        ValueError: they are not an object, or one is not the user's to set.
    """
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ValueError(f"{where}: it must be an object of names and values; it is {variables!r:.200}")
    reserved = [name for name in variables if name in RESERVED]
    if reserved:
        raise ValueError(f"{where}: {reserved} cannot be set here; they follow from the prompt")
    return {name: value for name, value in variables.items() if value is not None}


def render_prompts(
    prompts: Sequence[str | Messages],
    tokenizer: Any,
    *,
    template: str | None = None,
    system_prompt: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """The text each prompt becomes before it is split into tokens.

    Args:
        prompts: questions, or conversations as lists of messages; a question is a conversation of one user message. A
            conversation that ends with the assistant's message is continued; after any other, the assistant's turn is
            opened.
        tokenizer: a transformers tokenizer; its chat template is used if ``template`` is None.
        template, system_prompt, template_kwargs, date: as in ``Rendering``; other braces of ``template`` stay.
        rows: the columns of each prompt's row, of which a chat template takes ``tools`` and ``chat_template_kwargs``.

    Raises:
        ValueError: the tokenizer has no chat template and ``template`` is None; the chat template refuses a prompt
            (the error says which) or exceeds its limits; ``template`` lacks ``{question}``, or is used with a
            conversation, a system prompt or arguments.
    """
    if template is None:
        check_has_template(tokenizer)
        conversations = [
            conversation_of(
                prompt,
                f"prompt {n}",
                system_prompt=system_prompt,
                template_kwargs=template_kwargs,
                row=None if rows is None else rows[n],
            )
            for n, prompt in enumerate(prompts)
        ]
        return render_conversations(conversations, tokenizer, [f"prompt {n}" for n in range(len(prompts))], date=date)
    if "{question}" not in template:
        raise ValueError(f"a plain template must hold {{question}} where the prompt goes; it is {template!r}")
    if system_prompt:
        raise ValueError("a plain template leaves no place for system_prompt: write its text into the template")
    if template_kwargs:
        raise ValueError(
            f"template_kwargs {dict(template_kwargs)} are for a chat template, and template is a plain one"
        )
    questions: list[str] = []
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {position} is a conversation, and a plain template takes text: use a chat template"
            )
        questions.append(template.replace("{question}", prompt))
    return questions


def render_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, names: Sequence[str], *, date: str | None = None
) -> list[str]:
    """The text of each conversation as a prompt; ``names`` are what errors call them."""
    chats, owners = [], []
    for n, conversation in enumerate(conversations):
        parts = conversation.chats()
        chats += parts
        owners += [n] * len(parts)
    rendered = render_chats(
        tokenizer, chats, today=date, refusal=lambda place, template: f"{template} refuses {names[owners[place]]}"
    )
    texts = iter(rendered)
    counts = np.bincount(owners, minlength=len(conversations)) if owners else []
    return [
        conversation.prompt_text([next(texts) for _ in range(count)], name)
        for conversation, name, count in zip(conversations, names, counts, strict=True)
    ]


def encode_prompts(
    prompts: Sequence[str | Messages],
    tokenizer: Any,
    *,
    template: str | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    **rendering: Any,
) -> list[list[int]]:
    """The token ids of each prompt, from the text that ``render_prompts`` makes of it with the same arguments.

    A chat template writes its own special tokens, and what it renders is encoded without adding any, as
    ``tokenizer.apply_chat_template(..., tokenize=True)`` does. To a plain template the beginning-of-sequence token is
    added where the tokenizer adds one and the text does not begin with it, and nothing is added at the end.

    Raises:
        ValueError: as ``render_prompts``; and for a prompt that the tokenizer has no tokens for.
    """
    texts = render_prompts(prompts, tokenizer, template=template, rows=rows, **rendering)
    return encode_rendered(texts, tokenizer, plain=template is not None)


def encode_rendered(texts: Sequence[str], tokenizer: Any, *, plain: bool) -> list[list[int]]:
    """The token ids of rendered prompts; ``plain`` for those of a plain template, which may lack the beginning token.

    Raises:
        ValueError: the tokenizer has no tokens for one.
    """
    if not texts:
        return []
    token_ids = encode_texts(texts, tokenizer)
    if not plain:
        return token_ids
    bos = [tokenizer.bos_token_id]
    as_tokenizer_would = tokenizer(list(texts))["input_ids"]
    return [
        bos + ids if full[:1] == bos and ids[:1] != bos else ids
        for ids, full in zip(token_ids, as_tokenizer_would, strict=True)
    ]


def fit_prompts(
    token_ids: Sequence[list[int]], *, max_prompt_length: int, overlong_prompts: str = "drop"
) -> tuple[list[int], list[list[int]]]:
    """The prompts that fit into ``max_prompt_length`` tokens, as positions in ``token_ids`` and their ids.

    Args:
        token_ids: one list of ids a prompt.
        max_prompt_length: in tokens.
        overlong_prompts: what happens to a longer prompt. "drop" leaves it out: ``len(token_ids) - len(positions)``
            were dropped. "truncate" keeps its last ``max_prompt_length`` tokens, and so loses what begins the sequence.
            "error" raises.

    Raises:
        ValueError: a prompt without tokens; ``max_prompt_length`` less than 1; another word for ``overlong_prompts``;
            it is "error" and prompts are longer, or "drop" and no prompt is left (the error says how many are how
            long).
    """
    if overlong_prompts not in get_args(Overlong):
        raise ValueError(f"overlong_prompts must be one of {get_args(Overlong)}, and is {overlong_prompts!r}")
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, and is {max_prompt_length}")
    empty = [position for position, ids in enumerate(token_ids) if not ids]
    if empty:
        raise ValueError(f"prompts without a token, of {len(token_ids)}, stand at the positions {empty[:10]}")
    if overlong_prompts == "truncate":
        return list(range(len(token_ids))), [ids[-max_prompt_length:] for ids in token_ids]
    positions = [position for position, ids in enumerate(token_ids) if len(ids) <= max_prompt_length]
    dropped = len(token_ids) - len(positions)
    if dropped and (overlong_prompts == "error" or not positions):
        raise ValueError(
            f"{dropped} of {len(token_ids)} prompts are longer than max_prompt_length={max_prompt_length} tokens; the "
            f"longest has {max(map(len, token_ids))}. Raise max_prompt_length, or choose overlong_prompts = truncate"
            + (" or drop" if positions else "")
        )
    return positions, [token_ids[position] for position in positions]


def pad_prompts(
    token_ids: Sequence[list[int]], *, max_prompt_length: int, pad_id: int, index: Sequence[int] | np.ndarray
) -> Prompts:
    """Prompts padded on the left to ``max_prompt_length``; the mask comes from lengths, so a real pad id stays True.

    Args:
        token_ids: one list of ids a prompt.
        max_prompt_length: in tokens; every batch has this many columns.
        pad_id: what stands in the padding.
        index: the number of each prompt that its samples' noise is drawn from.

    Raises:
        ValueError: no prompts; a prompt without tokens or longer than ``max_prompt_length``; an index for more or fewer
            prompts, or the same one twice.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
    if not len(lengths) or lengths.min() == 0 or lengths.max() > max_prompt_length:
        raise ValueError(
            f"prompts must have between 1 and max_prompt_length={max_prompt_length} tokens (fit_prompts sees to the "
            f"upper limit), and there must be at least one; their lengths are {lengths.tolist()}"
        )
    if len(index) != len(lengths) or len(set(map(int, index))) != len(lengths):
        raise ValueError(f"index must have one number a prompt, all different: {len(lengths)} prompts, index {index}")
    mask = np.arange(max_prompt_length) >= max_prompt_length - lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int32)
    ids[mask] = np.concatenate(token_ids)
    return Prompts(jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(index, dtype=jnp.int32))
