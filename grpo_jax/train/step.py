"""Jitted train steps ``(state, batch) -> (state, metrics)`` from loss functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Key

from grpo_jax.devices import HOST_MEMORY, check_host_memory, platform, to_device
from grpo_jax.sampling import check_key
from grpo_jax.sharding import place
from grpo_jax.train.forward import Sequences, Tokens
from grpo_jax.train.guard import guarded_update
from grpo_jax.train.packing import in_batch_order, micro_batch
from grpo_jax.train.trainable import join, trainable_part
from grpo_jax.types import AS_STORED, Batch, Max, Mean, Metrics, PackedBatch, Params, Preparation, Rollout, TrainState

LossFn = Callable[[Params, Any], tuple[Mean, Metrics]]
"""``(params, batch) -> (loss, metrics)``."""
Offloaded = Literal["optimizer", "reference"]
"""Parts of a ``TrainState`` that may lie in the host's memory: the optimizer's state, the reference policy."""


def make_log_prob_fn(
    log_probs: Callable[[Params, Sequences], tuple[Tokens, Tokens]],
    *,
    num_micro_batches: int = 1,
    preparation: Preparation = AS_STORED,
) -> Callable[[Params, Rollout | PackedBatch], Tokens]:
    """A jitted ``(params, rollout) -> log-probabilities [B, T]`` of frozen policies: old and reference.

    Of a ``PackedBatch``, only the micro-batches that are not empty are computed; completions without tokens get 0.

    Args:
        log_probs: ``(params, rollout) -> (log-probabilities, entropy)``, such as a ``partial`` of
            ``completion_log_probs``.
        num_micro_batches: equal parts of a padded batch that are computed in turn, to save memory.
        preparation: of the parameters, once a call (``Model.preparation``).

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    @partial(jax.jit, compiler_options=compiler_options(platform()))
    def frozen_log_probs(params, rollout):
        params = preparation.prepare(to_device(params))
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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    num_micro_batches: int = 1,
    preparation: Preparation = AS_STORED,
    gradient_dtype: Any = jnp.float32,
    skip_grad_norm: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A jitted ``(state, batch) -> (state, metrics)`` that applies one update and donates the old state.

    A bad update, such as one with a gradient that is not finite, is not applied (``guarded_update``).

    Parameters with LoRA adapters are trained as ``trainable_part`` says, all others as a whole. The new state has the
    shardings of the old one, and its optimizer state is in the same memory. Called inside another jitted function, the
    step is traced into it.

    Gradients are accumulated over ``num_micro_batches`` parts of the batch, or over the micro-batches that a
    ``PackedBatch`` has. Sums and counts are added over the parts and divided at the end, so the update does not depend
    on the number of parts or the lengths of their sequences.

    Args:
        loss_fn: ``(params, batch) -> (loss, metrics)`` with the loss as a ``Mean`` and metrics as a dict of ``Mean`` or
            ``Max``. ``batch`` may be any pytree of arrays whose first axis is the batch; of a ``PackedBatch`` it is a
            ``Batch`` with ``rows``.
        optimizer: any optax transformation.
        num_micro_batches: more parts take less memory and more time.
        preparation: of the parameters, once an update (``Model.preparation``); gradients are taken with respect to
            prepared parameters and accumulated in their form and layout.
        gradient_dtype: dtype in which gradients are accumulated over the parts; bfloat16 takes half the memory of
            float32 and loses what is small beside the sum. The optimizer gets float32.
        skip_grad_norm: an update whose gradient has a larger norm is bad.

    Returns:
        The step. Its metrics are scalars: those of ``loss_fn``, ``loss`` and those of ``guarded_update``.

    Raises:
        TypeError: at trace time, when loss_fn returns something else, such as a scalar.
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def loss_sum(trainable, params, batch):
        output = loss_fn(preparation.constrain(join(trainable, params)), batch)
        check_loss_output(output)
        loss, metrics = output
        return loss.sum, {**metrics, "loss": loss}

    def micro_step(params, grads, batch):
        new_grads, metrics = jax.grad(loss_sum, has_aux=True)(trainable_part(params), params, batch)
        sums = jax.tree.map(lambda sum, new: sum + new.astype(gradient_dtype), grads, new_grads)
        return preparation.constrain(sums), metrics

    def over_packed(params, zeros, packed):
        def one(index, carry):
            grads, merged = carry
            grads, metrics = micro_step(params, grads, micro_batch(packed, index))
            return grads, {name: _merge(merged[name], metric) for name, metric in metrics.items()}

        _, metrics = jax.eval_shape(micro_step, params, zeros, jax.eval_shape(micro_batch, packed, 0))
        nothing = {name: _nothing(metric) for name, metric in metrics.items()}
        return jax.lax.fori_loop(0, packed.count, one, (zeros, nothing))

    def step(state: TrainState, batch):
        params = preparation.prepare(state.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, gradient_dtype), trainable_part(params))
        zeros = preparation.constrain(zeros)
        if isinstance(batch, PackedBatch):
            grads, merged = over_packed(params, zeros, batch)
        else:
            parts = split_rows(batch, num_micro_batches)
            grads, metrics = jax.lax.scan(lambda grads, part: micro_step(params, grads, part), zeros, parts)
            merged = {name: metric.reduce() for name, metric in metrics.items()}
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), preparation.restore(grads))
        loss = merged["loss"]
        assert isinstance(loss, Mean)
        grads = jax.tree.map(lambda g: g / jnp.where(loss.count > 0, loss.count, 1), grads)
        state, of_update = guarded_update(optimizer, grads, state, loss=loss.value, max_norm=skip_grad_norm)
        return state, {name: metric.value for name, metric in merged.items()} | of_update

    @cache
    def jitted(treedef, shardings):
        # Otherwise the compiler may choose other shardings, for which every later program would be compiled again.
        options = compiler_options(next(iter(shardings[0].device_set)).platform)
        out_shardings = (jax.tree.unflatten(treedef, shardings), None)
        return jax.jit(step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)

    def train_step(state: TrainState, batch):
        reference, state = state.ref_params, replace(state, ref_params=None)
        leaves, treedef = jax.tree.flatten(state)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            state, metrics = step(state, batch)
        else:
            state, metrics = jitted(treedef, tuple(leaf.sharding for leaf in leaves))(state, batch)
        return replace(state, ref_params=reference), metrics

    return train_step


