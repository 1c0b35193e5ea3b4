"""Updates compiled from shapes, laid out as those of a run, without weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from grpo_jax.sharding import BATCH, param_shardings, replicated
from grpo_jax.train import compiler_options, opt_state_shardings, trainable_part
from grpo_jax.types import PackedBatch, Params, TrainState

Step = Callable[[TrainState, Any], Any]


@dataclass(frozen=True)
class Layout:
    """Sequences as a program computes them.

    Attributes:
        batch: ``ShapeDtypeStruct`` of all arrays; of a ``PackedBatch``, ``count`` is a number.
        rows: that it computes.
        row_length: tokens of each.
        prompts_are_shared: whether a row has a prompt once for several completions.
    """

    batch: Any
    rows: int
    row_length: int
    prompts_are_shared: bool = False


@dataclass(frozen=True)
class Program:
    """A compiled update.

    Attributes:
        compiled: the program.
        seconds: time that it took to compile.
        rows: that an update computes.
        row_length: tokens of each.
        prompts_are_shared: whether a row has a prompt once for several completions.
    """

    compiled: Compiled
    seconds: float
    rows: int
    row_length: int
    prompts_are_shared: bool


def with_sharding(shape: Any, sharding: Sharding | None) -> Any:
    """A ``ShapeDtypeStruct`` with a sharding.

    Args:
        shape: an array or a ``ShapeDtypeStruct``.
        sharding: None to leave it to the compiler.
    """
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def placed(tree: Any, sharding: Sharding) -> Any:
    """A tree of ``ShapeDtypeStruct`` with one sharding for all.

    Args:
        tree: arrays or ``ShapeDtypeStruct``.
        sharding: of each.
    """
    return jax.tree.map(partial(with_sharding, sharding=sharding), tree)


def state_shapes(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of a train state.

    Args:
        params: shapes of the parameters.
        optimizer: of the updates.
    """
    return jax.eval_shape(
        lambda params: TrainState(jnp.int32(0), params, optimizer.init(trainable_part(params))), params
    )


def placed_state(state: TrainState, mesh: Mesh, *, offload_optimizer: bool = False) -> TrainState:
    """A train state laid out as a run's.

    Args:
        state: shapes.
        mesh: the devices.
        offload_optimizer: whether the optimizer's state lies in the host's memory.
    """
    everywhere, shardings = replicated(mesh), param_shardings(state.params, mesh)
    trained = trainable_part(state.params), trainable_part(shardings)
    moments = opt_state_shardings(state.opt_state, *trained, everywhere, on_host=offload_optimizer)
    places = {"step": everywhere, "params": shardings, "opt_state": moments}  # flattened by field name, as a TrainState
    leaves, form = jax.tree.flatten(state)
    pairs = zip(leaves, jax.tree.leaves(places), strict=True)
    return form.unflatten(with_sharding(leaf, sharding) for leaf, sharding in pairs)


def lay_out(batch: Any, mesh: Mesh) -> Layout:
    """A batch laid out as a run's.

    Args:
        batch: a ``PackedBatch`` on the host, or any pytree of arrays whose first axis is the rows.
        mesh: the devices.
    """
    if isinstance(batch, PackedBatch):
        _, rows_at_once, row_length = batch.rows.token_ids.shape
        rows = placed(batch.rows, NamedSharding(mesh, P(None, *BATCH)))
        whole = PackedBatch(placed(batch.sequences, replicated(mesh)), rows, batch.count)
        return Layout(whole, int(batch.count) * rows_at_once, row_length, batch.rows.prefix_ids is not None)
    if hasattr(batch, "completion_ids"):
        *sizes, T = batch.completion_ids.shape  # two completions of a pair
        rows, row_length = math.prod(sizes), batch.prompt_ids.shape[1] + T
    else:
        rows, row_length = batch.token_ids.shape
    return Layout(placed(batch, NamedSharding(mesh, BATCH)), rows, row_length)


def with_constant_count(function: Callable[..., Any], batch: Any) -> tuple[Callable[..., Any], Any]:
    """A function of ``(params or state, batch)`` whose number of micro-batches is a constant, and its argument.

    The program then says how often its loop runs.

    Args:
        function: takes a batch as its second argument.
        batch: of ``lay_out``.
    """
    if not isinstance(batch, PackedBatch):
        return function, batch
    count = batch.count
    shape = jax.ShapeDtypeStruct((), jnp.int32)
    return lambda first, batch: function(first, replace(batch, count=count)), replace(batch, count=shape)


def lower_update(step: Step, state: TrainState, layout: Layout) -> Any:
    """An update, lowered.

    Args:
        step: of ``train.make_train_step``.
        state: of ``placed_state``.
        layout: of ``lay_out``.
    """
    function, batch = with_constant_count(step, layout.batch)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch)


def options_of(mesh: Mesh, more_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of the compiler for programs over whole sequences.

    Args:
        mesh: the devices.
        more_options: in addition to those of a run.
    """
    return {**(compiler_options(mesh.devices.flat[0].platform) or {}), **(more_options or {})}


def compile_update(
    step: Step,
    state: TrainState,
    batch: Any,
    mesh: Mesh,
    *,
    offload_optimizer: bool = False,
    more_options: Mapping[str, Any] | None = None,
) -> Program:
    """An update, compiled with state and batch laid out as a run's.

    Args:
        step: of ``train.make_train_step``.
        state: shapes.
        batch: as for ``lay_out``.
        mesh: the devices.
        offload_optimizer: whether the optimizer's state lies in the host's memory.
        more_options: options of the compiler in addition to those of a run.
    """
    layout = lay_out(batch, mesh)
    lowered = lower_update(step, placed_state(state, mesh, offload_optimizer=offload_optimizer), layout)
    started = time.monotonic()
    compiled = lowered.compile(options_of(mesh, more_options) or None)
    seconds = time.monotonic() - started
    return Program(compiled, seconds, layout.rows, layout.row_length, layout.prompts_are_shared)


def program_bytes(compiled: Compiled) -> int:
    """Memory of a program on a device: arguments, results that do not take their place, and temporary arrays.

    Raises:
        RuntimeError: the compiler gives no memory analysis.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler gives no memory analysis")
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return kept + analysis.temp_size_in_bytes


def bytes_on_device(tree: Any) -> float:
    """Bytes of a tree in the memory of each device, without arrays in the host's memory.

    Args:
        tree: ``ShapeDtypeStruct`` with shardings.
    """

    def one(x: Any) -> int:
        if x.sharding is None:
            return x.size * x.dtype.itemsize
        if x.sharding.memory_kind not in (None, "device", "unpinned_host"):  # a CPU's memory is the host's
            return 0
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return float(sum(map(one, jax.tree.leaves(tree))))
