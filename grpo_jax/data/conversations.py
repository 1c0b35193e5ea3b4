"""Demonstrations: conversations and completions to token ids, with a mark on each token that is learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from grpo_jax.data.layouts import as_demonstration, as_messages, check_length, required_column, without
from grpo_jax.data.prompts import encode_prompts, encode_texts
from grpo_jax.data.sources import Messages, Row, checked_prompt, checked_text, is_message, parsed_rows, read_rows

LearnFrom = Literal["completion", "assistant", "all"]
"""What of a demonstration is learnt: its last turn, every turn of the assistant, or every token."""


@dataclass(frozen=True)
class Demonstration:
    """What is to be imitated.

    Attributes:
        prompt: the question as text, or the messages before the completion; "" where there is only a text.
        completion: the reply as text.
        where: the place it was read from, in words.
        columns: every other column of its row.
    """

    prompt: str | Messages
    completion: str
    where: str
    columns: Row = field(default_factory=dict)


class Example(NamedTuple):
    """A demonstration as tokens.

    Attributes:
        token_ids: all of them.
        learnt: for each, whether it is learnt from; the first never is, as nothing predicts it.
        prompt_length: how many stand before the last turn.
    """

    token_ids: list[int]
    learnt: list[bool]
    prompt_length: int


def load_demonstrations(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    skipped: list[str] | None = None,
) -> list[Demonstration]:
    """The demonstrations of a file, folder or data set, in any layout of ``docs/data.md``.

    A row has ``messages`` (a conversation that ends with the assistant's turn), or ``prompt`` and ``completion`` (texts
    or messages), or ``text`` alone; ``layouts.as_demonstration`` brings other layouts into one of these forms. Other
    columns hold the prompt and the completion where they are named.

    Args:
        source: as of ``sources.load_problems``.
        split: likewise.
        subset: likewise.
        prompt_column: instead of ``prompt``.
        completion_column: instead of ``completion``; with it alone, the completion is a text without a prompt.
        skipped: where given, rows that cannot be read are left out and the reasons are appended to it.

    Raises:
        KeyError: a row has none of these forms; the error lists its columns.
        ValueError: a row is empty, malformed or overlong, or its conversation does not end with the assistant's turn.
        FileNotFoundError: no such file, folder, split or data set.
    """

    def parse(row: Row, where: str) -> Demonstration:
        return _demonstration(row, where, prompt_column, completion_column)

    demonstrations = parsed_rows(read_rows(source, split, subset, skipped=skipped), parse, skipped)
    if not demonstrations:
        raise ValueError(f"{source} is empty: it has no demonstrations")
    return demonstrations


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: Any,
    *,
    eos_ids: Sequence[int],
    template: str | None = None,
    system_prompt: str | None = None,
    learn_from: LearnFrom = "completion",
) -> list[Example]:
    """The tokens of each demonstration.

    A prompt is encoded as the sampler would be given it, and what follows is encoded by itself and comes after: so what
    is learnt is what will be drawn. With a plain template the model's ending token comes last. With a chat template a
    turn is what the template writes after the opening that it writes for a generation, and it is learnt from up to its
    ending token.

    Args:
        demonstrations: what is to be imitated.
        tokenizer: a transformers tokenizer; its chat template is used if ``template`` is None, but for a text alone.
        eos_ids: the tokens that end a turn; the first of them ends a completion after a plain template.
        template: a text in which ``{question}`` stands for the prompt.
        system_prompt: a system message put before each conversation; with a chat template only.
        learn_from: "completion" for the last turn, "assistant" for every turn of the assistant, "all" for every token.

    Raises:
        ValueError: the chat template writes an earlier turn otherwise once others follow, so that no span of the text
            is that turn ("assistant"), or writes a prompt otherwise than for a generation; a conversation is to go into
            a plain template; the chat template writes no ending token; the tokenizer has no token for something. The
            error says which demonstration.
    """
    examples = []
    pieces = [_pieces(each, tokenizer, template, system_prompt, learn_from) for each in demonstrations]
    encoded = iter(_encoded_pieces(demonstrations, pieces, tokenizer))
    plain = _encoded_plain(demonstrations, tokenizer, template, system_prompt)
    for demonstration, parts, before in zip(demonstrations, pieces, plain, strict=True):
        ids, learnt, start = list(before), [learn_from == "all"] * len(before), len(before)
        for _, is_turn in parts:
            piece = next(encoded)
            ended = next((n + 1 for n, token in enumerate(piece) if token in eos_ids), None)
            if is_turn and ended is None:
                if template is None and demonstration.prompt:
                    raise ValueError(
                        f"{demonstration.where}: the chat template writes none of the ending tokens {list(eos_ids)} "
                        "after the assistant's turn, so no end would be learnt; name what it writes as a stop token"
                    )
                piece = [*piece, eos_ids[0]]
            start = len(ids) if is_turn else start
            ids += piece
            learnt += [learn_from == "all" or (is_turn and n < (ended or len(piece))) for n in range(len(piece))]
        learnt[0] = False
        if not any(learnt):
            raise ValueError(f"{demonstration.where} has nothing to learn from: nothing predicts its only token")
        examples.append(Example(ids, learnt, start))
    return examples


def _encoded_pieces(
    demonstrations: Sequence[Demonstration], pieces: list[list[tuple[str, bool]]], tokenizer: Any
) -> list[list[int]]:
    try:
        return encode_texts([text for each in pieces for text, _ in each], tokenizer)
    except ValueError:
        for demonstration, each in zip(demonstrations, pieces, strict=True):
            try:
                encode_texts([text for text, _ in each], tokenizer)
            except ValueError as error:
                raise ValueError(f"{demonstration.where}: {error}") from error
        raise


def _encoded_plain(
    demonstrations: Sequence[Demonstration], tokenizer: Any, template: str | None, system_prompt: str | None
) -> list[list[int]]:
    """What stands before each completion: a prompt in a plain template; the beginning token, of a text alone."""
    encoded = []
    for demonstration in demonstrations:
        if not demonstration.prompt:
            full = tokenizer([demonstration.completion])["input_ids"][0]
            encoded.append([tokenizer.bos_token_id] if full[:1] == [tokenizer.bos_token_id] else [])
        elif template is None:
            encoded.append([])
        else:
            try:
                encoded += encode_prompts(
                    [demonstration.prompt], tokenizer, template=template, system_prompt=system_prompt
                )
            except ValueError as error:
                raise ValueError(f"{demonstration.where}: {error}") from error
    return encoded


def _pieces(
    demonstration: Demonstration,
    tokenizer: Any,
    template: str | None,
    system_prompt: str | None,
    learn_from: LearnFrom,
) -> list[tuple[str, bool]]:
    """The text in pieces, and of each whether it is a turn that is learnt; without what a plain template makes."""
    if template is not None or not demonstration.prompt:
        return [(demonstration.completion, True)]
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    prompt = demonstration.prompt
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [*system, *before, {"role": "assistant", "content": demonstration.completion}]
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    turns = turns if learn_from == "assistant" else turns[-1:]
    whole = _rendered(messages, tokenizer, demonstration.where)
    pieces, written = [], 0
    for n in turns:
        opening = _rendered(messages[:n], tokenizer, demonstration.where, opens_turn=True)
        through = whole if n + 1 == len(messages) else _rendered(messages[: n + 1], tokenizer, demonstration.where)
        if not (whole.startswith(opening) and whole.startswith(through) and written <= len(opening) < len(through)):
            raise ValueError(
                f"{demonstration.where}: the chat template writes message {n - len(system)} otherwise in the whole "
                "conversation than as a turn of its own, so its tokens cannot be marked; learn from the completion "
                "alone, or use a template that leaves earlier turns as they are"
                if n != turns[-1] or len(turns) > 1
                else f"{demonstration.where}: the chat template does not write the prompt as it opens a generation, so "
                "the completion's tokens cannot be marked; use another template"
            )
        pieces += [(whole[written : len(opening)], False), (whole[len(opening) : len(through)], True)]
        written = len(through)
    return [piece for piece in [*pieces, (whole[written:], False)] if piece[0]]


def _rendered(messages: Messages, tokenizer: Any, where: str, *, opens_turn: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: pass a plain template that holds {question}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the conversation: {error}") from error


def _demonstration(row: Row, where: str, prompt_column: str | None, completion_column: str | None) -> Demonstration:
    if prompt_column is None and completion_column is None:
        row = as_demonstration(row, where)
        if "messages" in row:
            check_length(row["messages"], f"{where}, column 'messages'")
            return _conversation(row["messages"], where, without(row, "messages"))
        if "completion" not in row:
            check_length(row["text"], f"{where}, column 'text'")
            text = checked_text(row["text"], f"{where}, column 'text'")
            return Demonstration("", text, where, without(row, "text"))
        prompt_column = "prompt"
    completion_column = completion_column or "completion"
    completion = required_column(row, completion_column, where, "completion_column=")
    completion = as_messages(completion) or completion
    prompt: str | Messages = ""
    if prompt_column is not None:
        given = required_column(row, prompt_column, where, "prompt_column=")
        prompt = checked_prompt(as_messages(given) or given, f"{where}, column {prompt_column!r}")
    for name, value in ((prompt_column, prompt), (completion_column, completion)):
        check_length(value, f"{where}, column {name!r}")
    others = without(row, prompt_column, completion_column)
    if isinstance(completion, list) and completion and all(is_message(each) for each in completion):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _conversation([*before, *completion], where, others)
    return Demonstration(prompt, checked_text(completion, f"{where}, column {completion_column!r}"), where, others)


def _conversation(messages: Messages, where: str, columns: Row) -> Demonstration:
    if not (len(messages) > 1 and all(is_message(each) for each in messages)):
        raise ValueError(f"{where}: a conversation must hold at least two messages with role and content")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message is the {messages[-1]['role']}'s; it must be the assistant's")
    return Demonstration(messages[:-1], checked_text(messages[-1]["content"], f"{where}, last message"), where, columns)
