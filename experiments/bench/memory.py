"""Memory of a training step of GRPO, PPO, DPO and SFT by the compiler's analysis, without allocating weights.

Compiles each update at the shapes of a model with 7 billion parameters and reads the memory of state, batch, temporary
arrays and further models. Prints one JSON line.

    python experiments/bench/memory.py --topology v5p:2x2x2            # by the TPU compiler; needs no TPU
    python experiments/bench/memory.py --shape small                   # the toy model, by this device's compiler
    python experiments/bench/memory.py --config path/to/config.json    # any other model

With the CPU compiler remat saves almost nothing, so its results for large models do not carry over to other devices.
The TPU compiler comes with the extra "tpu" and takes some minutes for each update.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, Sharding

from grpo_jax import loss
from grpo_jax.config.run import require_at_least
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.loop.checks import check_divides
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import WITH_REWARD_MODEL
from grpo_jax.models import build_model, from_hf_config, param_shapes
from grpo_jax.models.hf_config import with_scalar_head
from grpo_jax.sharding import BATCH, make_mesh, param_shardings, replicated
from grpo_jax.tasks.toy_config import HF_CONFIG
from grpo_jax.train import (
    LossFn,
    completion_log_probs,
    completion_values,
    make_train_step,
    packed_log_probs,
    pair_log_probs,
)
from grpo_jax.types import Batch, Model, Packed, Pairs, Params, TrainState

QWEN2_5_7B: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
}
SHAPES = {"7b": QWEN2_5_7B, "small": HF_CONFIG}
METHODS = ("grpo", "ppo", "dpo", "sft")
ONLINE = ("grpo", "ppo")
"""Methods that sample completions, and so may have a reward model and a reference policy."""


@dataclass(frozen=True)
class Config:
    """Model, batch and methods."""

    shape: Literal["7b", "small"] = "7b"
    """The model: Qwen2.5-7B or the toy model."""
    config: Path | None = None
    """A config.json of another model."""
    rows: int = 16
    """Sequences per micro-batch over all devices; half as many pairs."""
    num_micro_batches: int = 4
    """Micro-batches per update."""
    max_prompt_length: int = 512
    """In tokens."""
    max_completion_length: int = 1024
    """In tokens."""
    remat: bool = True
    """Recompute activations in the backward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights, gradients and optimizer moments are float32."""
    topology: str | None = None
    """Compile for a TPU topology such as v5p:2x2x2, with weights, moments and rows sharded over all its devices.
    Default: one device of this machine."""
    methods: tuple[Literal[METHODS], ...] = METHODS  # pyright: ignore[reportInvalidTypeForm]
    """Methods to compare."""

    def __post_init__(self):
        require_at_least(self, rows=2, num_micro_batches=1, max_prompt_length=1, max_completion_length=1)
        if self.rows % 2:
            raise ValueError(f"rows is {self.rows}; it must be even, because DPO has two sequences per pair")

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """Hugging Face config of the model in effect."""
        return SHAPES[self.shape] if self.config is None else json.loads(self.config.read_text())

    @property
    def mesh(self) -> Mesh:
        """The devices to compile for, with everything sharded by fsdp."""
        if self.topology is None:
            return make_mesh(devices=jax.devices()[:1])
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the compiler runs without a TPU
        devices = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        return make_mesh(data=1, fsdp=len(devices), devices=devices)


@dataclass(frozen=True)
class Memory:
    """Memory of a method's update over all devices.

    Attributes:
        copies: copies of the model's weights, including reward model and critic.
        state_bytes: all weights and optimizer moments.
        peak_bytes: ``state_bytes`` plus the temporary memory and batch of the largest update.
    """

    copies: float
    state_bytes: int
    peak_bytes: int


def main(config: Config) -> None:
    memory = {}
    for name in config.methods:
        memory |= (step := step_memory(config, name))
        print(f"{name}: {step}", file=sys.stderr)  # compiling for another device takes minutes
    devices = config.mesh.devices
    result = {
        "bench": "memory",
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "parameters": size_of(param_shapes(from_hf_config(config.hf_config))),
        "tokens_at_once": config.rows * (config.max_prompt_length + config.max_completion_length),
        "dtype": config.dtype,
        **{name: asdict(step) for name, step in memory.items()},
    }
    for suffix in ("", WITH_REWARD_MODEL):
        grpo, ppo = memory.get(f"grpo{suffix}"), memory.get(f"ppo{suffix}")
        if grpo and ppo:
            result[f"grpo_of_ppo{suffix}"] = round(grpo.peak_bytes / ppo.peak_bytes, 3)
    print(json.dumps(result))


def step_memory(config: Config, method: str) -> dict[str, Memory]:
    """Memory of a method by its name, with rule-based rewards and without KL.

    Online methods are also measured with a reward model and a reference policy, under the suffix ``WITH_REWARD_MODEL``.
    PPO's critic is a separate model with the policy's shapes except for its head. DPO's reference is in memory only
    before the first step, so it is not counted.

    Args:
        config: model and batch.
        method: one of ``METHODS``.

    Raises:
        ValueError: the rows do not divide over the devices.
        RuntimeError: the compiler gives no memory analysis.
    """
    decoder, scoring = from_hf_config(config.hf_config), from_hf_config(with_scalar_head(config.hf_config))
    mesh = config.mesh
    check_divides(config.rows // 2 if method == "dpo" else config.rows, mesh, f"the rows of a micro-batch of {method}")
    build = partial(build_model, dtype=jnp.dtype(config.dtype).type, remat=config.remat)
    model, critic_model = build(decoder), build(scoring)
    weights, scalar_head_weights = param_shapes(decoder), param_shapes(scoring)
    optimizer, _ = OptimizerConfig().build(total_updates=100)
    make_step = partial(make_train_step, optimizer=optimizer, num_micro_batches=config.num_micro_batches)
    actor = state_of(weights, optimizer)
    critic = state_of(scalar_head_weights, optimizer)

    updates: list[tuple[LossFn, TrainState, Callable[[], Any]]]
    if method == "grpo":
        updates = [(policy_loss(model, config, "grpo"), actor, partial(policy_batch, config, with_values=False))]
    elif method == "ppo":
        batch = partial(policy_batch, config, with_values=True)
        updates = [(policy_loss(model, config, "ppo"), actor, batch), (critic_loss(critic_model), critic, batch)]
    elif method == "dpo":
        updates = [(preference_loss(model), actor, partial(pairs, config))]
    else:
        updates = [(sft_loss(model), actor, partial(packed, config))]

    states = [state for _, state, _ in updates]
    total = sum(map(bytes_of, states))
    peak = max(
        total - bytes_of(state) + program_bytes(make_step(loss_fn), state, jax.eval_shape(batch), optimizer, mesh)
        for loss_fn, state, batch in updates
    )
    memory = {}
    for suffix, frozen in (("", []), (WITH_REWARD_MODEL, [weights, scalar_head_weights])):
        if not frozen or method in ONLINE:
            trees, more = [*(state.params for state in states), *frozen], sum(map(bytes_of, frozen))
            copies = sum(map(size_of, trees)) / size_of(weights)
            memory[method + suffix] = Memory(round(copies, 2), total + more, peak + more)
    return memory


def program_bytes(
    step: Callable[[TrainState, Any], Any],
    state: TrainState,
    batch: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> int:
    """Peak memory of an update with its state, over all devices."""
    everywhere, shardings = replicated(mesh), param_shardings(state.params, mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    placed = {"step": everywhere, "params": shardings, "opt_state": moments}  # flattened by field name, as a TrainState
    shapes, form = jax.tree.flatten(state)
    state = form.unflatten(
        put(shape, sharding) for shape, sharding in zip(shapes, jax.tree.leaves(placed), strict=True)
    )
    batch = jax.tree.map(partial(put, sharding=NamedSharding(mesh, BATCH)), batch)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None)).lower(state, batch).compile()
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the compiler for {mesh.devices.flat[0].device_kind} gives no memory analysis")
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return mesh.size * (kept + analysis.temp_size_in_bytes)


def put(shape: Any, sharding: Sharding) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of the train state for parameter shapes ``params``."""
    return jax.eval_shape(lambda params: TrainState(jnp.int32(0), params, optimizer.init(params)), params)


