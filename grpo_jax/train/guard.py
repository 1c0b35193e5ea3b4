"""The optimizer's update, applied only where loss and gradient are sound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from grpo_jax.devices import to_device
from grpo_jax.train.trainable import join, trainable_part
from grpo_jax.types import Params, TrainState


def guarded_update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    state: TrainState,
    *,
    loss: Float[Array, ""],
    max_norm: float | None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after an update, or the state as it was if the update is bad.

    An update is bad if its loss or the norm of its gradient is not finite, or the norm is above ``max_norm``. Then
    nothing in the state changes: neither parameters nor moments, and neither ``step`` nor the optimizer's counters, so
    that the learning rate goes on as if the batch had not been there. A donated state is updated in place.

    Args:
        optimizer: any optax transformation.
        grads: float32, of the trainable parameters.
        state: before the update.
        loss: of the batch.
        max_norm: largest norm of a gradient that is applied; None for any finite one.

    Returns:
        The state, and the metrics ``grad_norm`` (before clipping) and ``skipped_updates``, 1 for a bad update and 0
        for others.
    """
    norm = optax.tree.norm(grads)
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if max_norm is not None:
        is_good &= norm <= max_norm

    def apply(trainable: Params, opt_state: Any) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer counters with floats
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

    def keep(trainable: Params, opt_state: Any) -> tuple[Params, Any]:
        return trainable, opt_state

    # Not jnp.where: fused with the update it changes the rounding of some optimizers.
    before = trainable_part(state.params), to_device(state.opt_state)
    trainable, opt_state = jax.lax.cond(is_good, apply, keep, *before)
    step = state.step + is_good.astype(state.step.dtype)
    metrics = {"grad_norm": norm, "skipped_updates": 1 - is_good.astype(jnp.float32)}
    return replace(state, step=step, params=join(trainable, state.params), opt_state=opt_state), metrics
