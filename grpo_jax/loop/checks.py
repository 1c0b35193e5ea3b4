"""Checks that stop a run before compute is spent, or when a metric is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grpo_jax import models
from grpo_jax.config.model import check_positions
from grpo_jax.loop.run import Run
from grpo_jax.loop.same_start import check_same


def check_length(length: int, policy: models.Pretrained, name: str) -> None:
    """Check that a model has a position for every token, and one set of rotary frequencies for all lengths.

    Args:
        length: longest sequence in tokens.
        policy: the model.
        name: the setting, or sum of settings, that gives the length.

    Raises:
        ValueError: it does not.
    """
    check_positions(length, policy.model.max_length, name)
    switch = policy.model.rope_switch_length
    if switch is not None and length > switch:
        raise ValueError(
            f"{name} is {length}, and this model changes its rotary frequencies beyond {switch} tokens; select one set "
            f"for all sequences with --rope-length {length}, or set {name} to at most {switch}"
        )


def check_same_data(position: Mapping[str, Any], digest: str, run: Run) -> None:
    """Check that a run is resumed with the data that it was started with.

    Args:
        position: position from the checkpoint; empty for a new run.
        digest: digest of the data.
        run: the run, for the error.

    Raises:
        ValueError: the digest in ``position`` differs, or that of another process.
    """
    check_same("has other training rows or tokens than", {"rows": digest})
    if position and position["data"] != digest:
        raise ValueError(
            f"the data differ from those that {run.folder} was started with; restore them, or choose another run_dir"
        )


def check_finite(metrics: Mapping[str, float], step: int, run: Run) -> None:
    """Check that the metrics of an update or evaluation are finite; call it before the step is saved.

    Args:
        metrics: metrics by name.
        step: the step.
        run: the run; the error lists its checkpoints.

    Raises:
        FloatingPointError: a metric is NaN or infinite.
    """
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())}. The run ends here; "
            f"complete checkpoints: {run.checkpoints.steps()}"
        )
