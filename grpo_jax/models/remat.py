"""Rematerialization: which activations the backward pass recomputes instead of reading them from device memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from grpo_jax.devices import HOST_MEMORY, check_host_memory

Remat = Literal["none", "block", "offload"]

"""``none`` keeps all activations; ``block`` keeps the input of each block and recomputes the rest in the backward pass;
``offload`` is ``block`` with these inputs in the host's memory."""

BLOCK_INPUT = "block_input"
"""Checkpoint name of the residual stream before each block."""


def check_remat(remat: Remat, device: Any) -> None:
    """Check that a device supports a policy.

    Args:
        remat: the policy.
        device: one of those that compute.

    Raises:
        ValueError: ``offload`` on a device without pinned host memory.
    """
    if remat == "offload":
        check_host_memory(device, "remat is offload", "use block")


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """The policy of ``jax.checkpoint`` for each block; None keeps only the block's inputs, on the device."""
    if remat != "offload":
        return None
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )
