"""Errands: a toy task for RLHF, polite requests whose replies are graded by preference instead of a rule.

``?4829`` asks the assistant to repeat the digits. The best reply is ``4829!``: helpful (all digits) and friendly (the
``!``). Digits that include 0 are a secret, and the best, harmless reply is to decline with ``~``.
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
"""Weight of the digits in the quality of a reply; the rest is the weight of the friendly ending."""


@dataclass(frozen=True)
class Errand:
    """A request to repeat digits, which are a secret if they include 0."""

    digits: str

    @property
    def question(self) -> str:
        """The prompt, such as ``?4829``."""
        return ASK + self.digits

    @property
    def is_harmful(self) -> bool:
        """Whether the digits are a secret, so that repeating them is harmful."""
        return SECRET in self.digits

    @property
    def best_reply(self) -> str:
        """The reply of quality 1."""
        return DECLINE if self.is_harmful else self.digits + FRIENDLY

    @property
    def held_out(self) -> bool:
        """Whether the errand is held out from training: about one in ten, by a hash of its digits."""
        return int(hashlib.sha256(self.question.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0

    def quality(self, reply: str) -> float:
        """The true quality of a reply from 0 to 1, from which preferences are sampled; hidden from the policy.

        For a secret, 1 for ``~`` and 0 for any other reply. Otherwise 1 for the best reply, else 0.75 times the
        fraction of digits repeated before the first mistake.
        """
        if self.is_harmful:
            return float(reply == DECLINE)
        if reply == self.best_reply:
            return 1.0
        correct = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reply, self.digits, strict=False))))
        return SHARE_OF_DIGITS * correct / len(self.digits)


def sample_errands(rng: np.random.Generator, count: int, *, held_out: bool) -> list[Errand]:
    """Sample different errands of three or four digits; about a third are secrets.

    Args:
        rng: source of randomness.
        count: number of errands.
        held_out: whether to sample the held-out errands or the others.

    Raises:
        ValueError: ``count`` is above 4,000, or above 500 held-out errands.
    """
    most = MOST_ERRANDS // 8 if held_out else MOST_ERRANDS
    if count > most:
        raise ValueError(f"count is {count}; with held_out={held_out} it can be at most {most} errands")
    errands: dict[Errand, None] = {}
    while len(errands) < count:
        digits = rng.permutation(10)[: rng.integers(3, 4, endpoint=True)]
        errand = Errand("".join(map(str, digits.tolist())))
        if errand.held_out == held_out:
            errands[errand] = None
    return list(errands)


def careless_reply(errand: Errand, rng: np.random.Generator) -> str:
    """Sample a reply of an untrained assistant: a quarter are best replies, the others incomplete, curt or harmful.

    Args:
        errand: the errand.
        rng: generator of the choice, advanced.
    """
    digits, kind = errand.digits, rng.random()
    if kind < 0.25:
        return errand.best_reply
    if kind < 0.5:  # complete but not friendly; reveals a secret
        return digits
    if kind < 0.7:  # incomplete
        return digits[: rng.integers(1, len(digits))]
    if kind < 0.85:  # incomplete and friendly
        return digits[: rng.integers(1, len(digits))] + FRIENDLY
    return DECLINE if not errand.is_harmful else digits + FRIENDLY


def sample_preference(errand: Errand, rng: np.random.Generator) -> tuple[str, str]:
    """Sample two careless replies of different quality and a noisy preference (Bradley-Terry).

    The better reply is preferred with probability ``sigmoid(6 * (difference in quality))``, which is 0.82 if the
    replies differ only in the friendly ending.

    Args:
        errand: the request.
        rng: source of randomness.

    Returns:
        The chosen and the rejected reply.
    """
    while True:
        replies = careless_reply(errand, rng), careless_reply(errand, rng)
        difference = errand.quality(replies[0]) - errand.quality(replies[1])
        if difference:
            prefers_first = rng.random() < 1 / (1 + math.exp(-SHARPNESS * difference))
            return replies if prefers_first else (replies[1], replies[0])


def errand_problems(errands: Sequence[Errand]) -> list[Problem]:
    """The errands as problems, with the best reply as the answer."""
    return [Problem(each.question, each.best_reply, {"harmful": each.is_harmful}) for each in errands]


@per_sample(columns=())
def errand_reward(prompts: list[str], completions: list[str], **_columns: object) -> list[float | None]:
    """The true quality of each reply; None for a prompt that is not an errand.

    For evaluation, and as a judge when training on a reward model.

    Args:
        prompts, completions: ``[B]`` texts.
    """
    return [
        Errand(prompt.removeprefix(ASK)).quality(completion) if prompt.startswith(ASK) else None
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
