"""Forward passes, train steps with gradient accumulation, optimizers and schedules."""

from grpo_jax.train.critic import CriticBatch as CriticBatch
from grpo_jax.train.critic import MLPCritic as MLPCritic
from grpo_jax.train.forward import completion_log_probs as completion_log_probs
from grpo_jax.train.forward import completion_states as completion_states
from grpo_jax.train.forward import completion_values as completion_values
from grpo_jax.train.forward import packed_log_probs as packed_log_probs
from grpo_jax.train.forward import pair_log_probs as pair_log_probs
from grpo_jax.train.forward import pair_scores as pair_scores
from grpo_jax.train.forward import policy_and_values as policy_and_values
from grpo_jax.train.forward import reward_model_scores as reward_model_scores
from grpo_jax.train.forward import with_value_head as with_value_head
from grpo_jax.train.optimizer import adamw as adamw
from grpo_jax.train.optimizer import lion as lion
from grpo_jax.train.optimizer import make_optimizer as make_optimizer
from grpo_jax.train.optimizer import make_schedule as make_schedule
from grpo_jax.train.optimizer import muon as muon
from grpo_jax.train.quantized_moments import scale_by_quantized_adam as scale_by_quantized_adam
from grpo_jax.train.step import LossFn as LossFn
from grpo_jax.train.step import init_state as init_state
from grpo_jax.train.step import make_log_prob_fn as make_log_prob_fn
from grpo_jax.train.step import make_train_step as make_train_step
from grpo_jax.train.step import opt_state_shapes as opt_state_shapes
from grpo_jax.train.step import opt_state_shardings as opt_state_shardings
from grpo_jax.train.step import shuffled_minibatches as shuffled_minibatches
from grpo_jax.train.step import split_rows as split_rows
from grpo_jax.train.step import with_fresh_reference as with_fresh_reference
