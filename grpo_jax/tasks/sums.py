"""A built-in task that a tiny model learns in minutes: sums of single digits, worked out as running totals.

``3+8+5=`` has the worked solution ``<think>3+8=11;11+5=16;</think><answer>16</answer>``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.problems import Problem

PLAIN = "{question}"
"""The template of this task: a problem is its own prompt."""

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHINESE_DIGITS = "〇一二三四五六七八九"
VOCABULARY = ("<pad>", "<eos>", *TAGS, *"0123456789+=;", *CHINESE_DIGITS, *"?!~")
HELD_OUT_SHARE = 10
PATIENCE = 10_000


@dataclass(frozen=True)
class Sum:
    """A sum of single digits."""

    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        """Such as ``3+8+5=``."""
        return "+".join(map(str, self.terms)) + "="

    @property
    def answer(self) -> str:
        """The total."""
        return str(sum(self.terms))

    @property
    def held_out(self) -> bool:
        """Whether the sum is kept from training: about one in ten is, by a hash of its digits and nothing else."""
        return int(hashlib.sha256(self.question.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def sample_sums(
    rng: np.random.Generator, count: int, *, min_terms: int = 3, max_terms: int = 7, held_out: bool
) -> list[Sum]:
    """``count`` different sums, all held out or none of them.

    The number of terms is drawn uniformly from ``min_terms`` to ``max_terms``, then each digit from 0 to 9; what was
    drawn before or is of the other kind is drawn again. Sums of one kind never meet the other, whatever the seed.

    Raises:
        ValueError: ``min_terms`` is less than 2 or more than ``max_terms``; there are fewer than ``count`` such sums
            (taken to be so when 10,000 draws in a row gave no new one).
    """
    if not 2 <= min_terms <= max_terms:
        raise ValueError(f"a sum has from 2 terms up: min_terms={min_terms}, max_terms={max_terms}")
    sums: dict[Sum, None] = {}
    misses = 0
    while len(sums) < count:
        digits = rng.integers(10, size=rng.integers(min_terms, max_terms, endpoint=True))
        drawn = Sum(tuple(digits.tolist()))
        is_new = drawn.held_out == held_out and drawn not in sums
        misses = 0 if is_new else misses + 1
        if is_new:
            sums[drawn] = None
        elif misses == PATIENCE:
            raise ValueError(
                f"there are no {count} different sums of {min_terms} to {max_terms} terms with held_out={held_out}, "
                f"only about {len(sums)}: ask for fewer, or raise max_terms"
            )
    return list(sums)


def worked(problem: Sum, *, in_chinese: bool = False) -> str:
    """The solution with its running totals: ``<think>3+8=11;11+5=16;</think><answer>16</answer>``.

    With ``in_chinese`` the digits of the thought are Chinese ones, ``<think>三+八=一一;``, and the answer is as before.
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
    """A guess without a thought, ``<answer>19</answer>``: the total of as many digits, drawn anew."""
    return f"<answer>{rng.integers(10, size=len(problem.terms)).sum()}</answer>"


def sum_problems(sums: Sequence[Sum]) -> list[Problem]:
    """The sums in the form in which other sources give problems, with their number of terms as the column ``terms``."""
    return [Problem(each.question, each.answer, {"terms": len(each.terms)}) for each in sums]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of this task: one token a character, one a tag, ``<pad>`` and ``<eos>``.

    Decoding joins without spaces, so that encoding what was decoded gives the same ids. There is no token for the
    unknown: encoding a character outside ``VOCABULARY`` raises. No special tokens are added, and the tags are not
    special, so decoding keeps them when special tokens are skipped. ``save_pretrained`` and
    ``AutoTokenizer.from_pretrained`` give the tokenizer back.
    """
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(VOCABULARY)}))

    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{'|'.join(TAGS)}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
