"""Settings of the optimizer and of the policy loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jaxtyping import Array

from grpo_jax import loss
from grpo_jax.config.functions import accepted, call_with, find_function, parse_call
from grpo_jax.masked import mean_pair
from grpo_jax.train.optimizer import adamw, lion, make_schedule, muon, sparing_untrained
from grpo_jax.train.router import RouterLosses, RouterTerms
from grpo_jax.train.step import LossFn, check_loss_output, opt_state_shapes
from grpo_jax.types import Batch, Mean, Metrics, Params

LOSSES: dict[str, Callable[..., tuple[Mean, Metrics]]] = {
    "grpo": loss.grpo_loss,
    "ppo": loss.ppo_loss,
    "dapo": loss.dapo_loss,
    "dr_grpo": loss.dr_grpo_loss,
    "gspo": loss.gspo_loss,
    "cispo": loss.cispo_loss,
    "sapo": loss.sapo_loss,
}
KL: dict[str, Callable] = {"k1": loss.kl_k1, "k2": loss.kl_k2, "k3": loss.kl_k3}
DEFAULT_KL = "k3"
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
    "adafactor": optax.adafactor,
}
# Names of the arguments that the run passes, which cannot be given in parentheses.
OPTIMIZER_INPUTS = ("learning_rate", "weight_decay")
SMALL_MODEL = {
    "model_type": "qwen3",
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1),
    "head_dim": 8,
}
"""Hugging Face config of the model that an optimizer is tried on."""
LOSS_INPUTS = (
    *("log_probs", "advantages", "mask", "old_log_probs", "ref_log_probs", "rollout_log_probs", "entropy"),
    *("epsilon_low", "epsilon_high", "kl", "kl_coef", "kl_correction", "entropy_coef", "importance_cap"),
    *("max_completion_length", "auxiliary"),
)
BadUpdates = Literal["refuse", "skip"]
"""Whether a run ends at an update that cannot be applied, or goes on without it."""
GUARD_FIELDS = ("bad_updates", "optimizer.skip_grad_norm", "critic_optimizer.skip_grad_norm")
"""Fields that may change on resume, so that a run can go on past a bad update."""
LogProbs = Callable[[Params, Batch], tuple[Any, ...]]
"""``(params, batch) -> (log-probabilities [B, T], entropies [B, T])``, and the terms of a router's losses if any."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    optimizer: str = "adamw"
    """adamw, muon, lion, adafactor, or module:function of your own with (learning_rate, ...) ->
    optax.GradientTransformation. Arguments in parentheses: 'adamw(b2=0.95)', 'optax:adabelief(b1=0.8)'. Less memory:
    "adamw(moments='bfloat16')" for the first moment, "adamw(moments='8bit')" for both, lion, or adafactor."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    warmup_updates: int = 5
    """Updates of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the end of the run."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm."""
    weight_decay: float = 0.0
    """Decoupled weight decay; of adamw, muon and lion on matrices only."""
    gradient_dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.Suppress] = "float32"
    """Precision in which gradients are accumulated over micro-batches; bfloat16 takes half the memory."""
    skip_grad_norm: Annotated[float | None, tyro.conf.Suppress] = None
    """An update whose gradient has a larger global norm, before clipping, is bad (bad_updates), as one that is not
    finite always is. Default: no bound."""

    def __post_init__(self):
        for name in ("learning_rate", "max_grad_norm", "skip_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup_updates", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        known = accepted(find_function(self.optimizer, "optimizer", OPTIMIZERS, OPTIMIZER_INPUTS))
        if self.weight_decay and known is not None and "weight_decay" not in known:
            raise ValueError(f"weight_decay is set, but {self.optimizer} has no weight_decay; set it to 0")
        self.build(total_updates=1)  # checks the optimizer's arguments

    def check(self) -> None:
        """Trace the first update of a small model, so that a mistake in the user's own is found before one is loaded.

        Raises:
            ValueError: as ``train.opt_state_shapes``.
        """
        from grpo_jax.models import from_hf_config, param_shapes  # imports flax, which --help does not wait for

        optimizer, _ = self.build(total_updates=1)
        try:
            opt_state_shapes(optimizer, param_shapes(from_hf_config(SMALL_MODEL)))
        except ValueError as error:
            raise ValueError(f"optimizer is {self.optimizer}: {error}") from error

    @property
    def description(self) -> str:
        """The settings in a few words."""
        return (
            f"{self.optimizer}, learning rate {self.learning_rate:g}, {self.decay} after {self.warmup_updates} updates "
            "of warm-up"
        )

    def build(self, *, total_updates: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer and its schedule ``update number -> learning rate``.

        A constant schedule does not depend on ``total_updates``. With decay, a warm-up longer than the run is cut to
        the length of the run.

        Args:
            total_updates: of the run.

        Raises:
            ValueError: as ``train.make_schedule``; the optimizer's function raises, or returns something else.
        """
        is_constant = self.decay == "constant"
        schedule = make_schedule(
            self.learning_rate,
            warmup_steps=self.warmup_updates if is_constant else min(self.warmup_updates, total_updates),
            total_steps=max(self.warmup_updates, total_updates) if is_constant else total_updates,
            decay=self.decay,
        )
        make = find_function(self.optimizer, "optimizer", OPTIMIZERS, OPTIMIZER_INPUTS)
        # A function with a default of its own, such as optax.adamw's 1e-4, must not decay where the setting says 0.
        is_named = "weight_decay" in (accepted(make) or ())
        given: dict[str, Any] = {"weight_decay": self.weight_decay} if self.weight_decay or is_named else {}
        try:
            optimizer = call_with(make, schedule, **given)
        except Exception as error:
            if ":" not in self.optimizer:
                raise
            raise ValueError(f"the optimizer {self.optimizer} failed: {type(error).__name__}: {error}") from error
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(
                f"the optimizer {self.optimizer} returned a {type(optimizer).__name__}; it must return an "
                "optax.GradientTransformation"
            )
        clipped = optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optimizer)
        return sparing_untrained(clipped), schedule


@dataclass(frozen=True)
class PolicyLossConfig:
    """Policy loss with KL penalty and entropy bonus."""

    loss: str = "grpo"
    """grpo, ppo, dapo, dr_grpo, gspo, cispo, sapo, or module:function of your own with the arguments of loss.grpo_loss
    that it needs. Arguments in parentheses: 'sapo(temperature_positive=0.8)', 'my_losses:dual_clip(c=3.0)'."""
    epsilon_low: float | None = None
    """Lower clip range. Default: the loss's own."""
    epsilon_high: float | None = None
    """Upper clip range. Default: the loss's own."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""
    importance_cap: float | None = None
    """Cap of the truncated importance weights that correct for the gap between sampler and policy. Default: no
    correction; with staleness, 2."""
    kl_coef: float = 0.0
    """Coefficient of the KL to the reference policy in the loss. (TRL: beta.)"""
    kl: str = DEFAULT_KL
    """KL estimator in the loss: k1, k2, k3 or module:function(log_probs, ref_log_probs)."""
    kl_correction: bool = False
    """Weight the KL in the loss by the importance ratio, which makes its gradient that of the KL."""
    router_balance_coef: Annotated[float, tyro.conf.Suppress] = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts, for each completion."""
    router_z_coef: Annotated[float, tyro.conf.Suppress] = 0.0
    """Coefficient of the z-loss of a mixture's router, which keeps its logits small."""

    def __post_init__(self):
        for name in ("epsilon_low", "epsilon_high", "kl_coef", "router_balance_coef", "router_z_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap is {self.importance_cap}; it bounds a weight and must be above 0")
        if self.kl == "k1" and self.kl_coef and not self.kl_correction:
            raise ValueError(
                "kl is k1 and kl_coef is not 0: as a loss, k1's gradient does not depend on the reference; use k2 or "
                "k3, set kl_correction, or put the KL in the reward with kl_reward_coef"
            )
        if self.kl != DEFAULT_KL and not self.kl_coef:
            raise ValueError(f"kl is {self.kl}, but kl_coef is 0: the estimator has no effect; set kl_coef")
        if self.kl_correction and not self.kl_coef:
            raise ValueError("kl_correction is set, but kl_coef is 0, so there is no KL in the loss")
        find_function(self.kl, "kl", KL, ("log_probs", "ref_log_probs"))
        known = accepted(find_function(self.loss, "loss", LOSSES, LOSS_INPUTS))
        for name in ("epsilon_low", "epsilon_high", "entropy_coef", "importance_cap", "kl_coef", "kl_correction"):
            if getattr(self, name) and known is not None and name not in known:
                raise ValueError(f"{name} is set, but the loss {self.loss} has no argument {name}; leave it out")
        if self.router_losses.are_used and known is not None and "auxiliary" not in known:
            raise ValueError(
                f"router_balance_coef or router_z_coef is set, but the loss {self.loss} has no argument auxiliary, to "
                "which they are added; leave them out"
            )

    def check(self, *, has_old: bool, has_reference: bool, needs_token_mean: bool = False) -> None:
        """Trace the loss on small arrays, so that a mistake in the user's own is found before a model is loaded.

        Args:
            has_old: whether the run passes ``old_log_probs``, which it does with several updates per step.
            has_reference: whether it passes ``ref_log_probs``.
            needs_token_mean: whether another mean over tokens is added to the loss.

        Raises:
            ValueError: the loss raises, does not return a ``Mean`` and metrics, or is not averaged over tokens where
                that is needed.
        """
        tokens, mask = jnp.zeros((2, 3)), jnp.array([[True, True, True], [True, False, False]])
        batch = Batch(
            prompt_ids=jnp.zeros((2, 1), jnp.int32),
            prompt_mask=mask[:, :1],
            completion_ids=jnp.zeros((2, 3), jnp.int32),
            completion_mask=mask,
            loss_mask=mask,
            advantages=jnp.zeros(2),
            rollout_log_probs=tokens,
            old_log_probs=tokens if has_old else None,
            ref_log_probs=tokens if has_reference else None,
        )
        loss_fn = self.build(lambda *_: (tokens, tokens), max_completion_length=3, sampler_alters_policy=False)
        try:
            check_loss_output(jax.eval_shape(loss_fn, None, batch))
            count = float(loss_fn(None, batch)[0].count) if needs_token_mean else None
        except Exception as error:
            if ":" not in self.loss + self.kl:
                raise
            absent = [name for name in ("old_log_probs", "ref_log_probs") if getattr(batch, name) is None]
            hint = f"; with these settings {' and '.join(absent)} are None" if absent else ""
            raise ValueError(f"the loss {self.loss} failed: {type(error).__name__}: {error}{hint}") from error
        if count not in (None, float(mask.sum())):
            raise ValueError(
                "with critic head, the value loss, averaged over tokens, is added to the policy loss, so that must be "
                f"averaged over tokens too, and {self.loss} is not; set loss to ppo, dapo or cispo, or critic to model"
            )

    @property
    def name(self) -> str:
        """The name of the loss, without its arguments."""
        return parse_call(self.loss, "loss")[0]

    def build(self, log_probs: LogProbs, *, max_completion_length: int, sampler_alters_policy: bool) -> LossFn:
        """The loss ``(params, batch) -> (loss, metrics)`` for ``train.make_train_step``.

        Args:
            log_probs: ``(params, batch) -> (log-probabilities, entropy)``, such as ``train.completion_log_probs`` of a
                model; or with the terms of a router's losses as a third result, as of ``train.routed_log_probs``.
            max_completion_length: T, the constant that Dr.GRPO divides by.
            sampler_alters_policy: whether the sampler draws from a modified distribution, such as top-p. Its
                log-probabilities then differ from the policy's by design, and are compared only where importance_cap
                corrects for it.
        """
        policy_loss = find_function(self.loss, "loss", LOSSES, LOSS_INPUTS)
        epsilons = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        settings = {
            **{name: value for name, value in epsilons.items() if value is not None},
            "kl": find_function(self.kl, "kl", KL, ("log_probs", "ref_log_probs")),
            "kl_coef": self.kl_coef,
            "kl_correction": self.kl_correction,
            "entropy_coef": self.entropy_coef,
            "importance_cap": self.importance_cap,
        }
        if "max_completion_length" in inspect.signature(policy_loss).parameters:  # no argument of grpo_loss
            settings["max_completion_length"] = max_completion_length
        compare = self.importance_cap is not None or not sampler_alters_policy

        def loss_fn(params: Params, batch: Batch) -> tuple[Mean, Metrics]:
            new_log_probs, entropy, *terms = log_probs(params, batch)
            auxiliary, of_router = self._of_router(terms, batch.loss_mask)
            loss, metrics = call_with(
                policy_loss,
                new_log_probs,
                batch.advantages,
                batch.loss_mask,
                old_log_probs=batch.old_log_probs,
                ref_log_probs=batch.ref_log_probs,
                rollout_log_probs=batch.rollout_log_probs if compare else None,
                entropy=entropy,
                **auxiliary,
                **settings,
            )
            return loss, metrics | of_router

        return loss_fn

    @property
    def router_losses(self) -> RouterLosses:
        """The losses of a mixture's router."""
        return RouterLosses(self.router_balance_coef, self.router_z_coef)

    def _of_router(self, terms: list[RouterTerms], mask: Array) -> tuple[dict[str, Array], Metrics]:
        """The weighted sum of a router's losses for each token, as an argument of the policy loss, and metrics."""
        if not terms:
            return {}, {}
        losses, of_tokens = self.router_losses, terms[0]
        metrics: Metrics = {f"router/{name}_loss": mean_pair(x, mask) for name, x in of_tokens._asdict().items()}
        return {"auxiliary": losses.balance * of_tokens.balance + losses.z * of_tokens.z}, metrics
