"""A policy loss of a model for ``make_train_step``, with everything that a batch holds."""

from grpo_jax.loss import grpo_loss
from grpo_jax.train import completion_log_probs


def loss_of(model, policy_loss=grpo_loss, *, temperature=1.0, **options):
    def loss_fn(params, batch):
        log_probs, entropy = completion_log_probs(model, params, batch, temperature=temperature)
        return policy_loss(
            log_probs,
            batch.advantages,
            batch.loss_mask,
            old_log_probs=batch.old_log_probs,
            ref_log_probs=batch.ref_log_probs,
            rollout_log_probs=batch.rollout_log_probs,
            entropy=entropy,
            **options,
        )

    return loss_fn
