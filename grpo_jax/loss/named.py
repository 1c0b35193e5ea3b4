"""Named policy losses: compositions of ``grpo_loss`` from the literature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TypedDict, TypeVar, Unpack

from grpo_jax.loss.checks import Scalar
from grpo_jax.loss.policy import Advantages, grpo_loss
from grpo_jax.loss.terms import Mask, Tokens, cispo, constant_length, sapo, sequence_log_ratio, token_mean
from grpo_jax.types import Mean, Metrics


class GrpoOptions(TypedDict, total=False):
    """Keyword arguments of ``grpo_loss`` that the named losses pass on; other parts are combined by ``grpo_loss``."""

    old_log_probs: Tokens | None
    ref_log_probs: Tokens | None
    rollout_log_probs: Tokens | None
    entropy: Tokens | None
    kl: Callable[[Tokens, Tokens], Tokens]
    kl_coef: Scalar
    kl_correction: bool
    entropy_coef: Scalar
    auxiliary: Tokens | None
    importance_cap: float | None


Loss = TypeVar("Loss", bound=Callable[..., tuple[Mean, Metrics]])


def _show_options(loss: Loss) -> Loss:
    """Spell out ``**options`` in the signature that ``help`` shows and that command lines read."""
    signature, every = inspect.signature(loss), inspect.signature(grpo_loss).parameters
    explicit = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
    options = [every[name] for name in GrpoOptions.__annotations__]
    loss.__signature__ = signature.replace(parameters=explicit + options)  # pyright: ignore[reportAttributeAccessIssue]
    return loss


@_show_options
def ppo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_t min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)``: PPO (arXiv 1707.06347, eq. 7).

    ``grpo_loss`` with ``aggregate=token_mean``; goes with the per-token advantages of ``advantage.gae``.

    Args:
        log_probs: of the current policy.
        advantages: per token, or per sequence.
        mask: True at the completion tokens to train on.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1.
        options: further keyword arguments of ``grpo_loss``.
    """
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        aggregate=token_mean,
        **options,
    )


@_show_options
def dapo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_t min(r_t A, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A)``: DAPO (arXiv 2503.14476, eq. 8).

    ``grpo_loss`` with clip higher (``epsilon_high=0.28``) and ``aggregate=token_mean``.

    Args:
        log_probs: of the current policy.
        advantages: per sequence, or per token.
        mask: True at the completion tokens to train on.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1.
        options: further keyword arguments of ``grpo_loss``.
    """
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        aggregate=token_mean,
        **options,
    )


@_show_options
def dr_grpo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    max_completion_length: int,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_i sum_t min(r_t A, clip(r_t) A) / max_completion_length``: Dr.GRPO (arXiv 2503.20783).

    ``grpo_loss`` with ``aggregate=constant_length``, which does not favour short correct and long wrong completions;
    goes with ``advantage.dr_grpo``.

    Args:
        log_probs: of the current policy.
        advantages: per sequence, or per token.
        mask: True at the completion tokens to train on.
        max_completion_length: the constant divisor, in tokens.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1.
        options: further keyword arguments of ``grpo_loss``.

    Raises:
        ValueError: max_completion_length below 1.
    """
    aggregate = partial(constant_length, length=max_completion_length)
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        aggregate=aggregate,
        **options,
    )


@_show_options
def gspo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_i min(s_i A_i, clip(s_i) A_i)`` with ``s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|)``: GSPO.

    ``grpo_loss`` with ``log_ratio=sequence_log_ratio`` and the narrow clip that goes with it (arXiv 2507.18071, eq. 5
    and section 5.1).

    Args:
        log_probs: of the current policy.
        advantages: per sequence, or per token.
        mask: True at the completion tokens to train on.
        epsilon_low: clip range below 1.
        epsilon_high: clip range above 1.
        options: further keyword arguments of ``grpo_loss``.
    """
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        log_ratio=sequence_log_ratio,
        **options,
    )


@_show_options
def cispo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    epsilon_low: float = 1.0,
    epsilon_high: float = 4.0,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_t stop_gradient(clip(r_t, 1 - epsilon_low, 1 + epsilon_high)) A log pi``: CISPO (arXiv 2506.13585).

    ``grpo_loss`` with ``surrogate=cispo`` and ``aggregate=token_mean``: importance weights of at most 5, without a
    lower bound, instead of clipped ratios.

    Args:
        log_probs: of the current policy.
        advantages: per sequence, or per token.
        mask: True at the completion tokens to train on.
        epsilon_low: the weight is at least ``1 - epsilon_low``.
        epsilon_high: the weight is at most ``1 + epsilon_high``.
        options: further keyword arguments of ``grpo_loss``.
    """
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        surrogate=cispo,
        aggregate=token_mean,
        **options,
    )


@_show_options
def sapo_loss(
    log_probs: Tokens,
    advantages: Advantages,
    mask: Mask,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    **options: Unpack[GrpoOptions],
) -> tuple[Mean, Metrics]:
    """``-mean_i mean_t (4 / tau) sigmoid(tau (r_t - 1)) A``: SAPO (arXiv 2511.20347).

    ``grpo_loss`` with ``surrogate=sapo``, a soft gate instead of a clip.

    Args:
        log_probs: of the current policy.
        advantages: per sequence, or per token.
        mask: True at the completion tokens to train on.
        temperature_positive: ``tau`` where A > 0.
        temperature_negative: ``tau`` elsewhere.
        epsilon_low, epsilon_high: the range outside of which metrics count a ratio; the loss does not depend on them.
        options: further keyword arguments of ``grpo_loss``.

    Raises:
        ValueError: a temperature not above 0.
    """
    temperatures = {"temperature_positive": temperature_positive, "temperature_negative": temperature_negative}
    return grpo_loss(
        log_probs,
        advantages,
        mask,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        surrogate=partial(sapo, **temperatures),
        **options,
    )
