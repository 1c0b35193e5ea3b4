"""Whether a completion has the asked-for form, whatever it says."""

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
    """1.0 where a completion is one ``<think>...</think>``, then one ``<answer>...</answer>``, and nothing else.

    Blanks and line breaks around the two blocks do not matter, and neither does what stands inside them, be it nothing
    or several lines, as long as it is no other such tag: blocks that are repeated, nested, out of order or not closed
    give 0.0. Takes time linear in the length.

    Args:
        prompts: one that has opened the thought with ``<think>`` (``thought.opened_by``) has opened the first block for
            its completion, which then must not.
        completions: the texts.
    """
    pairs = zip(prompts, completions, strict=True)
    return [float(_is_well_formed(completion, opened_by(prompt) == "think")) for prompt, completion in pairs]


@per_sample(columns=())
def pattern_reward(prompts: list[str], completions: list[str], *, pattern: str, **_columns: list[Any]) -> list[float]:
    """1.0 where the whole completion, without blanks around it, matches a regular expression; else 0.0.

    Some patterns take time exponential in the length: run yours in a ``RewardPool``, which has a deadline.

    Args:
        prompts: not looked at.
        completions: the texts.
        pattern: in Python's syntax; ``.`` matches line breaks too.

    Raises:
        ValueError: it is no regular expression.
    """
    compiled = _compiled(pattern)
    return [float(compiled.fullmatch(completion.strip()) is not None) for completion in completions]


@lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error


def _is_well_formed(completion: str, opened: bool) -> bool:
    text = completion.strip()
    text = f"<think>{text}" if opened else text
    if TAG.findall(text) != TAGS_IN_ORDER:
        return False
    between = text[text.index("</think>") + len("</think>") : text.index("<answer>")]
    return text.startswith("<think>") and text.endswith("</answer>") and not between.strip()
