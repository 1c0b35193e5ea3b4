"""Preference losses of policies (DPO and relatives) and of reward models, from pairs of completions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.loss.checks import Scalar, check_shapes, is_zero
from grpo_jax.masked import masked_count, masked_mean, masked_sum, mean_pair
from grpo_jax.types import Mean, Metrics

CHOSEN, REJECTED = 0, 1
"""Indices of the two completions on the pair axis."""

# Objectives: margin -> loss per pair ---------------------------------------------------------------------------------


def sigmoid_preference(
    margin: Float[Array, " B"], *, beta: float = 0.1, label_smoothing: float = 0.0, target_margin: float = 0.0
) -> Float[Array, " B"]:
    """``-(1 - e) log sigmoid(x) - e log sigmoid(-x)`` with ``x = beta margin - target_margin``: DPO's objective.

    After arXiv 2305.18290, eq. 7, with the label smoothing of its authors.

    Args:
        margin: ``log pi - log pi_ref`` of the chosen completion minus that of the rejected one.
        beta: strength of the pull towards the reference.
        label_smoothing: ``e``, the assumed share of pairs with the wrong label (conservative DPO).
        target_margin: required margin after beta (``gamma`` of SimPO, arXiv 2405.14734, eq. 6).

    Raises:
        ValueError: label_smoothing not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it is a share of wrong labels, from 0 to below 0.5")
    x = beta * margin - target_margin
    loss = -jax.nn.log_sigmoid(x)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-x)
    return loss


def hinge_preference(margin: Float[Array, " B"], *, beta: float = 0.1) -> Float[Array, " B"]:
    """``max(0, 1 - beta margin)``: SLiC-HF's hinge (arXiv 2305.10425) on the log-ratios of DPO.

    Args:
        margin: ``log pi - log pi_ref`` of the chosen completion minus that of the rejected one.
        beta: inverse of the margin beyond which a pair has no loss.
    """
    return jax.nn.relu(1 - beta * margin)


def squared_preference(margin: Float[Array, " B"], *, beta: float = 0.1) -> Float[Array, " B"]:
    """``(margin - 1 / (2 beta))^2``: IPO (arXiv 2310.12036, eq. 17).

    Args:
        margin: ``log pi - log pi_ref`` of the chosen completion minus that of the rejected one, each a mean over
            tokens (``per_token`` of ``dpo_loss``).
        beta: strength of the pull towards the reference (``tau`` of the paper).
    """
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
    sft_coef: Scalar = 0.0,
) -> tuple[Mean, Metrics]:
    """``objective(r_chosen - r_rejected) + sft_coef NLL(chosen)`` with ``r = log pi(y) - log pi_ref(y)``: DPO.

    The mean over pairs (arXiv 2305.18290, eq. 7); a pair of two empty completions counts as well.

    Args:
        log_probs: of the current policy at each completion token, the chosen completion before the rejected one;
            gradients flow only through these.
        mask: True at completion tokens.
        ref_log_probs: the reference policy's, summed over each completion; None for no reference (``r = log pi(y)``).
        beta: strength of the pull towards the reference.
        objective: ``(margin, beta=) -> loss`` per pair.
        per_token: divide each ``r`` by its number of tokens, so that long completions weigh no more than short ones.
        sft_coef: weight of the chosen completion's negative log-likelihood per token (``alpha`` of iterative RPO,
            arXiv 2404.19733).

    Returns:
        The loss, and metrics: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins`` (beta times r),
        ``rewards/accuracies`` (share of pairs with a positive margin; a tie counts half), ``logps/chosen``,
        ``logps/rejected`` (sums over tokens), and ``nll_loss`` of the chosen completions.

    Raises:
        AssertionError: at trace time, for log_probs and mask that are not both [B, 2, T], for ref_log_probs that are
            not [B, 2], or a mask that is not bool.
    """
    chex.assert_shape(log_probs, (None, 2, None), custom_message="log_probs: chosen and rejected, [B, 2, T]")
    chex.assert_type(mask, bool, custom_message="mask")
    check_shapes(log_probs.shape, mask=mask)
    check_shapes(log_probs.shape[:2], ref_log_probs=ref_log_probs)
    sums = masked_sum(log_probs, mask, 2)
    ratios = sums if ref_log_probs is None else sums - jax.lax.stop_gradient(ref_log_probs)
    if per_token:
        ratios = ratios / jnp.maximum(masked_count(mask, 2), 1).astype(ratios.dtype)
    margin = ratios[:, CHOSEN] - ratios[:, REJECTED]
    nll = -masked_mean(log_probs[:, CHOSEN], mask[:, CHOSEN], 1)
    loss = objective(margin, beta=beta)
    if not is_zero(sft_coef):
        loss = loss + sft_coef * nll
    metrics: Metrics = {
        "rewards/chosen": _mean(beta * ratios[:, CHOSEN]),
        "rewards/rejected": _mean(beta * ratios[:, REJECTED]),
        "rewards/margins": _mean(beta * margin),
        "rewards/accuracies": _mean(_accuracy(margin)),
        "logps/chosen": _mean(sums[:, CHOSEN]),
        "logps/rejected": _mean(sums[:, REJECTED]),
        "nll_loss": _mean(nll),
    }
    return _mean(loss), metrics


