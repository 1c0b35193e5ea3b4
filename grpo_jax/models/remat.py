"""Rematerialization: which activations the backward pass recomputes instead of reading them from device memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

RematName = Literal["auto", "none", "block", "offload"]
Remat = Literal["none", "block", "offload"]

BLOCK_INPUT = "block_input"
"""Checkpoint name of the residual stream before each block."""
OFFLOAD_MEMORY = "pinned_host"


def resolve_remat(name: RematName, device: Any) -> Remat:
    """The policy in effect on a device.

    Args:
        name: ``none`` keeps all activations; ``block`` keeps the input of each block and recomputes the rest;
            ``offload`` is ``block`` with these inputs in the host's memory; ``auto`` is ``none`` on a CPU, where it is
            faster and recomputing saves little memory, and ``block`` elsewhere.
        device: one of those that compute.

    Raises:
        ValueError: ``offload`` on a device without pinned host memory.
    """
    if name == "auto":
        return "none" if device.platform == "cpu" else "block"
    if name == "offload":
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if OFFLOAD_MEMORY not in kinds:
            raise ValueError(
                f"remat is offload, which needs {OFFLOAD_MEMORY} memory; {device.device_kind} has {', '.join(kinds)}: "
                "use block"
            )
    return name


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """The policy of ``jax.checkpoint`` for each block; None keeps only the block's inputs, on the device."""
    if remat != "offload":
        return None
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst=OFFLOAD_MEMORY,
    )
