"""pass@k, majority vote, confidence intervals and paired tests: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

RESAMPLES = 9999
"""Of a bootstrap, and of a permutation test whose permutations are more than these."""
STDERR = "_stderr"
BATCH_VALUES = 1 << 22
"""Resampled at once, so that many problems fit into memory."""


def pass_at_k(correct: Bool[Array, "N G"], k: int) -> Float[Array, ""]:
    """The chance that at least one of ``k`` samples is right, averaged over problems: the unbiased estimator.

    ``1 - C(G - c, k) / C(G, k)`` for a problem with ``c`` of its ``G`` samples right, computed as
    ``1 - prod_{i < k} max(G - c - i, 0) / (G - i)``, in which nothing overflows (Chen et al. 2021,
    https://arxiv.org/abs/2107.03374, equation 1).

    Args:
        correct: which samples are right; one row a problem.
        k: from 1 to G. ``k = 1`` gives the mean of ``correct``.

    Raises:
        ValueError: at trace time, where ``k`` is not from 1 to G or there are no problems.
    """
    return pass_at_k_of_each(correct, k).mean()


def pass_at_k_of_each(correct: Bool[Array, "N G"], k: int) -> Float[Array, " N"]:
    """What ``pass_at_k`` is the mean of: the chance for each problem."""
    G = correct.shape[1]
    _check_k(correct, k)
    draw = jnp.arange(k, dtype=jnp.float32)
    wrong = G - correct.sum(1, dtype=jnp.float32)
    fail = jnp.maximum(wrong[:, None] - draw[None, :], 0) / (G - draw)[None, :]
    return 1 - fail.prod(1)


def maj_at_k(answer_ids: Int[Array, "N G"], correct: Bool[Array, "N G"], k: int) -> Float[Array, ""]:
    """The share of problems whose most frequent answer among the first ``k`` samples is right.

    Where several answers are the most frequent, the problem counts the share of them that is right: what drawing one of
    them at random gives on average. A sample without an answer has no vote; a problem without any answer is wrong.

    Args:
        answer_ids: equal numbers within a row are equal answers; -1 is no answer. ``identify_answers`` makes them.
        correct: which samples are right; the same for equal answers of a row.
        k: from 1 to G.

    Raises:
        ValueError: at trace time, where ``k`` is not from 1 to G or there are no problems.
    """
    return maj_at_k_of_each(answer_ids, correct, k).mean()


def maj_at_k_of_each(answer_ids: Int[Array, "N G"], correct: Bool[Array, "N G"], k: int) -> Float[Array, " N"]:
    """What ``maj_at_k`` is the mean of: how far each problem counts."""
    _check_k(answer_ids, k)
    answer_ids, correct = answer_ids[:, :k], correct[:, :k]
    voted = answer_ids >= 0
    votes = (answer_ids[:, :, None] == answer_ids[:, None, :]).sum(2)
    winning = voted & (votes == votes.max(1, keepdims=True, where=voted, initial=0))
    # Every winning answer has the same number of samples, so the mean over samples is the mean over answers.
    return (winning & correct).sum(1, dtype=jnp.float32) / jnp.maximum(winning.sum(1, dtype=jnp.float32), 1)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and how sure it is.

    Attributes:
        mean: of the problems' figures.
        low, high: the ends of its confidence interval.
        problems: how many there are.
    """

    mean: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class PairedTest:
    """What changed between two evaluations of the same problems, and how sure it is.

    Attributes:
        before, after: the two means.
        difference: after - before.
        low, high: the ends of its confidence interval.
        p: how likely a difference as far from 0 would be if before and after were exchangeable in every problem.
        problems: how many there are.
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
    """The mean of a figure over problems, with a confidence interval: the bootstrap over problems (BCa).

    Percentiles of resampled means, corrected for bias and skewness (Efron 1987). The unit is the problem: samples of
    one problem are alike, and to count them as if they were not would make the interval too narrow. So a problem comes
    with one figure, such as the share of its samples that is right.

    Where all figures are the same, resampling knows no spread. If ``N`` of ``N`` are the same, then at least a share of
    ``((1 - confidence) / 2) ** (1 / N)`` of all problems is (Clopper and Pearson 1934), and the others are somewhere
    within ``bounds``: 256 right answers to 256 problems are 1.000 [0.986, 1.000].

    Args:
        values: one figure a problem, without NaN.
        bounds: the least and the greatest that a figure can be; None where that is not known, and an interval of equal
            figures has no width.
        confidence: how often the interval holds the true mean.
        seed: of the resampling.

    Raises:
        ValueError: there are no figures, or one is not finite.
    """
    from scipy import stats  # a second to import, which those who draw no intervals need not wait for

    N = _check_figures(values)
    mean = float(values.mean(dtype=np.float64))
    if np.ptp(values) == 0:
        others = 1 - ((1 - confidence) / 2) ** (1 / N)
        least, greatest = (mean, mean) if bounds is None else bounds
        return Estimate(mean, mean + others * (least - mean), mean + others * (greatest - mean), N)
    found = stats.bootstrap(
        (values.astype(np.float64),),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // N),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high), N)


def paired_test(
    before: Float[np.ndarray, " N"],
    after: Float[np.ndarray, " N"],
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Compare two evaluations of the same problems: their difference, its confidence interval and a p-value.

    Paired, because problems differ in difficulty more than most models do. The interval is ``estimate``'s, of the
    problems' differences. The p-value is that of the two-sided sign-flip test: were before and after exchangeable in
    every problem, each difference would have either sign with the same chance. All sign flips are tried where there are
    at most 9,999 (up to 13 problems); else 9,999 at random besides the one observed, so that no p is below 0.0002.

    Args:
        before, after: one figure a problem, in the same order, without NaN.
        bounds: the least and the greatest that a figure can be; see ``estimate``.
        confidence: how often the interval holds the true difference.
        seed: of the resampling and the sign flips.

    Raises:
        ValueError: there are no figures, or one is not finite.
    """
    from scipy import stats

    for values in (before, after):
        _check_figures(values)
    differences = after.astype(np.float64) - before.astype(np.float64)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    found = estimate(differences, bounds=span, confidence=confidence, seed=seed)
    largest = np.abs(differences).max()
    p = 1.0
    if largest > 0 and len(differences) > 1:
        # Figures are rounded to float32: what ties must not come apart in the last bits of a sum.
        tested = stats.permutation_test(
            (differences / largest,),
            lambda x, axis: x.mean(axis).round(6),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=max(1, BATCH_VALUES // len(differences)),
            rng=np.random.default_rng(seed),
        )
        p = float(tested.pvalue)
    means = [float(values.mean(dtype=np.float64)) for values in (before, after)]
    return PairedTest(means[0], means[1], found.mean, found.low, found.high, p, found.problems)


def standard_error(name: str, of_problems: np.ndarray) -> dict[str, float]:
    """``<name>_stderr``, the standard error of the mean of ``[problems]`` figures; nothing for fewer than two."""
    N = len(of_problems)
    return {f"{name}{STDERR}": float(of_problems.std(ddof=1) / N**0.5)} if N > 1 else {}


def _check_figures(values: Float[np.ndarray, " N"]) -> int:
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"a mean over problems needs finite figures of one problem or more; these are {values}")
    return len(values)


def _check_k(samples: Int[Array, "N G"] | Bool[Array, "N G"], k: int) -> None:
    N, G = samples.shape
    if N == 0 or not 1 <= k <= G:
        raise ValueError(
            f"k={k} must be from 1 to the {G} samples of a problem, and there must be problems: there are {N}"
        )
