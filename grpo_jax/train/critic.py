"""A critic without a model of its own: a small head that reads a value from the policy's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from grpo_jax.loss import value_loss
from grpo_jax.sharding import replicated
from grpo_jax.train.forward import completion_states
from grpo_jax.train.step import init_state, make_train_step, split_rows
from grpo_jax.types import Model, Params, Rollout, TrainState

WIDTH = 128


class Features(NamedTuple):
    """What a light critic learns from: hidden states, what they were worth, and which tokens count."""

    states: Float[Array, "B T D"]
    returns: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


class LightCritic:
    """Two small layers on the policy's last hidden states, whose gradient ends there: the policy does not learn for it.

    Hidden states are computed once a step, for all completions, and the head learns from them in a few passes of
    ``128 (D + 1)`` multiplications a token. It holds them meanwhile: rows x tokens x D numbers.

    Args:
        model: the policy's pure functions.
        hidden_size: D, the width of its hidden states.
        optimizer: any optax transformation.
        num_micro_batches: parts that a step's completions are read in.
        num_epochs: passes over each step's completions.
        seed: of its weights.
        mesh: that they are kept whole on.

    Attributes:
        start: its state before any update.
    """

    def __init__(
        self,
        model: Model,
        hidden_size: int,
        *,
        optimizer: optax.GradientTransformation,
        num_micro_batches: int,
        num_epochs: int,
        seed: int,
        mesh: Mesh,
    ):
        self.num_epochs = num_epochs
        on_mesh = replicated(mesh)
        params = jax.device_put(value_head(jax.random.key(seed), hidden_size), on_mesh)
        self.start: TrainState = init_state(params, optimizer, with_reference=False, replicated=on_mesh)
        self._states = jax.jit(partial(states_in_parts, model, num_micro_batches=num_micro_batches))
        self._values = jax.jit(values_of)
        self._step: Callable = make_train_step(head_loss, optimizer, num_micro_batches=num_micro_batches)

    def read(self, critic: TrainState, params: Params, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
        """Hidden states ``[B, T, D]`` of a policy's completions, and values ``[B, T]``."""
        states = self._states(params, rollout)
        return states, self._values(critic.params, states)

    def learn(self, critic: TrainState, features: Features) -> tuple[TrainState, dict[str, float]]:
        """The state after some passes over a step's completions, and the metrics of the last one as ``value/...``."""
        metrics = {}
        for _ in range(self.num_epochs):
            critic, metrics = self._step(critic, features)
        named = {name.removeprefix("value/"): float(value) for name, value in metrics.items()}
        return critic, {f"value/{name}": value for name, value in named.items()}


def value_head(key: Key[Array, ""], hidden_size: int) -> Params:
    """Weights of the head; those of the last layer are 0, so that every value is 0 at first."""
    scale = hidden_size**-0.5
    return {
        "in": scale * jax.random.normal(key, (hidden_size, WIDTH), jnp.float32),
        "bias": jnp.zeros((WIDTH,), jnp.float32),
        "out": jnp.zeros((WIDTH,), jnp.float32),
    }


def values_of(params: Params, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The value that the head reads from each hidden state."""
    return jax.nn.gelu(states.astype(jnp.float32) @ params["in"] + params["bias"][None, None]) @ params["out"]


def head_loss(params: Params, features: Features):
    """The squared distance of values from returns, over the tokens that count."""
    return value_loss(values_of(params, features.states), features.returns, features.mask)


def states_in_parts(model: Model, params: Params, rollout: Rollout, *, num_micro_batches: int) -> jax.Array:
    """Hidden states ``[B, T, D]`` from which each of the completions' tokens was predicted, a part after the other."""
    parts = jax.lax.map(partial(completion_states, model, params), split_rows(rollout, num_micro_batches))
    return jnp.swapaxes(parts, 0, 1).reshape(*rollout.completion_ids.shape, -1)
