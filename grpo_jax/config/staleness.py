"""The correction of a policy loss for samples of an earlier policy (``OnlineConfig.staleness``)."""

from __future__ import annotations

from dataclasses import replace

from grpo_jax.config.functions import accepted, find_function
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.training import LOSS_INPUTS, LOSSES, PolicyLossConfig

STALE_CAP = 2.0
"""Default cap of the importance weights of stale samples, each of one token. (The default of verl's
rollout_is_threshold too; for weights of tokens its docs/algo/rollout_corr.md calls 1.5 to 5 typical.)"""


def corrected(config: OnlineConfig, policy: PolicyLossConfig) -> PolicyLossConfig:
    """A policy loss with an importance cap if samples are stale and nothing else corrects for it.

    The objective is then the decoupled one (arXiv 2110.00641, 2505.24298): ratios and clip refer to the policy at
    the start of the step, and its probabilities over those of the policy that sampled are a weight.

    Args:
        config: of the run.
        policy: its policy loss, as configured.
    """
    is_corrected = policy.importance_cap is not None or config.old_log_probs == "sampler"
    return policy if is_corrected or not config.staleness else replace(policy, importance_cap=STALE_CAP)


def check_stale_loss(config: OnlineConfig, policy: PolicyLossConfig) -> None:
    """Check that the loss can correct for stale samples, if there are any.

    Args:
        config: of the run.
        policy: its policy loss, as configured.

    Raises:
        ValueError: it lacks the arguments.
    """
    known = accepted(find_function(policy.loss, "loss", LOSSES, LOSS_INPUTS))
    if not config.staleness or known is None:
        return
    is_sampler = config.old_log_probs == "sampler"
    needed = {"old_log_probs"} if is_sampler else {"importance_cap", "rollout_log_probs"}
    if lacking := needed - set(known):
        other = "recompute" if is_sampler else "sampler"
        raise ValueError(
            f"staleness is {config.staleness}, but the loss {policy.loss} has no argument "
            f"{' and no argument '.join(sorted(lacking))}, so that it would not correct for samples of an earlier "
            f"policy; use another loss, or old_log_probs {other}"
        )
