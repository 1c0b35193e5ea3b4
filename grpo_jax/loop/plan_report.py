"""A plan as tables, as a picture and as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_jax.jsonl import write_atomically
from grpo_jax.loop.plan import BOUNDS, KINDS, Phase, Plan
from grpo_jax.loop.roofline import Number
from grpo_jax.monitor.plots import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PALETTE, PURPLE

COLOURS = dict(zip(KINDS, (BLUE, PURPLE, "#db2777", "#dc2626", "#ca8a04", "#0891b2", GREEN, ORANGE, GREY), strict=True))
BOUND_COLOURS = dict(zip(BOUNDS, (PALETTE[0], PALETTE[1], PALETTE[2]), strict=True))
BOUND_NAMES = {"compute": "compute", "memory": "HBM", "wire": "wire"}
MARK = "the compiler's and the roofline's, not measured"
"""Said of every figure."""


def show_plan(plan: Plan, console: Console, *, title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print the tables of memory and time and the summary of a plan.

    Args:
        plan: the plan.
        console: to print on.
        title: the run in words.
        facts: lines of the summary, as names and values.
    """
    console.print()
    console.print(Text(title, style="bold"))
    console.print(_memory_table(plan))
    if plan.rates is not None:
        console.print(_time_table(plan))
    for name, value in facts:
        console.print(Text(f"{name:>18}  ", style="dim") + Text(value))


def show_ranking(plans: Sequence[Plan], console: Console) -> None:
    """Print one line for each of several plans of a run, the best first.

    Args:
        plans: of ``best_first``.
        console: to print on.
    """
    table = Table(title="meshes, best first", title_justify="left", title_style="bold", header_style="dim", box=None)
    for name in ("mesh", "micro-batches", "GB a device", "", "step, s", "update MFU", "most of it"):
        table.add_column(name, justify="left" if name in ("mesh", "", "most of it") else "right")
    for plan in plans:
        timed, mfu, bound = "", "", ""
        if plan.is_timed:
            seconds, update = plan.seconds(), plan.update_seconds
            timed = f"{_number(seconds['longest'])} to {_number(seconds['sum'])}"
            mfu = f"{plan.mfu(update['sum']):.0%} to {plan.mfu(update['longest']):.0%}"
            bound = BOUND_NAMES[plan.bound]
        table.add_row(plan.mesh, str(plan.num_micro_batches), _gb(plan.held), _verdict(plan.fits), timed, mfu, bound)
    console.print()
    console.print(table)


def best_first(plans: Sequence[Plan]) -> list[Plan]:
    """Plans in order: those that fit, then those with the shortest step without overlap."""

    def rank(plan: Plan) -> tuple[bool, Number]:
        return not plan.fits, plan.seconds()["sum"] if plan.is_timed else math.inf

    return sorted(plans, key=rank)


def facts_of(plan: Plan, *, price: Number | None, device: str, length: str) -> list[tuple[str, str]]:
    """The summary of a plan, line by line, as names and values.

    Args:
        plan: the plan.
        price: of a device for an hour; None if unknown.
        device: its name.
        length: the assumption about the lengths.
    """
    unrolled = {phase.layers for phase in plan.phases if phase.layers is not None}
    facts = [("verdict", _sentence(plan, device))]
    if plan.is_timed:
        seconds, update = plan.seconds(), plan.update_seconds
        low, high = seconds["longest"], seconds["sum"]
        facts += [
            ("a step", f"{_number(low)} s if compute, HBM and wire overlap, {_number(high)} s if they do not"),
            ("tokens a second", f"{plan.tokens / high:,.0f} to {plan.tokens / low:,.0f} ({plan.tokens:,} a step)"),
            (
                "MFU",
                f"{plan.mfu(update['sum']):.1%} to {plan.mfu(update['longest']):.1%} of the updates, "
                f"{plan.mfu(high):.1%} to {plan.mfu(low):.1%} of a step",
            ),
            ("time goes to", ", ".join(f"{BOUND_NAMES[each]} {seconds[each] / high:.0%}" for each in BOUNDS)),
        ]
        steps = plan.num_steps or 1000
        hours = [steps * each / 3600 for each in (low, high)]
        run = f"{_number(hours[0])} to {_number(hours[1])} hours for {steps:,} steps"
        if price is not None:
            costs = [each * plan.devices * price for each in hours]
            run += f", {costs[0]:,.0f} to {costs[1]:,.0f} at {price:g} an hour for each of {plan.devices} devices"
        facts.append(("the run", run))
    facts.append(("lengths", length))
    for small, large in sorted(unrolled):
        facts.append(("sampling", f"its layers are unrolled: from programs of {small} and {large} layers, linearly"))
    facts.append(("not counted", "evaluations, rewards, further draws, the host; compaction; latency of programs"))
    facts.append(("all figures are", MARK))
    return facts


