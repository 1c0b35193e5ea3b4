"""Checks that stop a run before compute is spent, or when its numbers are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.config.model import check_positions
from grpo_jax.loop.run import Run


def check_length(length: int, policy: models.Pretrained, name: str) -> None:
    """Check that a model has a position for every token, and one set of rotary frequencies for all lengths.

    Raises:
        ValueError: it has not.
    """
    check_positions(length, policy.model.max_length, name)
    switch = policy.model.rope_switch_length
    if switch is not None and length > switch:
        raise ValueError(
            f"{name} is {length}, and sequences of more than {switch} tokens have other rotary frequencies in this "
            f"model; choose one set for all with --rope-length {length}, or set {name} to at most {switch}"
        )


def check_same_data(position: Mapping[str, Any], digest: str, run: Run) -> None:
    """Check that a run is resumed with the data it was begun with.

    Raises:
        ValueError: the digest in its position is another one.
    """
    if position and position["data"] != digest:
        raise ValueError(
            f"the data are not those that {run.folder} was begun with; restore them, or use another run_dir"
        )


def check_divides(count: int, mesh: Mesh, name: str) -> None:
    """Check that a number of rows divides over the devices that share a batch.

    Raises:
        ValueError: it does not.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % parts:
        raise ValueError(f"{name}: {count} do not divide over mesh data x fsdp = {parts} devices")


def check_finite(metrics: Mapping[str, float], step: int, run: Run) -> None:
    """Stop a run whose updates or evaluation gave a loss, gradient or other metric that is not finite.

    Args:
        metrics: those of the step's updates, before it is saved, or of an evaluation.
        step: its number.
        run: whose complete checkpoints the error lists.

    Raises:
        FloatingPointError: a metric is NaN or infinite.
    """
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())}. The run ends here; "
            f"complete checkpoints: {run.checkpoints.steps()}"
        )
