"""A reward against saying the same thing again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex

from grpo_jax.rewards.calling import per_sample

LONGEST_WORD = 20
LONGEST_BLANK = 40
LETTERS_A_WORD = 4
STUTTER = regex.compile(r"(\p{L})\1{5}")

# Scripts in which each character is taken for a word, and others that put no blanks between words either.
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
    | (?P<blank>\s{{{LONGEST_BLANK + 1},}}+)
    | \S
    """,
    regex.VERBOSE | regex.V1,
)


@per_sample(columns=())
def repetition_reward(prompts: list[str], completions: list[str], *, n: int = 4, **_columns: list[Any]) -> list[float]:
    """Minus the share of a completion's n-grams that stood in it before: 0 for none, towards -1 for nothing else.

    The n-gram penalty of arXiv 2502.03373, section 4.3, over the whole completion, as ``repeated_share`` counts it.

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

    Words are runs of letters, without regard to case, and runs of digits; a punctuation mark or a symbol is a word of
    its own, and so is each character of Chinese, Japanese and Korean. Where there are no words, characters count: in
    Thai, Lao, Khmer, Burmese, Tibetan and Javanese, in runs of more than 20 letters or digits or with one letter six
    times in a row, and in runs of more than 40 blanks, each character begins a word, which is it and the three after.

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
        is_short = match.lastgroup in ("letters", "digits") and len(word) <= LONGEST_WORD
        if match.lastgroup is None or (is_short and not STUTTER.search(word)):
            yield word
        else:
            yield from (word[i : i + LETTERS_A_WORD] for i in range(len(word)))
