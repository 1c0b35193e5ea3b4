"""Ending a completion by what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.data.tokens import decode_following


def stop_strings(tokenizer: Any, strings: Sequence[str]) -> Callable[[Sequence[int], int], int | None]:
    """A function for a ``Sampler``'s ``stop``: completions end with the token that completes one of the strings.

    The tokens stay as they were drawn: the last one may say more than the string. Special tokens count with their text.

    Args:
        tokenizer: a transformers tokenizer.
        strings: any of these ends a completion.

    Returns:
        From a completion's ids and the number of them that were looked at before, to its length where it ends, or None.

    Raises:
        ValueError: no strings, or an empty one, which would end every completion at once.
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings must be one or more texts, none of them empty; they are {strings!r}")
    # Nearly every token has at least a byte of text, so that a string begins at most that many tokens back.
    reach = 2 * max(len(string.encode()) for string in strings)

    def says_one(ids: Sequence[int]) -> bool:
        [text] = decode_following(tokenizer, [ids])
        return any(string in text for string in strings)

    def stop(ids: Sequence[int], seen: int) -> int | None:
        first = max(0, seen - reach)
        if not says_one(ids[first:]):
            return None
        return next((end for end in range(seen + 1, len(ids)) if says_one(ids[first:end])), len(ids))

    return stop
