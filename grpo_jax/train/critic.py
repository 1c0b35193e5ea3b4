"""A critic without a model of its own: a small MLP on the policy's hidden states."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from grpo_jax.loss import value_loss
from grpo_jax.sampling import check_key
from grpo_jax.sharding import place, replicated
from grpo_jax.train.forward import Sequences, completion_states
from grpo_jax.train.step import init_state, make_train_step, split_rows
from grpo_jax.types import Mean, Metrics, Model, Params, TrainState

WIDTH = 128


class CriticBatch(NamedTuple):
    """Training data of an ``MLPCritic``: hidden states, their target values, and True at the tokens to train on."""

    states: Float[Array, "B T D"]
    returns: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


class MLPCritic:
    """A two-layer MLP that predicts values from the policy's last hidden states, without a gradient into the policy.

    Hidden states are computed once per step for all completions and kept for several passes of training, which cost
    ``128 (D + 1)`` multiplications per token each; they take B * T * D numbers of memory.

    Args:
        model: the policy's decoder.
        hidden_size: D, the width of the policy's hidden states.
        optimizer: any optax transformation.
        num_micro_batches: equal parts of the completions that are computed in turn, to save memory.
        num_epochs: passes over the completions of each step.
        seed: of the initial weights.
        mesh: devices that the weights are replicated over.
        skip_grad_norm: as for ``make_train_step``.

    Attributes:
        initial_state: the state before any update.
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
        skip_grad_norm: float | None = None,
    ):
        self.num_epochs = num_epochs
        params = place(init_mlp(jax.random.key(seed), hidden_size), replicated(mesh))
        self.initial_state = init_state(params, optimizer, with_reference=False, replicated=replicated(mesh))
        self._states = jax.jit(partial(micro_batched_states, model, num_micro_batches=num_micro_batches))
        self._values = jax.jit(mlp_values)
        self._train_step = make_train_step(
            mlp_loss, optimizer, num_micro_batches=num_micro_batches, skip_grad_norm=skip_grad_norm
        )

    def states_and_values(
        self, state: TrainState, policy_params: Params, sequences: Sequences
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T"]]:
        """Hidden states before the completion tokens, and their values.

        Args:
            state: the critic's.
            policy_params: parameters of the policy.
            sequences: B prompts with completions.
        """
        hidden = self._states(policy_params, sequences)
        return hidden, self._values(state.params, hidden)

    def update(self, state: TrainState, batch: CriticBatch) -> tuple[TrainState, dict[str, float]]:
        """The state after ``num_epochs`` passes over a batch, and metrics as ``value/...``.

        They are of the last pass, or of the last one whose update was bad and not applied.

        Args:
            state: the critic's; donated.
            batch: hidden states and returns of a step's completions.
        """
        passes = []
        for _ in range(self.num_epochs):
            state, metrics = self._train_step(state, batch)
            passes.append(metrics)
        metrics = next((metrics for metrics in reversed(passes) if metrics["skipped_updates"]), passes[-1])
        return state, {f"value/{name.removeprefix('value/')}": float(value) for name, value in metrics.items()}


def init_mlp(key: Key[Array, ""], hidden_size: int) -> Params:
    """Initial weights; those of the last layer are 0, so that every value is 0.

    Args:
        key: random key.
        hidden_size: D, the width of the input.
    """
    check_key(key)
    scale = hidden_size**-0.5
    return {
        "in": scale * jax.random.normal(key, (hidden_size, WIDTH), jnp.float32),
        "bias": jnp.zeros((WIDTH,), jnp.float32),
        "out": jnp.zeros((WIDTH,), jnp.float32),
    }


def mlp_values(params: Params, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """``gelu(states W + b) v``, the value at each hidden state.

    Args:
        params: as ``init_mlp`` makes them.
        states: hidden states, cast to float32.
    """
    return jax.nn.gelu(states.astype(jnp.float32) @ params["in"] + params["bias"][None, None]) @ params["out"]


def mlp_loss(params: Params, batch: CriticBatch) -> tuple[Mean, Metrics]:
    """``loss.value_loss`` of the MLP's values.

    Args:
        params: as ``init_mlp`` makes them.
        batch: hidden states and their targets.
    """
    return value_loss(mlp_values(params, batch.states), batch.returns, batch.mask)


def micro_batched_states(
    model: Model, params: Params, sequences: Sequences, *, num_micro_batches: int
) -> Float[Array, "B T D"]:
    """``completion_states``, computed in equal parts of the batch one after the other.

    Args:
        model: the policy's decoder.
        params: the policy's parameters.
        sequences: B prompts with completions.
        num_micro_batches: number of parts; divides B.
    """
    states_of = partial(completion_states, model, model.preparation.prepare(params))
    parts = jax.lax.map(states_of, split_rows(sequences, num_micro_batches))
    return jnp.swapaxes(parts, 0, 1).reshape(*sequences.completion_ids.shape, -1)
