"""The device mesh and the shardings of parameters and batches.

Five axes: ``data`` (replicas of the model, each with a part of the batch), ``fsdp`` (parameters and optimizer state
are sharded and gathered when used; the batch is sharded here too), ``context`` (tokens of each sequence are sharded,
and parameters as over ``fsdp``), ``tensor`` (heads, hidden units and experts are sharded) and ``expert`` (experts are
sharded, other parameters as over ``fsdp``, and the batch).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from grpo_jax.devices import all_devices
from grpo_jax.types import Params

AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")
"""Axes over which the rows of a batch are sharded."""
BATCH = P(ROW_AXES)
TOKENS = P(ROW_AXES, "context")
"""Rows and tokens of activations in training."""
EXPERT_AXES = ("expert", "tensor")
"""Axes over which experts are sharded."""

PARAM_RULES = (
    (r"(embed|lm_head)/embedding$", P("tensor", "fsdp")),
    (r"(q|k|v|z|out_gate|q_b)/kernel$|attention/(k_b|v_b)$", P("fsdp", "tensor", None)),
    (r"(q_a|kv_a|router|shared_gate|score|value)/kernel$", P("fsdp", None)),
    (r"delta/(q|k|v)_conv$", P("tensor", None, None)),
    (r"experts/(gate|up)$", P(EXPERT_AXES, "fsdp", None)),
    (r"experts/down$", P(EXPERT_AXES, None, "fsdp")),
    (r"experts/(gate|up|down)_bias$", P(EXPERT_AXES, None)),
    (r"(q|k|v)/bias$", P("tensor", None)),
    (r"o/kernel$", P("tensor", None, "fsdp")),
    (r"(gate|up)/kernel$|delta/(a|b)/kernel$", P("fsdp", "tensor")),
    (r"(gate|up)/bias$|attention/sinks$|delta/(A_log|dt_bias)$", P("tensor")),
    (r"down/kernel$", P("tensor", "fsdp")),
    (r"(o|down)/bias$", P()),
    (r"(q|k|v|z|q_a|q_b|kv_a|gate|up)/kernel_lora_a$", P("fsdp", None)),
    (r"(q|k|v|z|q_b|gate|up)/kernel_lora_b$", P(None, "tensor")),
    (r"(o|down)/kernel_lora_a$", P("tensor", None)),
    (r"(o|down)/kernel_lora_b$", P(None, "fsdp")),
    (r"/scale$|(norm|q_a|kv_a|router)/bias$|selection_bias$|(q_a|kv_a)/kernel_lora_b$", P()),
)
"""Patterns of parameter paths and the sharding of their dimensions; the first match applies."""

ROLLOUT_RULES = tuple(
    (pattern, P(*(None if axes == "fsdp" else axes for axes in spec))) for pattern, spec in PARAM_RULES
)
"""The rules for sampling: replicated over ``data`` and ``fsdp``, so that no decode step gathers parameters."""


def num_row_shards(mesh: Mesh | Mapping[str, int] | None) -> int:
    """Parts in which the rows of a batch are sharded.

    Args:
        mesh: the devices, or the sizes of their axes; None for one.
    """
    if mesh is None:
        return 1
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    return math.prod(sizes.get(axis, 1) for axis in ROW_AXES)


def row_axes(mesh: Mesh | Mapping[str, int]) -> str:
    """The axes of ``num_row_shards`` that a message names, such as ``data x fsdp``.

    Args:
        mesh: the devices, or the sizes of their axes.
    """
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    return " x ".join(axis for axis in ROW_AXES if axis != "expert" or sizes.get(axis, 1) > 1)


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of ``data x fsdp x expert x context x tensor`` devices.

    Args:
        data: size of the axis; -1 for all devices that the other axes leave.
        fsdp: size of the axis.
        expert: size of the axis.
        context: size of the axis.
        tensor: size of the axis.
        devices: devices to use, of which as many as the axes take are taken; by default all.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = all_devices() if devices is None else list(devices)
    others = {"fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    if min(others.values()) < 1 or (data < 1 and data != -1):
        sizes = ", ".join(f"{name}={size}" for name, size in {"data": data, **others}.items())
        raise ValueError(f"mesh {sizes}: sizes must be at least 1 (data may be -1: all others)")
    # An axis that few use is named only where it is used.
    rare = ("expert", "context")
    named = " x ".join(f"mesh.{name} {size}" for name, size in others.items() if name not in rare or size > 1)
    size = math.prod(others.values())
    if data == -1:
        data = len(devices) // size
        if data * size != len(devices):
            raise ValueError(
                f"{named} does not divide the {len(devices)} devices; their product must be one of "
                f"{divisors(len(devices))}"
            )
    size *= data
    if size > len(devices):
        raise ValueError(f"mesh.data {data} x {named} takes {size} devices; there are {len(devices)}")
    # Auto: the compiler propagates shardings from the arguments, so that the mathematics does not name a mesh.
    shape, types = (data, *others.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:size])
    except NotImplementedError:  # an axis that is not a product of whole axes of a TPU's torus
        split = mesh_utils.create_device_mesh(shape, devices[:size], allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of a mesh for sampling: ``tensor`` of them share the model's heads, and groups of them the batch.

    Its devices are in the same order, so that a jitted function may take arrays of both meshes. Those of ``expert`` and
    ``context`` share the batch too.

    Args:
        mesh: of ``make_mesh``.
        tensor: size of the axis; a multiple of that of ``mesh`` that divides its ``fsdp x expert x context x tensor``.

    Raises:
        ValueError: it is not.
    """
    sizes = mesh.shape
    if tensor == sizes["tensor"] and sizes["context"] == sizes["expert"] == 1:
        return mesh
    most = mesh.size // sizes["data"]
    if tensor < 1 or tensor % sizes["tensor"] or most % tensor:
        named = [name for name in AXES[1:] if name not in ("expert", "context") or sizes[name] > 1]
        axes = " x ".join(f"mesh.{name}" for name in named)
        raise ValueError(
            f"mesh.rollout_tensor is {tensor}; it must be a multiple of mesh.tensor = {sizes['tensor']} that divides "
            f"{axes} = {most}"
        )
    shape = dict.fromkeys(AXES, 1) | {"data": mesh.size // tensor, "tensor": tensor}
    return Mesh(mesh.devices.reshape(*shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(name: str, rules: Sequence[tuple[str, P]] = PARAM_RULES) -> P | None:
    """The spec of the first rule that matches a parameter; None if none does.

    Args:
        name: path of the parameter, such as ``layers_0/attention/q/kernel``. The values and scales of a quantized
            matrix are laid out as the matrix.
        rules: as in ``param_shardings``.
    """
    name = re.sub(r"/kernel/(qvalue|scale)$", "/kernel", name)
    return next((spec for pattern, spec in rules if re.search(pattern, name)), None)


def fitted_spec(name: str, shape: Sequence[int], axes: Mapping[str, int], rules: Sequence[tuple[str, P]]) -> P | None:
    """``param_spec`` for a parameter whose dimensions the mesh's axes may not divide.

    An axis that does not divide its dimension splits another dimension that the rule splits, if it divides that one;
    otherwise the parameter is replicated over it.

    Args:
        name: as in ``param_spec``.
        shape: of the parameter.
        axes: sizes of the mesh's axes.
        rules: as in ``param_shardings``.
    """
    spec = param_spec(name, rules)
    if spec is None:
        return None
    wanted = [axis_names(entry) for entry in spec]
    # These axes shard what fsdp does, but for an axis that shards another dimension already.
    also = [axis for axis in ("expert", "context") if axes.get(axis, 1) > 1 and not any(axis in n for n in wanted)]
    wanted = [sum((("fsdp", *also) if axis == "fsdp" else (axis,) for axis in n if axis in axes), ()) for n in wanted]
    fitted: list[tuple[str, ...]] = [()] * len(wanted)

    def placed(axis: str, dimension: int) -> bool:
        names = (*fitted[dimension], axis)
        if shape[dimension] % math.prod(axes[name] for name in names) == 0:
            fitted[dimension] = names
        return axis in fitted[dimension]

    missing = [axis for dimension, names in enumerate(wanted) for axis in names if not placed(axis, dimension)]
    # Scales of a quantized matrix lie as the matrix or whole: several of its entries may share one.
    for axis in missing if not name.endswith("/kernel/scale") else ():
        next((dimension for dimension, names in enumerate(wanted) if names and placed(axis, dimension)), None)
    return P(*(None if not names else names[0] if len(names) == 1 else names for names in fitted))


def param_shardings(shapes: Params, mesh: Mesh, rules: Sequence[tuple[str, P]] = PARAM_RULES) -> Params:
    """A sharding for each parameter, by its path, as ``fitted_spec``.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: a mesh of ``make_mesh``.
        rules: pairs of a regular expression on the path and a spec; the first match applies.

    Raises:
        ValueError: parameters without a rule; one error lists all.
    """
    problems = []

    def place(path, leaf):
        name = _name(path)
        spec = fitted_spec(name, leaf.shape, mesh.shape, rules)
        if spec is None:
            problems.append(f"{name}: no sharding rule matches; add (pattern, PartitionSpec) for it")
            return None
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if problems:
        raise ValueError("the mesh does not fit the model:\n  " + "\n  ".join(problems))
    return shardings


def params_by_name(shapes: Params) -> list[tuple[str, tuple[int, ...]]]:
    """Path and shape of each parameter."""
    return [(_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]


def num_shards(spec: P | None, axes: Mapping[str, int]) -> int:
    """Distinct parts of an array over a mesh.

    Args:
        spec: of the array; None for a replicated one.
        axes: sizes of the mesh's axes.
    """
    return math.prod(axes[axis] for entry in spec or () for axis in axis_names(entry))


def _name(path: Any) -> str:
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a ``PartitionSpec``."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def rollout_steps(shapes: Params, mesh: Mesh, tensor: int) -> Params:
    """Shardings on the way from training to sampling with more devices on the ``tensor`` axis.

    From them on, parameters need only be gathered. Without this step, the compiler would give every device all of them
    to take its part from.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: mesh of training; ``tensor`` divides its ``fsdp x expert x context x tensor``.
        tensor: size of the axis in sampling.
    """
    sizes, inner = mesh.shape, tensor // mesh.shape["tensor"]
    outer = sizes["fsdp"] * sizes["expert"] * sizes["context"] // inner
    devices = mesh.devices.reshape(sizes["data"], outer, inner, sizes["tensor"])
    split = Mesh(devices, ("data", "fsdp", "inner", "tensor"), axis_types=(AxisType.Auto,) * 4)
    over = ("inner", "tensor")
    rules = [
        (pattern, P(*(over if axes in ("tensor", EXPERT_AXES) else axes for axes in spec)))
        for pattern, spec in PARAM_RULES
    ]
    return param_shardings(shapes, split, rules)


def make_reshard(shardings: Params, dtype: Any, *, steps: Sequence[Params] = ()) -> Callable[[Params], Params]:
    """A jitted function ``params -> params`` that changes sharding and dtype.

    Parameters that have both already are returned without a copy. The function keeps no reference to its results: if
    the caller drops them before the next call, memory holds one copy. Called inside another jitted function, it is
    traced into it.

    Args:
        shardings: a sharding for each parameter.
        dtype: of the matrices; vectors, such as the scales of norms, and integers, of quantized matrices, keep theirs.
        steps: shardings that parameters pass through on the way.
    """

    def target_dtype(x: Array) -> Any:
        return dtype if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype

    @partial(jax.jit, out_shardings=shardings)
    def move(params: Params) -> Params:
        params = jax.tree.map(lambda x: x.astype(target_dtype(x)), params)
        for step in steps:
            params = jax.tree.map(jax.lax.with_sharding_constraint, params, step)
        return params

    def reshard(params: Params) -> Params:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(params)):
            return move(params)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
        if all(x.dtype == target_dtype(x) and x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs):
            return params
        return move(params)

    return reshard


def bytes_on_devices(tree: Any) -> int:
    """Bytes of a tree's arrays, summed over this process's devices."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


def place(tree: Any, sharding: Sharding | None) -> Any:
    """A tree of arrays laid out over devices, also those of other processes.

    Args:
        tree: arrays, the same on all processes: nothing is compared or sent. Arrays that are sharded over several
            processes already are laid out anew by all of them together.
        sharding: of each array; None for the default device.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        on_host = np.asarray(x)
        return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


def shard_rows(tree, mesh: Mesh):
    """A tree of arrays with their rows sharded over the mesh's axes of rows.

    Args:
        tree: arrays whose first axis is the rows.
        mesh: of ``make_mesh``.

    Raises:
        ValueError: the rows do not divide.
    """
    parts = num_row_shards(mesh)
    for x in jax.tree.leaves(tree):
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} rows do not divide over {row_axes(mesh)} = {parts} devices")
    return place(tree, NamedSharding(mesh, BATCH))


def constrain(x: Array, mesh: Mesh | None, spec: P) -> Array:
    """The same values with a sharding constraint, inside a jitted function.

    The compiler derives the sharding of activations from those of parameters and batch, and does not always choose that
    of the batch. Without a mesh, or if a dimension does not divide, there is no constraint.

    Args:
        x: an activation.
        mesh: a mesh of ``make_mesh``, or None.
        spec: mesh axes of the leading dimensions.
    """
    if mesh is None:
        return x
    for dimension, axes in zip(x.shape, spec, strict=False):
        if dimension % math.prod(mesh.shape[axis] for axis in axis_names(axes)):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def take_rows(x: Array, rows: Int[Array, "devices taken"]) -> Array:
    """Rows gathered within each device's shard, without communication: ``[devices * taken, ...]``.

    Args:
        x: an array whose first axis is sharded evenly over ``devices``.
        rows: for each device, indices into its shard.
    """
    parts = x.reshape(rows.shape[0], x.shape[0] // rows.shape[0], *x.shape[1:])
    taken = jax.vmap(lambda part, index: part.at[index].get(mode="promise_in_bounds"))(parts, rows)
    return taken.reshape(rows.shape[0] * rows.shape[1], *x.shape[1:])


def divisors(n: int) -> list[int]:
    """The divisors of ``n`` in ascending order."""
    return [d for d in range(1, n + 1) if n % d == 0]
