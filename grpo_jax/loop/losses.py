"""The losses of the scripts as ``(params, batch) -> (loss, metrics)``, of their settings and a model."""

from __future__ import annotations

from functools import partial
from typing import Any

from grpo_jax import loss
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.training import LogProbs
from grpo_jax.train import (
    LossFn,
    completion_log_probs,
    completion_values,
    packed_log_probs,
    pair_log_probs,
    pair_scores,
    policy_and_values,
    routed_log_probs,
)
from grpo_jax.types import Batch, Mean, Model, Packed, Pairs, Params


def policy_loss(config: GRPOConfig | PPOConfig, model: Model, *, log_probs: LogProbs | None = None) -> LossFn:
    """The loss of a policy, with the correction for stale samples if there are any.

    Args:
        config: of the run.
        model: of the policy.
        log_probs: ``(params, batch) -> (log-probabilities, entropy)``; None for ``model``'s.
    """
    if log_probs is None:
        losses = config.policy_loss.router_losses
        if losses.are_used and model.routing is None:
            raise ValueError(
                "router_balance_coef and router_z_coef are of a mixture of experts, and this model has "
                "none; leave them out"
            )
        options: dict[str, Any] = {"temperature": config.sampling.temperature}
        if losses.are_used:
            log_probs = partial(routed_log_probs, model, **options)
        else:
            log_probs = partial(completion_log_probs, model, **options)
    return config.policy_loss.build(
        log_probs, max_completion_length=config.completion_length, sampler_alters_policy=config.sampling.alters_policy
    )


def critic_loss(config: PPOConfig, model: Model) -> LossFn:
    """The loss of PPO's critic, where it is a model of its own.

    Args:
        config: of the run.
        model: the critic, with a scalar head.
    """

    def loss_fn(params: Params, batch: Batch):
        assert batch.returns is not None
        return loss.value_loss(
            completion_values(model, params, batch),
            batch.returns,
            batch.loss_mask,
            old_values=batch.old_values,
            epsilon=config.value_epsilon,
        )

    return loss_fn


def shared_trunk_loss(config: PPOConfig, model: Model, *, critic_alone: bool) -> LossFn:
    """The sum of PPO's policy loss and its weighted value loss, where the critic is a head on the actor's trunk.

    Args:
        config: of the run.
        model: of the actor.
        critic_alone: whether only the value head is trained.
    """
    if config.policy_loss.router_losses.are_used:
        raise ValueError("with critic head, the losses of a router are not implemented; set critic to model")
    outputs = partial(policy_and_values, model, temperature=config.sampling.temperature)

    def loss_fn(params: Params, batch: Batch):
        log_probs, entropy, values = outputs(params, batch, shares_trunk=not critic_alone)
        assert batch.returns is not None
        value_loss, metrics = loss.value_loss(
            values, batch.returns, batch.loss_mask, old_values=batch.old_values, epsilon=config.value_epsilon
        )
        metrics["value/loss"] = value_loss
        if critic_alone:
            return value_loss, metrics
        of_policy, policy_metrics = policy_loss(config, model, log_probs=lambda *_: (log_probs, entropy))(params, batch)
        # Both are means over the same tokens (``PolicyLossConfig.check``), so their counts are equal.
        total = of_policy.sum + config.value_coef * value_loss.sum
        return Mean(total, of_policy.count), metrics | policy_metrics

    return loss_fn


def demonstration_loss(model: Model) -> LossFn:
    """The loss of SFT."""

    def loss_fn(params: Params, batch: Packed):
        return loss.supervised_loss(packed_log_probs(model, params, batch), batch.loss_mask), {}

    return loss_fn


def preference_loss(config: DPOConfig, model: Model) -> LossFn:
    """The loss of DPO.

    Args:
        config: of the run.
        model: of the policy.
    """

    def loss_fn(params: Params, batch: Pairs):
        return loss.dpo_loss(
            pair_log_probs(model, params, batch),
            batch.completion_mask,
            ref_log_probs=batch.ref_log_probs,
            beta=config.beta,
            objective=config.objective,
            per_token=config.by_token,
            sft_coef=config.sft_coef,
        )

    return loss_fn


def reward_model_loss(config: RewardModelConfig, model: Model) -> LossFn:
    """The loss of a reward model (Bradley-Terry).

    Args:
        config: of the run.
        model: the reward model, with a scalar head.
    """

    def loss_fn(params: Params, batch: Pairs):
        margins = batch.margins if config.use_margins else None
        return loss.bradley_terry_loss(pair_scores(model, params, batch), margins=margins, centring=config.centring)

    return loss_fn
