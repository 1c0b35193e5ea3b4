"""The device mesh, and where each array lies on it.

Three axes: ``data`` (whole copies of the model, each with its part of the batch), ``fsdp`` (parameters and optimizer
state split, gathered as they are used; the batch is split here too) and ``tensor`` (heads and hidden units split).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
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
    (r"/scale$", P()),
)
"""Parameter path -> how its dimensions lie on the mesh; the first pattern found in the path holds."""

ROLLOUT_RULES = tuple(
    (pattern, P(*(None if axes == "fsdp" else axes for axes in spec))) for pattern, spec in PARAM_RULES
)
"""The same for sampling: whole over ``data`` and ``fsdp``, so that nothing is gathered for each token."""


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``data x fsdp x tensor`` devices.

    Args:
        data: its size; -1 takes all devices that the other axes leave.
        fsdp: its size.
        tensor: its size.
        devices: those to use; by default all there are, or the first ``data * fsdp * tensor``.

    Raises:
        ValueError: when the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor}: sizes are at least 1 (data may be -1: the rest)"
        )
    if data == -1:
        data = len(devices) // (fsdp * tensor)
        if data * fsdp * tensor != len(devices):
            raise ValueError(
                f"mesh fsdp={fsdp} x tensor={tensor} does not divide the {len(devices)} devices there are; "
                f"their product must be one of {divisors(len(devices))}"
            )
    size = data * fsdp * tensor
    if size > len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} takes {size} devices; there are {len(devices)}"
        )
    # Auto: the compiler propagates shardings from the arrays passed in, so mathematics never names a mesh.
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def param_shardings(shapes: Params, mesh: Mesh, rules: Sequence[tuple[str, P]] = PARAM_RULES) -> Params:
    """A sharding for each parameter, by its path.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: from ``make_mesh``.
        rules: pattern -> spec; see ``PARAM_RULES``.

    Raises:
        ValueError: one that lists every parameter without a rule, and every dimension that its mesh axes do not divide,
            with the axis sizes that would do.
    """
    problems = []

    def place(path, leaf):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            problems.append(f"{name}: no sharding rule matches; add (pattern, PartitionSpec) for it")
            return None
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


def make_reshard(shardings: Params, dtype: Any) -> Callable[[Params], Params]:
    """A function ``params -> params`` in another layout and precision, as one jitted step.

    Parameters that lie so already are given back as they are, without a copy. The new ones are the caller's: dropped
    before the next are made, they are in memory once.

    Args:
        shardings: a tree of shardings like the parameters'.
        dtype: of the matrices; norms' scales are computed with in the precision they are stored in.
    """

    def precision(x: Array) -> Any:
        return dtype if x.ndim > 1 else x.dtype

    @partial(jax.jit, out_shardings=shardings)
    def move(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(precision(x)), params)

    def reshard(params: Params) -> Params:
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
        if all(x.dtype == precision(x) and x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs):
            return params
        return move(params)

    return reshard


def bytes_on_devices(tree: Any) -> int:
    """What the arrays of a tree take on all devices together."""
    return sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def shard_rows(tree, mesh: Mesh):
    """Lay every array's rows out over the mesh's ``data`` and ``fsdp`` axes.

    Raises:
        ValueError: when the rows do not divide.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for x in jax.tree.leaves(tree):
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} rows do not divide over data x fsdp = {parts} devices")
    return jax.device_put(tree, NamedSharding(mesh, BATCH))


def constrain(x: Array, mesh: Mesh | None, spec: P) -> Array:
    """The same values, laid out over a mesh at this point of a jitted function.

    The compiler lays activations out by itself from the parameters' layout and the batch's, and does not always choose
    the batch's. Without a mesh, and where a dimension does not divide, the choice stays with it.
    """
    if mesh is None:
        return x
    for dimension, axes in zip(x.shape, spec, strict=False):
        if dimension % math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())):
            return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def take_rows(x: Array, rows: Int[Array, "devices taken"]) -> Array:
    """Rows gathered within each device's part, so that none has to travel: ``[devices * taken, ...]``.

    Args:
        x: rows first, in as many equal parts as ``rows`` has.
        rows: for each part the rows of it that are taken, counted from its first.
    """
    parts = x.reshape(rows.shape[0], x.shape[0] // rows.shape[0], *x.shape[1:])
    taken = jax.vmap(lambda part, index: part.at[index].get(mode="promise_in_bounds"))(parts, rows)
    return taken.reshape(rows.shape[0] * rows.shape[1], *x.shape[1:])


def divisors(n: int) -> list[int]:
    """The whole numbers that divide ``n``, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]
