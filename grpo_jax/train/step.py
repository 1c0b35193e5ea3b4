"""From a loss function to a jitted train step: state in, state out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Sharding
from jaxtyping import Array, Float, Key

from grpo_jax.train.forward import Tokens
from grpo_jax.types import (
    Batch,
    Mean,
    Metrics,
    Params,
    Rollout,
    TrainState,
)

LossFn = Callable[[Params, Any], tuple[Mean, Metrics]]


def make_log_prob_fn(
    log_probs: Callable[[Params, Rollout], tuple[Tokens, Tokens]], *, num_micro_batches: int = 1
) -> Callable[[Params, Rollout], Tokens]:
    """A jitted ``(params, rollout) -> log-probabilities`` for policies that are not being trained: old and reference.

    Args:
        log_probs: ``(params, sequences) -> (log-probabilities, entropy)``, such as ``completion_log_probs`` of a model.
        num_micro_batches: parts that are computed one after the other, to save memory.

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def score(params, rollout):
        parts = split_rows(rollout, num_micro_batches)
        scores = jax.lax.map(lambda part: log_probs(params, part)[0], parts)
        return jnp.swapaxes(scores, 0, 1).reshape(rollout.completion_ids.shape)

    return jax.jit(score)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, num_micro_batches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A jitted ``(state, batch) -> (state, metrics)`` that applies one update; the state passed in is donated.

    The new state lies on its devices as the old one did. Inside another jitted function it is that function's part.

    The batch is computed in ``num_micro_batches`` parts. Sums and counts are added over the parts and divided at the
    end, so the update is that of the whole batch, whatever the number of parts, and however long the sequences in each.

    Args:
        loss_fn: ``(params, batch) -> (loss, metrics)``, both in the form of ``masked`` that is merged by adding.
            ``batch`` may be any tree of arrays with the sequences first.
        optimizer: any optax transformation.
        num_micro_batches: more parts take less memory and more time.

    Returns:
        The step. Its metrics are scalars: those of ``loss_fn``, ``loss`` and ``grad_norm`` (before any clipping).

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def loss_sum(params, batch):
        loss, metrics = loss_fn(params, batch)
        return loss.sum, {**metrics, "loss": loss}

    def micro_step(params, grads, batch):
        new_grads, metrics = jax.grad(loss_sum, has_aux=True)(params, batch)
        return jax.tree.map(lambda sum, new: sum + new.astype(jnp.float32), grads, new_grads), metrics

    def step(state: TrainState, batch):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        parts = split_rows(batch, num_micro_batches)
        grads, metrics = jax.lax.scan(lambda grads, part: micro_step(state.params, grads, part), zeros, parts)
        merged = {name: metric.reduce() for name, metric in metrics.items()}
        loss = merged["loss"]
        assert isinstance(loss, Mean)
        grads = jax.tree.map(lambda g: g / jnp.where(loss.count > 0, loss.count, 1), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer counters with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        scalars = {name: metric.value for name, metric in merged.items()}
        scalars["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state, state.ref_params), scalars

    @cache
    def jitted(treedef, shardings):
        # Without this the compiler may lay parameters out anew, and every later program would be another one.
        return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(treedef, shardings), None))

    def train_step(state: TrainState, batch):
        leaves, treedef = jax.tree.flatten(state)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return step(state, batch)
        return jitted(treedef, tuple(leaf.sharding for leaf in leaves))(state, batch)

    return train_step


def split_rows(batch, parts: int):
    """Cut every array's rows into ``parts``, stacked: ``[B, ...] -> [parts, B / parts, ...]``.

    KVSegment i takes rows i, i + parts, ...: rows that lie sharded over devices are cut where they lie.

    Raises:
        ValueError: when ``parts`` does not divide the number of rows.
    """

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} sequences does not divide into {parts} equal parts")
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def shuffled_minibatches(batch: Batch, key: Key[Array, ""], num_minibatches: int) -> list[Batch]:
    """Cut a batch into minibatches of rows drawn without replacement; one minibatch is the batch as it is.

    Raises:
        ValueError: when ``num_minibatches`` does not divide the number of rows.
    """
    if num_minibatches == 1:
        return [batch]
    order = jax.random.permutation(key, batch.advantages.shape[0])
    parts = split_rows(jax.tree.map(lambda x: x[order], batch), num_minibatches)
    return [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(num_minibatches)]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_reference: bool, replicated: Sharding
) -> TrainState:
    """A fresh state around ``params`` as they lie on their devices; the optimizer's moments lie as their parameters.

    Args:
        params: taken over: the first train step donates them.
        optimizer: the one that the train step uses.
        with_reference: whether a copy of the parameters is held as the reference policy.
        replicated: where the state's scalars lie.
    """
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(params),
        ref_params=jax.tree.map(jnp.copy, params) if with_reference else None,
    )


def with_fresh_reference(state: TrainState) -> TrainState:
    """The state with a copy of its own parameters as the reference policy."""
    return TrainState(state.step, state.params, state.opt_state, jax.tree.map(jnp.copy, state.params))
