"""Metrics of one step's completions and rewards, under TRL's names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def completion_metrics(lengths: np.ndarray, truncated: np.ndarray) -> dict[str, float]:
    """Statistics of completion lengths, and the fraction of truncated completions.

    Args:
        lengths: ``[B]`` int, in tokens, the ending token included.
        truncated: ``[B]`` bool.

    Returns:
        ``completions/mean_length``, ``min_length``, ``max_length``, ``clipped_ratio`` (fraction truncated) and, unless
        all are truncated, ``mean_terminated_length``.
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
    """Means and standard deviations of rewards, and the fraction of groups without a learning signal.

    Args:
        total: ``[B]`` total rewards, NaN where absent; the rows of a group are adjacent.
        parts: ``[B]`` scores of each reward by name, NaN where absent.
        group_size: samples per prompt.

    Returns:
        ``reward``; ``reward_std``, the mean over groups of the standard deviation within a group (ddof 1, as in TRL);
        ``frac_reward_zero_std``, the fraction of groups whose rewards are all equal (for ``group_size`` above 1);
        ``frac_reward_absent``; and for each part ``rewards/<name>/mean`` and ``/std``. A metric without any value is
        left out.
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


def routing_metrics(experts: np.ndarray, mask: np.ndarray, num_experts: int) -> dict[str, float]:
    """How evenly a step's completions use the experts of a mixture.

    Args:
        experts: ``[B, T, L, k]`` int, of each token in each layer with experts; negative entries are not counted.
        mask: ``[B, T]`` bool, the tokens that count.
        num_experts: E, of a layer.

    Returns:
        ``router/dead_experts``, the fraction of experts of all layers that are chosen less than a hundredth as often as
        the average of their layer, and ``router/max_load``, the largest number of choices of an expert relative to that
        average; nothing if no token counts.
    """
    chosen = experts[mask].astype(np.int64)
    L = chosen.shape[1]
    in_all = (chosen + num_experts * np.arange(L)[:, None])[chosen >= 0]
    if not in_all.size:
        return {}
    loads = np.bincount(in_all, minlength=L * num_experts).reshape(L, num_experts)
    relative = loads / loads.mean(axis=1, keepdims=True)
    return {"router/dead_experts": float((relative < 0.01).mean()), "router/max_load": float(relative.max())}


def _sample_std(rows: np.ndarray) -> np.ndarray:
    """The standard deviation of each row (ddof 1) without NaN; 0 for a single value."""
    counts = (~np.isnan(rows)).sum(1)
    centred = rows - np.nanmean(rows, axis=1, keepdims=True)
    return np.sqrt(np.nansum(centred**2, axis=1) / np.maximum(counts - 1, 1))
