"""The device mesh and the shardings of parameters and batches.

Three axes: ``data`` (replicas of the model, each with a part of the batch), ``fsdp`` (parameters and optimizer state
are sharded and gathered when used; the batch is sharded here too) and ``tensor`` (heads and hidden units are sharded).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from grpo_jax.types import Params

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

PARAM_RULES = (
    (r"(embed|lm_head)/embedding$", P("tensor", "fsdp")),
    (r"(q|k|v)/kernel$", P("fsdp", "tensor", None)),
    (r"(q|k|v)/bias$", P("tensor", None)),
    (r"o/kernel$", P("tensor", None, "fsdp")),
    (r"(gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(gate|up)/bias$", P("tensor")),
    (r"down/kernel$", P("tensor", "fsdp")),
    (r"(o|down)/bias$", P()),
    (r"(score|value)/kernel$", P("fsdp", None)),
    (r"(q|k|v|gate|up)/kernel_lora_a$", P("fsdp", None)),
    (r"(q|k|v|gate|up)/kernel_lora_b$", P(None, "tensor")),
    (r"(o|down)/kernel_lora_a$", P("tensor", None)),
    (r"(o|down)/kernel_lora_b$", P(None, "fsdp")),
    (r"/scale$", P()),
)
"""Patterns of parameter paths and the sharding of their dimensions; the first match applies."""

ROLLOUT_RULES = tuple(
    (pattern, P(*(None if axes == "fsdp" else axes for axes in spec))) for pattern, spec in PARAM_RULES
)
"""The rules for sampling: replicated over ``data`` and ``fsdp``, so that no decode step gathers parameters."""


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``data x fsdp x tensor`` devices.

    Args:
        data: size of the axis; -1 for all devices that the other axes leave.
        fsdp: size of the axis.
        tensor: size of the axis.
        devices: devices to use, of which the first ``data * fsdp * tensor`` are taken; by default all.

    Raises:
        ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}: sizes must be at least 1 (data may be -1: all others)"
        )
    if data == -1:
        data = len(devices) // (fsdp * tensor)
        if data * fsdp * tensor != len(devices):
            raise ValueError(
                f"mesh fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices; "
                f"their product must be one of {divisors(len(devices))}"
            )
    size = data * fsdp * tensor
    if size > len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} takes {size} devices; there are {len(devices)}"
        )
    # Auto: the compiler propagates shardings from the arguments, so that the mathematics does not name a mesh.
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def param_shardings(shapes: Params, mesh: Mesh, rules: Sequence[tuple[str, P]] = PARAM_RULES) -> Params:
    """A sharding for each parameter, by its path.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: a mesh of ``make_mesh``.
        rules: pairs of a regular expression on the path and a spec; the first match applies.

    Raises:
        ValueError: parameters without a rule, or dimensions that their mesh axes do not divide; one error lists all,
            with the axis sizes that would divide.
    """
    problems = []

    def place(path, leaf):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        matrix, _, part = name.rpartition("/")
        is_scale = part == "scale" and matrix.endswith("/kernel")  # of a quantized matrix, as is qvalue
        pattern_name = matrix if is_scale or part == "qvalue" else name
        spec = next((spec for pattern, spec in rules if re.search(pattern, pattern_name)), None)
        if spec is None:
            problems.append(f"{name}: no sharding rule matches; add (pattern, PartitionSpec) for it")
            return None
        if is_scale:  # it has fewer entries than the matrix where several share one
            spec = P(
                *(axes if _divides(mesh, axes, size) else None for size, axes in zip(leaf.shape, spec, strict=True))
            )
        for dimension, axes in enumerate(spec):
            size = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if leaf.shape[dimension] % size:
                problems.append(
                    f"{name}: dimension {dimension} of shape {tuple(leaf.shape)} does not divide by mesh axis "
                    f"{axes!r} of size {size}; sizes that would do: {divisors(leaf.shape[dimension])}"
                )
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if problems:
        raise ValueError("the mesh does not fit the model:\n  " + "\n  ".join(problems))
    return shardings


def _divides(mesh: Mesh, axes: Any, size: int) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())) == 0


def make_reshard(shardings: Params, dtype: Any) -> Callable[[Params], Params]:
    """A jitted function ``params -> params`` that changes sharding and dtype.

    Parameters that have both already are returned without a copy. The function keeps no reference to its results: if
    the caller drops them before the next call, memory holds one copy.

    Args:
        shardings: a sharding for each parameter.
        dtype: of the matrices; vectors, such as the scales of norms, and integers, of quantized matrices, keep theirs.
    """

    def target_dtype(x: Array) -> Any:
        return dtype if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype

    @partial(jax.jit, out_shardings=shardings)
    def move(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(target_dtype(x)), params)

    def reshard(params: Params) -> Params:
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
        if all(x.dtype == target_dtype(x) and x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs):
            return params
        return move(params)

    return reshard


def bytes_on_devices(tree: Any) -> int:
    """Bytes of a tree's arrays, summed over this process's devices."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


def shard_rows(tree, mesh: Mesh):
    """A tree of arrays with their rows sharded over the mesh's ``data`` and ``fsdp`` axes.

    Args:
        tree: arrays whose first axis is the rows.
        mesh: of ``make_mesh``.

    Raises:
        ValueError: the rows do not divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for x in jax.tree.leaves(tree):
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} rows do not divide over data x fsdp = {parts} devices")
    return jax.device_put(tree, NamedSharding(mesh, BATCH))


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
        if dimension % math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())):
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
