"""Between problems and arrays: prompts encoded once and padded as needed, completions decoded as they were sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any, Unpack

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import Overlong, Rendering, encode_rendered, fit_prompts, pad_prompts, render_prompts
from grpo_jax.data.tokens import decode_following
from grpo_jax.types import Prompts, Rollout


class EncodedProblems:
    """Problems whose prompts are rendered and encoded, those that do not fit left out or cut by choice.

    Attributes:
        problems: those that are left.
        texts: what each one's prompt became.
        dropped: how many were left out as too long.

    Args:
        problems: what is asked.
        tokenizer: a transformers tokenizer.
        max_prompt_length: in tokens.
        pad_id: what stands in the padding.
        overlong_prompts: see ``prompts.fit_prompts``.
        first_index: what the noise of prompts is counted from; where those of several sets are drawn for together, no
            two have the same.
        rendering: as in ``prompts.Rendering``; columns ``tools`` and ``chat_template_kwargs`` go to a chat template.

    Raises:
        ValueError: as ``render_prompts`` and ``fit_prompts``; and for a prompt without tokens (the error names it).
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Any,
        *,
        max_prompt_length: int,
        pad_id: int,
        overlong_prompts: Overlong = "drop",
        first_index: int = 0,
        **rendering: Unpack[Rendering],
    ):
        prompts = [problem.prompt for problem in problems]
        texts = render_prompts(prompts, tokenizer, rows=[problem.columns for problem in problems], **rendering)
        token_ids = encode_rendered(texts, tokenizer, plain=rendering.get("template") is not None)
        for prompt, ids in zip(prompts, token_ids, strict=True):
            if not ids:
                raise ValueError(f"the prompt {prompt!r} has no tokens")
        kept, self._token_ids = fit_prompts(
            token_ids, max_prompt_length=max_prompt_length, overlong_prompts=overlong_prompts
        )
        self.problems = [problems[i] for i in kept]
        self.texts = [texts[i] for i in kept]
        self.dropped = len(problems) - len(kept)
        self._max_prompt_length = max_prompt_length
        self._pad_id = pad_id
        self._first_index = first_index

    def __len__(self) -> int:
        return len(self.problems)

    def padded(self, positions: Sequence[int] | np.ndarray | range) -> Prompts:
        """The prompts at these positions of ``problems``, left-padded; each one's noise is drawn from its position."""
        return pad_prompts(
            [self._token_ids[i] for i in positions],
            max_prompt_length=self._max_prompt_length,
            pad_id=self._pad_id,
            index=[self._first_index + int(i) for i in positions],
        )


def decode_completions(tokenizer: Any, rollout: Rollout, eos_ids: Sequence[int]) -> list[str]:
    """The text of each completion as it follows its prompt: all its tokens but the ending one, special ones included.

    Args:
        tokenizer: a transformers tokenizer.
        rollout: what was sampled.
        eos_ids: the ending tokens.
    """
    lengths = np.asarray(rollout.completion_mask).sum(1)
    rows = [ids[:length].tolist() for ids, length in zip(np.asarray(rollout.completion_ids), lengths, strict=True)]
    return decode_following(tokenizer, [_without_end(row, eos_ids) for row in rows])


def decode_one(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """The same for the ids of a single completion."""
    return decode_following(tokenizer, [_without_end(ids, eos_ids)])[0]


def last_tokens(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The token in which each of some places of a completion's text comes to its end.

    Args:
        tokenizer: a transformers tokenizer.
        ids: the completion's tokens.
        ends: how many characters of the text stand before and at each place, from 1 up.

    Returns:
        A position in ``ids`` for each: that of the token with the last byte of the last character. The last position
        where the text is shorter than that.
    """

    @cache
    def text(count: int) -> str:
        return decode_following(tokenizer, [ids[:count]])[0]

    # Compared by what it says, not by its length: a character of which only some bytes are there is decoded as another.
    whole, counts = text(len(ids)) if ends else "", range(1, len(ids) + 1)
    found = [bisect_left(counts, True, key=lambda count, end=end: text(count)[:end] == whole[:end]) for end in ends]
    return [min(place, len(ids) - 1) for place in found]


def _without_end(ids: Sequence[int], eos_ids: Sequence[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in eos_ids else ids
