"""Tables and curves of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config.compare import WITH_REWARD_MODEL
from grpo_jax.monitor import plots
from grpo_jax.monitor.plots import Curve, Panel

SHARE = (0.0, 1.02)
"""Limits of an axis of shares."""
COLOURS: Mapping[str, str] = {
    "grpo": "tab:blue",
    "rloo": "tab:cyan",
    "ppo": "tab:orange",
    "dpo": "tab:purple",
    "sft": "tab:green",
}


def seconds_of(rows: Sequence[Mapping[str, Any]], last: int | None = None) -> float:
    """Seconds of a run's steps.

    Args:
        rows: the run's metrics rows.
        last: last step to count; None for all.
    """
    return sum(row.get("step_time", 0.0) for row in rows if last is None or row["step"] <= last)


def reached(points: Sequence[Mapping[str, Any]], level: float) -> float | None:
    """Number of samples at which pass@1 reaches a level, linearly interpolated; None if it never does.

    Args:
        points: ``samples`` and ``pass@1`` of each evaluation, by samples.
        level: of pass@1.
    """
    if points[0]["pass@1"] >= level:
        return 0.0
    for before, after in pairwise(points):
        if before["pass@1"] < level <= after["pass@1"]:
            part = (level - before["pass@1"]) / (after["pass@1"] - before["pass@1"])
            return before["samples"] + part * (after["samples"] - before["samples"])
    return None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, minimum and maximum over seeds; None if a seed has no value."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return {"mean": None, "low": None, "high": None, "of_seeds": list(values)}
    return {"mean": float(np.mean(present)), "low": min(present), "high": max(present), "of_seeds": present}


def learning(figures: Mapping[str, Mapping[str, Any]], level: float) -> list[tuple[str, ...]]:
    """Table of the methods' results; the first row is the header.

    Args:
        figures: results of each method.
        level: pass@1 that ``samples_to_level`` of the figures is for.
    """
    rows = [("", "pass@1", "of the seeds", f"samples to {level:g}", "seconds", "of a step", "largest fall")]
    for method, results in figures.items():
        final = results["pass@1"]
        rows.append(
            (
                method,
                f"{final['mean']:.3f}",
                f"{final['low']:.3f} to {final['high']:.3f}",
                shown(results["samples_to_level"]["mean"], ",.0f"),
                shown(results["seconds"]["mean"], ".0f"),
                shown(results["step_seconds"]["mean"], ".2f"),
                shown(results["largest_fall"]["mean"], ".3f"),
            )
        )
    return rows


def memories(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Table of the memory of the methods' updates; the first row is the header."""
    rows = [("", "copies of the model", "MiB of an update", "GiB with the larger model")]
    for method, results in figures.items():
        larger = results["memory_of_larger"]
        for name, memory in results["memory"].items():
            suffix = " with reward model and reference" if name.endswith(WITH_REWARD_MODEL) else ""
            gib = larger[name]["peak_bytes"] / 2**30 if name in larger else None
            mib = memory["peak_bytes"] / 2**20
            rows.append((method + suffix, f"{memory['copies']:g}", f"{mib:.1f}", shown(gib, ".1f")))
    return rows


def claims(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """``(claim, measurement)`` for common claims about GRPO against PPO; empty unless both were compared."""
    if not {"grpo", "ppo"} <= figures.keys():
        return []
    rows, grpo, ppo = [], figures["grpo"], figures["ppo"]
    for suffix, what in (("", "rules as rewards"), (WITH_REWARD_MODEL, "reward model and reference")):
        shares = {
            where: grpo[kind]["grpo" + suffix]["peak_bytes"] / ppo[kind]["ppo" + suffix]["peak_bytes"]
            for where, kind in (("this model", "memory"), ("the larger one", "memory_of_larger"))
            if "grpo" + suffix in grpo[kind] and "ppo" + suffix in ppo[kind]
        }
        measured = ", ".join(f"{share:.0%} of PPO's with {where}" for where, share in shares.items())
        rows.append((f"nearly halves memory: {what}", measured))
    named = (("GRPO", grpo), ("PPO", ppo))
    control = ""
    if "rloo" in figures:
        same = figures["rloo"]["step_seconds"]["mean"] / grpo["step_seconds"]["mean"]
        control = f" (RLOO's, which is the same program: {same:.2f})"
    slower = ppo["step_seconds"]["mean"] / grpo["step_seconds"]["mean"]
    samples = ", ".join(f"{name} {shown(each['samples_to_level']['mean'], ',.0f')}" for name, each in named)
    ends = ", ".join(f"{name} {each['pass@1']['low']:.3f} to {each['pass@1']['high']:.3f}" for name, each in named)
    falls = ", ".join(f"{name} {each['largest_fall']['high']:.3f}" for name, each in named)
    return [
        *rows,
        ("three times faster: a step", f"PPO's takes {slower:.2f} times as long{control}"),
        ("three times faster: samples to the level", samples),
        ("more stable: pass@1 of the seeds", ends),
        ("more stable: largest fall of the reward", falls),
    ]


def shown(value: float | None, form: str) -> str:
    """A number in a table cell; a dash for None.

    Args:
        value: the number.
        form: its format, such as ``.2f``.
    """
    return "-" if value is None else format(value, form)


def draw(of_methods: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Plot held-out pass@1 by samples and by time, one line per seed and one colour per method.

    Args:
        of_methods: for each method, the points of each seed.
        path: image file to write.
    """
    curves = [Curve("pass@1", method, COLOURS[method], True, runs=seeds) for method, seeds in of_methods.items()]
    labels = {"samples": "samples", "seconds": "seconds of sampling and training"}
    plots.draw(
        [Panel("pass@1, held out", curves, limits=SHARE, x=x, x_label=label) for x, label in labels.items()], path
    )


def draw_stages(of_seeds: Sequence[Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Plot the metrics that are shares over the pipeline's stages, one line per seed; R1-Zero's as dotted lines.

    Args:
        of_seeds: ``stages`` of the summary of each seed.
        path: image file to write.
    """
    chain = [model for model in of_seeds[0] if model != "r1_zero"]
    runs = [[{"stage": place, **stages[model]} for place, model in enumerate(chain)] for stages in of_seeds]
    zero = [[{"stage": place, **stages["r1_zero"]} for place in (0, len(chain) - 1)] for stages in of_seeds]
    panels = [
        Panel(
            name,
            (
                Curve(name, "R1's chain", "tab:blue", points=True, runs=runs),
                Curve(name, "R1-Zero", "tab:orange", dotted=True, runs=zero),
            ),
            limits=SHARE,
            x="stage",
            x_label="",
            ticks=chain,
        )
        for name in ("pass@1", "format", "language", "general quality")
        if all(figures.get(name) is not None for stages in of_seeds for figures in stages.values())
    ]
    plots.draw(panels, path, columns=len(panels))
