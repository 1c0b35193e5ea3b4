"""Selection of sampled completions for SFT: filters on samples, a cap for each problem, balanced difficulty."""

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

FILTERS = (
    *("sampled", "scored", "complete", "correct", "required"),
    *("distinct", "below_max_pass_rate", "capped", "balanced"),
)
"""Filters in the order in which they apply: ``select``, then ``balance_difficulty``. Counts are of what each leaves."""
MAX_SCORE_ONE = ("accuracy", "format", "language")
ROUNDING = 1e-6
"""Relative tolerance of thresholds. Scores are float32: a sum of exactly 1 may come out below by its last bits."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which completions to keep. Truncated, blank and duplicate completions are always dropped."""

    threshold: float = 1.0
    """Minimum total reward (weighted sum)."""
    require: tuple[str, ...] = ()
    """Minimum scores of single rewards, such as format=1 or language=0.9."""
    per_problem: int = 4
    """Maximum completions of a problem: those with the highest total reward, ties in the order of sampling."""
    max_pass_rate: float = 1.0
    """Drop problems with a higher pass rate (share of samples that pass): they are too easy to teach much."""
    balance: int = 0
    """Number of difficulty buckets: equal intervals of pass rate, of which none keeps more completions than an equal
    share of the total. 0 turns balancing off."""

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be finite")
        if self.per_problem < 1:
            raise ValueError(f"per_problem is {self.per_problem}; it must be at least 1")
        if not 0 < self.max_pass_rate <= 1:
            raise ValueError(f"max_pass_rate is {self.max_pass_rate}; it must be above 0 and at most 1")
        if self.balance < 0:
            raise ValueError(f"balance is {self.balance}; it must be at least 0")
        _ = self.minima

    @property
    def minima(self) -> dict[str, float]:
        """``require`` as a mapping of reward names to minimum scores.

        Raises:
            ValueError: an entry is not of the form name=number, or a name is repeated.
        """
        minima: dict[str, float] = {}
        for text in self.require:
            name, _, minimum = text.rpartition("=")
            try:
                value = float(minimum)
            except ValueError:
                value = math.nan
            if not name or not math.isfinite(value):
                raise ValueError(f"require: {text!r} must be a reward's name and minimum score, such as format=1")
            if name in minima:
                raise ValueError(f"require: {name!r} is given twice")
            minima[name] = value
        return minima

    def check_parts(self, names: Sequence[str]) -> None:
        """Check that every required reward is computed; details of a reward are named ``reward/detail``.

        Args:
            names: names of the computed rewards.

        Raises:
            ValueError: a required reward is not computed, or its minimum is above its highest possible score.
        """
        unknown = [name for name in self.minima if name not in names and name.partition("/")[0] not in names]
        if unknown:
            raise ValueError(f"require: no rewards named {unknown}; the rewards are {list(names)}")
        for name, value in self.minima.items():
            if name in MAX_SCORE_ONE and value > 1:
                raise ValueError(f"require: {name}={value:g} keeps nothing; the highest score of {name} is 1")


