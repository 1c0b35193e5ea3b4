"""Jitted train steps ``(state, batch) -> (state, metrics)`` from loss functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Sharding
from jaxtyping import Array, Float, Key

from grpo_jax.sampling import check_key
from grpo_jax.train.forward import Sequences, Tokens
from grpo_jax.train.packing import in_batch_order, micro_batch
from grpo_jax.train.trainable import join, trainable_part
from grpo_jax.types import Batch, Max, Mean, Metrics, PackedBatch, Params, Rollout, TrainState

LossFn = Callable[[Params, Any], tuple[Mean, Metrics]]
"""``(params, batch) -> (loss, metrics)``."""


def make_log_prob_fn(
    log_probs: Callable[[Params, Sequences], tuple[Tokens, Tokens]], *, num_micro_batches: int = 1
) -> Callable[[Params, Rollout | PackedBatch], Tokens]:
    """A jitted ``(params, rollout) -> log-probabilities [B, T]`` of frozen policies: old and reference.

    Of a ``PackedBatch``, the micro-batches that it has are computed, and those of completions without tokens are 0.

    Args:
        log_probs: ``(params, rollout) -> (log-probabilities, entropy)``, such as a ``partial`` of
            ``completion_log_probs``.
        num_micro_batches: equal parts of a padded batch that are computed in turn, to save memory.

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    @jax.jit
    def frozen_log_probs(params, rollout):
        if isinstance(rollout, PackedBatch):

            def one(index, out):
                part = micro_batch(rollout, index)
                assert part.rows is not None
                return in_batch_order(log_probs(params, part)[0], part.rows, out)

            return jax.lax.fori_loop(0, rollout.count, one, jnp.zeros(rollout.sequences.completion_ids.shape))
        parts = split_rows(rollout, num_micro_batches)
        stacked = jax.lax.map(lambda part: log_probs(params, part)[0], parts)
        return jnp.swapaxes(stacked, 0, 1).reshape(rollout.completion_ids.shape)

    return frozen_log_probs


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, num_micro_batches: int = 1
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A jitted ``(state, batch) -> (state, metrics)`` that applies one update and donates the old state.

    Parameters with LoRA adapters are trained as ``trainable_part`` says, all others as a whole. The new state has the
    shardings of the old one. Called inside another jitted function, the step is traced into it.

    Gradients are accumulated over ``num_micro_batches`` parts of the batch, or over the micro-batches that a
    ``PackedBatch`` has. Sums and counts are added over the parts and divided at the end, so the update does not depend
    on the number of parts or the lengths of their sequences.

    Args:
        loss_fn: ``(params, batch) -> (loss, metrics)`` with the loss as a ``Mean`` and metrics as a dict of ``Mean`` or
            ``Max``. ``batch`` may be any pytree of arrays whose first axis is the batch; of a ``PackedBatch`` it is a
            ``Batch`` with ``rows``.
        optimizer: any optax transformation.
        num_micro_batches: more parts take less memory and more time.

    Returns:
        The step. Its metrics are scalars: those of ``loss_fn``, ``loss`` and ``grad_norm`` (before clipping).

    Raises:
        TypeError: at trace time, when loss_fn returns something else, such as a scalar.
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def loss_sum(trainable, params, batch):
        output = loss_fn(join(trainable, params), batch)
        check_loss_output(output)
        loss, metrics = output
        return loss.sum, {**metrics, "loss": loss}

    def micro_step(params, grads, batch):
        new_grads, metrics = jax.grad(loss_sum, has_aux=True)(trainable_part(params), params, batch)
        return jax.tree.map(lambda sum, new: sum + new.astype(jnp.float32), grads, new_grads), metrics

    def over_packed(params, zeros, packed):
        def one(index, carry):
            grads, merged = carry
            grads, metrics = micro_step(params, grads, micro_batch(packed, index))
            return grads, {name: _merge(merged[name], metric) for name, metric in metrics.items()}

        _, metrics = jax.eval_shape(micro_step, params, zeros, jax.eval_shape(micro_batch, packed, 0))
        nothing = {name: _nothing(metric) for name, metric in metrics.items()}
        return jax.lax.fori_loop(0, packed.count, one, (zeros, nothing))

    def step(state: TrainState, batch):
        trainable = trainable_part(state.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
        if isinstance(batch, PackedBatch):
            grads, merged = over_packed(state.params, zeros, batch)
        else:
            parts = split_rows(batch, num_micro_batches)
            grads, metrics = jax.lax.scan(lambda grads, part: micro_step(state.params, grads, part), zeros, parts)
            merged = {name: metric.reduce() for name, metric in metrics.items()}
        loss = merged["loss"]
        assert isinstance(loss, Mean)
        grads = jax.tree.map(lambda g: g / jnp.where(loss.count > 0, loss.count, 1), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer counters with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
            params = join(optax.apply_updates(trainable, updates), state.params)
        scalars = {name: metric.value for name, metric in merged.items()}
        scalars["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state, state.ref_params), scalars

    @cache
    def jitted(treedef, shardings):
        # Otherwise the compiler may choose other shardings, for which every later program would be compiled again.
        return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(treedef, shardings), None))

    def train_step(state: TrainState, batch):
        leaves, treedef = jax.tree.flatten(state)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return step(state, batch)
        return jitted(treedef, tuple(leaf.sharding for leaf in leaves))(state, batch)

    return train_step


def _merge(a: Mean | Max, b: Mean | Max) -> Mean | Max:
    return jax.tree.map(lambda *parts: jnp.stack(parts), a, b).reduce()


def _nothing(metric: Mean | Max) -> Mean | Max:
    """The mean or maximum of no entries."""
    return jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf if isinstance(metric, Max) else 0, x.dtype), metric)


