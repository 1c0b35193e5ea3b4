"""Demonstrations for SFT: loading, and tokenization with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

from grpo_jax.data.columns import check_length, required_column, without
from grpo_jax.data.files import read_rows
from grpo_jax.data.formats import Row
from grpo_jax.data.layouts import as_demonstration, as_messages
from grpo_jax.data.messages import Messages, checked_messages, is_message
from grpo_jax.data.problems import checked_prompt, checked_text, parsed_rows
from grpo_jax.data.prompts import Rendering, encode_prompts
from grpo_jax.data.tokens import encode_following, encode_texts
from grpo_jax.data.turns import Demonstration, Piece, TrainOn, missing_end, render_demonstrations, split_turns


class Example(NamedTuple):
    """A tokenized demonstration.

    Attributes:
        token_ids: the whole demonstration.
        loss_mask: whether the loss includes each token; False for the first, which no token predicts.
        prompt_length: number of tokens before the last turn.
    """

    token_ids: list[int]
    loss_mask: list[bool]
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
    """Load demonstrations from a file, a folder or the hub, in any layout of ``docs/data.md``.

    A row has ``messages`` (a conversation that ends with the assistant's turn), or ``prompt`` and ``completion`` (texts
    or messages), or only ``text``. ``layouts.as_demonstration`` converts other layouts.

    Args:
        source: path of a file or folder, or id of a data set on the hub.
        split: split of a folder or data set, by default "train".
        subset: configuration of a folder or data set.
        prompt_column: column of the prompt, by default found by its usual names.
        completion_column: column of the completion, likewise. Given alone, the completion is a text without a prompt.
        skipped: if given, unreadable rows are skipped and the reasons appended to it.

    Raises:
        KeyError: a row has an unknown layout; the message lists its columns.
        ValueError: a row is empty, malformed or too long, or its conversation does not end with the assistant's turn.
        FileNotFoundError: the file, folder, split or data set does not exist.
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
    train_on: TrainOn = "completion",
    **rendering: Unpack[Rendering],
) -> list[Example]:
    """Tokenize demonstrations, with a loss mask.

    Prompt and completion are encoded separately and concatenated, so that the training tokens are those of a rollout:
    the prompt as the sampler gets it, then the completion. After a plain template, the first of ``eos_ids`` is
    appended. With a chat template, a turn is the text after the generation prompt, and the loss includes it up to its
    ending token. A completion after a prompt that ends with an assistant message continues that message.

    Args:
        demonstrations: demonstrations to tokenize.
        tokenizer: a transformers tokenizer. Its chat template is used if ``template`` is None, except for
            demonstrations without a prompt.
        eos_ids: ids of the tokens that end a turn.
        train_on: tokens that the loss includes: "completion" (the last turn), "assistant" (all assistant turns) or
            "all".
        rendering: fields of ``prompts.Rendering``. A chat template also gets the columns ``tools`` and
            ``chat_template_kwargs``.

    Raises:
        ValueError: the chat template renders a turn differently within the conversation than on its own (so that its
            tokens cannot be marked) or writes no ending token; a plain template is used with a conversation; the
            tokenizer cannot encode a text. The message names the demonstration.
    """
    examples = []
    plain = rendering.get("template") is not None
    pieces = [[Piece(each.completion, True)] for each in demonstrations]
    chats = [] if plain else [n for n, each in enumerate(demonstrations) if each.prompt]
    chat_pieces = split_turns([demonstrations[n] for n in chats], tokenizer, train_on, rendering)
    for n, parts in zip(chats, chat_pieces, strict=True):
        pieces[n] = parts
    prefixes = _encode_prefixes(demonstrations, tokenizer, rendering, plain=plain)
    encoded = iter(_encode_pieces(demonstrations, pieces, prefixes, tokenizer))
    for demonstration, parts, prefix in zip(demonstrations, pieces, prefixes, strict=True):
        ids, loss_mask, start = list(prefix), [train_on == "all"] * len(prefix), len(prefix)
        for part in parts:
            piece = next(encoded)
            ended = next((n + 1 for n, token in enumerate(piece) if token in eos_ids), None)
            if part.is_turn and ended is None:
                if not plain and demonstration.prompt:
                    raise ValueError(f"{demonstration.where}: {missing_end(tokenizer, piece, eos_ids)}")
                piece = [*piece, eos_ids[0]]
            start = len(ids) if part.is_turn else start
            ids += piece
            loss_mask += [train_on == "all" or (part.is_turn and n < (ended or len(piece))) for n in range(len(piece))]
        loss_mask[0] = False
        if not any(loss_mask):
            raise ValueError(f"{demonstration.where} has only one token, which cannot be predicted; drop the row")
        examples.append(Example(ids, loss_mask, start))
    return examples


def completion_ids(example: Example) -> list[int]:
    """The tokens of the last turn, through its ending token; a chat template may write more after it."""
    last = max(n for n, is_trained in enumerate(example.loss_mask) if is_trained)
    return example.token_ids[example.prompt_length : last + 1]


