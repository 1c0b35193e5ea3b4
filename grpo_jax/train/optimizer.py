"""Learning-rate schedules and the default optimizer."""

from __future__ import annotations

from typing import Literal

import jax
import optax

VECTORS = ("scale", "bias")


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
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, b1: float = 0.9, b2: float = 0.999
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with weight decay on matrices only.

    Args:
        learning_rate: a number, or update number -> learning rate.
        weight_decay: decoupled; norms, biases and other vectors are not decayed.
        b1: decay of the first moment.
        b2: decay of the second moment.

    Raises:
        ValueError: ``b1`` or ``b2`` is not in [0, 1).
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 1")

    def decayed(params):
        def is_matrix(path, x):  # by name too: the bias of several heads has two axes
            return x.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) not in VECTORS

        return jax.tree.map_with_path(is_matrix, params)

    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
