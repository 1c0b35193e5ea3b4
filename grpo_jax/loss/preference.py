"""Losses of preferences: the better of two completions is to score higher, by the policy or by a reward model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.masked import masked_count, masked_mean, masked_sum, mean_pair
from grpo_jax.types import Mean, Metrics

CHOSEN, REJECTED = 0, 1
"""Where the two completions of a pair stand on the axis of length 2."""

# Objectives: margin -> loss for each pair ----------------------------------------------------------------------------


def sigmoid_preference(
    margin: Float[Array, " B"], *, beta: float = 0.1, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Float[Array, " B"]:
    """``-(1 - e) log sigmoid(x) - e log sigmoid(-x)`` with ``x = beta margin - target_margin``, of DPO.

    The objective of arXiv 2305.18290, eq. 7, with the label smoothing of its authors.

    Args:
        margin: ``log pi - log pi_ref`` of the chosen completion, less the same of the rejected one.
        beta: strength of the pull towards the reference.
        label_smoothing: ``e``, the share of pairs that are taken to be labelled the wrong way round (conservative DPO).
        target_margin: by how much the chosen one is to win, after beta (``gamma`` of SimPO, arXiv 2405.14734, eq. 6).

    Raises:
        ValueError: label_smoothing not from 0 to below 0.5.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a share of wrong labels, from 0 to below 0.5")
    x = beta * margin - target_margin
    loss = -jax.nn.log_sigmoid(x)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-x)
    return loss


def hinge_preference(margin: Float[Array, " B"], *, beta: float = 0.1) -> Float[Array, " B"]:
    """``max(0, 1 - beta margin)``: SLiC-HF's hinge (arXiv 2305.10425), on the log-ratios of DPO."""
    return jax.nn.relu(1 - beta * margin)


def squared_preference(margin: Float[Array, " B"], *, beta: float = 0.1) -> Float[Array, " B"]:
    """``(margin - 1 / (2 beta))^2``: IPO (arXiv 2310.12036, eq. 17); its margins are means over tokens."""
    return (margin - 1 / (2 * beta)) ** 2


# Compositions --------------------------------------------------------------------------------------------------------


def dpo_loss(
    log_probs: Float[Array, "B 2 T"],
    mask: Bool[Array, "B 2 T"],
    *,
    ref_log_probs: Float[Array, "B 2"] | None,
    beta: float = 0.1,
    objective: Callable[..., Float[Array, " B"]] = sigmoid_preference,
    per_token: bool = False,
    sft_coef: float = 0.0,
) -> tuple[Mean, Metrics]:
    """``objective(r_chosen - r_rejected) + sft_coef NLL(chosen)`` with ``r = log pi(y) - log pi_ref(y)``: DPO.

    The mean over pairs (arXiv 2305.18290, eq. 7); one whose completions are both empty counts as well.

    Args:
        log_probs: of the current policy at each completion token; on the second axis the chosen completion, then the
            rejected one. The only argument through which gradients flow.
        mask: True at the completions' tokens.
        ref_log_probs: the reference policy's, summed over each completion; None for no reference (``r = log pi(y)``).
        beta: strength of the pull towards the reference.
        objective: ``(margin, beta=) -> loss`` for each pair.
        per_token: divide each ``r`` by its number of tokens, so that long completions weigh no more.
        sft_coef: weight of the chosen completion's mean negative log-likelihood for each token (``alpha`` of iterative
            RPO, arXiv 2404.19733).

    Returns:
        The loss, and metrics: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (beta times r),
        ``rewards/accuracies`` (share of pairs whose chosen one wins; a tie is half), ``logps/chosen``,
        ``logps/rejected`` (sums over tokens), and ``nll_loss`` of the chosen ones.

    Raises:
        ValueError: at trace time, for arrays whose shapes do not fit.
    """
    if log_probs.shape != mask.shape or log_probs.ndim != 3 or log_probs.shape[1] != 2:
        raise ValueError(f"log_probs {log_probs.shape} and mask {mask.shape} must both be [B, 2, T]")
    if ref_log_probs is not None and ref_log_probs.shape != log_probs.shape[:2]:
        raise ValueError(f"ref_log_probs is {ref_log_probs.shape}; a sum for each completion is {log_probs.shape[:2]}")
    sums = masked_sum(log_probs, mask, 2)
    ratios = sums if ref_log_probs is None else sums - jax.lax.stop_gradient(ref_log_probs)
    if per_token:
        ratios = ratios / jnp.maximum(masked_count(mask, 2), 1).astype(ratios.dtype)
    margin = ratios[:, CHOSEN] - ratios[:, REJECTED]
    nll = -masked_mean(log_probs[:, CHOSEN], mask[:, CHOSEN], 1)
    loss = objective(margin, beta=beta)
    if sft_coef:
        loss = loss + sft_coef * nll
    metrics: Metrics = {
        "rewards/chosen": _mean(beta * ratios[:, CHOSEN]),
        "rewards/rejected": _mean(beta * ratios[:, REJECTED]),
        "rewards/margins": _mean(beta * margin),
        "rewards/accuracies": _mean(_wins(margin)),
        "logps/chosen": _mean(sums[:, CHOSEN]),
        "logps/rejected": _mean(sums[:, REJECTED]),
        "nll_loss": _mean(nll),
    }
    return _mean(loss), metrics


