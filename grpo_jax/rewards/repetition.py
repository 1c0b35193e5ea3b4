"""A reward against saying the same thing again."""

from __future__ import annotations

import re
from typing import Any

from grpo_jax.rewards.calling import per_sample

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\d_]+|\d+|[^\w\s]|_")


@per_sample(columns=())
def repetition_reward(prompts: list[str], completions: list[str], *, n: int = 4, **_columns: list[Any]) -> list[float]:
    """Minus the share of a completion's n-grams that stood in it before: 0 for none, towards -1 for nothing else.

    The n-gram penalty of arXiv 2502.03373, section 4.3, over the whole completion; see ``repeated_share``.

    Args:
        prompts: not looked at.
        completions: the texts.
        n: words to an n-gram.

    Raises:
        ValueError: ``n`` is below 1.
    """
    return [-repeated_share(completion, n) for completion in completions]


def repeated_share(text: str, n: int = 4) -> float:
    """``1 - distinct n-grams / n-grams`` of a text; 0 for one with fewer than ``n`` words.

    Words are runs of letters, without regard to case, and runs of digits; a punctuation mark is a word of its own, and
    so is each character of Chinese, Japanese and Korean.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    words = WORD.findall(text.lower())
    count = len(words) - n + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(words[i : i + n]) for i in range(count)}) / count