def encode_replies(
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    tokenizer: Any,
    *,
    eos_ids: Sequence[int],
    ended: Sequence[bool],
    rows: Sequence[Row],
    **rendering: Unpack[Rendering],
) -> list[list[int]]:
    """Tokenize prompts with completions, as ``encode_demonstrations`` does, through the ending token.

    Args:
        prompts: texts or messages.
        completions: replies of the assistant.
        tokenizer: a transformers tokenizer.
        eos_ids: ids of the tokens that end a turn.
        ended: False for truncated completions, which get no ending token.
        rows: the columns of each prompt's row.
        rendering: fields of ``prompts.Rendering``.

    Raises:
        ValueError: as ``encode_demonstrations``.
    """
    token_ids: list[list[int]] = [[] for _ in prompts]
    complete = [n for n, has_ended in enumerate(ended) if has_ended]
    demonstrations = [Demonstration(prompts[n], completions[n], f"completion {n}", rows[n]) for n in complete]
    examples = encode_demonstrations(demonstrations, tokenizer, eos_ids=eos_ids, **rendering)
    for n, example in zip(complete, examples, strict=True):
        token_ids[n] = example.token_ids[: example.prompt_length] + completion_ids(example)
    cut = [n for n, has_ended in enumerate(ended) if not has_ended]
    prompt_ids = encode_prompts([prompts[n] for n in cut], tokenizer, rows=[rows[n] for n in cut], **rendering)
    following = encode_following([completions[n] for n in cut], tokenizer)
    for n, ids, after in zip(cut, prompt_ids, following, strict=True):
        token_ids[n] = ids + after
    return token_ids


def encode_whole_chats(
    prompts: Sequence[str | Messages],
    completions: Sequence[str],
    tokenizer: Any,
    *,
    rows: Sequence[Row],
    **rendering: Unpack[Rendering],
) -> list[list[int]]:
    """Tokenize prompts with completions as whole chats, including what the chat template writes after the completion.

    Args:
        prompts: texts or messages.
        completions: replies of the assistant.
        tokenizer: a transformers tokenizer.
        rows: the columns of each prompt's row.
        rendering: fields of ``prompts.Rendering``.

    Raises:
        ValueError: the chat template rejects a conversation, or the tokenizer cannot encode a text.
    """
    demonstrations = [
        Demonstration(prompt, completion, f"completion {n}", row)
        for n, (prompt, completion, row) in enumerate(zip(prompts, completions, rows, strict=True))
    ]
    return encode_texts(render_demonstrations(demonstrations, tokenizer, rendering), tokenizer)


def _encode_pieces(
    demonstrations: Sequence[Demonstration], pieces: list[list[Piece]], prefixes: list[list[int]], tokenizer: Any
) -> list[list[int]]:
    """The tokens of all pieces, encoded as the beginning of a sequence or as text that follows other text."""
    texts = [piece.text for parts in pieces for piece in parts]
    begins = [
        m == 0 and not (prefix and demonstration.prompt)
        for demonstration, prefix, parts in zip(demonstrations, prefixes, pieces, strict=True)
        for m in range(len(parts))
    ]
    try:
        first = iter(encode_texts([text for text, is_first in zip(texts, begins, strict=True) if is_first], tokenizer))
        later = [text for text, is_first in zip(texts, begins, strict=True) if not is_first]
        following = iter(encode_following(later, tokenizer))
    except ValueError:
        for demonstration, parts in zip(demonstrations, pieces, strict=True):
            try:
                encode_texts([piece.text for piece in parts], tokenizer)
            except ValueError as error:
                raise ValueError(f"{demonstration.where}: {error}") from error
        raise
    return [next(first if is_first else following) for is_first in begins]


def _encode_prefixes(
    demonstrations: Sequence[Demonstration], tokenizer: Any, rendering: Rendering, *, plain: bool
) -> list[list[int]]:
    """The tokens before the pieces: the prompt of a plain template; the beginning token of a text without a prompt."""
    encoded: list[list[int]] = [[] for _ in demonstrations]
    with_prompt = [n for n, each in enumerate(demonstrations) if each.prompt and plain]
    prompts = [demonstrations[n].prompt for n in with_prompt]
    try:
        prompt_ids = encode_prompts(prompts, tokenizer, **rendering) if with_prompt else []
    except ValueError:
        for n in with_prompt:
            try:
                encode_prompts([demonstrations[n].prompt], tokenizer, **rendering)
            except ValueError as error:
                raise ValueError(f"{demonstrations[n].where}: {error}") from error
        raise
    for n, ids in zip(with_prompt, prompt_ids, strict=True):
        encoded[n] = ids
    for n, demonstration in enumerate(demonstrations):
        if not demonstration.prompt:
            full = tokenizer([demonstration.completion])["input_ids"][0]
            encoded[n] = [tokenizer.bos_token_id] if full[:1] == [tokenizer.bos_token_id] else []
    return encoded


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
        value = required_column(row, prompt_column, where, "prompt_column=")
        prompt = checked_prompt(as_messages(value) or value, f"{where}, column {prompt_column!r}")
    for name, value in ((prompt_column, prompt), (completion_column, completion)):
        check_length(value, f"{where}, column {name!r}")
    others = without(row, prompt_column, completion_column)
    if isinstance(completion, list) and completion and all(is_message(each) for each in completion):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _conversation([*before, *completion], where, others)
    return Demonstration(prompt, checked_text(completion, f"{where}, column {completion_column!r}"), where, others)


def _conversation(messages: Messages, where: str, columns: Row) -> Demonstration:
    if len(messages) < 2:
        raise ValueError(f"{where}: a conversation must have at least two messages with role and content")
    *before, last = checked_messages(messages, where)
    if last["role"] != "assistant":
        raise ValueError(f"{where}: the last message has the role {last['role']!r}; it must be the assistant's")
    if last.get("weight", 1) == 0:
        raise ValueError(
            f"{where}: the last message has weight 0, which excludes it from training; end the conversation with a "
            "message to train on, or drop the row"
        )
    reply = {name: value for name, value in last.items() if name not in ("role", "content", "weight")}
    completion = last["content"] if reply.get("tool_calls") else checked_text(last["content"], f"{where}, last message")
    return Demonstration(before, completion, where, columns, reply)
