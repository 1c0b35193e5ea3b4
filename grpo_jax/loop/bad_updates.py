"""Updates that were not applied, because their loss or gradient is not sound: refused or skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.loop.checks import check_finite
from grpo_jax.loop.report import over_updates
from grpo_jax.loop.run import Run
from grpo_jax.monitor.alarms import Alarm

SKIPPED = "skipped_updates"
ALARM = "bad_updates"
MOST_IN_A_ROW = 10
"""Steps in a row with skipped updates after which a run ends: its state or its data are broken, not a batch."""


def check_updates(updates: Sequence[Mapping[str, Any]], step: int, config: Any, run: Run) -> dict[str, float]:
    """Refuse or report bad updates, and return the metrics of the step from those of its updates.

    A bad update has left the state as it was (``train.guard``): after an error, the newest checkpoint is good.

    Args:
        updates: metrics of each update of the step; ``skipped_updates``, and ``value/skipped_updates`` of a critic,
            say which are bad.
        step: the step.
        config: has ``bad_updates``, ``refuse`` or ``skip``.
        run: receives the alarm ``bad_updates`` when updates start to be skipped.

    Returns:
        ``over_updates`` of the applied updates, or of all if none was, and ``skipped_updates``, how many were not.

    Raises:
        FloatingPointError: an update is bad and ``bad_updates`` is ``refuse``, or there were some in more than
            ``MOST_IN_A_ROW`` steps in a row; or a metric of an applied update is not finite.
    """
    updates = [{name: float(value) for name, value in update.items()} for update in updates]
    bad = [update for update in updates if _is_bad(update)]
    applied = [update for update in updates if not _is_bad(update)]
    metrics = {name: value for name, value in over_updates(applied or bad).items() if not _is_count(name)}
    if applied:
        check_finite(metrics, step, run)
    if bad:
        text = f"{_reasons(bad[0])}, in {len(bad)} of {len(updates)} updates"
        if config.bad_updates == "refuse":
            raise FloatingPointError(
                f"step {step}: {text}. Such an update is not applied. The run ends here; complete checkpoints: "
                f"{run.checkpoints.steps()}. The same command resumes from the last of them; set bad_updates to "
                "skip to go on without such updates"
            )
        _report(text, step, run)
    return {**metrics, SKIPPED: float(len(bad))}


def _is_bad(update: Mapping[str, float]) -> bool:
    return any(value for name, value in update.items() if _is_count(name))


def _is_count(name: str) -> bool:
    return name.rpartition("/")[2] == SKIPPED


def _reasons(update: Mapping[str, float]) -> str:
    broken = {name: value for name, value in update.items() if not math.isfinite(value)}
    norms = {name: value for name, value in update.items() if name.rpartition("/")[2] == "grad_norm"}
    text = ", ".join(f"{name} is {value:g}" for name, value in (broken or norms).items())
    return text if broken else f"{text}, above skip_grad_norm"


def _report(text: str, step: int, run: Run) -> None:
    rows = [row for row in run.rows() if SKIPPED in row]
    in_a_row = next((n for n, row in enumerate(reversed(rows)) if not row[SKIPPED]), len(rows)) + 1
    if in_a_row > MOST_IN_A_ROW:
        raise FloatingPointError(
            f"step {step}: {text}: updates were skipped in {in_a_row} steps in a row, the most is {MOST_IN_A_ROW}. The "
            f"run ends here; complete checkpoints: {run.checkpoints.steps()}"
        )
    if in_a_row == 1:
        remedy = "look at the batch; lower the learning rate if it happens again"
        run.raise_alarms([Alarm(step, ALARM, "warn", f"{text}; the batch is skipped ({remedy})")])
