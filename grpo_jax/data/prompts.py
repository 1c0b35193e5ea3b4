"""Prompts: rendering by a plain or chat template, tokenization, truncation, left padding."""

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
"""A plain template for base models, in the style of DeepSeek-R1-Zero."""

MARK = "@@last message@@"
"""Placeholder for a message's content, to find where a template writes it."""


class Rendering(TypedDict, total=False):
    """Arguments for rendering prompts.

    Attributes:
        template: plain template with ``{question}`` in place of the prompt, such as ``R1_ZERO``; None uses the
            tokenizer's chat template.
        system_prompt: system message for conversations that do not begin with one; chat template only.
        template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        date: date for ``strftime_now`` in a chat template, such as "2026-11-27"; None is the current date.
    """

    template: str | None
    system_prompt: str | None
    template_kwargs: Mapping[str, Any]
    date: str | None


Overlong = Literal["drop", "truncate", "error"]
"""Handling of prompts that are too long, by ``fit_prompts``."""


class Conversation(NamedTuple):
    """A prompt for a chat template.

    Attributes:
        messages: messages, normalized by ``messages.checked_messages``.
        tools: JSON schemas, or None.
        variables: further arguments of the template.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]

    @property
    def is_continued(self) -> bool:
        """Whether the last message is from the assistant, so that the completion continues it."""
        return self.messages[-1]["role"] == "assistant"

    def chat(self, messages: Messages, *, opens_turn: bool = False) -> Chat:
        """Other messages, with the tools and arguments of this conversation.

        Args:
            messages: the messages.
            opens_turn: whether the text ends with the beginning of the assistant's turn.
        """
        return Chat(messages, self.tools, self.variables, opens_turn)

    def chats(self) -> list[Chat]:
        """The chats to render for ``prompt_text``."""
        if not self.is_continued:
            return [self.chat(self.messages, opens_turn=True)]
        *before, last = self.messages
        marked = self.chat([*before, {**last, "content": MARK}])
        return [marked, self.chat(before, opens_turn=True)] if before else [marked]

    def prompt_text(self, texts: Sequence[str], where: str) -> str:
        """The text of the prompt; it ends within the last message if the completion continues that.

        Args:
            texts: the rendered ``chats``.
            where: source location, for the error.

        Raises:
            ValueError: the template does not write the content of the last message exactly once.
        """
        if not self.is_continued:
            return texts[0]
        content = self.messages[-1]["content"]
        head, _ = around_mark(texts[0], where)
        opening = texts[1] if len(texts) > 1 else head
        # The template opens a thought, and the message may begin with the same opening tag.
        added = head[len(opening) :].split() if head.startswith(opening) else []
        return (opening if added and content.lstrip().startswith(added[0]) else head) + content


def around_mark(text: str, where: str) -> tuple[str, str]:
    """The text before and after ``MARK``.

    Args:
        text: a rendered chat whose last message has the content ``MARK``.
        where: source location, for the error.

    Raises:
        ValueError: ``text`` does not contain ``MARK`` exactly once.
    """
    if text.count(MARK) != 1:
        raise ValueError(
            f"{where}: the chat template changes the last message, so that it cannot be continued; end the prompt with "
            "another message, or use another template"
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
    """A prompt as a conversation; a text becomes one user message.

    Args:
        prompt: text or messages.
        where: source location, for errors.
        system_prompt: system message, unless the prompt begins with one; None or empty for none.
        template_kwargs: further arguments of the chat template.
        row: the columns of the prompt's row. ``tools`` and ``chat_template_kwargs`` are used; the latter override
            ``template_kwargs``.

    Raises:
        ValueError: a message, the tools or the arguments are malformed, or the last message has tool calls.
    """
    row = row or {}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else checked_messages(prompt, where)
    if messages[-1]["role"] == "assistant" and messages[-1].get("tool_calls"):
        raise ValueError(f"{where}: it ends with tool calls of the assistant; add the tools' replies")
    if system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    row_kwargs = row.get("chat_template_kwargs") or {}
    if isinstance(row_kwargs, str):
        try:
            row_kwargs = json.loads(row_kwargs)
        except ValueError as error:
            raise ValueError(f"{where}, column 'chat_template_kwargs': it is not JSON ({error})") from error
    row_kwargs = checked_variables(row_kwargs, f"{where}, column 'chat_template_kwargs'")
    variables = {**(template_kwargs or {}), **row_kwargs}
    return Conversation(messages, checked_tools(row.get("tools"), where), variables)


def template_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that a chat template uses: ``tools`` and ``chat_template_kwargs``."""
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}


