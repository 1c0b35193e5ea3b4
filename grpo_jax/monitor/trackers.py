"""Experiment trackers: TensorBoard, Weights & Biases, trackio. Their packages are optional and imported when used."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from grpo_jax.jsonl import Row, to_json, write_atomically

SAMPLES = "completions"
"""Name of the tables of completions."""


@runtime_checkable
class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, metrics: Row, step: int) -> None:
        """Log numbers.

        Args:
            metrics: values by name; texts and None are left out.
            step: the step.
        """
        ...

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        """Log completions as a table.

        Args:
            rows: those of ``Sample.row``.
            step: the step.
        """
        ...

    def close(self) -> None:
        """Flush and close the tracker."""
        ...


def _numbers(metrics: Row) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if key != "step" and not isinstance(value, str | None)}


class TensorBoard(Tracker):
    """TensorBoard scalars in ``run_dir/tensorboard``, written with tensorboardX.

    Names cannot contain ``@``: ``eval/pass@1`` becomes ``eval/pass_at_1``. On resume, TensorBoard discards values that
    an earlier process wrote for steps from ``first_step`` on.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        purge_step = first_step if first_step > 0 else None
        self._writer = package.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        self._add_json("config", config, first_step)

    def _add_json(self, name: str, value: Any, step: int) -> None:
        text = json.dumps(to_json(value), indent=2, ensure_ascii=False).replace("\n", "\n    ")
        self._writer.add_text(name, f"    {text}", step)  # indented: Markdown shows it as it is

    def log(self, metrics: Row, step: int) -> None:
        """Log the numbers among ``metrics`` at ``step``."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        """Log completions as text."""
        self._add_json(SAMPLES, rows, step)

    def close(self) -> None:
        """Flush and close the tracker."""
        self._writer.close()


class WandB(Tracker):
    """A Weights & Biases run, continued on resume.

    The project is the environment variable ``WANDB_PROJECT``, by default ``grpo_jax``. The x axis is ``step``; steps
    repeated after a resume are logged twice.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        self._package = package
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "grpo_jax"),
            id=_tracker_id(run_dir),
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=to_json(config),
            resume="allow",
        )
        # W&B's own step must increase, so that it would drop steps repeated after a resume.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Row, step: int) -> None:
        """Log the numbers among ``metrics`` at ``step``."""
        self._run.log({**_numbers(metrics), "step": step})

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        """Log completions as a ``wandb.Table``."""
        rows = to_json(rows)
        columns = [*dict.fromkeys(name for row in rows for name in row)]
        table = self._package.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])
        self._run.log({SAMPLES: table, "step": step})

    def close(self) -> None:
        """Flush and close the tracker."""
        self._run.finish()


class Trackio(Tracker):
    """A run in trackio's local dashboard, continued on resume; steps repeated after a resume are logged twice.

    The project is the environment variable ``TRACKIO_PROJECT``, by default ``grpo_jax``.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        self._package = package
        self._run = package.init(
            project=os.environ.get("TRACKIO_PROJECT", "grpo_jax"),
            # trackio identifies a run by its name, and two run folders may have the same name.
            name=f"{run_dir.resolve().name}-{_tracker_id(run_dir)[:6]}",
            config=to_json(config),
            resume="allow",
            embed=False,
        )

    def log(self, metrics: Row, step: int) -> None:
        """Log the numbers among ``metrics`` at ``step``."""
        self._run.log(_numbers(metrics), step=step)

    def log_samples(self, rows: Sequence[Row], step: int) -> None:
        """Log completions as a ``trackio.Table``."""
        # Rows as mappings: trackio ignored ``columns`` in its first versions.
        self._run.log({SAMPLES: self._package.Table(data=to_json(rows))}, step=step)

    def close(self) -> None:
        """Flush and close the tracker."""
        self._run.finish()


def _tracker_id(run_dir: Path) -> str:
    path = run_dir / "tracker_id.txt"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex.encode())
    return path.read_text()


TRACKERS = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "trackio": ("trackio", Trackio),
}


def open_trackers(names: Sequence[str], run_dir: str | Path, config: Row, *, first_step: int = 0) -> list[Tracker]:
    """Open trackers. If one cannot be opened, none stays open.

    Args:
        names: any of ``tensorboard``, ``wandb`` and ``trackio``.
        run_dir: folder of the run, which also receives the trackers' files.
        config: settings of the run, logged with it.
        first_step: first step that will be logged; above 0 for a resumed run.

    Raises:
        ValueError: an unknown name.
        ImportError: the package of a tracker is not installed; the message says how to install it.
        Exception: any error of a tracker when it opens.
    """
    unknown = sorted(set(names) - set(TRACKERS))
    if unknown:
        raise ValueError(f"unknown trackers {unknown}; choose from {sorted(TRACKERS)}")
    packages = {name: _import(TRACKERS[name][0], extra=name) for name in names}
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    opened: list[Tracker] = []
    try:
        for name, package in packages.items():
            opened.append(TRACKERS[name][1](package, Path(run_dir), config, first_step))
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _import(module: str, *, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'the tracker {extra!r} needs the package {module!r}: pip install "grpo_jax[{extra}]"'
        ) from error
