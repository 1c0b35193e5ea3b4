"""Sums: a toy task that a tiny model learns in minutes, sums of single digits with running totals.

``3+8+5=`` has the worked solution ``<think>3+8=11;11+5=16;</think><answer>16</answer>``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax.data.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = "{question}"
"""The plain template of this task: the prompt is the question."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHINESE_DIGITS = "〇一二三四五六七八九"
VOCABULARY = ("<pad>", "<eos>", *TAGS, *"0123456789+=;", *CHINESE_DIGITS, *"?!~")
HELD_OUT_SHARE = 10
MAX_MISSES = 10_000


@dataclass(frozen=True)
class Sum:
    """A sum of single digits."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        """The prompt, such as ``3+8+5=``."""
        return "+".join(map(str, self.terms)) + "="

    @property
    def answer(self) -> str:
        """The total as text."""
        return str(sum(self.terms))

    @property
    def held_out(self) -> bool:
        """Whether the sum is held out from training: about one in ten, by a hash of its digits."""
        return int(hashlib.sha256(self.question.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def sample_sums(
    rng: np.random.Generator, count: int, *, min_terms: int = 3, max_terms: int = 7, held_out: bool
) -> list[Sum]:
    """Sample different sums by rejection.

    The number of terms is uniform from ``min_terms`` to ``max_terms``, each digit from 0 to 9. Held-out and other sums
    are disjoint for all seeds.

    Args:
        rng: source of randomness.
        count: number of sums.
        min_terms: minimum number of terms, at least 2.
        max_terms: maximum number of terms.
        held_out: whether to sample the held-out sums or the others.

    Raises:
        ValueError: ``min_terms`` is below 2 or above ``max_terms``; there are not ``count`` such sums (10,000 samples
            in a row were not new).
    """
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"min_terms={min_terms} and max_terms={max_terms} must satisfy 2 <= min_terms <= max_terms")
    sums: dict[Sum, None] = {}
    misses = 0
    while len(sums) < count:
        digits = rng.integers(10, size=rng.integers(min_terms, max_terms, endpoint=True))
        candidate = Sum(tuple(digits.tolist()))
        is_new = candidate.held_out == held_out and candidate not in sums
        misses = 0 if is_new else misses + 1
        if is_new:
            sums[candidate] = None
        elif misses == MAX_MISSES:
            raise ValueError(
                f"there are only about {len(sums)} different sums of {min_terms} to {max_terms} terms with "
                f"held_out={held_out}, fewer than count={count}: lower count or raise max_terms"
            )
    return list(sums)


def worked(problem: Sum, *, in_chinese: bool = False) -> str:
    """The worked solution, with running totals: ``<think>3+8=11;11+5=16;</think><answer>16</answer>``.

    Args:
        problem: the sum.
        in_chinese: whether the thought, not the answer, has Chinese digits: ``<think>三+八=一一;``.
    """
    totals = list(accumulate(problem.terms))
    steps = [
        f"{before}+{term}={after};"
        for before, term, after in zip(totals[:-1], problem.terms[1:], totals[1:], strict=True)
    ]
    thought = "".join(steps)
    if in_chinese:
        thought = thought.translate({ord(digit): CHINESE_DIGITS[int(digit)] for digit in "0123456789"})
    return f"<think>{thought}</think><answer>{problem.answer}</answer>"


def blurted(problem: Sum, rng: np.random.Generator) -> str:
    """A guess without a thought, ``<answer>19</answer>``: the total of other random digits, as many as the terms.

    Args:
        problem: the sum.
        rng: generator of the digits, advanced.
    """
    return f"<answer>{rng.integers(10, size=len(problem.terms)).sum()}</answer>"


def sum_problems(sums: Sequence[Sum]) -> list[Problem]:
    """The sums as problems, with the number of terms as the column ``terms``."""
    return [Problem(each.question, each.answer, {"terms": len(each.terms)}) for each in sums]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the toy tasks: a token for each character and tag, ``<pad>`` and ``<eos>``.

    Encoding and decoding are inverses. There is no unknown token: encoding a character outside ``VOCABULARY`` raises.
    No special tokens are added, and the tags are not special, so that decoding keeps them. The tokenizer survives
    ``save_pretrained`` and ``AutoTokenizer.from_pretrained``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{'|'.join(TAGS)}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
