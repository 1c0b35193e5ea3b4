"""Settings of the optimizer and of the policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import optax
from jaxtyping import Array, Float

from grpo_jax import loss
from grpo_jax.train import LossFn, make_optimizer, make_schedule
from grpo_jax.types import Batch, Mean, Metrics, Params

LOSSES = {
    "grpo": loss.grpo_loss,
    "ppo": loss.ppo_loss,
    "dapo": loss.dapo_loss,
    "dr_grpo": loss.dr_grpo_loss,
    "gspo": loss.gspo_loss,
    "cispo": loss.cispo_loss,
    "sapo": loss.sapo_loss,
}
KL = {"k1": loss.kl_k1, "k2": loss.kl_k2, "k3": loss.kl_k3}
LogProbs = Callable[[Params, Batch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind clipping by the global norm."""

    learning_rate: float | None = None
    """Peak. Default: 1e-6 with --model, 2.5e-4 for the embedded base."""
    warmup_updates: int = 5
    """Updates over which the learning rate rises."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """What it does after that: stay, or fall to 0 at the end of the run."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be above 0")
        for name in ("warmup_updates", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")

    def described(self, default_learning_rate: float) -> str:
        """The settings in effect in a few words, for a run's first lines."""
        rate = default_learning_rate if self.learning_rate is None else self.learning_rate
        return f"AdamW, learning rate {rate:g}, {self.decay} after {self.warmup_updates} updates of warm-up"

    def build(
        self, *, total_updates: int, default_learning_rate: float
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer, and its learning rate by update; see ``train.make_schedule`` for what it raises.

        A constant learning rate is the same function of the update for every ``total_updates``, warm-up included. In
        one that decays, a warm-up that would be longer than the run is as long as it.
        """
        is_constant = self.decay == "constant"
        schedule = make_schedule(
            default_learning_rate if self.learning_rate is None else self.learning_rate,
            warmup_steps=self.warmup_updates if is_constant else min(self.warmup_updates, total_updates),
            total_steps=max(self.warmup_updates, total_updates) if is_constant else total_updates,
            decay=self.decay,
        )
        return make_optimizer(
            schedule, max_grad_norm=self.max_grad_norm, weight_decay=self.weight_decay, b1=self.b1, b2=self.b2
        ), schedule


@dataclass(frozen=True)
class PolicyLossConfig:
    """A named policy loss, and what is added to it."""

    loss: Literal[tuple(LOSSES)] = "grpo"  # pyright: ignore[reportInvalidTypeForm]
    """The policy loss."""
    epsilon_low: float | None = None
    """How far the ratio counts below 1; by default the loss's own."""
    epsilon_high: float | None = None
    """How far above 1; by default the loss's own."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    importance_cap: float | None = None
    """Cap of the weights that correct for a sampler that is not quite the policy; None for no correction."""
    kl_coef: float = 0.0
    """Weight in the loss of the KL to the reference policy. (TRL: beta.)"""
    kl: Literal[tuple(KL)] = "k3"  # pyright: ignore[reportInvalidTypeForm]
    """Estimator of the KL in the loss."""
    kl_correction: bool = False
    """Weight the KL in the loss by the importance ratio, which makes its gradient that of the KL."""

    def __post_init__(self):
        for name in ("epsilon_low", "epsilon_high", "kl_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap is {self.importance_cap}; it bounds a weight and must be above 0")
        if self.kl == "k1" and self.kl_coef and not self.kl_correction:
            raise ValueError(
                "kl is k1 and kl_coef is not 0: as a loss, k1's gradient knows nothing of the reference; use k2 or k3, "
                "set kl_correction, or put it in the reward with kl_reward_coef"
            )
        if self.kl_correction and not self.kl_coef:
            raise ValueError("kl_correction is set, but kl_coef is 0, so there is no KL in the loss")

    def build(self, log_probs: LogProbs, *, max_completion_length: int, sampler_alters_policy: bool) -> LossFn:
        """The loss of a batch, as ``train.make_train_step`` takes it.

        Args:
            log_probs: ``(params, batch) -> (log-probabilities, entropy)``, such as ``train.completion_log_probs`` of a
                model.
            max_completion_length: what Dr.GRPO divides by.
            sampler_alters_policy: whether what is drawn from is not the policy itself, such as where tokens are
                removed. The sampler's log-probabilities then differ from the policy's by design, and are compared only
                where importance_cap corrects for it.
        """
        policy_loss = LOSSES[self.loss]
        if self.loss == "dr_grpo":
            policy_loss = partial(policy_loss, max_completion_length=max_completion_length)
        epsilons = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        policy_loss = partial(policy_loss, **{name: value for name, value in epsilons.items() if value is not None})
        compare = self.importance_cap is not None or not sampler_alters_policy

        def loss_fn(params: Params, batch: Batch) -> tuple[Mean, Metrics]:
            new_log_probs, entropy = log_probs(params, batch)
            return policy_loss(
                new_log_probs,
                batch.advantages,
                batch.loss_mask,
                old_log_probs=batch.old_log_probs,
                ref_log_probs=batch.ref_log_probs,
                rollout_log_probs=batch.rollout_log_probs if compare else None,
                entropy=entropy,
                kl=KL[self.kl],
                kl_coef=self.kl_coef,
                kl_correction=self.kl_correction,
                entropy_coef=self.entropy_coef,
                importance_cap=self.importance_cap,
            )

        return loss_fn
