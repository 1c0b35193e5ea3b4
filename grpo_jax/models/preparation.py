"""Parameters as a train step computes with them: in the compute dtype, equal layers stacked for ``lax.scan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from grpo_jax.models.config import DecoderConfig
from grpo_jax.sharding import PARAM_RULES, constrain, fitted_spec
from grpo_jax.types import Params, Preparation

STACKED = "layers"
"""Key of the stacked layers: a tree for each place in the period, whose arrays have a leading axis of repetitions."""


@dataclass(frozen=True)
class Repetition:
    """The layers ``0 .. period * count - 1``, of which layer ``i`` equals layer ``i + period`` but for its weights.

    Attributes:
        period: layers that differ in kind.
        count: repetitions of the period.
    """

    period: int
    count: int


def find_repetition(config: DecoderConfig) -> Repetition | None:
    """The shortest period that repeats at least twice from the first layer on; None if there is none.

    Layers after its last whole repetition are left over.

    Args:
        config: kinds of the layers.
    """
    kinds = config.kinds
    for period in range(1, config.num_layers // 2 + 1):
        if kinds[period:] == kinds[:-period]:
            return Repetition(period, config.num_layers // period)
    return None


def preparation(dtype: Any, repetition: Repetition | None, mesh: Mesh | None) -> Preparation:
    """The preparation of a decoder's parameters, as ``types.Preparation`` documents it.

    The matrices of the layers, LoRA adapters among them, are cast to ``dtype``. Vectors, embeddings, heads and
    quantized values keep their precision: the gradient of an embedding's row is a sum over all of its tokens.

    Args:
        dtype: compute dtype.
        repetition: layers to stack; None to stack none.
        mesh: mesh whose layout arrays and gradients are constrained to; None for no constraints.
    """

    def cast(path: Any, x: Array) -> Array:
        is_matrix = x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_matrix and path[0].key.startswith("layers_") else x

    def constrained(params: Params) -> Params:
        return params if mesh is None else constrain_params(params, mesh)

    def prepare(params: Params) -> Params:
        params = constrained(jax.tree.map_with_path(cast, params))
        return params if repetition is None else constrained(stack_layers(params, repetition))

    return Preparation(prepare, constrained, unstack_layers)


def stack_layers(params: Params, repetition: Repetition) -> Params:
    """Parameters with the repeated layers stacked under ``STACKED`` in place of ``layers_0``, ``layers_1``, ...

    Args:
        params: of a decoder.
        repetition: the layers.
    """
    period, stop = repetition.period, repetition.period * repetition.count
    names = [f"layers_{i}" for i in range(stop)]
    groups = [[params[name] for name in names[place::period]] for place in range(period)]
    stacked = tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *group) for group in groups)
    return {name: value for name, value in params.items() if name not in names} | {STACKED: stacked}


def unstack_layers(tree: Params) -> Params:
    """The inverse of ``stack_layers``; a tree without stacked layers is returned as it is."""
    if STACKED not in tree:
        return tree
    stacked = tree[STACKED]
    count = jax.tree.leaves(stacked)[0].shape[0]
    layers = {
        f"layers_{repeat * len(stacked) + place}": jax.tree.map(lambda x, repeat=repeat: x[repeat], group)
        for repeat in range(count)
        for place, group in enumerate(stacked)
    }
    return {name: value for name, value in tree.items() if name != STACKED} | layers


def constrain_params(params: Params, mesh: Mesh) -> Params:
    """The same values with the sharding constraints of ``PARAM_RULES``, which also hold for their gradients.

    Parameters without a rule have no constraint.

    Args:
        params: parameters, whole or of a layer, stacked or not; or a tree of the same paths, such as gradients.
        mesh: a mesh of ``make_mesh``.
    """

    def place(path: Any, x: Array) -> Array:
        names = [str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path]
        leading = int(names[0] == STACKED)
        spec = fitted_spec("/".join(names), x.shape[leading:], mesh.shape, PARAM_RULES)
        return x if spec is None else constrain(x, mesh, P(*[None] * leading, *spec))

    return jax.tree.map_with_path(place, params)


def num_stacked(params: Mapping[str, Any]) -> int:
    """Number of layers that are stacked in ``params``."""
    stacked = params.get(STACKED, ())
    return len(stacked) * jax.tree.leaves(stacked)[0].shape[0] if stacked else 0
