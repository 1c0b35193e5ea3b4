"""Equal answers as equal ids, for majority voting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grpo_jax.rewards.math.answer import canonical_answer, same_text


def identify_answers(
    answers: Sequence[Sequence[str | None]], same: Callable[[str, str], bool] = same_text
) -> Int[Array, "N G"]:
    """Answer ids for ``maj_at_k``: equal answers within a row get equal ids.

    Answers with the same ``canonical_answer`` are equal. Other pairs are compared once with ``same``, unless both are
    numbers; equality is closed transitively.

    Args:
        answers: ``[N, G]`` answers, a row per problem; None or blank is no answer and gets -1.
        same: the grader's equality of two answers, such as ``compare.same_answers``.

    Raises:
        ValueError: rows differ in length.
    """
    lengths = sorted({len(row) for row in answers})
    if len(lengths) > 1:
        raise ValueError(f"every problem must have the same number of answers; there are rows of {lengths}")
    return jnp.asarray(np.array([_identify_row(row, same) for row in answers], dtype=np.int32))


def _identify_row(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    keys = ["" if answer is None else canonical_answer(answer) for answer in answers]
    texts = {key: answer for key, answer in zip(keys, answers, strict=True) if answer is not None and key != ""}
    ids = {key: index for index, key in enumerate(texts)}
    for (a, text), (b, other) in combinations(texts.items(), 2):
        if ids[a] != ids[b] and not (isinstance(a, Fraction) and isinstance(b, Fraction)) and same(text, other):
            merged, kept = ids[b], ids[a]
            ids = {key: kept if id_ == merged else id_ for key, id_ in ids.items()}
    return [ids.get(key, -1) for key in keys]