ipo_loss = partial(dpo_loss, objective=squared_preference, per_token=True)
"""``dpo_loss`` with IPO's square of margins for each token (arXiv 2310.12036, eq. 17)."""

simpo_loss = partial(
    dpo_loss, ref_log_probs=None, beta=2.0, objective=partial(sigmoid_preference, target_margin=1.0), per_token=True
)
"""``dpo_loss`` without a reference, of mean log-probabilities with a target margin (SimPO, arXiv 2405.14734)."""


def bradley_terry_loss(
    scores: Float[Array, "B 2"], *, margins: Float[Array, " B"] | None = None, centring: float = 0.0
) -> tuple[Mean, Metrics]:
    """``-log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2``: of a reward model.

    The mean over pairs: Bradley-Terry, with the margin of Llama 2 (arXiv 2307.09288, eq. 2) and centring at 0 (arXiv
    2312.09244), which says where the scores lie that the pairs leave open.

    Args:
        scores: of the chosen completion, then of the rejected one.
        margins: by how much each chosen one is to win; None for 0.
        centring: TRL's ``center_rewards_coefficient``.

    Returns:
        The loss, and metrics: ``accuracy`` (share of pairs in the right order; a tie is half), ``margin`` and
        ``score/mean``.

    Raises:
        ValueError: at trace time, for scores that are not two for each pair, or margins that are not one.
    """
    if scores.ndim != 2 or scores.shape[1] != 2:
        raise ValueError(f"scores is {scores.shape}; a chosen and a rejected one for each pair are [B, 2]")
    if margins is not None and margins.shape != scores.shape[:1]:
        raise ValueError(f"margins is {margins.shape}; one for each pair is {scores.shape[:1]}")
    difference = scores[:, CHOSEN] - scores[:, REJECTED]
    loss = -jax.nn.log_sigmoid(difference if margins is None else difference - margins)
    if centring:
        loss = loss + centring * scores.sum(1) ** 2
    metrics: Metrics = {
        "accuracy": _mean(_wins(difference)),
        "margin": _mean(difference),
        "score/mean": mean_pair(scores, jnp.ones_like(scores, dtype=bool)),
    }
    return _mean(loss), metrics


def _wins(margin):
    return jnp.where(margin > 0, 1.0, jnp.where(margin == 0, 0.5, 0.0))


def _mean(x):
    return mean_pair(x, jnp.ones_like(x, dtype=bool))
