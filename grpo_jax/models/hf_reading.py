"""Which part of a stored tensor each process reads, if a parameter is sharded over several processes."""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from grpo_jax.models.hf_keys import Entry

SMALL_BYTES = 2**20
"""A parameter up to this size is read by every process that holds a part of it."""


def reading_sharding(sharding: Sharding, entry: Entry, itemsize: int) -> Sharding:
    """A sharding in which every process reads its own rows of a stored tensor.

    Matrices are stored with their output axis first, while most are sharded by their input axis, so a process's shard
    lies in short runs all over the tensor: since storage is read in pages and ahead, it would read the whole tensor.
    And a parameter that is replicated over a mesh axis would be read by all of its processes. Here all mesh axes
    divide the first axes of the stored tensor as far as they can, so together the processes read it once; the devices
    then exchange their parts.

    Args:
        sharding: of the parameter in the run.
        entry: of the parameter.
        itemsize: of the parameter, in bytes.

    Returns:
        The sharding to read in, on the same devices; ``sharding`` itself if one process has all of its devices, or the
        parameter is small.
    """
    several = len({device.process_index for device in sharding.device_set}) > 1
    if not (several and isinstance(sharding, NamedSharding)) or math.prod(entry.shape) * itemsize <= SMALL_BYTES:
        return sharding
    return NamedSharding(sharding.mesh, row_spec(sharding.spec, dict(sharding.mesh.shape), entry))


def row_spec(spec: PartitionSpec, sizes: dict[str, int], entry: Entry) -> PartitionSpec:
    """The spec with each mesh axis moved to the outermost axis of the stored tensor that it divides.

    Args:
        spec: of the parameter.
        sizes: of the mesh axes.
        entry: of the parameter.
    """
    names: list[list[str]] = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in spec]
    names += [[] for _ in range(len(entry.shape) - len(names))]
    for name, size in sizes.items():
        own = next((i for i, axes in enumerate(names) if name in axes), None)
        for i in entry.axes:  # from the outermost axis of the stored tensor
            if i == own:
                break
            parts = math.prod(sizes[axis] for axis in names[i])
            if entry.shape[i] % (parts * size) == 0:
                if own is not None:
                    names[own].remove(name)
                names[i].append(name)
                break
    return PartitionSpec(*(tuple(axes) or None for axes in names))


def redistributed(array: jax.Array, sharding: Sharding) -> jax.Array:
    """A parameter that was read in one sharding, in that of the run.

    Args:
        array: the parameter.
        sharding: on the same devices.
    """
    if array.sharding == sharding:
        return array
    return jax.block_until_ready(jax.device_put(array, sharding))
