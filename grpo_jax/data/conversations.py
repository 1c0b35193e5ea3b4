"""Demonstrations: conversations and completions to token ids, with a mark on each token that is learnt from."""

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
from grpo_jax.data.turns import Demonstration, Piece, TrainOn, no_end, turns, whole_texts


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
    train_on: TrainOn = "completion",
    **rendering: Unpack[Rendering],
) -> list[Example]:
    """The tokens of each demonstration.

    A prompt is encoded as the sampler would be given it, and what follows is encoded by itself and comes after: so what
    is learnt is what will be drawn. With a plain template the model's ending token comes last. With a chat template a
    turn is what the template writes after the opening that it writes for a generation, and it is learnt from up to its
    ending token. A prompt that ends with the assistant's message is continued by the completion.

    Args:
        demonstrations: what is to be imitated.
        tokenizer: a transformers tokenizer; its chat template is used if ``template`` is None, but for a text alone.
        eos_ids: the tokens that end a turn; the first of them ends a completion after a plain template.
        train_on: "completion" for the last turn, "assistant" for every turn of the assistant, "all" for every token.
        rendering: as in ``prompts.Rendering``. Columns ``tools`` and ``chat_template_kwargs`` go to a chat template.

    Raises:
        ValueError: the chat template writes an earlier turn otherwise once others follow, so that no span of the text
            is that turn ("assistant"), or writes a prompt otherwise than for a generation; a conversation is to go into
            a plain template; the chat template writes no ending token; the tokenizer has no token for something. The
            error says which demonstration.
    """
    examples = []
    plain = rendering.get("template") is not None
    pieces = [[Piece(each.completion, True)] for each in demonstrations]
    chats = [] if plain else [n for n, each in enumerate(demonstrations) if each.prompt]
    for n, found in zip(chats, turns([demonstrations[n] for n in chats], tokenizer, train_on, rendering), strict=True):
        pieces[n] = found
    befores = _encoded_before(demonstrations, tokenizer, rendering, plain=plain)
    encoded = iter(_encoded_pieces(demonstrations, pieces, befores, tokenizer))
    for demonstration, parts, before in zip(demonstrations, pieces, befores, strict=True):
        ids, learnt, start = list(before), [train_on == "all"] * len(before), len(before)
        for part in parts:
            piece = next(encoded)
            ended = next((n + 1 for n, token in enumerate(piece) if token in eos_ids), None)
            if part.is_turn and ended is None:
                if not plain and demonstration.prompt:
                    raise ValueError(f"{demonstration.where}: {no_end(tokenizer, piece, eos_ids)}")
                piece = [*piece, eos_ids[0]]
            start = len(ids) if part.is_turn else start
            ids += piece
            learnt += [train_on == "all" or (part.is_turn and n < (ended or len(piece))) for n in range(len(piece))]
        learnt[0] = False
        if not any(learnt):
            raise ValueError(f"{demonstration.where} has nothing to learn from: nothing predicts its only token")
        examples.append(Example(ids, learnt, start))
    return examples


def until_end(example: Example) -> list[int]:
    """The tokens of the last turn through its ending one; a chat template may write others after it."""
    last = max(n for n, learnt in enumerate(example.learnt) if learnt)
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
    """The tokens of prompts with completions, as ``encode_demonstrations`` gives them through the ending token.

    Args:
        prompts: questions or messages.
        completions: the assistant's replies.
        tokenizer: a transformers tokenizer.
        eos_ids: as in ``encode_demonstrations``.
        ended: whether each completion ended by itself; one that was cut off gets no ending token.
        rows: columns of each prompt's row.
        rendering: as in ``prompts.Rendering``.

    Raises:
        ValueError: as ``encode_demonstrations``.
    """
    token_ids: list[list[int]] = [[] for _ in prompts]
    whole = [n for n, is_whole in enumerate(ended) if is_whole]
    demonstrations = [Demonstration(prompts[n], completions[n], f"completion {n}", rows[n]) for n in whole]
    examples = encode_demonstrations(demonstrations, tokenizer, eos_ids=eos_ids, **rendering)
    for n, example in zip(whole, examples, strict=True):
        token_ids[n] = example.token_ids[: example.prompt_length] + until_end(example)
    cut = [n for n, is_whole in enumerate(ended) if not is_whole]
    before = encode_prompts([prompts[n] for n in cut], tokenizer, rows=[rows[n] for n in cut], **rendering)
    for n, ids, after in zip(cut, before, encode_following([completions[n] for n in cut], tokenizer), strict=True):
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
    """The tokens of everything that the chat template writes of prompts with completions.

    Args:
        prompts: questions or messages.
        completions: the assistant's replies.
        tokenizer: a transformers tokenizer.
        rows: columns of each prompt's row.
        rendering: as in ``prompts.Rendering``.

    Raises:
        ValueError: the chat template refuses a conversation, or the tokenizer has no token for something.
    """
    demonstrations = [
        Demonstration(prompt, completion, f"completion {n}", row)
        for n, (prompt, completion, row) in enumerate(zip(prompts, completions, rows, strict=True))
    ]
    return encode_texts(whole_texts(demonstrations, tokenizer, rendering), tokenizer)


def _encoded_pieces(
    demonstrations: Sequence[Demonstration], pieces: list[list[Piece]], befores: list[list[int]], tokenizer: Any
) -> list[list[int]]:
    """The tokens of all pieces: those that begin a sequence as the tokenizer begins one, others as what follows."""
    texts = [piece.text for parts in pieces for piece in parts]
    begins = [
        m == 0 and not (before and demonstration.prompt)
        for demonstration, before, parts in zip(demonstrations, befores, pieces, strict=True)
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


def _encoded_before(
    demonstrations: Sequence[Demonstration], tokenizer: Any, rendering: Rendering, *, plain: bool
) -> list[list[int]]:
    """What stands before each completion: a prompt in a plain template; the beginning token, of a text alone."""
    encoded: list[list[int]] = [[] for _ in demonstrations]
    asked = [n for n, each in enumerate(demonstrations) if each.prompt and plain]
    prompts = [demonstrations[n].prompt for n in asked]
    try:
        found = encode_prompts(prompts, tokenizer, **rendering) if asked else []
    except ValueError:
        for n in asked:
            try:
                encode_prompts([demonstrations[n].prompt], tokenizer, **rendering)
            except ValueError as error:
                raise ValueError(f"{demonstrations[n].where}: {error}") from error
        raise
    for n, ids in zip(asked, found, strict=True):
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
    if len(messages) < 2:
        raise ValueError(f"{where}: a conversation must hold at least two messages with role and content")
    *before, last = checked_messages(messages, where)
    if last["role"] != "assistant":
        raise ValueError(f"{where}: the last message is the {last['role']}'s; it must be the assistant's")
    if last.get("weight", 1) == 0:
        raise ValueError(
            f"{where}: the last message has weight 0, so that it is not to be trained on; let the conversation end "
            "with one that is, or leave out the row"
        )
    reply = {name: value for name, value in last.items() if name not in ("role", "content", "weight")}
    completion = last["content"] if reply.get("tool_calls") else checked_text(last["content"], f"{where}, last message")
    return Demonstration(before, completion, where, columns, reply)
