"""The MLPs of a mixture of experts: every token through the experts it chose, on one device or over a mesh.

Shapes: N tokens with k of E experts each, D and F the width of the residual stream and of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.models.expert_blocks import ExpertParams, GatedActivation, expert_blocks
from grpo_jax.models.expert_groups import expert_groups
from grpo_jax.models.mesh_checks import check_experts
from grpo_jax.sharding import EXPERT_AXES, ROW_AXES


def gated(activation: Callable[[Array], Array]) -> GatedActivation:
    """``activation(gate) * up``.

    Args:
        activation: elementwise, such as one of ``config.ACTIVATIONS``.
    """
    return lambda gate, up: activation(gate) * up


def clamped_swiglu(gate: Array, up: Array, *, limit: float, alpha: float = 1.702) -> Array:
    """The activation of gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)``, after clamping.

    ``gate`` is clamped to at most ``limit``, ``up`` to ``[-limit, limit]``.

    Args:
        gate, up: products with these matrices.
        limit: of both.
        alpha: factor in the sigmoid.
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def expert_mlp(
    x: Float[Array, "*tokens D"],
    experts: Int[Array, "*tokens k"],
    weights: Float[Array, "*tokens k"],
    params: ExpertParams,
    *,
    activation: GatedActivation,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Float[Array, "*tokens D"]:
    """``sum_i weights_i * (activation(x gate_i + b_i, x up_i + c_i) down_i + d_i)`` over a token's experts ``i``.

    Dropless: experts take as many tokens as choose them. By ``expert_blocks`` on CPUs, by ``expert_groups`` elsewhere.

    Over a mesh, experts are sharded over ``expert`` and ``tensor``. Tokens are gathered over ``expert``, each device
    computes the choices of its own experts, and the results are summed over both axes. Matrices are sharded over
    ``fsdp`` and ``context`` too and gathered when they are used.

    Args:
        x: tokens, in the compute dtype. With a mesh of ``context`` > 1, ``[B, S, D]``.
        experts: distinct for each token; entries that are not in ``[0, E)`` are skipped.
        weights: of each expert, float32.
        params: matrices and biases; converted to the dtype of ``x``.
        activation: such as ``gated(jax.nn.silu)``.
        mesh: the devices; None for one.
        platform: that computes, such as ``cpu``; by default that of the mesh or of JAX's default device.

    Raises:
        ValueError: ``expert * tensor`` devices do not divide E.
    """
    params = jax.tree.map(lambda p: p.astype(x.dtype), params)
    default = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    share = 1.0 if mesh is None else 1 / math.prod(mesh.shape.get(axis, 1) for axis in EXPERT_AXES)
    compute = partial(_on_device, activation=activation, platform=platform or default, share=share)
    if mesh is None or mesh.size == 1:
        return compute(x, experts, weights, params)
    return _over_mesh(compute, x, experts, weights, params, mesh)


def _on_device(x, experts, weights, params, *, activation: GatedActivation, platform: str, share: float):
    tokens, experts, weights = (y.reshape(-1, y.shape[-1]) for y in (x, experts, weights))
    function: Any = expert_blocks
    if platform != "cpu":
        function = partial(expert_groups, layout="ragged" if platform == "tpu" else "slots", share=share)
    return function(activation, tokens, experts, weights, params).reshape(x.shape)


def _over_mesh(compute, x, experts, weights, params: ExpertParams, mesh: Mesh):
    sizes = dict.fromkeys((*ROW_AXES, "context", "tensor"), 1) | dict(mesh.shape)
    check_experts(len(params.gate), mesh.shape)
    rows = tuple(axis for axis in ROW_AXES if axis in mesh.axis_names)
    is_split = x.shape[0] % math.prod(sizes[axis] for axis in rows) == 0  # not of a few sequences in sampling
    tokens = (rows if is_split else None, *(("context",) if x.ndim == 3 and sizes["context"] > 1 else ()))
    if len(tokens) == 2 and x.shape[1] % sizes["context"]:
        tokens = tokens[:1]
    over = tuple(axis for axis in EXPERT_AXES if sizes[axis] > 1)
    width = tuple(axis for axis in ("fsdp", "context") if sizes[axis] > 1)
    gathers = bool(width) and x.shape[-1] % math.prod(sizes[axis] for axis in width) == 0

    def spec(name: str) -> P:
        place = {"gate": 1, "up": 1, "down": 2}.get(name) if gathers else None
        return P(over or None, *(width if i == place else None for i in range(1, 3 if place else 1)))

    def on_device(x, experts, weights, params: ExpertParams):
        if gathers:
            params = params._replace(
                gate=jax.lax.all_gather(params.gate, width, axis=1, tiled=True),
                up=jax.lax.all_gather(params.up, width, axis=1, tiled=True),
                down=jax.lax.all_gather(params.down, width, axis=2, tiled=True),
            )
        shares = is_split and sizes["expert"] > 1
        if shares:
            x, experts, weights = (jax.lax.all_gather(y, "expert", tiled=True) for y in (x, experts, weights))
        own = experts - (jax.lax.axis_index(over) * len(params.gate) if over else 0)
        out = compute(x, own, weights, params)
        if shares:
            out = jax.lax.psum_scatter(out, "expert", tiled=True)
        summed = tuple(axis for axis in over if axis == "tensor" or not shares)
        return jax.lax.psum(out, summed) if summed else out

    if gathers:  # again in the backward pass, or every layer's gathered matrices would be kept until then
        on_device = jax.checkpoint(on_device, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    specs: dict[str, Any] = {name: spec(name) for name, p in params._asdict().items() if p is not None}
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(*tokens), P(*tokens), P(*tokens), ExpertParams(**specs)),
        out_specs=P(*tokens),
        check_vma=False,
    )
    return run(x, experts, weights, params)
