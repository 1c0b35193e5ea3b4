"""Which completions become demonstrations: filters on samples, caps per problem, balanced difficulty."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.jsonl import to_json

FILTERS = ("drawn", "scored", "complete", "right", "of_form", "distinct", "not_too_easy", "capped", "balanced")
"""What samples are counted by, each what the one before left: see ``choose`` and ``balanced``."""
UP_TO_ONE = ("accuracy", "format", "language")
ROUNDING = 1e-6
"""Scores are float32: a sum that is 1 on paper may fall short by its last bits."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which completions are kept. Those that were cut off, are blank or say what another one says never are."""

    threshold: float = 1.0
    """The least weighted sum of rewards."""
    require: tuple[str, ...] = ()
    """Least scores of parts: format=1, or language=0.9."""
    per_problem: int = 4
    """Completions of a problem at most: those with the highest reward, and of equal ones those drawn first."""
    max_pass_rate: float = 1.0
    """Leave problems out of which a larger share of samples passes: they teach little."""
    balance: int = 0
    """Divide problems into that many parts of equal width by the share of their samples that passes; none gives more
    completions than an equal share of what there is would be. 0 for no balance."""

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be a number")
        if self.per_problem < 1:
            raise ValueError(f"per_problem is {self.per_problem}; it must be at least 1")
        if not 0 < self.max_pass_rate <= 1:
            raise ValueError(f"max_pass_rate is {self.max_pass_rate}; it must be above 0 and at most 1")
        if self.balance < 0:
            raise ValueError(f"balance is {self.balance}; it must be at least 0")
        _ = self.minima

    @property
    def minima(self) -> dict[str, float]:
        """The least score of each part that is required.

        Raises:
            ValueError: one is not of the form name=number, or is there twice.
        """
        minima: dict[str, float] = {}
        for text in self.require:
            name, _, least = text.rpartition("=")
            try:
                value = float(least)
            except ValueError:
                value = math.nan
            if not name or not math.isfinite(value):
                raise ValueError(f"require: {text!r} must be the name of a part and its least score, such as format=1")
            if name in minima:
                raise ValueError(f"require: {name!r} is there twice")
            minima[name] = value
        return minima

    def check_parts(self, names: Sequence[str]) -> None:
        """Check that what is required is scored; what a part says besides goes by ``part/detail``.

        Args:
            names: of the parts that are scored.

        Raises:
            ValueError: a part is required that is not, or more of one than its highest score.
        """
        unknown = [name for name in self.minima if name not in names and name.partition("/")[0] not in names]
        if unknown:
            raise ValueError(f"require: {unknown} are not scored; what is scored is {list(names)}")
        for name, value in self.minima.items():
            if name in UP_TO_ONE and value > 1:
                raise ValueError(f"require: {name}={value:g} keeps nothing; the highest score of {name} is 1")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is kept of a problem.

    Attributes:
        place: of the problem.
        num_scored: samples that have a score.
        num_passed: those of them that pass every filter on samples, duplicates among them.
        samples: the numbers of those that are kept, the best first.
    """

    place: int
    num_scored: int
    num_passed: int
    samples: tuple[int, ...]

    @property
    def pass_rate(self) -> float:
        """The share of samples that passes; 0 where none has a score."""
        return self.num_passed / max(self.num_scored, 1)

    def bucket(self, count: int) -> int:
        """In which of ``count`` parts of (0, 1] the pass rate lies; -1 if nothing passes."""
        return -(-self.num_passed * count // max(self.num_scored, 1)) - 1


def choose(collected: ProblemSamples, settings: SelectionConfig) -> tuple[Choice, dict[str, int]]:
    """What is kept of a problem's completions, and how many each filter left.

    A completion is dropped, in this order, if it has no score (``scored``), was cut off or is blank (``complete``), has
    less than the least total (``right``) or of a part that is required (``of_form``), says what a better one says but
    for white space (``distinct``), is of a problem of which too many pass (``not_too_easy``), or is one too many of its
    problem (``capped``). Of equal totals the first that was drawn comes first: samples are drawn alike, so that is a
    fair choice, and shortness is not taught where nothing pays for it.

    Returns:
        The choice, and a count for every name in ``FILTERS`` but the last.
    """
    totals = {n: total for n, total in enumerate(collected.total) if total is not None}
    complete = whole(collected)
    right = [n for n in complete if reaches(totals[n], settings.threshold)]
    of_form = [n for n in right if passes(collected, n, settings)]
    best_first = sorted(of_form, key=lambda n: (-totals[n], n))
    by_text = {" ".join(collected.completions[n].split()): n for n in reversed(best_first)}
    distinct = sorted(by_text.values(), key=best_first.index)
    choice = Choice(collected.place, len(totals), len(of_form), ())
    fitting = distinct if choice.pass_rate <= settings.max_pass_rate else []
    capped = fitting[: settings.per_problem]
    left = (collected.completions, totals, complete, right, of_form, distinct, fitting, capped)
    return replace(choice, samples=tuple(capped)), dict(zip(FILTERS, map(len, left), strict=False))


def preferred(collected: ProblemSamples, settings: SelectionConfig, *, most: int) -> list[tuple[int, int]]:
    """Pairs of a problem's completions that DPO can learn from: one that would be imitated before one that would not.

    Completions that have no score, were cut off, are blank or say what an earlier one says are in no pair, and none is
    in two.

    Args:
        collected: a problem with its completions.
        settings: of them, ``threshold`` and ``require`` say what would be imitated.
        most: pairs that are made at most.

    Returns:
        The numbers of the samples, the chosen one before the rejected one, in the order they were drawn in.
    """
    by_text: dict[str, int] = {}
    for n in whole(collected):
        by_text.setdefault(" ".join(collected.completions[n].split()), n)
    right = [n for n in by_text.values() if passes(collected, n, settings)]
    wrong = [n for n in by_text.values() if not passes(collected, n, settings)]
    return list(zip(right, wrong, strict=False))[:most]


def whole(collected: ProblemSamples) -> list[int]:
    """The samples that have a score, were not cut off and are not blank."""
    return [
        n
        for n, completion in enumerate(collected.completions)
        if collected.total[n] is not None and not collected.truncated[n] and completion.strip()
    ]


def passes(collected: ProblemSamples, sample: int, settings: SelectionConfig) -> bool:
    """Whether a sample has the least total, and of every part that is required the least score."""
    parts = [(collected.rewards.get(name), least) for name, least in settings.minima.items()]
    return reaches(collected.total[sample], settings.threshold) and all(
        part is not None and reaches(part[sample], least) for part, least in parts
    )


def balanced(choices: Sequence[Choice], *, buckets: int, seed: int) -> list[Choice]:
    """The same with less of what there is too much of: no bucket of difficulty keeps more than an equal share.

    An equal share is what each bucket would have if the samples there are were dealt out evenly to the buckets that
    have any, rounded up. Of a bucket with more, every problem keeps its best sample before any keeps a second one, and
    who goes without is drawn from the seed.

    Args:
        choices: of all problems, in any order.
        buckets: parts of (0, 1] that pass rates fall into; with 0 or 1 nothing is taken away.
        seed: of the draw.

    Returns:
        The choices that have samples left, by place.
    """
    members: dict[int, list[Choice]] = defaultdict(list)
    for choice in sorted(choices, key=lambda choice: choice.place):
        if choice.samples:
            members[choice.bucket(max(buckets, 1))].append(choice)
    total = sum(len(choice.samples) for choice in choices)
    share = -(-total // max(len(members), 1))
    kept = []
    for bucket, group in members.items():
        order = np.random.default_rng([seed, bucket]).permutation(len(group)).tolist()
        turns = sorted((rank, turn) for turn, n in enumerate(order) for rank in range(len(group[n].samples)))
        count = Counter(order[turn] for _, turn in turns[:share])
        kept += [replace(group[n], samples=group[n].samples[:number]) for n, number in count.items()]
    return sorted(kept, key=lambda choice: choice.place)


def check_some_left(counts: Mapping[str, int], settings: SelectionConfig) -> None:
    """Check that filters left something.

    Args:
        counts: by the names in ``FILTERS``.
        settings: of the filters.

    Raises:
        ValueError: nothing is left; it says which filter took the last of it, and what would let something through.
    """
    empty = next((name for name in FILTERS if not counts[name]), None)
    if empty is None:
        return
    remedies = {
        "drawn": "no problem was asked",
        "scored": "no completion has a score (reward_errors.jsonl says why)",
        "complete": "all that have a score were cut off or are blank; raise max_completion_length",
        "right": f"no total reaches threshold = {settings.threshold}; lower it, or draw more or from a better model",
        "of_form": f"none has what is required, {list(settings.require)}; lower it, or pay for it in training first",
        "not_too_easy": f"every problem passes more often than max_pass_rate = {settings.max_pass_rate}; raise it",
    }
    raise ValueError(f"nothing is selected: {remedies[empty]}. What each filter left: {dict(counts)}")


def reaches(score: float | None, least: float) -> bool:
    """Whether a score is there and not below the least one, by more than float32 rounds."""
    return score is not None and score >= least - ROUNDING * max(1.0, abs(least))


@dataclass(frozen=True)
class ProblemSamples:
    """The completions of a problem, and what they are worth; G of them.

    Attributes:
        place: of the problem among those that were asked.
        problem: what was asked.
        prompt: the text that it became.
        completions: texts.
        lengths: in tokens.
        truncated: whether each was cut off.
        total: the weighted sum of rewards; None where absent.
        rewards: each part by name; None where absent.
    """

    place: int
    problem: Problem
    prompt: str
    completions: list[str]
    lengths: list[int]
    truncated: list[bool]
    total: list[float | None]
    rewards: dict[str, list[float | None]]

    def row(self, step: int) -> dict[str, Any]:
        """As JSON."""
        return to_json({"step": step, **dataclasses.asdict(self)})

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ProblemSamples:
        """From what ``row`` gave."""
        fields = {name: value for name, value in row.items() if name != "step"}
        return cls(**{**fields, "problem": Problem(**fields["problem"])})
