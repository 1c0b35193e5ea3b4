"""Encoding of prompts and completions for a reward model, in the format that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.data.conversations import encode_replies, encode_whole_chats
from grpo_jax.data.messages import Messages
from grpo_jax.data.problems import PROMPT
from grpo_jax.data.prompt_format import described, read_prompt_format
from grpo_jax.data.prompts import Rendering, encode_rendered
from grpo_jax.data.tokens import encode_following
from grpo_jax.data.turns import turn_borders
from grpo_jax.models import Pretrained
from grpo_jax.rewards.learned import Encode

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that are passed to a chat template."""


def reward_model_reader(reward_model: Pretrained, *, today: str | None = None) -> Encode:
    """The function that encodes the input of a reward model, for ``LearnedReward(encode=...)``.

    A model with a ``prompt_format.json`` reads the format of its training (``encode_demonstrations``): the problem's
    prompt (column ``problem_prompt``) in that format, and the completion up to its end-of-sequence token. Without the
    file the model reads the whole conversation in its chat template, as is usual with transformers; without a chat
    template, the policy's prompt and the completion. Without a column ``problem_prompt``, prompts must be texts in the
    reward model's own format. A completion that was cut off (column ``truncated``) gets no end-of-sequence token.

    Args:
        reward_model: the model with its tokenizer.
        today: the date for its chat template if its format does not fix one; None means the current date.

    Raises:
        ValueError: ``prompt_format.json`` is malformed. When called: no row can be encoded. Single rows that cannot be
            encoded get no tokens.
    """
    tokenizer, eos_ids = reward_model.tokenizer, reward_model.eos_ids
    assert tokenizer is not None
    if reward_model.prompt_format is not None:
        rendering = read_prompt_format(reward_model.prompt_format)
    else:
        rendering: Rendering = {"template": None if tokenizer.chat_template is not None else "{question}"}
    is_plain = rendering.get("template") is not None
    reads_tail = reward_model.prompt_format is None and not is_plain  # the template's text after the ending token
    if not is_plain:
        rendering = {**rendering, "date": rendering.get("date") or today}

    def encode_texts(prompts: list[str], completions: list[str], ended: list[bool]) -> list[list[int]]:
        borders = None if is_plain else turn_borders(tokenizer, "x", {}, **rendering)
        tail = "" if borders is None else borders[1]
        texts = [reply + tail if is_ended else reply for reply, is_ended in zip(completions, ended, strict=True)]
        replies = encode_following(texts, tokenizer)
        for n, ids in enumerate(replies):
            end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), None)
            if ended[n] and end is None and is_plain:
                replies[n] = [*ids, eos_ids[0]]
            elif ended[n] and end is not None and not reads_tail:
                replies[n] = ids[:end]
        prompt_ids = encode_rendered(prompts, tokenizer, plain=is_plain)
        return [prompt + reply for prompt, reply in zip(prompt_ids, replies, strict=True)]

    def encode(prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> list[list[int]]:
        ended = [not cut_off for cut_off in columns.get("truncated") or [False] * len(completions)]
        names = [name for name in TEMPLATE_COLUMNS if name in columns]
        rows = [{name: columns[name][n] for name in names} for n in range(len(completions))]
        problem_prompts = columns.get(PROMPT)
        reads_text = problem_prompts is None or (reward_model.prompt_format is None and is_plain)
        questions: list[Any] = list(prompts if problem_prompts is None else problem_prompts)
        questions = [as_question(prompt) for prompt in questions] if is_plain else questions

        def encode_rows(indices: Sequence[int]) -> list[list[int]]:
            replies, chosen_rows = [completions[n] for n in indices], [rows[n] for n in indices]
            are_ended = [ended[n] for n in indices]
            if reads_text:
                return encode_texts([prompts[n] for n in indices], replies, are_ended)
            chosen = [questions[n] for n in indices]
            if reads_tail and all(are_ended):
                return encode_whole_chats(chosen, replies, tokenizer, rows=chosen_rows, **rendering)
            return encode_replies(
                chosen, replies, tokenizer, eos_ids=eos_ids, ended=are_ended, rows=chosen_rows, **rendering
            )

        token_ids: list[list[int]] = [[] for _ in completions]
        errors: list[ValueError] = []
        for is_finished in (True, False):
            indices = [n for n, is_ended in enumerate(ended) if is_ended == is_finished]
            encoded, failed = encode_possible(encode_rows, indices)
            errors += failed
            for n, ids in zip(indices, encoded, strict=True):
                token_ids[n] = ids
        if errors and not any(token_ids):
            raise errors[0]
        return token_ids

    return encode


def described_input(reward_model: Pretrained) -> str:
    """A description of the prompts that a reward model reads, for people."""
    if reward_model.prompt_format is not None:
        return f"{described(reward_model.prompt_format)}, the format of its training"
    if getattr(reward_model.tokenizer, "chat_template", None) is not None:
        return "its tokenizer's chat template (it has no prompt_format.json)"
    return "the policy's prompts (it has neither a prompt_format.json nor a chat template)"


def encode_possible(
    encode_rows: Callable[[Sequence[int]], list[list[int]]], indices: Sequence[int]
) -> tuple[list[list[int]], list[ValueError]]:
    """The token ids of rows, empty for rows that cannot be encoded, and the errors of these.

    Args:
        encode_rows: encodes the rows of some indices; raises ``ValueError`` if it cannot encode one of them.
        indices: the rows.
    """
    if not indices:
        return [], []
    try:
        return encode_rows(indices), []
    except ValueError as error:
        if len(indices) == 1:
            return [[]], [error]
    parts = [encode_possible(encode_rows, [n]) for n in indices]
    return [ids for encoded, _ in parts for ids in encoded], [error for _, errors in parts for error in errors]


def as_question(prompt: str | Messages) -> str | Messages:
    """The content of a conversation that consists of one user message; any other prompt unchanged."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].get("role") == "user":
        return prompt[0]["content"]
    return prompt
