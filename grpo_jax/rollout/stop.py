"""Stop strings: the end of a completion by its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.data.tokens import decode_following


def stop_strings(tokenizer: Any, strings: Sequence[str]) -> Callable[[Sequence[int], int], int | None]:
    """A ``stop`` function for ``Sampler``: a completion ends with the token that completes one of the strings.

    Tokens are kept as sampled, so that the last one may contain text after the string. Special tokens are part of the
    text.

    Args:
        tokenizer: a transformers tokenizer.
        strings: any of these ends a completion.

    Returns:
        A function ``(ids, num_seen) -> length``: from a completion's ids, of which the first ``num_seen`` were checked
        before, to the length at which it ends, or None.

    Raises:
        ValueError: no strings, or an empty one, which would end every completion at once.
    """
    if isinstance(strings, str) or not strings or not all(strings):
        raise ValueError(f"stop strings must be one or more texts, none of them empty; they are {strings!r}")
    # Nearly every token has at least a byte of text, so that a string begins at most that many tokens back.
    reach = 2 * max(len(string.encode()) for string in strings)

    def contains_one(ids: Sequence[int]) -> bool:
        [text] = decode_following(tokenizer, [ids])
        return any(string in text for string in strings)

    def stop(ids: Sequence[int], num_seen: int) -> int | None:
        first = max(0, num_seen - reach)
        if not contains_one(ids[first:]):
            return None
        return next((end for end in range(num_seen + 1, len(ids)) if contains_one(ids[first:end])), len(ids))

    return stop
