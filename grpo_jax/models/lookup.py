"""Lookups in a sharded embedding: ids and results travel, the table and its gradient do not."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.sharding import TOKENS, num_row_shards

TOKEN_AXES = ("fsdp", "expert", "context")
"""Mesh axes over which both the tokens and the table's columns are sharded."""


@jax.custom_vjp
def lookup(table: Float[Array, "V D"], token_ids: Int[Array, "*tokens"]) -> Float[Array, "*tokens D"]:
    """``table[clip(token_ids)]``, with a gradient that is accumulated in float32 whatever the table's dtype.

    In bfloat16, the gradient of a frequent token would lose all but the largest of its terms.

    Args:
        table: embeddings.
        token_ids: clipped to the table's rows.
    """
    return jnp.take(table, token_ids, axis=0, mode="clip")


def _lookup_forward(table, token_ids):
    return lookup(table, token_ids), (token_ids, jnp.zeros((table.shape[0], 0), table.dtype))


def _lookup_backward(saved, grads):
    token_ids, like = saved
    total = jnp.zeros((like.shape[0], grads.shape[-1]), jnp.float32)
    total = total.at[jnp.clip(token_ids, 0, like.shape[0] - 1)].add(grads.astype(jnp.float32))
    return total.astype(like.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def lookup_divides(token_ids: Int[Array, "B S"], table: Array, mesh: Mesh) -> bool:
    """Whether ``sharded_lookup`` applies: for several tokens, on a mesh whose axes divide the arrays.

    A decode step, with one token of each sequence, looks up in tables that are replicated over ``fsdp``.

    Args:
        token_ids: of B sequences.
        table: [V, D].
        mesh: the devices.
    """
    sizes, (B, S), (V, D) = mesh.shape, token_ids.shape, table.shape
    width = math.prod(sizes[axis] for axis in TOKEN_AXES)
    divides = B % num_row_shards(mesh) == 0 and S % sizes["context"] == 0
    divides &= D % (width if V % sizes["tensor"] == 0 else width * sizes["tensor"]) == 0
    return S > 1 and width * sizes["tensor"] > 1 and divides


def sharded_lookup(
    table: Float[Array, "V D"], token_ids: Int[Array, "B S"], mesh: Mesh, dtype: Any
) -> Float[Array, "B S D"]:
    """``table[clip(token_ids)]`` with ids and results sent between devices instead of the table or its gradient.

    Each device looks up its slice of the width for the tokens of all devices of ``TOKEN_AXES``, then they exchange
    slices.

    Args:
        table: rows sharded over ``tensor``, columns over ``TOKEN_AXES``; or columns over all, where ``tensor`` does not
            divide the rows.
        token_ids: sequences sharded over ``data`` and ``fsdp``, their tokens over ``context``.
        mesh: the devices; its axes divide the arrays.
        dtype: of the result, in which it travels.
    """
    last, rows_divide = table.shape[0] - 1, table.shape[0] % mesh.shape["tensor"] == 0

    def found_rows(part: Array, ids: Array) -> Array:
        if not rows_divide:
            return jax.lax.all_gather(lookup(part, ids).astype(dtype), "tensor", axis=1, tiled=True)
        local = ids - jax.lax.axis_index("tensor") * part.shape[0]
        is_here = (local >= 0) & (local < part.shape[0])
        found = jnp.where(is_here[:, None], lookup(part, local).astype(dtype), 0)
        return jax.lax.psum(found, "tensor")  # one device has the row, the others 0

    def on_device(part: Array, ids: Array) -> Array:
        everyones = jnp.clip(jax.lax.all_gather(ids.reshape(-1), TOKEN_AXES, tiled=True), 0, last)
        found = jax.lax.all_to_all(found_rows(part, everyones), TOKEN_AXES, split_axis=0, concat_axis=1, tiled=True)
        return found.reshape(*ids.shape, -1)

    of_table = P("tensor", TOKEN_AXES) if rows_divide else P(None, (*TOKEN_AXES, "tensor"))
    specs = {"in_specs": (of_table, TOKENS), "out_specs": TOKENS}
    # Without the check, which would ask the gradient of a lookup for the sum over "data" that is taken outside.
    run = jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)
    return run(table, token_ids)
