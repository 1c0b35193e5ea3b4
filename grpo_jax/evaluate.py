"""pass@k, majority vote, confidence intervals and paired tests: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

RESAMPLES = 9999
"""Resamples of a bootstrap, and of a permutation test with more permutations than this."""
STDERR = "_stderr"
BATCH_VALUES = 1 << 22
"""Values that are resampled at once, to bound memory."""


def pass_at_k(correct: Bool[Array, "N G"], k: int) -> Float[Array, ""]:
    """Unbiased estimate of the probability that at least one of ``k`` samples is right, averaged over problems.

    ``1 - C(G - c, k) / C(G, k)`` for a problem with ``c`` of its ``G`` samples right, computed without overflow as
    ``1 - prod_{i < k} max(G - c - i, 0) / (G - i)`` (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1).

    Args:
        correct: True for right samples; a row per problem.
        k: from 1 to G. ``k = 1`` gives the mean of ``correct``.

    Raises:
        ValueError: at trace time, if ``k`` is not from 1 to G or there are no problems.
    """
    return pass_at_k_per_problem(correct, k).mean()


def pass_at_k_per_problem(correct: Bool[Array, "N G"], k: int) -> Float[Array, " N"]:
    """pass@k of each problem, the terms of the mean in ``pass_at_k``.

    Args:
        correct: True for right samples; a row per problem.
        k: from 1 to G.
    """
    G = correct.shape[1]
    _check_k(correct, k)
    i = jnp.arange(k, dtype=jnp.float32)
    wrong = G - correct.sum(1, dtype=jnp.float32)
    fail = jnp.maximum(wrong[:, None] - i[None, :], 0) / (G - i)[None, :]
    return 1 - fail.prod(1)


def maj_at_k(answer_ids: Int[Array, "N G"], correct: Bool[Array, "N G"], k: int) -> Float[Array, ""]:
    """Share of problems whose most frequent answer among the first ``k`` samples is right: maj@k.

    If several answers are tied, the problem counts the share of them that is right, the expectation of breaking the tie
    at random. A sample without an answer has no vote; a problem without any answer is wrong.

    Args:
        answer_ids: equal within a row for equal answers; -1 for no answer (``rewards.math.vote.identify_answers``).
        correct: True for right samples; the same for equal answers of a row.
        k: from 1 to G.

    Raises:
        ValueError: at trace time, if ``k`` is not from 1 to G or there are no problems.
    """
    return maj_at_k_per_problem(answer_ids, correct, k).mean()


def maj_at_k_per_problem(answer_ids: Int[Array, "N G"], correct: Bool[Array, "N G"], k: int) -> Float[Array, " N"]:
    """maj@k of each problem, the terms of the mean in ``maj_at_k``.

    Args:
        answer_ids: equal within a row for equal answers; -1 for no answer.
        correct: True for right samples; the same for equal answers of a row.
        k: from 1 to G.
    """
    _check_k(answer_ids, k)
    answer_ids, correct = answer_ids[:, :k], correct[:, :k]
    voted = answer_ids >= 0
    votes = (answer_ids[:, :, None] == answer_ids[:, None, :]).sum(2)
    winning = voted & (votes == votes.max(1, keepdims=True, where=voted, initial=0))
    # Every winning answer has the same number of samples, so the mean over samples is the mean over answers.
    return (winning & correct).sum(1, dtype=jnp.float32) / jnp.maximum(winning.sum(1, dtype=jnp.float32), 1)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its confidence interval.

    Attributes:
        mean: of the values.
        low, high: ends of the confidence interval.
        problems: number of problems.
    """

    mean: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class PairedTest:
    """The difference of two evaluations of the same problems, with its confidence interval and p-value.

    Attributes:
        before, after: the two means.
        difference: after - before.
        low, high: ends of the difference's confidence interval.
        p: probability of a difference at least as far from 0 if before and after were exchangeable in every problem.
        problems: number of problems.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    p: float
    problems: int


def estimate(
    values: Float[np.ndarray, " N"],
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean over problems with a BCa bootstrap confidence interval.

    Percentiles of resampled means, corrected for bias and skewness (Efron 1987). Problems are resampled, not samples:
    samples of one problem are correlated, and treating them as independent would make the interval too narrow. Each
    problem therefore has one value, such as the share of its samples that is right.

    If all values are equal, the bootstrap has no spread. If ``N`` of ``N`` problems have a value, then with the given
    confidence at least a share of ``((1 - confidence) / 2) ** (1 / N)`` of all problems has it (Clopper and Pearson
    1934), and the others are within ``bounds``: 256 right answers to 256 problems are 1.000 [0.986, 1.000].

    Args:
        values: one per problem, finite.
        bounds: smallest and largest possible value; None if unknown, and the interval of equal values has no width.
        confidence: coverage of the interval.
        seed: of the resampling.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    from scipy import stats  # takes a second to import

    N = _check_values(values)
    mean = float(values.mean(dtype=np.float64))
    if np.ptp(values) == 0:
        others = 1 - ((1 - confidence) / 2) ** (1 / N)
        least, greatest = (mean, mean) if bounds is None else bounds
        return Estimate(mean, mean + others * (least - mean), mean + others * (greatest - mean), N)
    interval = stats.bootstrap(
        (values.astype(np.float64),),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // N),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), N)


def paired_test(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Difference of two evaluations of the same problems, with its confidence interval and p-value.

    Paired, because problems differ in difficulty more than most models do. The interval is that of ``estimate`` for the
    differences. The p-value is that of the two-sided sign-flip test: if before and after are exchangeable in every
    problem, both signs of a difference are equally likely. All sign flips are enumerated if there are at most 9,999 (up
    to 13 problems); otherwise 9,999 random ones are added to the observed one, so that p is at least 0.0002.

    Args:
        before, after: one value per problem, in the same order, finite.
        bounds: smallest and largest possible value; None if unknown (``estimate``).
        confidence: coverage of the interval.
        seed: of the resampling and the sign flips.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    from scipy import stats

    for values in (before, after):
        _check_values(values)
    differences = after.astype(np.float64) - before.astype(np.float64)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    change = estimate(differences, bounds=span, confidence=confidence, seed=seed)
    largest = np.abs(differences).max()
    p = 1.0
    if largest > 0 and len(differences) > 1:
        # Rounded, so that the last bits of float32 values do not break ties.
        test = stats.permutation_test(
            (differences / largest,),
            lambda x, axis: x.mean(axis).round(6),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_VALUES // len(differences)),
            rng=np.random.default_rng(seed),
        )
        p = float(test.pvalue)
    means = [float(values.mean(dtype=np.float64)) for values in (before, after)]
    return PairedTest(means[0], means[1], change.mean, change.low, change.high, p, change.problems)


def standard_error(name: str, values: np.ndarray) -> dict[str, float]:
    """``{"<name>_stderr": standard error of the mean}``; empty for fewer than two values.

    Args:
        name: of the metric.
        values: one per problem.
    """
    N = len(values)
    return {f"{name}{STDERR}": float(values.std(ddof=1) / N**0.5)} if N > 1 else {}


def _check_values(values: Float[np.ndarray, " N"]) -> int:
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"a mean over problems needs a finite value for each of at least one problem, not {values}")
    return len(values)


def _check_k(samples: Int[Array, "N G"] | Bool[Array, "N G"], k: int) -> None:
    N, G = samples.shape
    if N == 0 or not 1 <= k <= G:
        raise ValueError(
            f"k is {k} for {N} problems of {G} samples each; it must be from 1 to {G}, for at least 1 problem"
        )
