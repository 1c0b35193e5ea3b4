"""Learning-rate schedules and optimizers."""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from grpo_jax.train.quantized_moments import scale_by_quantized_adam
from grpo_jax.types import Params

MOMENTS = ("float32", "bfloat16", "8bit")
VECTORS = ("scale", "bias")
MUON_AXES = (
    (r"(^|/)(q|k|v|z|out_gate)/kernel$", MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))),
    (r"(^|/)o/kernel$", MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2)),
    (r"(^|/)(gate|up|down)/kernel$", MuonDimensionNumbers(reduction_axis=0, output_axis=1)),
)
"""Patterns of the paths of the matrices that Muon updates, and the axes that are their rows and columns."""


def make_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, decay: Literal["constant", "linear", "cosine"]
) -> optax.Schedule:
    """Linear warm-up, then a constant learning rate or decay to 0 at ``total_steps``.

    Args:
        learning_rate: peak.
        warmup_steps: updates of warm-up; update ``i`` of them has ``(i + 1) / (warmup_steps + 1)`` of the peak.
        total_steps: updates of the run.
        decay: of the learning rate after the warm-up.

    Raises:
        ValueError: learning_rate is not above 0, or the warm-up is longer than the run.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be from 0 to the run's {total_steps} updates")
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }
    # Starts at learning_rate / (warmup_steps + 1): an update at 0 would be wasted.
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[decay]], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW after gradient clipping by the global norm.

    Args:
        schedule: update number -> learning rate.
        max_grad_norm: gradients with a larger global norm are scaled down to it.
        weight_decay: see ``adamw``.
        b1: decay of the first moment.
        b2: decay of the second moment.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm), adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    )


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    moments: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with weight decay on matrices only.

    Args:
        learning_rate: a number, or update number -> learning rate.
        weight_decay: decoupled; norms, biases and other vectors are not decayed.
        b1: decay of the first moment.
        b2: decay of the second moment.
        moments: float32, bfloat16 or 8bit: a state of 8, 6 or about 2 bytes per parameter. bfloat16 applies to the
            first moment; the second stays in float32, because an update changes it by less than bfloat16 resolves. 8bit
            applies to both (``scale_by_quantized_adam``).

    Raises:
        ValueError: ``b1`` or ``b2`` is not in [0, 1), or there are no such ``moments``.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")
    if moments not in MOMENTS:
        raise ValueError(f"moments is {moments!r}; it must be one of {', '.join(MOMENTS)}")
    if moments == "8bit":
        decay = optax.add_decayed_weights(weight_decay, _matrices)
        return optax.chain(scale_by_quantized_adam(b1=b1, b2=b2), decay, optax.scale_by_learning_rate(learning_rate))
    mu_dtype = jnp.bfloat16 if moments == "bfloat16" else None
    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices, mu_dtype=mu_dtype)


def lion(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675) with weight decay on matrices only; its learning rate is a third to a tenth of AdamW's.

    Args:
        learning_rate: a number, or update number -> learning rate.
        weight_decay: decoupled; norms, biases and other vectors are not decayed.
        b1: decay of the moment in the update's direction.
        b2: decay of the moment that is kept.
    """
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=_matrices)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    beta: float = 0.95,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Muon (Jordan, 2024): orthogonalized momentum for the matrices of attention and MLP, Adam for all else.

    The heads of q, k, v and o are parts of one matrix, ``[D, heads * head_dim]`` or its transpose. Embeddings, output
    embedding, norms and biases are updated by Adam. With ``consistent_rms`` 0.2 the updates are as large as AdamW's, so
    that its learning rates apply (arXiv 2502.16982, equation 4).

    Args:
        learning_rate: a number, or update number -> learning rate.
        weight_decay: decoupled, of the matrices that Muon updates.
        beta: decay of the momentum.
        ns_steps: Newton-Schulz iterations.
        consistent_rms: root mean square of an update; None scales it by ``sqrt(max(1, fan_out / fan_in))``.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.

    Raises:
        ValueError: by ``init``, if no parameter is a matrix of attention or MLP.
    """

    def axes(params: Params) -> Params:
        found = jax.tree.map_with_path(lambda path, _: _muon_axes(path), params)
        if not any(isinstance(leaf, MuonDimensionNumbers) for leaf in jax.tree.leaves(found, is_leaf=_is_axes)):
            raise ValueError("muon: no parameter is a matrix of attention (q, k, v, o) or MLP (gate, up, down)")
        return found

    return optax.contrib.muon(
        learning_rate,
        beta=beta,
        ns_steps=ns_steps,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=consistent_rms,
        muon_weight_dimension_numbers=axes,
    )


def _muon_axes(path: Any) -> MuonDimensionNumbers | None:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((axes for pattern, axes in MUON_AXES if re.search(pattern, name)), None)


def _is_axes(x: Any) -> bool:
    return isinstance(x, MuonDimensionNumbers)


def _matrices(params: Params) -> Params:
    """True at matrices, by name too: the bias of several heads has two axes."""
    return jax.tree.map_with_path(
        lambda path, x: x.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) not in VECTORS, params
    )