def ipo_loss(
    log_probs: Float[Array, "B 2 T"],
    mask: Bool[Array, "B 2 T"],
    *,
    ref_log_probs: Float[Array, "B 2"] | None,
    beta: float = 0.1,
    sft_coef: Scalar = 0.0,
) -> tuple[Mean, Metrics]:
    """``(r_chosen - r_rejected - 1 / (2 beta))^2`` with log-ratios ``r`` per token: IPO (arXiv 2310.12036, eq. 17).

    ``dpo_loss`` with ``objective=squared_preference`` and ``per_token=True``.

    Args:
        log_probs: of the current policy at each completion token, the chosen completion before the rejected one.
        mask: True at completion tokens.
        ref_log_probs: the reference policy's, summed over each completion; None for no reference.
        beta: strength of the pull towards the reference (``tau`` of the paper).
        sft_coef: weight of the chosen completion's negative log-likelihood per token.
    """
    return dpo_loss(
        log_probs,
        mask,
        ref_log_probs=ref_log_probs,
        beta=beta,
        objective=squared_preference,
        per_token=True,
        sft_coef=sft_coef,
    )


def simpo_loss(
    log_probs: Float[Array, "B 2 T"],
    mask: Bool[Array, "B 2 T"],
    *,
    beta: float = 2.0,
    target_margin: float = 1.0,
    sft_coef: Scalar = 0.0,
) -> tuple[Mean, Metrics]:
    """``-log sigmoid(beta (r_chosen - r_rejected) - target_margin)`` with ``r = log pi(y) / |y|``: SimPO.

    ``dpo_loss`` without a reference, with ``per_token=True`` and a target margin (arXiv 2405.14734, eq. 6).

    Args:
        log_probs: of the current policy at each completion token, the chosen completion before the rejected one.
        mask: True at completion tokens.
        beta: scale of the log-probabilities per token.
        target_margin: ``gamma`` of the paper (TRL: ``simpo_gamma``).
        sft_coef: weight of the chosen completion's negative log-likelihood per token.
    """
    return dpo_loss(
        log_probs,
        mask,
        ref_log_probs=None,
        beta=beta,
        objective=partial(sigmoid_preference, target_margin=target_margin),
        per_token=True,
        sft_coef=sft_coef,
    )


def bradley_terry_loss(
    scores: Float[Array, "B 2"], *, margins: Float[Array, " B"] | None = None, centring: Scalar = 0.0
) -> tuple[Mean, Metrics]:
    """``-log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2``: reward-model training.

    The mean over pairs: Bradley-Terry, with the margin of Llama 2 (arXiv 2307.09288, eq. 2) and centring at 0 (arXiv
    2312.09244), which fixes the offset of the scores that pairs leave undetermined.

    Args:
        scores: of the chosen completion, then of the rejected one.
        margins: required score difference of each pair; None for 0.
        centring: weight of the squared sum of scores (TRL: ``center_rewards_coefficient``).

    Returns:
        The loss, and metrics: ``accuracy`` (share of pairs in the right order; a tie counts half), ``margin`` and
        ``score/mean``.

    Raises:
        AssertionError: at trace time, for scores that are not [B, 2] or margins that are not [B].
    """
    chex.assert_shape(scores, (None, 2), custom_message="scores: chosen and rejected, [B, 2]")
    check_shapes(scores.shape[:1], margins=margins)
    difference = scores[:, CHOSEN] - scores[:, REJECTED]
    loss = -jax.nn.log_sigmoid(difference if margins is None else difference - margins)
    if not is_zero(centring):
        loss = loss + centring * scores.sum(1) ** 2
    metrics: Metrics = {
        "accuracy": _mean(_accuracy(difference)),
        "margin": _mean(difference),
        "score/mean": mean_pair(scores, jnp.ones_like(scores, dtype=bool)),
    }
    return _mean(loss), metrics


def _accuracy(margin):
    return jnp.where(margin > 0, 1.0, jnp.where(margin == 0, 0.5, 0.0))


def _mean(x):
    return mean_pair(x, jnp.ones_like(x, dtype=bool))