def policy_loss(model: Model, config: Config, name: str) -> LossFn:
    return PolicyLossConfig(loss=name).build(
        partial(completion_log_probs, model),
        max_completion_length=config.max_completion_length,
        sampler_alters_policy=False,
    )


def critic_loss(model: Model) -> LossFn:
    def value_loss(params: Params, batch: Batch):
        assert batch.returns is not None
        values = completion_values(model, params, batch)
        return loss.value_loss(values, batch.returns, batch.loss_mask, old_values=batch.old_values, epsilon=0.2)

    return value_loss


def preference_loss(model: Model) -> LossFn:
    def dpo_loss(params: Params, batch: Pairs):
        log_probs = pair_log_probs(model, params, batch)
        return loss.dpo_loss(log_probs, batch.completion_mask, ref_log_probs=batch.ref_log_probs, beta=0.1)

    return dpo_loss


def sft_loss(model: Model) -> LossFn:
    def supervised_loss(params: Params, batch: Packed):
        return loss.supervised_loss(packed_log_probs(model, params, batch), batch.loss_mask), {}

    return supervised_loss


def policy_batch(config: Config, *, with_values: bool) -> Batch:
    """A batch of GRPO, or of PPO ``with_values``; both with old log-probabilities."""
    B, P, T = config.rows * config.num_micro_batches, config.max_prompt_length, config.max_completion_length
    per_token = jnp.zeros((B, T)) if with_values else None
    return Batch(
        prompt_ids=jnp.zeros((B, P), jnp.int32),
        prompt_mask=jnp.ones((B, P), bool),
        completion_ids=jnp.zeros((B, T), jnp.int32),
        completion_mask=jnp.ones((B, T), bool),
        loss_mask=jnp.ones((B, T), bool),
        advantages=jnp.zeros(B) if per_token is None else per_token,
        rollout_log_probs=jnp.zeros((B, T)),
        old_log_probs=jnp.zeros((B, T)),
        old_values=per_token,
        returns=per_token,
    )


def pairs(config: Config) -> Pairs:
    B, P, T = config.rows // 2 * config.num_micro_batches, config.max_prompt_length, config.max_completion_length
    return Pairs(
        prompt_ids=jnp.zeros((B, P), jnp.int32),
        prompt_mask=jnp.ones((B, P), bool),
        completion_ids=jnp.zeros((B, 2, T), jnp.int32),
        completion_mask=jnp.ones((B, 2, T), bool),
        ref_log_probs=jnp.zeros((B, 2)),
    )


def packed(config: Config) -> Packed:
    shape = config.rows * config.num_micro_batches, config.max_prompt_length + config.max_completion_length
    return Packed(
        token_ids=jnp.zeros(shape, jnp.int32),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.zeros(shape, jnp.int32),
        loss_mask=jnp.ones(shape, bool),
    )


def size_of(tree: Any) -> int:
    """Number of elements of all arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
