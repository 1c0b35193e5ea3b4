"""Prompts: a question or a conversation to text, to token ids, to left-padded arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_args

import jax.numpy as jnp
import numpy as np
from jinja2 import TemplateError

from grpo_jax.types import Prompts

R1_ZERO = (
    "Below, a user puts a question to an assistant. Before it replies, the assistant works the problem out step by "
    "step; then it states its result. The working stands between <think> and </think>, and the result alone stands "
    "between <answer> and </answer>: <think> working </think> <answer> result </answer>.\n\n"
    "User: {question}\n\nAssistant:"
)
"""A plain template for base models, in the style of R1-Zero."""


class Rendering(TypedDict, total=False):
    """How prompts become text; see ``render_prompts``."""

    template: str | None
    system_prompt: str | None


Overlong = Literal["drop", "truncate", "error"]
"""What ``fit_prompts`` can do to a prompt that is too long, for the configuration of an experiment."""


def render_prompts(
    prompts: Sequence[str | list[dict[str, Any]]],
    tokenizer: Any,
    *,
    template: str | None = None,
    system_prompt: str | None = None,
) -> list[str]:
    """The text each prompt becomes before it is split into tokens.

    Args:
        prompts: questions, or conversations as lists of messages; a question is a conversation of one user message.
        tokenizer: a transformers tokenizer; its chat template is used if ``template`` is None, and asked for the
            opening of the assistant's turn.
        template: a text in which ``{question}`` stands for the prompt, such as ``R1_ZERO``; other braces stay.
        system_prompt: a system message put before each conversation.

    Raises:
        ValueError: the tokenizer has no chat template and ``template`` is None; the chat template refuses a prompt
            (the error says which); ``template`` lacks ``{question}``, or is used with a conversation or system prompt.
    """
    if template is None:
        return _render_chat(prompts, tokenizer, system_prompt)
    if "{question}" not in template:
        raise ValueError(f"a plain template must hold {{question}} where the prompt goes; it is {template!r}")
    if system_prompt is not None:
        raise ValueError("a plain template leaves no place for system_prompt: write its text into the template")
    questions: list[str] = []
    for position, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {position} is a conversation, and a plain template takes text: use a chat template"
            )
        questions.append(template.replace("{question}", prompt))
    return questions


def encode_prompts(
    prompts: Sequence[str | list[dict[str, Any]]],
    tokenizer: Any,
    *,
    template: str | None = None,
    system_prompt: str | None = None,
) -> list[list[int]]:
    """The token ids of each prompt, from the text that ``render_prompts`` makes of it with the same arguments.

    A chat template writes its own special tokens, and what it renders is encoded without adding any, as
    ``tokenizer.apply_chat_template(..., tokenize=True)`` does. To a plain template the beginning-of-sequence token is
    added where the tokenizer adds one and the text does not begin with it, and nothing is added at the end.

    Raises:
        ValueError: as ``render_prompts``; and for a prompt that the tokenizer has no tokens for.
    """
    texts = render_prompts(prompts, tokenizer, template=template, system_prompt=system_prompt)
    if not texts:
        return []
    token_ids = encode_texts(texts, tokenizer)
    if template is None:
        return token_ids
    bos = [tokenizer.bos_token_id]
    as_tokenizer_would = tokenizer(texts)["input_ids"]
    return [
        bos + ids if full[:1] == bos and ids[:1] != bos else ids
        for ids, full in zip(token_ids, as_tokenizer_would, strict=True)
    ]


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of each text, none added.

    Raises:
        ValueError: the tokenizer has no tokens for a text; says for which.
    """
    if not texts:
        return []
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:
        position = next(i for i, text in enumerate(texts) if not _can_encode(tokenizer, text))
        raise ValueError(f"the tokenizer cannot encode text {position}, {texts[position]!r:.200}: {error}") from error


def _can_encode(tokenizer: Any, text: str) -> bool:
    try:
        tokenizer([text])
    except Exception:
        return False
    return True


def fit_prompts(
    token_ids: Sequence[list[int]], *, max_prompt_length: int, overlong: str = "drop"
) -> tuple[list[int], list[list[int]]]:
    """The prompts that fit into ``max_prompt_length`` tokens, as positions in ``token_ids`` and their ids.

    Args:
        token_ids: one list of ids a prompt.
        max_prompt_length: in tokens.
        overlong: what happens to a longer prompt. "drop" leaves it out: ``len(token_ids) - len(positions)`` were
            dropped. "truncate" keeps its last ``max_prompt_length`` tokens, and so loses what begins the sequence.
            "error" raises.

    Raises:
        ValueError: a prompt without tokens; ``max_prompt_length`` less than 1; another word for ``overlong``; it is
            "error" and prompts are longer, or "drop" and no prompt is left (the error says how many are how long).
    """
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {get_args(Overlong)}, and is {overlong!r}")
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, and is {max_prompt_length}")
    empty = [position for position, ids in enumerate(token_ids) if not ids]
    if empty:
        raise ValueError(f"prompts without a token, of {len(token_ids)}, stand at the positions {empty[:10]}")
    if overlong == "truncate":
        return list(range(len(token_ids))), [ids[-max_prompt_length:] for ids in token_ids]
    positions = [position for position, ids in enumerate(token_ids) if len(ids) <= max_prompt_length]
    dropped = len(token_ids) - len(positions)
    if dropped and (overlong == "error" or not positions):
        raise ValueError(
            f"{dropped} of {len(token_ids)} prompts are longer than max_prompt_length={max_prompt_length} tokens; the "
            f"longest has {max(map(len, token_ids))}. Raise max_prompt_length, or choose overlong='truncate'"
            + (" or 'drop'" if positions else "")
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


def _render_chat(prompts: Sequence[str | list[dict[str, Any]]], tokenizer: Any, system_prompt: str | None) -> list[str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: for a base model pass a plain one, such as "
            "template=grpo_jax.data.prompts.R1_ZERO or any text that holds {question}"
        )
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    texts: list[str] = []
    for position, prompt in enumerate(prompts):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            texts.append(tokenizer.apply_chat_template(system + messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses prompt {position}: {error}") from error
    return texts