def compiler_options(platform: str) -> dict[str, str] | None:
    """Options of the compiler for programs over whole sequences; None for its defaults.

    A TPU's compiler would run a product with gathered weights as a loop over parts, which hides their transfer and
    reads and writes activations once for each device (by its plan for 7 billion parameters on 16 v5e chips, 4.2 TB of
    memory traffic an update instead of 1.8).

    Args:
        platform: of the devices, such as ``tpu``.
    """
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if platform == "tpu" else None


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
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    with_reference: bool,
    replicated: Sharding,
    ref_dtype: Any = None,
    offload: Collection[Offloaded] = (),
) -> TrainState:
    """The state before the first update, with optimizer state as ``opt_state_shardings`` lays it out.

    With LoRA adapters, the optimizer's state and the reference policy are of ``trainable_part(params)`` alone.

    Args:
        params: on their devices; the first train step donates them.
        optimizer: of the train step.
        with_reference: whether to keep a copy of the parameters as the reference policy.
        replicated: sharding of the state's scalars.
        ref_dtype: dtype of the reference's matrices; in that of the computation its log-probabilities are the same.
            None for that of the parameters.
        offload: what lies in the host's memory, and on the devices only while a program computes with it.

    Raises:
        ValueError: as ``opt_state_shapes`` and ``devices.check_host_memory``, before anything is computed.
    """
    if offload:
        device = next(iter(replicated.device_set))
        check_host_memory(device, f"offload is {' '.join(offload)}", "leave it out")
    trainable = trainable_part(params)
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    shapes = opt_state_shapes(optimizer, trainable)
    moments = opt_state_shardings(shapes, trainable, shardings, replicated, on_host="optimizer" in offload)
    reference = _frozen_copy(trainable, ref_dtype) if with_reference else None
    if "reference" in offload:
        reference = jax.tree.map(lambda x: jax.device_put(x, _on_host(x.sharding)), reference)
    return TrainState(
        step=place(jnp.int32(0), replicated),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(trainable),
        ref_params=reference,
    )