def to_json(plan: Plan, *, price: Number | None) -> dict[str, Any]:
    """A plan as JSON.

    Args:
        plan: the plan.
        price: of a device for an hour; None if unknown.
    """
    result: dict[str, Any] = {
        "mesh": dict(plan.axes),
        "rollout_tensor": plan.rollout_tensor,
        "num_micro_batches": plan.num_micro_batches,
        "fits": plan.fits,
        "capacity_bytes": plan.capacity,
        "device_bytes": plan.held,
        "phases": [_phase_json(phase, plan) for phase in plan.phases],
        "tokens_per_step": plan.tokens,
        "model_flops_per_step": plan.flops,
        "num_steps": plan.num_steps,
    }
    if not plan.is_timed:
        return result
    seconds, update = plan.seconds(), plan.update_seconds
    ends = ("longest", "sum")
    result |= {
        "seconds": seconds,
        "update_seconds": update,
        "largest": plan.bound,
        "tokens_per_second": {end: plan.tokens / seconds[end] for end in ends},
        "mfu_of_updates": {end: plan.mfu(update[end]) for end in ends},
        "mfu_of_step": {end: plan.mfu(seconds[end]) for end in ends},
    }
    if plan.num_steps is not None:
        result["hours"] = {end: plan.num_steps * seconds[end] / 3600 for end in ends}
        if price is not None:
            result["price"] = {end: hours * price * plan.devices for end, hours in result["hours"].items()}
    return result


def _phase_json(phase: Phase, plan: Plan) -> dict[str, Any]:
    totals = {name: phase.total(name) for name in ("flops", "traffic", "wire")}
    return {
        "name": phase.name,
        "fits": phase.fits(plan.capacity),
        "device_bytes": phase.held,
        "bytes_by_kind": dict(phase.memory),
        "refused_bytes": None if phase.refused is None or math.isnan(phase.refused) else phase.refused,
        "is_refused": phase.refused is not None,
        "layers_compiled": phase.layers,
        "flops": totals["flops"],
        "memory_traffic_bytes": totals["traffic"],
        "wire_bytes": totals["wire"],
        "collective_bytes": phase.collectives,
        "num_collectives": phase.num_collectives,
        "latency_seconds": None if plan.rates is None else phase.latency(plan.rates),
        "seconds": None if plan.rates is None or phase.refused is not None else phase.seconds(plan.rates),
        "programs": {
            name: {
                "times": times,
                "flops": measured.flops,
                "memory_traffic_bytes": measured.traffic,
                "wire_bytes": measured.wire,
                "argument_bytes": measured.arguments,
                "temporary_bytes": measured.temporary,
                "peak_bytes": measured.peak,
                "compile_seconds": round(measured.seconds, 1),
            }
            for name, (measured, times) in phase.programs.items()
        },
    }


