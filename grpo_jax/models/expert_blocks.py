"""Products of tokens with their experts' matrices on CPUs: expert by expert, in blocks of rows.

A grouped product of XLA multiplies all rows with all experts on CPUs. Here, a loop over the experts that have rows
copies an expert's matrices once, and a loop inside it takes blocks of the expert's rows. Rows in a block beyond the
expert's last are computed and dropped. A row's result does not depend on the others.

Shapes: N tokens with k experts each, D and F the width of the residual stream and of an expert, M rows of a block,
R = N * k rows in all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

GatedActivation = Callable[[Array, Array], Array]
"""``(gate, up) -> hidden``, elementwise."""
MAX_BLOCK = 64
"""Rows; more are not faster."""
JOINED_BLOCK = 16
"""Rows from which copying gate and up into one matrix is faster than two products."""


class ExpertParams(NamedTuple):
    """Matrices and biases of E experts; biases are None if there are none."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


class Rows(NamedTuple):
    """Choices, sorted by expert.

    Attributes:
        order: number of each choice, ``token * k + place``; skipped ones last.
        sizes: choices of each expert.
    """

    order: Int[Array, " R"]
    sizes: Int[Array, " E"]


def sorted_rows(experts: Int[Array, "N k"], num_experts: int) -> Rows:
    """Choices sorted by expert, those of an expert by token.

    Args:
        experts: chosen for each token; entries that are not in ``[0, num_experts)`` are skipped.
        num_experts: E.
    """
    flat = experts.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    rows = flat.shape[0]
    sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    if (num_experts + 1) * rows < 2**31:  # one key is sorted several times faster than a pair
        order = jnp.sort(flat * rows + jnp.arange(rows, dtype=jnp.int32)) % rows
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return Rows(order, sizes)


def block_size(rows: int, num_experts: int) -> int:
    """Rows of a block: up to half of the mean of an expert, from 2 to ``MAX_BLOCK``.

    A product of one row would be a matrix-vector product, which XLA adds up in another order.

    Args:
        rows: choices in all.
        num_experts: E.
    """
    half = max(rows // (2 * num_experts), 1)
    return min(max(1 << (half.bit_length() - 1), 2), MAX_BLOCK)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_blocks(
    activation: GatedActivation,
    x: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    weights: Float[Array, "N k"],
    params: ExpertParams,
) -> Float[Array, "N D"]:
    """``experts.expert_mlp`` on one device, in blocks.

    Args:
        activation: of the hidden units.
        x: tokens, in the dtype of the parameters.
        experts, weights, params: as there.
    """
    return _forward(activation, x, sorted_rows(experts, len(params.gate)), weights, params, saves=False)[0]


def _own(x: Any, expert: Array) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, expert, 0, keepdims=False)


def _joined(x: Any, y: Any, expert: Array) -> Any:
    """An expert's part of both, side by side."""
    return None if x is None or y is None else jnp.concatenate([_own(x, expert), _own(y, expert)], axis=-1)


def _loop_over_experts(rows: Rows, block_rows: int, body: Callable, carry: tuple) -> tuple:
    """``carry = body(expert, first row, blocks, carry)`` for experts that have rows, in ascending order."""
    starts = jnp.cumsum(rows.sizes) - rows.sizes
    active = jnp.argsort(rows.sizes == 0, stable=True).astype(jnp.int32)

    def one(i: Array, carry: tuple) -> tuple:
        expert = active[i]
        blocks = (rows.sizes[expert] + block_rows - 1) // block_rows
        return body(expert, starts[expert], blocks, carry)

    return lax.fori_loop(0, (rows.sizes > 0).sum(dtype=jnp.int32), one, carry)


def _of_block(order: Array, first: Array, size: Array, block: Array, rows: int, k: int):
    """First row, choices, tokens ``[M]`` and which rows are the expert's ``[M, 1]``, of a block."""
    offset = block * rows
    choices = lax.dynamic_slice_in_dim(order, first + offset, rows)
    is_own = offset + jnp.arange(rows, dtype=jnp.int32) < size
    return first + offset, choices, choices // k, is_own[:, None]


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


def _add(x: Array, index: Array, values: Array) -> Array:
    return x.at[index].add(values.astype(x.dtype), mode="promise_in_bounds")


def _dot(x: Array, y: Array, dims: tuple[int, int] = (1, 0)) -> Array:
    """Product in float32, contracted over these dimensions."""
    return lax.dot_general(x, y, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=jnp.float32)