def split_rows(batch, parts: int):
    """Split the first axis of every array: ``[B, ...] -> [parts, B / parts, ...]``.

    Part i has rows i, i + parts, ..., so that rows that are sharded over devices are not moved.

    Args:
        batch: any pytree of arrays whose first axis is the batch.
        parts: number of parts.

    Raises:
        ValueError: when ``parts`` does not divide the number of rows.
    """

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} sequences does not divide into {parts} equal parts")
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def shuffled_minibatches(batch: Batch, key: Key[Array, ""], num_minibatches: int) -> list[Batch]:
    """Minibatches of randomly permuted rows; a single minibatch is the batch itself, in its order.

    Args:
        batch: the sequences of a step.
        key: random key of the permutation.
        num_minibatches: number of equal parts.

    Raises:
        TypeError: the key is an old-style ``jax.random.PRNGKey``.
        ValueError: when ``num_minibatches`` does not divide the number of rows.
    """
    check_key(key)
    if num_minibatches == 1:
        return [batch]
    order = jax.random.permutation(key, batch.advantages.shape[0])
    parts = split_rows(jax.tree.map(lambda x: x[order], batch), num_minibatches)
    return [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(num_minibatches)]


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_reference: bool, replicated: Sharding
) -> TrainState:
    """The state before the first update, with optimizer state as ``opt_state_shardings`` lays it out.

    With LoRA adapters, the optimizer's state and the reference policy are of ``trainable_part(params)`` alone.

    Args:
        params: on their devices; the first train step donates them.
        optimizer: of the train step.
        with_reference: whether to keep a copy of the parameters as the reference policy.
        replicated: sharding of the state's scalars.
    """
    trainable = trainable_part(params)
    moments = opt_state_shardings(
        jax.eval_shape(optimizer.init, trainable), trainable, jax.tree.map(lambda x: x.sharding, trainable), replicated
    )
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(trainable),
        ref_params=jax.tree.map(jnp.copy, trainable) if with_reference else None,
    )


def opt_state_shardings(opt_state: Any, params: Params, shardings: Params, replicated: Sharding) -> Any:
    """A sharding for each array of an optimizer's state, of any optax transformation.

    An array whose path ends in the path of a parameter of the same shape, such as a moment, has the parameter's
    sharding. All others, such as counters and Adafactor's rows and columns, are replicated.

    Args:
        opt_state: arrays or ``ShapeDtypeStruct``.
        params: the parameters, in the same form.
        shardings: of the parameters.
        replicated: sharding of the other arrays.
    """
    of_param = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> Sharding:
        for start in range(len(path)):
            shape, sharding = of_param.get(path[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(of_leaf, opt_state)


def with_fresh_reference(state: TrainState) -> TrainState:
    """The state with a copy of its current parameters as the reference policy (reference refresh)."""
    return TrainState(state.step, state.params, state.opt_state, jax.tree.map(jnp.copy, trainable_part(state.params)))


def reference_params(state: TrainState) -> Params:
    """The reference policy's parameters; of a state with LoRA adapters, with the frozen ones.

    Raises:
        ValueError: the state has no reference.
    """
    if state.ref_params is None:
        raise ValueError("the state has no reference: init_state(..., with_reference=True) keeps one")
    return join(state.ref_params, state.params)


def check_loss_output(output: Any) -> None:
    """Check what a ``LossFn`` returned.

    Raises:
        TypeError: it is not a ``Mean`` and a dict of ``Mean`` and ``Max``.
    """

    def kind(x):
        return "an array" if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else f"a {type(x).__name__}"

    wanted = "(loss, metrics): a Mean(sum, count), such as loss.token_mean(x, mask), and a dict of Mean or Max"
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(f"loss_fn returned {kind(output)}; it must return {wanted}")
    loss, metrics = output
    if not isinstance(loss, Mean) or not isinstance(metrics, Mapping):
        raise TypeError(f"loss_fn returned {kind(loss)} and {kind(metrics)}; it must return {wanted}")
    for name, metric in metrics.items():
        if not isinstance(metric, Mean | Max):
            raise TypeError(f"loss_fn returned {kind(metric)} as the metric {name!r}; it must return {wanted}")
