"""Rewards for the format of a completion."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.thought import opened_by

TAG = re.compile(r"</?(?:think|answer)>")
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


@per_sample(columns=())
def format_reward(prompts: list[str], completions: list[str], **_columns: list[Any]) -> list[float]:
    """1.0 if a completion is ``<think>...</think>`` followed by ``<answer>...</answer>`` and nothing else, else 0.0.

    Whitespace around the blocks is ignored. A block may be empty or have several lines, but must not contain any of the
    four tags: repeated, nested, unordered or unclosed blocks give 0.0. Takes time linear in the length.

    Args:
        prompts: texts; if a prompt has opened the thought with ``<think>`` (``thought.opened_by``), its completion must
            not open it again.
        completions: the texts.
    """
    pairs = zip(prompts, completions, strict=True)
    return [float(_is_well_formed(completion, opened_by(prompt) == "think")) for prompt, completion in pairs]


@per_sample(columns=())
def pattern_reward(prompts: list[str], completions: list[str], *, pattern: str, **_columns: list[Any]) -> list[float]:
    """1.0 if the whole completion, without whitespace around it, matches a regular expression, else 0.0.

    Some patterns take exponential time; a ``RewardPool`` gives them a deadline.

    Args:
        prompts: ignored.
        completions: the texts.
        pattern: in Python's syntax; ``.`` matches line breaks too.

    Raises:
        ValueError: ``pattern`` is not a regular expression.
    """
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(completion.strip()) is not None) for completion in completions]


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


def _is_well_formed(completion: str, opened: bool) -> bool:
    text = completion.strip()
    text = f"<think>{text}" if opened else text
    if TAG.findall(text) != TAGS_IN_ORDER:
        return False
    between = text[text.index("</think>") + len("</think>") : text.index("<answer>")]
    return text.startswith("<think>") and text.endswith("</answer>") and not between.strip()
