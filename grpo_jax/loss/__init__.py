"""Losses of policies, preferences, reward models and critics, from log-probabilities, scores and values.

Values at masked positions, NaN included, reach neither a loss nor its gradient. Losses are ``Mean`` pairs:
micro-batches are merged by adding sums and counts, and ``.value`` divides.
"""

from grpo_jax.loss.named import cispo_loss, dapo_loss, dr_grpo_loss, gspo_loss, ppo_loss, sapo_loss
from grpo_jax.loss.policy import grpo_loss, supervised_loss
from grpo_jax.loss.preference import (
    bradley_terry_loss,
    dpo_loss,
    hinge_preference,
    ipo_loss,
    sigmoid_preference,
    simpo_loss,
    squared_preference,
)
from grpo_jax.loss.terms import (
    cispo,
    clipped_surrogate,
    constant_length,
    kl_k1,
    kl_k2,
    kl_k3,
    sapo,
    sequence_log_ratio,
    sequence_mean,
    token_log_ratio,
    token_mean,
    truncated_importance,
)
from grpo_jax.loss.value import value_loss

__all__ = [
    "bradley_terry_loss",
    "cispo",
    "cispo_loss",
    "clipped_surrogate",
    "constant_length",
    "dapo_loss",
    "dpo_loss",
    "dr_grpo_loss",
    "grpo_loss",
    "gspo_loss",
    "hinge_preference",
    "ipo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "ppo_loss",
    "sapo",
    "sapo_loss",
    "sequence_log_ratio",
    "sequence_mean",
    "sigmoid_preference",
    "simpo_loss",
    "squared_preference",
    "supervised_loss",
    "token_log_ratio",
    "token_mean",
    "truncated_importance",
    "value_loss",
]
