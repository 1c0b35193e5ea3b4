"""Memory and work of an update of each method by the compiler's analysis, without allocating weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import loss
from grpo_jax.config.compare import WITH_REWARD_MODEL
from grpo_jax.config.run import check_divides
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.loop.compiled_updates import Program, compile_update, program_bytes, state_shapes
from grpo_jax.loop.losses import demonstration_loss
from grpo_jax.models import LoRA, add_adapters, build_model, from_hf_config, param_shapes
from grpo_jax.models.hf_config import with_scalar_head
from grpo_jax.models.kernels import AttentionName
from grpo_jax.models.remat import Remat
from grpo_jax.sharding import num_row_shards
from grpo_jax.train import (
    LossFn,
    completion_log_probs,
    completion_values,
    make_train_step,
    pair_log_probs,
    trainable_part,
)
from grpo_jax.train.packing import pack_on_host
from grpo_jax.types import Batch, Model, Packed, PackedBatch, Packing, Pairs, Params, TrainState

METHODS = ("grpo", "ppo", "dpo", "sft")
ONLINE = ("grpo", "ppo")
"""Methods that sample completions, and so may have a reward model and a reference policy."""


@dataclass(frozen=True, kw_only=True)
class UpdateShapes:
    """Model and batch of an update.

    Attributes:
        hf_config: the model's Hugging Face config.
        rows: sequences per micro-batch over all devices; half as many pairs.
        num_micro_batches: micro-batches per update.
        max_prompt_length: in tokens.
        max_completion_length: in tokens.
        remat: which activations the backward pass recomputes, as in ``build_model``.
        dtype: precision of the computation; weights and optimizer moments are float32.
        attention: kernel, as in ``build_model``.
        scan_layers: as in ``build_model``.
        gradient_dtype: as in ``make_train_step``.
        packing: layout of the completions of GRPO and PPO, as in ``OnlineConfig``.
        group_size: completions of each prompt.
        lora: adapters to train in place of the model; not for PPO's critic.
        offload_optimizer: whether its state lies in the host's memory.
    """

    hf_config: Mapping[str, Any]
    rows: int
    num_micro_batches: int
    max_prompt_length: int
    max_completion_length: int
    remat: Remat
    dtype: str
    attention: AttentionName = "auto"
    scan_layers: bool | None = None
    gradient_dtype: str = "float32"
    packing: Literal["auto", "shared", "separate", "none"]
    group_size: int
    lora: LoRA = field(default_factory=LoRA)
    offload_optimizer: bool = False

    def packing_of(self, model: Model) -> Packing | None:
        """The packing in effect."""
        if self.packing == "auto":
            return None if self.dtype == "float32" else model.packing
        return None if self.packing == "none" else self.packing


@dataclass(frozen=True)
class Memory:
    """Memory of a method's update over all devices.

    Attributes:
        copies: copies of the model's weights, including reward model and critic.
        state_bytes: all weights and optimizer moments, but for offloaded ones.
        peak_bytes: ``state_bytes`` plus the temporary memory and batch of the largest update.
    """

    copies: float
    state_bytes: int
    peak_bytes: int


def update_memory(
    shapes: UpdateShapes,
    method: str,
    mesh: Mesh,
    *,
    more_options: Mapping[str, Any] | None = None,
    on_program: Callable[[Program], None] | None = None,
) -> dict[str, Memory]:
    """Memory of a method's update by its name, with rule-based rewards and without KL.

    Online methods are also measured with a reward model and a reference policy, under the suffix ``WITH_REWARD_MODEL``.
    PPO's critic is a separate model with the policy's shapes except for its head. DPO's reference is in memory only
    before the first step, so it is not counted.

    Args:
        shapes: model and batch.
        method: one of ``METHODS``.
        mesh: the devices to compile for.
        more_options: options of the compiler, in addition to those of a train step.
        on_program: called with each compiled update.

    Raises:
        ValueError: the rows do not divide over the devices.
        RuntimeError: the compiler gives no memory analysis.
    """
    decoder, scoring = from_hf_config(shapes.hf_config), from_hf_config(with_scalar_head(shapes.hf_config))
    check_divides(shapes.rows // 2 if method == "dpo" else shapes.rows, mesh, f"the rows of a micro-batch of {method}")
    build = partial(
        build_model,
        dtype=jnp.dtype(shapes.dtype).type,
        remat=shapes.remat,
        attention=shapes.attention,
        mesh=mesh,
        scan_layers=shapes.scan_layers,
    )
    model, critic_model = build(decoder, lora=shapes.lora), build(scoring)
    weights, scalar_head_weights = param_shapes(decoder), param_shapes(scoring)
    policy = weights
    if shapes.lora.is_used:
        adapted = partial(add_adapters, config=decoder, lora=shapes.lora, dtype=jnp.dtype(shapes.dtype).type)
        policy = jax.eval_shape(lambda params, key: adapted(params, key=key), weights, jax.random.key(0))
    optimizer, _ = OptimizerConfig().build(total_updates=100)
    make_step = partial(
        make_train_step,
        optimizer=optimizer,
        num_micro_batches=shapes.num_micro_batches,
        gradient_dtype=shapes.gradient_dtype,
    )
    actor = state_shapes(policy, optimizer)
    critic = state_shapes(scalar_head_weights, optimizer)

    updates: list[tuple[LossFn, Model, TrainState, Callable[[], Any]]]
    if method == "grpo":
        batch = partial(_policy_batch, shapes, model, mesh, with_values=False)
        updates = [(_policy_loss(model, shapes, "grpo"), model, actor, batch)]
    elif method == "ppo":
        batch = partial(_policy_batch, shapes, model, mesh, with_values=True)
        updates = [
            (_policy_loss(model, shapes, "ppo"), model, actor, batch),
            (_critic_loss(critic_model), critic_model, critic, batch),
        ]
    elif method == "dpo":
        updates = [(_preference_loss(model), model, actor, partial(_pairs, shapes))]
    else:
        updates = [(demonstration_loss(model), model, actor, partial(_packed, shapes))]

    states = [state for _, _, state, _ in updates]
    on_devices = partial(_device_bytes, is_offloaded=shapes.offload_optimizer)
    total, peak = sum(map(on_devices, states)), 0
    for loss_fn, trained, state, batch in updates:
        step = make_step(loss_fn, preparation=trained.preparation)
        program = compile_update(
            step, state, batch(), mesh, offload_optimizer=shapes.offload_optimizer, more_options=more_options
        )
        if on_program is not None:
            on_program(program)
        peak = max(peak, total - on_devices(state) + mesh.size * program_bytes(program.compiled))
    memory = {}
    reference = trainable_part(policy)  # with adapters, the rest is that of the policy
    for suffix, frozen in (("", []), (WITH_REWARD_MODEL, [reference, scalar_head_weights])):
        if not frozen or method in ONLINE:
            trees, more = [*(state.params for state in states), *frozen], sum(map(_bytes_of, frozen))
            copies = sum(map(size_of, trees)) / size_of(policy)
            memory[method + suffix] = Memory(round(copies, 2), total + more, peak + more)
    return memory


def _policy_loss(model: Model, shapes: UpdateShapes, name: str) -> LossFn:
    return PolicyLossConfig(loss=name).build(
        partial(completion_log_probs, model),
        max_completion_length=shapes.max_completion_length,
        sampler_alters_policy=False,
    )


def _critic_loss(model: Model) -> LossFn:
    def value_loss(params: Params, batch: Batch):
        assert batch.returns is not None
        values = completion_values(model, params, batch)
        return loss.value_loss(values, batch.returns, batch.loss_mask, old_values=batch.old_values, epsilon=0.2)

    return value_loss


def _preference_loss(model: Model) -> LossFn:
    def dpo_loss(params: Params, batch: Pairs):
        log_probs = pair_log_probs(model, params, batch)
        return loss.dpo_loss(log_probs, batch.completion_mask, ref_log_probs=batch.ref_log_probs, beta=0.1)

    return dpo_loss


def _policy_batch(shapes: UpdateShapes, model: Model, mesh: Mesh, *, with_values: bool) -> Batch | PackedBatch:
    """A batch of GRPO, or of PPO ``with_values``, of the greatest lengths; both with old log-probabilities."""
    B, P, T = shapes.rows * shapes.num_micro_batches, shapes.max_prompt_length, shapes.max_completion_length
    per_token = np.zeros((B, T), np.float32)
    prompts = np.repeat(np.arange(-(-B // shapes.group_size)), shapes.group_size)[:B]
    batch = Batch(
        prompt_ids=np.broadcast_to(prompts[:, None], (B, P)).astype(np.int32),  # pyright: ignore[reportArgumentType]
        prompt_mask=np.ones((B, P), bool),  # pyright: ignore[reportArgumentType]
        completion_ids=np.zeros((B, T), np.int32),  # pyright: ignore[reportArgumentType]
        completion_mask=np.ones((B, T), bool),  # pyright: ignore[reportArgumentType]
        loss_mask=np.ones((B, T), bool),  # pyright: ignore[reportArgumentType]
        advantages=per_token if with_values else np.zeros(B, np.float32),  # pyright: ignore[reportArgumentType]
        rollout_log_probs=per_token,  # pyright: ignore[reportArgumentType]
        old_log_probs=per_token,  # pyright: ignore[reportArgumentType]
        old_values=per_token if with_values else None,  # pyright: ignore[reportArgumentType]
        returns=per_token if with_values else None,  # pyright: ignore[reportArgumentType]
    )
    packing = shapes.packing_of(model)
    if packing is None:
        return batch
    devices = num_row_shards(mesh)
    return pack_on_host(
        batch,
        packing,
        micro_batch_tokens=shapes.rows * (P + T) // devices,
        devices=devices,
        row_length=None,
        attention_length=model.attention_length,
    )


def _pairs(shapes: UpdateShapes) -> Pairs:
    B, P, T = shapes.rows // 2 * shapes.num_micro_batches, shapes.max_prompt_length, shapes.max_completion_length
    return Pairs(
        prompt_ids=jnp.zeros((B, P), jnp.int32),
        prompt_mask=jnp.ones((B, P), bool),
        completion_ids=jnp.zeros((B, 2, T), jnp.int32),
        completion_mask=jnp.ones((B, 2, T), bool),
        ref_log_probs=jnp.zeros((B, 2)),
    )


def _packed(shapes: UpdateShapes) -> Packed:
    shape = shapes.rows * shapes.num_micro_batches, shapes.max_prompt_length + shapes.max_completion_length
    return Packed(
        token_ids=jnp.zeros(shape, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.zeros(shape, jnp.int32),
        loss_mask=jnp.ones(shape, bool),
    )


def size_of(tree: Any) -> int:
    """Number of elements of all arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _device_bytes(state: TrainState, *, is_offloaded: bool) -> int:
    return _bytes_of(replace(state, opt_state=()) if is_offloaded else state)


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
