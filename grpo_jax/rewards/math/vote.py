"""Which answers are the same, for a majority vote."""

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
    """Answers as numbers for ``maj_at_k``: those of a row that are the same get the same number.

    Texts are the same where ``canonical_answer`` is. Two that differ are compared once by ``same``, unless both are
    numbers; what is the same as a third is the same.

    Args:
        answers: one row a problem, all of one length; None or a blank text is no answer and becomes -1.
        same: whether two answers are the same by the grader's own rules, such as ``math.same_answers``.

    Raises:
        ValueError: rows of different lengths.
    """
    lengths = sorted({len(row) for row in answers})
    if len(lengths) > 1:
        raise ValueError(f"every problem must have the same number of answers; there are rows of {lengths}")
    return jnp.asarray(np.array([_identify_row(row, same) for row in answers], dtype=np.int32))


def _identify_row(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    keys = ["" if answer is None else canonical_answer(answer) for answer in answers]
    texts = {key: answer for key, answer in zip(keys, answers, strict=True) if answer is not None and key != ""}
    number = {key: n for n, key in enumerate(texts)}
    for (a, text), (b, other) in combinations(texts.items(), 2):
        if number[a] != number[b] and not (isinstance(a, Fraction) and isinstance(b, Fraction)) and same(text, other):
            old, new = number[b], number[a]
            number = {key: new if n == old else n for key, n in number.items()}
    return [number.get(key, -1) for key in keys]
