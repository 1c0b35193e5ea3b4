"""The programs over whole sequences of a step, compiled from shapes: updates and frozen-policy log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

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
    lower_update,
    options_of,
    placed_state,
    state_shapes,
    with_constant_count,
)
from grpo_jax.loop.losses import (
    critic_loss,
    demonstration_loss,
    policy_loss,
    preference_loss,
    reward_model_loss,
    shared_trunk_loss,
)
from grpo_jax.loop.planned_model import (
    Lengths,
    as_rollout,
    decoder_of,
    host_batch,
    online_layout,
    packed_batch,
    pairs_batch,
    planned_model,
    reference_of,
)
from grpo_jax.loop.roofline import Measured, compile_measured, kernel_flops
from grpo_jax.models.kernels import hardware, resolve_attention
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.train import (
    LossFn,
    completion_log_probs,
    completion_values,
    make_log_prob_fn,
    make_train_step,
    pair_log_probs,
    policy_and_values,
    trainable_part,
)
from grpo_jax.types import Params, Preparation, TrainState

REFERENCE_ONCE = "reference (once)"


@dataclass(frozen=True)
class Work:
    """A program over whole sequences.

    Attributes:
        name: of its phase.
        measured: its work and memory.
        times: how often it runs in a step.
        batch: bytes of its arguments on a device that are not part of a state.
        gradients: bytes of the accumulated gradients on a device.
        rows, row_length: sequences that it computes, and tokens of each.
        prompts_are_shared: whether a row has a prompt once for several completions.
    """

    name: str
    measured: Measured
    times: int
    batch: float
    gradients: float
    rows: int
    row_length: int
    prompts_are_shared: bool


@dataclass(frozen=True)
class Learner:
    """Models that a run trains, as shapes, and their programs.

    Attributes:
        config: of the run.
        mesh: the devices.
        policy: the trained model; of a reward model, with a scalar head.
        held: bytes on a device of what is in memory for the whole run, by kind.
        options: of the compiler in addition to those of a run.
    """

    config: Any
    mesh: Mesh
    policy: Pretrained
    held: dict[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None

    def state(self, params: Params, optimizer: optax.GradientTransformation, *names: str) -> TrainState:
        """A train state, whose memory is noted.

        Args:
            params: shapes of the parameters.
            optimizer: of the updates.
            names: the kinds of its weights and of its optimizer state.
        """
        offloads = "optimizer" in self.config.offload
        state = placed_state(state_shapes(params, optimizer), self.mesh, offload_optimizer=offloads)
        self.note(names[0], bytes_on_device(state.params))
        self.note(names[-1], bytes_on_device(state.opt_state))
        return state

    def note(self, kind: str, size: float) -> None:
        """Add to what is held.

        Args:
            kind: of memory.
            size: bytes on a device.
        """
        self.held[kind] = self.held.get(kind, 0.0) + size

    def is_fused(self, model: Pretrained) -> bool:
        """Whether an attention kernel computes whole sequences."""
        kind, config = hardware(self.mesh.devices.flat[0]), self.config
        name = resolve_attention(config.attention, model.config, config.compute_dtype, kind, self.mesh.shape["tensor"])
        return name in ("cudnn", "splash")

    def update(
        self,
        name: str,
        model: Pretrained,
        loss_fn: LossFn,
        state: TrainState,
        optimizer: optax.GradientTransformation,
        layout: Layout,
        *,
        times: int,
        gradient_dtype: str,
        preparation: Preparation | None = None,
    ) -> Work:
        """An update.

        Args:
            name: of its phase.
            model: that is trained.
            loss_fn: of the update.
            state: of ``state``.
            optimizer: of the update.
            layout: of its batch.
            times: how often it runs in a step.
            gradient_dtype: as in ``make_train_step``.
            preparation: of the parameters; None for the model's.
        """
        step = make_train_step(
            loss_fn,
            optimizer,
            num_micro_batches=self.config.micro_batches,
            preparation=preparation or model.model.preparation,
            gradient_dtype=gradient_dtype,
        )
        lower = partial(lower_update, step, state, layout)
        trained = trainable_part(state.params)
        gradients = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(gradient_dtype), sharding=x.sharding), trained
        )
        return self.work(name, model, lower, layout, state, times, bytes_on_device(gradients))

    def log_probs(
        self,
        name: str,
        model: Pretrained,
        log_probs: Callable[..., Any],
        params: Params,
        layout: Layout,
        *,
        times: int,
        parts: int,
        preparation: Preparation | None = None,
    ) -> Work:
        """Frozen-policy log-probabilities, or values.

        Args:
            name: of its phase.
            model: that is computed.
            log_probs: as in ``make_log_prob_fn``.
            params: shapes of its parameters.
            layout: of all sequences of the step.
            times: how often it runs in a step.
            parts: micro-batches of padded rows.
            preparation: of the parameters; None for the model's.
        """
        function: Any = make_log_prob_fn(
            log_probs, num_micro_batches=parts, preparation=preparation or model.model.preparation
        )
        frozen, batch = with_constant_count(function.__wrapped__, layout.batch)
        return self.work(name, model, lambda: jax.jit(frozen).lower(params, batch), layout, params, times, None)

    def work(
        self,
        name: str,
        model: Pretrained,
        lower: Callable[[], Any],
        layout: Layout,
        own: Any,
        times: int,
        gradients: float | None,
    ) -> Work:
        """A program over whole sequences, compiled.

        Args:
            name: of its phase.
            model: that is computed.
            lower: returns the lowered program.
            layout: of its batch.
            own: its arguments beside the batch, with shardings.
            times: how often it runs in a step.
            gradients: bytes of the accumulated gradients on a device; None without a backward pass.
        """
        remat = None if gradients is None else self.config.remat
        more = 0.0
        if self.is_fused(model):
            more = kernel_flops(model.config, layout.rows, layout.row_length, remat) / self.mesh.size
        _, measured = compile_measured(lower, options_of(self.mesh, self.options), more_flops=more)
        batch = max(0.0, measured.arguments - bytes_on_device(own))
        shape = layout.rows, layout.row_length, layout.prompts_are_shared
        return Work(name, measured, times, batch, float(gradients or 0), *shape)


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
        hf_config: of the policy, whose sizes the critic has.
    """
    config: PPOConfig = learner.config
    policy, model, mesh = learner.policy, learner.policy.model, learner.mesh
    total = config.num_steps * config.updates_per_step
    optimizer, _ = config.optimizer.build(total_updates=total)
    whole = host_batch(config, lengths, has_token_advantages=True, has_values=True)
    layout = online_layout(config, model, mesh, _minibatch(whole, config))
    of_all = online_layout(config, model, mesh, as_rollout(whole))
    parts, times, dtype = config.num_minibatches * config.micro_batches, config.updates_per_step, "gradient_dtype"
    if config.critic == "head":
        head: Any = jax.ShapeDtypeStruct((policy.config.hidden_size, 1), jnp.float32)
        state = learner.state({"policy": policy.params, "value": {"kernel": head}}, optimizer, "weights", "optimizer")
        note_reference(learner)
        outputs = partial(policy_and_values, model, temperature=config.sampling.temperature)
        prepared = model.preparation.under("policy")
        passes = 1 + (config.old_log_probs == "recompute") + config.has_reference  # values, too
        work = learner.log_probs(
            "log-probs and values",
            policy,
            lambda params, rollout: outputs(params, rollout)[:2],
            state.params,
            of_all,
            times=passes,
            parts=parts,
            preparation=prepared,
        )
        loss_fn = shared_trunk_loss(config, model, critic_alone=False)
        return [
            work,
            learner.update(
                "update",
                policy,
                loss_fn,
                state,
                optimizer,
                layout,
                times=times,
                gradient_dtype=config.optimizer.gradient_dtype,
                preparation=prepared,
            ),
        ]
    state = learner.state(policy.params, optimizer, "weights", "optimizer")
    critic = planned_model(config, decoder_of(config, hf_config, scalar_head=True), mesh)
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
        gradients = getattr(settings, dtype)
        works.append(
            learner.update(
                name, trained, loss_fn, its_state, its_optimizer, layout, times=times, gradient_dtype=gradients
            )
        )
    return works


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
            works.append(
                learner._work("reference (before the first step)", policy, lower, layout, policy.params, 0, None)
            )
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
