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
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from grpo_jax.devices import all_devices
from grpo_jax.types import Params

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
HOST_MEMORY = "pinned_host"
"""The host's memory that devices copy from and to by themselves."""

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
        ValueError: the sizes do not fit the number of devices, or the axes of a TPU slice.
    """
    devices = all_devices() if devices is None else list(devices)
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
    try:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])
    except NotImplementedError as error:  # of a TPU slice whose axes would have to be split
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not follow the chips of the slice: each size must "
            f"be a product of some of its axes ({error})"
        ) from error


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of a mesh for sampling: ``tensor`` of them share the model's heads, and groups of them the batch.

    Its devices are in the same order, so that a jitted function may take arrays of both meshes.

    Args:
        mesh: of ``make_mesh``.
        tensor: size of the axis; a multiple of that of ``mesh`` that divides its ``fsdp x tensor``.

    Raises:
        ValueError: it is not.
    """
    sizes = mesh.shape
    if tensor == sizes["tensor"]:
        return mesh
    if tensor < 1 or tensor % sizes["tensor"] or sizes["fsdp"] * sizes["tensor"] % tensor:
        raise ValueError(
            f"mesh.rollout_tensor is {tensor}; it must be a multiple of mesh.tensor = {sizes['tensor']} that divides "
            f"mesh.fsdp x mesh.tensor = {sizes['fsdp'] * sizes['tensor']}"
        )
    devices = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def param_spec(name: str, rules: Sequence[tuple[str, P]] = PARAM_RULES) -> P | None:
    """The spec of the first rule that matches a parameter; None if none does.

    Args:
        name: path of the parameter, such as ``layers_0/attention/q/kernel``. The values and scales of a quantized
            matrix are laid out as the matrix.
        rules: as in ``param_shardings``.
    """
    name = re.sub(r"/kernel/(qvalue|scale)$", "/kernel", name)
    return next((spec for pattern, spec in rules if re.search(pattern, name)), None)


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
        spec = param_spec(name, rules)
        if spec is None:
            problems.append(f"{name}: no sharding rule matches; add (pattern, PartitionSpec) for it")
            return None
        if name.endswith("/kernel/scale"):  # of a quantized matrix: fewer entries, where several share one
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


def rollout_steps(shapes: Params, mesh: Mesh, tensor: int) -> Params:
    """Shardings on the way from training to sampling with more devices on the ``tensor`` axis.

    From them on, parameters need only be gathered. Without this step, the compiler would give every device all of them
    to take its part from.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: mesh of training; ``tensor`` divides its ``fsdp x tensor``.
        tensor: size of the axis in sampling.
    """
    sizes, inner = mesh.shape, tensor // mesh.shape["tensor"]
    devices = mesh.devices.reshape(sizes["data"], sizes["fsdp"] // inner, inner, sizes["tensor"])
    split = Mesh(devices, ("data", "fsdp", "inner", "tensor"), axis_types=(AxisType.Auto,) * 4)
    rules = [
        (pattern, P(*(("inner", "tensor") if axes == "tensor" else axes for axes in spec)))
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


def device_bytes(devices: Sequence[Any]) -> int | None:
    """The memory of the smallest of some devices; None where devices do not report theirs (CPU).

    Args:
        devices: of this process.
    """
    sizes = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return min(sizes) if all(sizes) else None


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
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
        on_host = np.asarray(x)
        return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])

    return jax.tree.map(one, tree)


def check_host_memory(device: Any, setting: str, advice: str) -> None:
    """Check that a device can keep arrays in the host's memory.

    Args:
        device: one of those that compute.
        setting: what needs it, such as ``remat is offload``.
        advice: what to do without.

    Raises:
        ValueError: it has no ``HOST_MEMORY``.
    """
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if kinds and HOST_MEMORY not in kinds:  # none are known of a device that is only compiled for
        raise ValueError(
            f"{setting}, which needs {HOST_MEMORY} memory; {device.device_kind} has {', '.join(kinds)}: {advice}"
        )


def to_device(tree: Any) -> Any:
    """A tree of arrays, inside a jitted function, with those in the host's memory moved to the device's.

    Args:
        tree: any pytree of arrays.
    """

    def move(x: Array) -> Array:
        is_on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if is_on_host else x

    return jax.tree.map(move, tree)


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
