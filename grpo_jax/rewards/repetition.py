"""Penalty for repeated n-grams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex

from grpo_jax.rewards.calling import per_sample

MAX_WORD_LENGTH = 20
MAX_BLANK_LENGTH = 40
CHARACTERS_PER_WORD = 4
STUTTER = regex.compile(r"(\p{L})\1{5}")

# Scripts in which each character counts as a word, and other scripts without spaces between words.
SYLLABLES = "".join(
    rf"\p{{Script_Extensions={name}}}" for name in ("Han", "Hiragana", "Katakana", "Bopomofo", "Hangul")
)
UNSPACED = "".join(rf"\p{{Script={name}}}" for name in ("Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Javanese"))
WORD = regex.compile(
    rf"""
      [{SYLLABLES}]
    | (?P<unspaced>[{UNSPACED}][{UNSPACED}\p{{M}}]*+)
    | (?P<letters>[\p{{L}}--[{SYLLABLES}{UNSPACED}]][[\p{{L}}\p{{M}}]--[{SYLLABLES}{UNSPACED}]]*+)
    | (?P<digits>\d++)
    | (?P<blank>\s{{{MAX_BLANK_LENGTH + 1},}}+)
    | \S
    """,
    regex.VERBOSE | regex.V1,
)


@per_sample(columns=())
def repetition_reward(prompts: list[str], completions: list[str], *, n: int = 4, **_columns: list[Any]) -> list[float]:
    """Minus the share of a completion's n-grams that occurred earlier in it (``repeated_share``), in (-1, 0].

    The n-gram penalty of arXiv 2502.03373, section 4.3, applied to the whole completion.

    Args:
        prompts: ignored.
        completions: the texts.
        n: number of words of an n-gram.

    Raises:
        ValueError: ``n`` is below 1.
    """
    return [-repeated_share(completion, n) for completion in completions]


def repeated_share(text: str, n: int = 4) -> float:
    """``1 - distinct n-grams / n-grams`` of a text; 0 for a text with fewer than ``n`` words.

    Words are runs of letters (ignoring case) and runs of digits. Each punctuation mark, symbol, and Chinese, Japanese
    or Korean character is a word. Text that cannot be split into words is read as overlapping words of four characters:
    Thai, Lao, Khmer, Burmese, Tibetan and Javanese, runs of more than 20 letters or digits, runs with one letter six
    times in a row, and runs of more than 40 whitespace characters.

    Args:
        text: any text.
        n: number of words of an n-gram.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    words = list(_words(text.lower()))
    count = len(words) - n + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(words[i : i + n]) for i in range(count)}) / count


def _words(text: str) -> Iterator[str]:
    for match in WORD.finditer(text):
        word = match[0]
        is_short = match.lastgroup in ("letters", "digits") and len(word) <= MAX_WORD_LENGTH
        if match.lastgroup is None or (is_short and not STUTTER.search(word)):
            yield word
        else:
            yield from (word[i : i + CHARACTERS_PER_WORD] for i in range(len(word)))