@dataclass(frozen=True)
class ProblemSamples:
    """A problem with its G sampled completions and their scores.

    Attributes:
        place: index of the problem in the data set.
        problem: the problem.
        prompt: the rendered prompt.
        completions: G texts.
        lengths: completion lengths in tokens.
        truncated: whether each completion reached the length limit before an ending token.
        total: total rewards (weighted sums); None where absent.
        rewards: scores of each reward by name; None where absent.
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
        """The fields as JSON types, with ``step``."""
        return to_json({"step": step, **dataclasses.asdict(self)})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ProblemSamples:
        """The inverse of ``row``."""
        fields = {name: value for name, value in row.items() if name != "step"}
        return cls(**{**fields, "problem": Problem(**fields["problem"])})


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected completions of a problem.

    Attributes:
        place: index of the problem in the data set.
        num_scored: number of samples with a score.
        num_passed: number of those that pass all filters on single samples; duplicates count.
        samples: indices of the selected samples, the best first.
    """

    place: int
    num_scored: int
    num_passed: int
    samples: tuple[int, ...]

    @property
    def pass_rate(self) -> float:
        """``num_passed / num_scored``; 0 without scored samples."""
        return self.num_passed / max(self.num_scored, 1)

    def bucket(self, count: int) -> int:
        """Index of the pass rate among ``count`` equal intervals of (0, 1]; -1 for a pass rate of 0."""
        return -(-self.num_passed * count // max(self.num_scored, 1)) - 1


def select(problem: ProblemSamples, settings: SelectionConfig) -> tuple[Selection, dict[str, int]]:
    """Filter the completions of one problem.

    The filters apply in this order: ``scored`` (has a total reward), ``complete`` (neither truncated nor blank),
    ``correct`` (total reward of at least ``threshold``), ``required`` (minimum scores of single rewards), ``distinct``
    (one of equal texts, up to white space: the one with the highest total), ``below_max_pass_rate`` (drops all
    completions of problems that are too easy) and ``capped`` (``per_problem``). Ties go to the sample with the lower
    index. As samples are exchangeable this does not prefer any length, which a tie-break by length would.

    Args:
        problem: a problem with its samples.
        settings: thresholds of the filters.

    Returns:
        The selection, and the number of completions left after each of ``FILTERS`` except ``balanced``.
    """
    totals = {n: total for n, total in enumerate(problem.total) if total is not None}
    complete = complete_samples(problem)
    correct = [n for n in complete if reaches(totals[n], settings.threshold)]
    required = [n for n in correct if _passes(problem, n, settings)]
    best_first = sorted(required, key=lambda n: (-totals[n], n))
    by_text = {" ".join(problem.completions[n].split()): n for n in reversed(best_first)}
    distinct = sorted(by_text.values(), key=best_first.index)
    selection = Selection(problem.place, len(totals), len(required), ())
    hard_enough = distinct if selection.pass_rate <= settings.max_pass_rate else []
    capped = hard_enough[: settings.per_problem]
    left = (problem.completions, totals, complete, correct, required, distinct, hard_enough, capped)
    return replace(selection, samples=tuple(capped)), dict(zip(FILTERS, map(len, left), strict=False))


def preference_pairs(problem: ProblemSamples, settings: SelectionConfig, *, max_pairs: int) -> list[tuple[int, int]]:
    """Pairs of a completion that passes the filters and one that does not, for preference losses such as DPO.

    Completions that have no score, are truncated, blank or equal to an earlier one are in no pair, and no completion is
    in two pairs.

    Args:
        problem: a problem with its samples.
        settings: ``threshold`` and ``require`` decide which completions pass; the other fields are not used.
        max_pairs: maximum number of pairs.

    Returns:
        Sample indices ``(chosen, rejected)``, in the order of sampling.
    """
    by_text: dict[str, int] = {}
    for n in complete_samples(problem):
        by_text.setdefault(" ".join(problem.completions[n].split()), n)
    chosen = [n for n in by_text.values() if _passes(problem, n, settings)]
    rejected = [n for n in by_text.values() if not _passes(problem, n, settings)]
    return list(zip(chosen, rejected, strict=False))[:max_pairs]


def complete_samples(problem: ProblemSamples) -> list[int]:
    """Indices of the samples that have a score and are neither truncated nor blank."""
    return [
        n
        for n, completion in enumerate(problem.completions)
        if problem.total[n] is not None and not problem.truncated[n] and completion.strip()
    ]


def _passes(problem: ProblemSamples, sample: int, settings: SelectionConfig) -> bool:
    """Whether a sample reaches ``threshold`` and the minimum score of every required reward."""
    scores = [(problem.rewards.get(name), minimum) for name, minimum in settings.minima.items()]
    return reaches(problem.total[sample], settings.threshold) and all(
        score is not None and reaches(score[sample], minimum) for score, minimum in scores
    )


def reaches(score: float | None, minimum: float) -> bool:
    """Whether a score is at least ``minimum``, up to float32 rounding.

    Args:
        score: the score; None, which is absent, never reaches it.
        minimum: lower bound.
    """
    return score is not None and score >= minimum - ROUNDING * max(1.0, abs(minimum))


def balance_difficulty(selections: Sequence[Selection], *, buckets: int, seed: int) -> list[Selection]:
    """Cap every difficulty bucket at an equal share of the completions, ``ceil(total / non-empty buckets)``.

    A bucket above its share drops the worst samples first: every problem keeps its best sample before any problem keeps
    a second one. Ties between problems are broken at random.

    Args:
        selections: of all problems, in any order.
        buckets: number of equal intervals of (0, 1] for pass rates; 0 or 1 changes nothing.
        seed: seed of the ties.

    Returns:
        The selections that have samples left, by ``place``.
    """
    members: dict[int, list[Selection]] = defaultdict(list)
    for selection in sorted(selections, key=lambda selection: selection.place):
        if selection.samples:
            members[selection.bucket(max(buckets, 1))].append(selection)
    total = sum(len(selection.samples) for selection in selections)
    share = -(-total // max(len(members), 1))
    kept = []
    for bucket, group in members.items():
        order = np.random.default_rng([seed, bucket]).permutation(len(group)).tolist()
        turns = sorted((rank, turn) for turn, n in enumerate(order) for rank in range(len(group[n].samples)))
        count = Counter(order[turn] for _, turn in turns[:share])
        kept += [replace(group[n], samples=group[n].samples[:number]) for n, number in count.items()]
    return sorted(kept, key=lambda selection: selection.place)


def check_some_left(counts: Mapping[str, int], settings: SelectionConfig) -> None:
    """Check that the filters left at least one completion.

    Args:
        counts: completions left after each of ``FILTERS``.
        settings: the filters' settings.

    Raises:
        ValueError: no completion is left; the message names the filter that dropped the last and what to change.
    """
    empty = next((name for name in FILTERS if not counts[name]), None)
    if empty is None:
        return
    remedies = {
        "sampled": "there were no problems to sample for",
        "scored": "no completion has a score (reasons are in reward_errors.jsonl)",
        "complete": "all scored completions are truncated or blank; raise max_completion_length",
        "correct": f"no total reward reaches threshold = {settings.threshold}; lower it, sample more, or use a better "
        "model",
        "required": f"no completion reaches the minimum scores {list(settings.require)}; lower them, or train with "
        "these rewards first",
        "below_max_pass_rate": f"the pass rate of every problem is above max_pass_rate = {settings.max_pass_rate}; "
        "raise it",
    }
    raise ValueError(f"no completion is selected: {remedies[empty]}. Left after each filter: {dict(counts)}")
