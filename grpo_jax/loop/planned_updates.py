"""The programs over whole sequences of a step, compiled from shapes: updates and frozen-policy log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.offline import OfflineConfig
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.loop.compiled_updates import (
    Layout,
    bytes_on_device,
    lay_out,
)
from grpo_jax.loop.losses import (
    critic_loss,
    demonstration_loss,
    policy_loss,
    preference_loss,
    reward_model_loss,
    shared_trunk_loss,
)
from grpo_jax.loop.planned_learner import Learner, Work
from grpo_jax.loop.planned_model import (
    Lengths,
    as_rollout,
    host_batch,
    judge_of,
    online_layout,
    packed_batch,
    pairs_batch,
    planned_model,
    reference_of,
)
from grpo_jax.train import (
    completion_log_probs,
    completion_values,
    pair_log_probs,
    policy_and_values,
)
from grpo_jax.types import Params

REFERENCE_ONCE = "reference (once)"


def plan_grpo(learner: Learner, lengths: Lengths) -> list[Work]:
    """Log-probabilities and update of a step of GRPO.

    Args:
        learner: of the run.
        lengths: of the step's sequences.
    """
    config: GRPOConfig = learner.config
    policy, model = learner.policy, learner.policy.model
    optimizer, _ = config.optimizer.build(total_updates=config.num_steps * config.updates_per_step)
    state = learner.state(policy.params, optimizer, "weights", "optimizer")
    note_reference(learner)
    recomputes = config.old_log_probs == "recompute" and (config.updates_per_step > 1 or config.kl_reward_coef)
    works = _frozen(learner, lengths, old=bool(recomputes), has_values=False)
    has_tokens = bool({"step_rewards", "is_step_end"} & set(config.advantage_inputs))
    whole = host_batch(config, lengths, has_token_advantages=has_tokens, has_values=False)
    layout = online_layout(config, model, learner.mesh, _minibatch(whole, config))
    loss_fn, dtype = policy_loss(config, model), config.optimizer.gradient_dtype
    times = config.updates_per_step
    return [
        *works,
        learner.update("update", policy, loss_fn, state, optimizer, layout, times=times, gradient_dtype=dtype),
    ]


def plan_ppo(learner: Learner, lengths: Lengths, hf_config: Mapping[str, Any]) -> list[Work]:
    """Log-probabilities, values and updates of a step of PPO after the critic's warm-up.

    Args:
        learner: of the run.
        lengths: of the step's sequences.
        hf_config: of the policy.
    """
    config: PPOConfig = learner.config
    policy, model, mesh = learner.policy, learner.policy.model, learner.mesh
    total = config.num_steps * config.updates_per_step
    optimizer, _ = config.optimizer.build(total_updates=total)
    whole = host_batch(config, lengths, has_token_advantages=True, has_values=True)
    layout = online_layout(config, model, mesh, _minibatch(whole, config))
    of_all = online_layout(config, model, mesh, as_rollout(whole))
    parts, times = config.num_minibatches * config.micro_batches, config.updates_per_step
    if config.critic == "head":
        return _shared_trunk(learner, layout, of_all, optimizer)
    state = learner.state(policy.params, optimizer, "weights", "optimizer")
    critic = planned_model(config, judge_of(config, hf_config), mesh)
    of_critic, _ = config.critic_optimizer.build(total_updates=total)
    critic_state = learner.state(critic.params, of_critic, "critic")
    note_reference(learner)
    works = _frozen(learner, lengths, old=config.old_log_probs == "recompute", has_values=True)
    values = partial(completion_values, critic.model)
    works.append(
        learner.log_probs(
            "values", critic, lambda *args: (values(*args), None), critic.params, of_all, times=1, parts=parts
        )
    )
    for name, trained, loss_fn, its_state, its_optimizer, settings in (
        ("critic update", critic, critic_loss(config, critic.model), critic_state, of_critic, config.critic_optimizer),
        ("update", policy, policy_loss(config, model), state, optimizer, config.optimizer),
    ):
        gradients = settings.gradient_dtype
        works.append(
            learner.update(
                name, trained, loss_fn, its_state, its_optimizer, layout, times=times, gradient_dtype=gradients
            )
        )
    return works


def _shared_trunk(
    learner: Learner, layout: Layout, of_all: Layout, optimizer: optax.GradientTransformation
) -> list[Work]:
    """The programs of a critic that is a head on the actor's trunk."""
    config, policy, model = learner.config, learner.policy, learner.policy.model
    head: Any = jax.ShapeDtypeStruct((policy.config.hidden_size, 1), jnp.float32)
    state = learner.state({"policy": policy.params, "value": {"kernel": head}}, optimizer, "weights", "optimizer")
    note_reference(learner)
    outputs = partial(policy_and_values, model, temperature=config.sampling.temperature)
    before = learner.log_probs(
        "log-probs and values",
        policy,
        lambda params, rollout: outputs(params, rollout)[:2],
        state.params,
        of_all,
        times=1 + (config.old_log_probs == "recompute") + config.has_reference,  # values by themselves
        parts=config.num_minibatches * config.micro_batches,
        preparation=model.preparation.under("policy"),
    )
    update = learner.update(
        "update",
        policy,
        shared_trunk_loss(config, model, critic_alone=False),
        state,
        optimizer,
        layout,
        times=config.updates_per_step,
        gradient_dtype=config.optimizer.gradient_dtype,
        preparation=model.preparation.under("policy"),
    )
    return [before, update]