def checked_variables(variables: Any, where: str) -> dict[str, Any]:
    """Validate further arguments of a chat template; null values are removed.

    Args:
        variables: values by name.
        where: source location, for errors.

    Raises:
        ValueError: ``variables`` is not a mapping with text keys, or sets a reserved name.
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
    """Render prompts with a plain or chat template.

    Args:
        prompts: texts, or conversations as lists of messages. For a chat template, a text is one user message. The
            rendered text ends with the opening of the assistant's turn, or within a last message from the assistant.
        tokenizer: a transformers tokenizer.
        template: plain template with ``{question}`` in place of the prompt (other braces are kept); None uses the
            tokenizer's chat template.
        system_prompt, template_kwargs, date: arguments for a chat template, as in ``Rendering``.
        rows: the columns of each prompt's row. A chat template uses ``tools`` and ``chat_template_kwargs``.

    Raises:
        ValueError: the tokenizer has no chat template and ``template`` is None; the chat template rejects a prompt or
            exceeds its limits; ``template`` has no ``{question}``, or is used with a conversation, a system prompt or
            template arguments.
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
        raise ValueError(f"a plain template must contain {{question}}, the place of the prompt; it is {template!r}")
    if system_prompt:
        raise ValueError("system_prompt cannot be used with a plain template: include its text in the template")
    if template_kwargs:
        raise ValueError(
            f"template_kwargs {dict(template_kwargs)} cannot be used with a plain template, only with a chat template"
        )
    questions: list[str] = []
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {position} is a conversation, and a plain template requires text: use a chat template"
            )
        questions.append(template.replace("{question}", prompt))
    return questions


def render_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, names: Sequence[str], *, date: str | None = None
) -> list[str]:
    """Render conversations as prompts with the chat template.

    Args:
        conversations: the conversations.
        tokenizer: a transformers tokenizer with a chat template.
        names: the name of each conversation in errors.
        date: date for ``strftime_now``; None is the current date.

    Raises:
        ValueError: the chat template rejects a conversation or exceeds its limits.
    """
    chats, owners = [], []
    for n, conversation in enumerate(conversations):
        parts = conversation.chats()
        chats += parts
        owners += [n] * len(parts)
    rendered = render_chats(
        tokenizer, chats, today=date, error_prefix=lambda place, template: f"{template} rejects {names[owners[place]]}"
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
    """Render and tokenize prompts.

    A chat template writes its own special tokens: none are added, as in ``tokenizer.apply_chat_template``. After a
    plain template, a beginning-of-sequence token is added if the tokenizer adds one and the text does not begin with
    it; no ending token is added.

    Args:
        prompts: texts, or conversations as lists of messages.
        tokenizer: a transformers tokenizer.
        template: plain template; None uses the tokenizer's chat template.
        rows: the columns of each prompt's row.
        rendering: other arguments of ``render_prompts``.

    Raises:
        ValueError: as ``render_prompts``; the tokenizer cannot encode a prompt.
    """
    texts = render_prompts(prompts, tokenizer, template=template, rows=rows, **rendering)
    return encode_rendered(texts, tokenizer, plain=template is not None)


def encode_rendered(texts: Sequence[str], tokenizer: Any, *, plain: bool) -> list[list[int]]:
    """Tokenize rendered prompts.

    Args:
        texts: rendered prompts.
        tokenizer: a transformers tokenizer.
        plain: whether the template was plain, so that a beginning-of-sequence token may be missing.

    Raises:
        ValueError: the tokenizer cannot encode a prompt.
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
    """Drop or truncate prompts of more than ``max_prompt_length`` tokens.

    Args:
        token_ids: token ids of each prompt.
        max_prompt_length: in tokens.
        overlong_prompts: "drop" removes longer prompts, "truncate" keeps their last ``max_prompt_length`` tokens (the
            beginning-of-sequence token is lost), "error" raises.

    Returns:
        The positions of the remaining prompts in ``token_ids``, and their token ids.

    Raises:
        ValueError: a prompt has no tokens; ``max_prompt_length`` is below 1; ``overlong_prompts`` is unknown, is
            "error" and a prompt is longer, or is "drop" and no prompt is left.
    """
    if overlong_prompts not in get_args(Overlong):
        raise ValueError(f"overlong_prompts is {overlong_prompts!r}; it must be one of {get_args(Overlong)}")
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length is {max_prompt_length}; it must be at least 1")
    empty = [position for position, ids in enumerate(token_ids) if not ids]
    if empty:
        raise ValueError(f"{len(empty)} of {len(token_ids)} prompts have no tokens, at the positions {empty[:10]}")
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
    """Left-pad prompts to ``max_prompt_length``. The mask is computed from lengths: a prompt may contain ``pad_id``.

    Args:
        token_ids: token ids of each prompt.
        max_prompt_length: number of columns.
        pad_id: token id of padding.
        index: a distinct number for each prompt, from which its sampling noise is derived.

    Raises:
        ValueError: there are no prompts, a prompt is empty or too long, or ``index`` has another length or repeats a
            number.
    """
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
    if not len(lengths) or lengths.min() == 0 or lengths.max() > max_prompt_length:
        raise ValueError(
            f"there must be prompts, of 1 to max_prompt_length={max_prompt_length} tokens (fit_prompts drops longer "
            f"ones); the lengths are {lengths.tolist()}"
        )
    if len(index) != len(lengths) or len(set(map(int, index))) != len(lengths):
        raise ValueError(f"index must have a distinct number for each of {len(lengths)} prompts; it is {index}")
    mask = np.arange(max_prompt_length) >= max_prompt_length - lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int32)
    ids[mask] = np.concatenate(token_ids)
    return Prompts(jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(index, dtype=jnp.int32))
