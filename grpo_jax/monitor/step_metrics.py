"""The figures of one step's completions and rewards, under TRL's names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def completion_metrics(lengths: np.ndarray, truncated: np.ndarray) -> dict[str, float]:
    """Lengths in tokens (the ending one included) and the share of completions that were cut off.

    Args:
        lengths: ``[B]`` int.
        truncated: ``[B]`` bool.

    Returns:
        ``completions/...``; those of terminated completions only where there are any.
    """
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(truncated.mean()),
    }
    if not truncated.all():
        metrics["completions/mean_terminated_length"] = float(lengths[~truncated].mean())
    return metrics


def reward_metrics(total: np.ndarray, parts: Mapping[str, np.ndarray], *, group_size: int) -> dict[str, float]:
    """Mean rewards, how they spread within groups, and how many groups carry no signal. NaN is an absent reward.

    Args:
        total: ``[B]``, what is learnt from; rows of a group adjacent.
        parts: the same shape, each part by its name.
        group_size: samples for each prompt.

    Returns:
        ``reward``; ``reward_std``, the mean over groups of the standard deviation within one (ddof 1, as TRL's);
        ``frac_reward_zero_std``, the share of groups in which all rewards are equal, where a group has more than one;
        ``frac_reward_absent``; and for
        each part ``rewards/<name>/mean`` and ``/std``. What nothing is present for is left out.
    """
    present = ~np.isnan(total)
    metrics = {"frac_reward_absent": float(1 - present.mean())}
    if present.any():
        groups = total.reshape(-1, group_size)
        groups = groups[~np.isnan(groups).all(1)]
        spread = np.nanmax(groups, axis=1) - np.nanmin(groups, axis=1)
        metrics["reward"] = float(total[present].mean())
        metrics["reward_std"] = float(_sample_std(groups).mean())
        if group_size > 1:
            metrics["frac_reward_zero_std"] = float((spread == 0).mean())
    for name, values in parts.items():
        values = values[~np.isnan(values)]
        if values.size:
            metrics[f"rewards/{name}/mean"] = float(values.mean())
            metrics[f"rewards/{name}/std"] = float(_sample_std(values[None])[0])
    return metrics


def _sample_std(rows: np.ndarray) -> np.ndarray:
    """The deviation of each row (ddof 1) over what is present; 0 for a row with a single value."""
    counts = (~np.isnan(rows)).sum(1)
    centred = rows - np.nanmean(rows, axis=1, keepdims=True)
    return np.sqrt(np.nansum(centred**2, axis=1) / np.maximum(counts - 1, 1))