def _memory_table(plan: Plan) -> Table:
    kinds = [kind for kind in KINDS if any(kind in phase.memory for phase in plan.phases)]
    limit = "" if plan.capacity is None else f", of {_gb(plan.capacity)}"
    table = Table(
        title=f"memory by kind, GB a device{limit}", title_justify="left", title_style="", header_style="dim", box=None
    )
    table.add_column("phase")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name in ("all", "", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for phase in plan.phases:
        cells = [_gb(phase.memory[kind]) if phase.memory.get(kind) else "" for kind in kinds]
        if phase.refused is not None:
            cells[-1] = "?"
        share = Text("") if plan.capacity is None else _bar(phase.held / plan.capacity)
        table.add_row(phase.name, *cells, _held(phase), share, _verdict(phase.fits(plan.capacity), phase))
    return table


def _time_table(plan: Plan) -> Table:
    assert plan.rates is not None
    table = Table(title="time of a step, seconds", title_justify="left", title_style="", header_style="dim", box=None)
    table.add_column("phase")
    columns = ("times", "TFLOP", "HBM, GB", "wire, GB", "compute", "HBM", "wire", "longest", "sum")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("collectives, GB")
    for phase in plan.phases:
        if phase.refused is not None:
            table.add_row(phase.name, *["?"] * len(columns), "")
            continue
        seconds, totals = phase.seconds(plan.rates), [phase.total(name) for name in ("flops", "traffic", "wire")]
        most = max(BOUNDS, key=lambda name, seconds=seconds: seconds[name])
        times = [
            Text(_number(seconds[name]), style="bold" if name == most and seconds[name] else "") for name in BOUNDS
        ]
        moved = ", ".join(f"{kind} {_number(size / 1e9)}" for kind, size in phase.collectives.items() if size >= 5e6)
        table.add_row(
            phase.name,
            f"{sum(count for _, count in phase.programs.values()):,}",
            _number(totals[0] / 1e12),
            _number(totals[1] / 1e9),
            _number(totals[2] / 1e9),
            *times,
            _number(seconds["longest"]),
            _number(seconds["sum"]),
            Text(moved, style="dim"),
        )
    return table


def _sentence(plan: Plan, device: str) -> str:
    if plan.capacity is None:
        return f"the memory of {device} is unknown; the largest phase takes {_gb(plan.held)} GB"
    of = f"{_gb(plan.held)} of the {_gb(plan.capacity)} GB of {device}"
    worst = max(plan.phases, key=lambda phase: phase.held)
    if plan.fits:
        return f"fits: {of} in the largest phase, {worst.name}"
    too_large = [phase.name for phase in plan.phases if not phase.fits(plan.capacity)]
    refused = [phase.name for phase in plan.phases if phase.refused is not None]
    more = f" (the compiler refuses {', '.join(refused)})" if refused else ""
    return f"does not fit: {of}; too large: {', '.join(too_large)}{more}"


def _held(phase: Phase) -> Text:
    at_least = "> " if phase.refused is not None and math.isnan(phase.refused) else ""
    return Text(at_least + _gb(phase.held), style="bold")


def _verdict(fits: bool, phase: Phase | None = None) -> Text:
    refused = phase is not None and phase.refused is not None
    return Text("fits", style="green") if fits else Text("refused" if refused else "too large", style="bold red")


def _bar(share: Number, width: int = 16) -> Text:
    filled = min(width, round(share * width))
    colour = "green" if share <= 0.9 else "yellow" if share <= 1 else "red"
    return Text("█" * filled, style=colour) + Text("·" * (width - filled), style="dim") + Text(f" {share:.0%}")


def _gb(size: Number) -> str:
    return f"{size / 1e9:.1f}" if size >= 5e7 or not size else f"{size / 1e9:.2g}"


def _number(value: Number) -> str:
    """Three digits, and thousands separators."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}" if value >= 1 else f"{value:.2g}"


def draw_plan(plan: Plan, path: Path, *, title: str) -> None:
    """Draw the memory of each phase by kind beside the device's, and the time of each phase.

    Args:
        plan: the plan.
        path: output file, in the format of its suffix; its folder must exist.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    phases, timed = list(plan.phases), plan.is_timed
    height = 1.9 + 0.5 * len(phases)
    figure = Figure(figsize=(13 if timed else 7.5, height), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.995, 0.005, MARK, fontsize=8, color=GREY, ha="right", va="bottom")
    names, places = [phase.name for phase in phases], range(len(phases))
    panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    for axes, label in zip(panels, ("memory of a device, GB", "seconds of a step, one after the other"), strict=False):
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_title(label, fontsize=11.5, color=INK, loc="left")
        axes.tick_params(labelsize=10, colors=INK, color=GREY)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
    memory = panels[0]
    for kind in KINDS:
        sizes = [phase.memory.get(kind, 0.0) / 1e9 for phase in phases]
        if any(sizes):
            starts = [_before(phase, kind) / 1e9 for phase in phases]
            memory.barh(places, sizes, left=starts, color=COLOURS[kind], label=kind, height=0.62)
    for place, phase in enumerate(phases):
        total, known = phase.held / 1e9, sum(phase.memory.values()) / 1e9
        if total > known:
            memory.barh(
                [place], [total - known], left=[known], color="white", edgecolor="#dc2626", hatch="///", height=0.62
            )
        text = " refused" if phase.refused is not None else ""
        memory.text(total, place, f" {total:.1f}{text}", va="center", fontsize=9, color=INK)
    most = max(phase.held for phase in phases) / 1e9
    if plan.capacity is not None:
        limit = plan.capacity / 1e9
        memory.axvline(limit, color="#dc2626", linewidth=1.5)
        memory.text(limit, -0.75, f"{limit:.0f} GB", color="#dc2626", fontsize=9, ha="center", va="center")
        most = max(most, limit)
    memory.set_xlim(0, 1.17 * most)
    figure.legend(
        *memory.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=9,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
    )
    if timed:
        _draw_times(plan, panels[1])
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "png")
    write_atomically(path, picture.getvalue())


def _draw_times(plan: Plan, axes: Any) -> None:
    assert plan.rates is not None
    parts = [phase.seconds(plan.rates) for phase in plan.phases]
    starts = [0.0] * len(parts)
    for name in BOUNDS:
        sizes = [part[name] for part in parts]
        label = BOUND_NAMES[name]
        axes.barh(range(len(parts)), sizes, left=starts, color=BOUND_COLOURS[name], label=label, height=0.62)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for place, part in enumerate(parts):
        axes.plot([part["longest"]] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=1.5)
        text = f" {_number(part['longest'])} to {_number(part['sum'])}"
        axes.text(part["sum"], place, text, va="center", fontsize=9, color=INK)
    axes.plot([], [], color=INK, linewidth=1.5, label="with full overlap")
    axes.set_xlim(0, 1.25 * max(starts))
    axes.legend(fontsize=9, framealpha=0.8, edgecolor="none", labelcolor=INK, loc="best")


def _before(phase: Phase, kind: str) -> Number:
    return sum(phase.memory.get(each, 0.0) for each in KINDS[: KINDS.index(kind)])