def _frozen_copy(params: Params, dtype: Any) -> Params:
    """A copy with matrices of a dtype, which does not share memory with ``params``: these are donated."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype if dtype is None or x.ndim < 2 else dtype), params)


def _on_host(sharding: Sharding) -> Sharding:
    return sharding.with_memory_kind(HOST_MEMORY)


def opt_state_shapes(optimizer: optax.GradientTransformation, params: Params) -> Any:
    """The state of an optimizer as ``ShapeDtypeStruct``, after a trace of its first update.

    Args:
        optimizer: any optax transformation.
        params: arrays or ``ShapeDtypeStruct``.

    Raises:
        ValueError: its ``init`` or ``update`` raises, such as one that needs more than gradients, or an update is not
            of the parameters' shapes, or changes the shapes of the state.
    """

    def shapes(tree):
        return jax.tree.map(lambda x: x.shape, tree)

    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    try:
        with jax.numpy_dtype_promotion("standard"):
            state = jax.eval_shape(optimizer.init, params)
            updates, next_state = jax.eval_shape(optimizer.update, grads, state, params)
    except Exception as error:
        raise ValueError(f"the optimizer cannot update these parameters: {type(error).__name__}: {error}") from error
    for found, expected, name in ((updates, params, "parameters"), (next_state, state, "state")):
        if shapes(found) != shapes(expected):
            raise ValueError(
                f"the optimizer cannot update these parameters: its update has other shapes than the {name}"
            )
    return state


def opt_state_shardings(
    opt_state: Any, params: Params, shardings: Params, replicated: Sharding, *, on_host: bool = False
) -> Any:
    """A sharding for each array of an optimizer's state, of any optax transformation.

    An array whose path ends in the path of a parameter of the same shape, such as a moment, has the parameter's
    sharding. So has one that differs from the parameter in its last axis only, such as the scales of a quantized
    moment's blocks; if that axis does not divide, it is replicated. All others, such as counters and Adafactor's rows
    and columns, are replicated.

    Args:
        opt_state: arrays or ``ShapeDtypeStruct``.
        params: the parameters, in the same form.
        shardings: of the parameters.
        replicated: sharding of the other arrays.
        on_host: whether all arrays but scalars lie in the host's memory.
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
            if isinstance(sharding, NamedSharding) and leaf.shape and shape[:-1] == leaf.shape[:-1]:
                spec = PartitionSpec(*(*sharding.spec, *[None] * len(shape))[: len(shape) - 1])
                whole_last = NamedSharding(sharding.mesh, spec)
                parts = shape[-1] // sharding.shard_shape(shape)[-1]
                return sharding if leaf.shape[-1] % parts == 0 else whole_last
        return replicated

    found = jax.tree_util.tree_map_with_path(of_leaf, opt_state)
    if not on_host:
        return found
    return jax.tree.map(lambda sharding, x: _on_host(sharding) if x.ndim else sharding, found, opt_state)


def with_fresh_reference(state: TrainState) -> TrainState:
    """The state with a copy of its current parameters as the reference policy, where and as precise as the one before.

    Reference refresh.
    """
    params, before = trainable_part(state.params), state.ref_params
    dtypes = {x.dtype for x in jax.tree.leaves(before) if x.ndim > 1}
    ref_params = _frozen_copy(params, dtypes.pop() if dtypes else None)
    if before is not None:
        ref_params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), ref_params, before)
    return replace(state, ref_params=ref_params)


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