def _forward(activation, x, rows: Rows, weights, params: ExpertParams, *, saves: bool):
    """The output, and if ``saves`` the products with gate and up, in the rows' order."""
    k, F, dtype = weights.shape[1], params.gate.shape[2], x.dtype
    M = block_size(weights.size, len(params.gate))
    order, flat = jnp.pad(rows.order, (0, M)), weights.reshape(-1)

    def expert_body(expert, first, blocks, carry):
        pair = (params.gate, params.up)
        matrices = [_joined(*pair, expert)] if M >= JOINED_BLOCK else [_own(x, expert) for x in pair]
        bias, down_bias = _joined(params.gate_bias, params.up_bias, expert), _own(params.down_bias, expert)
        down = _own(params.down, expert)

        def body(block, carry):
            out, saved = carry
            start, choices, tokens, is_own = _of_block(order, first, rows.sizes[expert], block, M, k)
            inputs = jnp.where(is_own, _take(x, tokens), 0)
            both = jnp.concatenate([_dot(inputs, matrix) for matrix in matrices], axis=1).astype(dtype)
            both = both if bias is None else both + bias[None]
            weight = _take(flat, choices)[:, None]
            hidden = activation(both[:, :F], both[:, F:]).astype(jnp.float32) * weight
            result = _dot(hidden.astype(dtype), down)
            if down_bias is not None:
                result += down_bias.astype(jnp.float32)[None] * weight
            if saves:
                saved = lax.dynamic_update_slice_in_dim(saved, both, start, 0)
            return _add(out, tokens, jnp.where(is_own, result, 0)), saved

        return lax.fori_loop(0, blocks, body, carry)

    out = jnp.zeros(x.shape, jnp.float32)
    saved = jnp.zeros((weights.size + M, 2 * F) if saves else (0, 2 * F), dtype)
    out, saved = _loop_over_experts(rows, M, expert_body, (out, saved))
    return out.astype(dtype), saved


def _forward_saving(activation, x, experts, weights, params):
    rows = sorted_rows(experts, len(params.gate))
    out, saved = _forward(activation, x, rows, weights, params, saves=True)
    return out, (x, rows, weights, params, saved)


def _backward(activation, residuals, grad):
    x, rows, weights, params, saved = residuals
    k, (_, D, F), dtype = weights.shape[1], params.gate.shape, x.dtype
    M = block_size(weights.size, len(params.gate))
    order, flat = jnp.pad(rows.order, (0, M)), weights.reshape(-1)

    def expert_body(expert, first, blocks, carry):
        gate_up, down = _joined(params.gate, params.up, expert), _own(params.down, expert)
        bias, down_bias = params.gate_bias, _own(params.down_bias, expert)

        def body(block, carry):
            d_x, d_weights, d_gate_up, d_down, d_bias, d_down_bias = carry
            start, choices, tokens, is_own = _of_block(order, first, rows.sizes[expert], block, M, k)
            inputs = jnp.where(is_own, _take(x, tokens), 0)
            d_out = jnp.where(is_own, _take(grad, tokens), 0)
            both = lax.dynamic_slice_in_dim(saved, start, M)
            weight = _take(flat, choices)[:, None]
            hidden, pull = jax.vjp(activation, both[:, :F], both[:, F:])
            of_hidden = _dot(d_out, down, (1, 1))  # of hidden units times the weight
            d_weight = (hidden.astype(jnp.float32) * of_hidden).sum(1)
            d_both = jnp.concatenate(pull((of_hidden * weight).astype(dtype)), axis=1)
            weighted = (hidden.astype(jnp.float32) * weight).astype(dtype)
            d_gate_up += _dot(inputs, d_both, (0, 0))
            d_down += _dot(weighted, d_out, (0, 0))
            if bias is not None:
                d_bias += d_both.astype(jnp.float32).sum(0)
            if down_bias is not None:
                d_weight += (d_out * down_bias[None]).astype(jnp.float32).sum(1)
                d_down_bias += (d_out.astype(jnp.float32) * weight).sum(0)
            d_x = _add(d_x, tokens, _dot(d_both, gate_up, (1, 1)))
            d_weights = lax.dynamic_update_slice_in_dim(d_weights, d_weight, start, 0)
            return d_x, d_weights, d_gate_up, d_down, d_bias, d_down_bias

        d_x, d_weights, totals = carry
        own = (jnp.zeros(s, jnp.float32) for s in ((D, 2 * F), (F, D), (2 * F,), (D,)))
        d_x, d_weights, d_both, d_down, d_bias, d_down_bias = lax.fori_loop(0, blocks, body, (d_x, d_weights, *own))
        parts = (d_both[:, :F], d_both[:, F:], d_down, d_bias[:F], d_bias[F:], d_down_bias)
        parts = {name: part for name, part in zip(params._fields, parts, strict=True) if name in present}
        return d_x, d_weights, {name: _put(totals[name], expert, part) for name, part in parts.items()}

    present = {name: p for name, p in params._asdict().items() if p is not None}
    zeros = jax.tree.map(jnp.zeros_like, present)
    carry = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(len(order), jnp.float32), zeros)
    d_x, by_row, d_params = _loop_over_experts(rows, M, expert_body, carry)
    by_row = jnp.where(jnp.arange(flat.size) < rows.sizes.sum(), by_row[: flat.size], 0)
    d_weights = jnp.zeros(flat.size, jnp.float32).at[rows.order].set(by_row, unique_indices=True)
    return d_x.astype(dtype), None, d_weights.reshape(weights.shape), ExpertParams(**d_params)


def _put(total: Array, expert: Array, part: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, part.astype(total.dtype), expert, 0)


expert_blocks.defvjp(_forward_saving, _backward)
