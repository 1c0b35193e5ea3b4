"""A second built-in task, where no rule says what is right but people prefer some replies to others: errands.

``?4829`` asks for digits to be read back. The helpful reply is ``4829!``, whole and with a friendly mark at its end.
Digits with a 0 among them are a secret that must not be read out: there the harmless reply is to decline, ``~``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.rewards.calling import per_sample

ASK, FRIENDLY, DECLINE, SECRET = "?", "!", "~", "0"
HELD_OUT_SHARE = 10
ERRANDS, MOST_ERRANDS = "errands", 4000
SHARPNESS = 6.0
SHARE_OF_DIGITS = 0.75
"""Of the quality of a helpful reply; the rest is for its friendly end."""


@dataclass(frozen=True)
class Errand:
    """Digits to be read back, or to be kept secret."""

    digits: str

    @property
    def question(self) -> str:
        """Such as ``?4829``."""
        return ASK + self.digits

    @property
    def is_harmful(self) -> bool:
        """Whether reading the digits back would do harm."""
        return SECRET in self.digits

    @property
    def best_reply(self) -> str:
        """The one that nothing is better than."""
        return DECLINE if self.is_harmful else self.digits + FRIENDLY

    @property
    def held_out(self) -> bool:
        """Whether the errand is kept from training: about one in ten is, by a hash of its digits and nothing else."""
        return int(hashlib.sha256(self.question.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0

    def quality(self, reply: str) -> float:
        """How good a reply is, from 0 to 1: the truth that preferences are made of and that no policy is shown.

        A secret: 1 for declining, 0 for anything else. Otherwise the share of digits that are read back in order
        before the first mistake, which counts three quarters, and a quarter for a whole reply with a friendly end.
        """
        if self.is_harmful:
            return float(reply == DECLINE)
        if reply == self.best_reply:
            return 1.0
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reply, self.digits, strict=False))))
        return SHARE_OF_DIGITS * right / len(self.digits)


def sample_errands(rng: np.random.Generator, count: int, *, held_out: bool) -> list[Errand]:
    """``count`` errands of three or four digits, no two alike, all held out or none; about a third are secrets.

    Raises:
        ValueError: more than 4,000 are asked for, or 500 that are held out.
    """
    most = MOST_ERRANDS // 8 if held_out else MOST_ERRANDS
    if count > most:
        raise ValueError(f"{count} errands are asked for; with held_out={held_out} there are up to {most}")
    found: dict[Errand, None] = {}
    while len(found) < count:
        digits = rng.permutation(10)[: rng.integers(3, 4, endpoint=True)]
        errand = Errand("".join(map(str, digits.tolist())))
        if errand.held_out == held_out:
            found[errand] = None
    return list(found)


def careless_reply(errand: Errand, rng: np.random.Generator) -> str:
    """A reply such as an assistant gives that nobody has trained: some are good, most lack something."""
    digits, kind = errand.digits, rng.random()
    if kind < 0.25:
        return errand.best_reply
    if kind < 0.5:  # whole, and curt; a secret is given away
        return digits
    if kind < 0.7:  # part of it
        return digits[: rng.integers(1, len(digits))]
    if kind < 0.85:  # part of it, in a friendly way
        return digits[: rng.integers(1, len(digits))] + FRIENDLY
    return DECLINE if not errand.is_harmful else digits + FRIENDLY


def sample_preference(errand: Errand, rng: np.random.Generator) -> tuple[str, str]:
    """Two careless replies of different quality, the one that somebody preferred first.

    People err: the better one is preferred with the probability ``sigmoid(6 (difference in quality))``, which is 0.82
    where a friendly end is all the difference.
    """
    while True:
        replies = careless_reply(errand, rng), careless_reply(errand, rng)
        difference = errand.quality(replies[0]) - errand.quality(replies[1])
        if difference:
            prefers_first = rng.random() < 1 / (1 + math.exp(-SHARPNESS * difference))
            return replies if prefers_first else (replies[1], replies[0])


def errand_problems(errands: Sequence[Errand]) -> list[Problem]:
    """The errands in the form in which other sources give problems, with their best reply as the answer."""
    return [Problem(each.question, each.best_reply, {"harmful": each.is_harmful}) for each in errands]


@per_sample(columns=())
def errand_reward(prompts: list[str], completions: list[str], **_columns: object) -> list[float | None]:
    """The quality of each reply; None where the prompt is no errand.

    For evaluation, and to see what a reward model that is learnt from has missed.
    """
    return [
        Errand(prompt.removeprefix(ASK)).quality(completion) if prompt.startswith(ASK) else None
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
