"""What a reward model reads of a prompt and a completion: the tokens that it was trained on."""

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

OF_TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that a chat template takes."""


def reward_model_reader(reward_model: Pretrained, *, today: str | None = None) -> Encode:
    """The function that encodes what a reward model reads, as ``LearnedReward`` takes it.

    A model with a ``prompt_format.json`` reads what ``encode_demonstrations`` gave in its training: the problem's own
    prompt (column ``problem_prompt``) in that format, and the completion through its ending token. Without one, a chat
    template is taken to be what it was trained with, and the whole conversation is read, as users of transformers do;
    without that too, the prompt as the policy was given it. Where there is no column ``problem_prompt``, prompts are
    taken to be texts in the reward model's own format. A completion that was cut off (column ``truncated``) gets no
    ending.

    Args:
        reward_model: with its tokenizer.
        today: the date for its chat template where it was not trained with one; None is today.

    Raises:
        ValueError: its ``prompt_format.json`` is malformed. When called: no row can be encoded; of single ones that
            cannot be, nothing is read.
    """
    tokenizer, eos_ids = reward_model.tokenizer, reward_model.eos_ids
    assert tokenizer is not None
    if reward_model.prompt_format is not None:
        rendering = read_prompt_format(reward_model.prompt_format)
    else:
        rendering: Rendering = {"template": None if tokenizer.chat_template is not None else "{question}"}
    is_plain = rendering.get("template") is not None
    reads_rest = reward_model.prompt_format is None and not is_plain  # of what follows the ending token
    if not is_plain:
        rendering = {**rendering, "date": rendering.get("date") or today}

    def encode_texts(prompts: list[str], completions: list[str], ended: list[bool]) -> list[list[int]]:
        around = None if is_plain else turn_borders(tokenizer, "x", {}, **rendering)
        tail = "" if around is None else around[1]
        texts = [reply + tail if is_ended else reply for reply, is_ended in zip(completions, ended, strict=True)]
        replies = encode_following(texts, tokenizer)
        for n, ids in enumerate(replies):
            end = next((place + 1 for place, token in enumerate(ids) if token in eos_ids), None)
            if ended[n] and end is None and is_plain:
                replies[n] = [*ids, eos_ids[0]]
            elif ended[n] and end is not None and not reads_rest:
                replies[n] = ids[:end]
        before = encode_rendered(prompts, tokenizer, plain=is_plain)
        return [prompt + reply for prompt, reply in zip(before, replies, strict=True)]

    def encode(prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> list[list[int]]:
        ended = [not cut_off for cut_off in columns.get("truncated") or [False] * len(completions)]
        names = [name for name in OF_TEMPLATES if name in columns]
        rows = [{name: columns[name][n] for name in names} for n in range(len(completions))]
        own = columns.get(PROMPT)
        reads_text = own is None or (reward_model.prompt_format is None and is_plain)
        asked: list[Any] = list(prompts if own is None else own)
        asked = [as_question(prompt) for prompt in asked] if is_plain else asked

        def encode_at(places: Sequence[int]) -> list[list[int]]:
            replies, chosen_rows = [completions[n] for n in places], [rows[n] for n in places]
            are_ended = [ended[n] for n in places]
            if reads_text:
                return encode_texts([prompts[n] for n in places], replies, are_ended)
            chosen = [asked[n] for n in places]
            if reads_rest and all(are_ended):
                return encode_whole_chats(chosen, replies, tokenizer, rows=chosen_rows, **rendering)
            return encode_replies(
                chosen, replies, tokenizer, eos_ids=eos_ids, ended=are_ended, rows=chosen_rows, **rendering
            )

        found: list[list[int]] = [[] for _ in completions]
        refused: list[ValueError] = []
        for kind in (True, False):
            places = [n for n, is_ended in enumerate(ended) if is_ended == kind]
            read, errors = leniently(encode_at, places)
            refused += errors
            for n, ids in zip(places, read, strict=True):
                found[n] = ids
        if refused and not any(found):
            raise refused[0]
        return found

    return encode


def described_input(reward_model: Pretrained) -> str:
    """The prompts that a reward model reads, in words."""
    if reward_model.prompt_format is not None:
        return f"{described(reward_model.prompt_format)}, as it was trained"
    if getattr(reward_model.tokenizer, "chat_template", None) is not None:
        return "its tokenizer's chat template, the default: it does not say how it was trained"
    return "the policy's prompts: it does not say how it was trained, and has no chat template"


def leniently(
    encode_at: Callable[[Sequence[int]], list[list[int]]], places: Sequence[int]
) -> tuple[list[list[int]], list[ValueError]]:
    """The tokens at all places, empty where they cannot be had, and why not."""
    if not places:
        return [], []
    try:
        return encode_at(places), []
    except ValueError as error:
        if len(places) == 1:
            return [[]], [error]
    parts = [leniently(encode_at, [place]) for place in places]
    return [ids for found, _ in parts for ids in found], [error for _, errors in parts for error in errors]


def as_question(prompt: str | Messages) -> str | Messages:
    """The question of a conversation that is one message of the user; any other prompt as it is."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].get("role") == "user":
        return prompt[0]["content"]
    return prompt