def plan_offline(learner: Learner) -> list[Work]:
    """The update of SFT, DPO or a reward model; of DPO, also the reference's log-probabilities of as many pairs.

    Args:
        learner: of the run.
    """
    config: OfflineConfig = learner.config
    policy, model, mesh = learner.policy, learner.policy.model, learner.mesh
    optimizer, _ = config.optimizer.build(total_updates=100)
    state = learner.state(policy.params, optimizer, "weights", "optimizer")
    works = []
    if isinstance(config, SFTConfig):
        layout, loss_fn = (
            lay_out(packed_batch(config.num_sequences, config.row_length), mesh),
            demonstration_loss(model),
        )
    else:
        assert isinstance(config, DPOConfig | RewardModelConfig)
        has_reference = isinstance(config, DPOConfig) and not config.reference_free
        has_margins = isinstance(config, RewardModelConfig) and config.use_margins
        pairs = pairs_batch(config.num_pairs, config.lengths, has_reference=has_reference, has_margins=has_margins)
        layout = lay_out(pairs, mesh)
        loss_fn = preference_loss(config, model) if isinstance(config, DPOConfig) else reward_model_loss(config, model)
        if has_reference:
            prepare = model.preparation.prepare

            def sums(params: Params, batch: Any) -> Any:
                return pair_log_probs(model, prepare(params), batch).sum(2)

            lower = partial(jax.jit(sums).lower, policy.params, layout.batch)
            works.append(learner.work(REFERENCE_ONCE, policy, lower, layout, policy.params, 0, None))
    dtype = config.optimizer.gradient_dtype
    work = learner.update("update", policy, loss_fn, state, optimizer, layout, times=1, gradient_dtype=dtype)
    return [*works, work]


def note_reference(learner: Learner) -> None:
    """Note the memory of the reference policy."""
    config: OnlineConfig = learner.config
    if config.has_reference and "reference" not in config.offload:
        learner.note("reference", bytes_on_device(reference_of(learner.policy.params, config.compute_dtype)))


def _minibatch(batch: Any, config: OnlineConfig) -> Any:
    """The first minibatch; all have as many sequences."""
    rows = config.num_completions // config.num_minibatches
    return jax.tree.map(lambda x: x[:rows], batch)


def _frozen(learner: Learner, lengths: Lengths, *, old: bool, has_values: bool) -> list[Work]:
    """Log-probabilities of the old and the reference policy, if a step needs them."""
    config, policy = learner.config, learner.policy
    passes = old + config.has_reference
    if not passes:
        return []
    log_probs = partial(completion_log_probs, policy.model, temperature=config.sampling.temperature)
    batch = host_batch(config, lengths, has_token_advantages=False, has_values=has_values)
    layout = online_layout(config, policy.model, learner.mesh, as_rollout(batch))
    names = [name for name, is_needed in (("old", old), ("reference", config.has_reference)) if is_needed]
    params = policy.params
    if not old and policy.lora is None:  # with adapters, the frozen weights are the policy's
        params = reference_of(params, config.compute_dtype)
    parts = config.num_minibatches * config.micro_batches
    name = f"log-probs ({', '.join(names)})"
    return [learner.log_probs(name, policy, log_probs, params, layout, times=passes, parts=parts)]
