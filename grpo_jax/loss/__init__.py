"""From log-probabilities, scores and values to a loss: of policies, of preferences, of what a critic predicts.

What stands at a masked position, NaN included, reaches neither a loss nor its gradient. Losses are ``Mean`` pairs:
parts computed on micro-batches are merged by adding sums and counts. ``.value`` divides.
"""

from grpo_jax.loss.policy import (
    cispo,
    cispo_loss,
    clipped_surrogate,
    constant_length,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    ppo_loss,
    sapo,
    sapo_loss,
    sequence_log_ratio,
    sequence_mean,
    supervised_loss,
    token_log_ratio,
    token_mean,
    truncated_importance,
)
from grpo_jax.loss.preference import (
    bradley_terry_loss,
    dpo_loss,
    hinge_preference,
    ipo_loss,
    sigmoid_preference,
    simpo_loss,
    squared_preference,
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
