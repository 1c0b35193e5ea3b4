"""Trackers that metrics can be sent to besides the files of a run; their packages are optional and imported late."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

from grpo_jax.jsonl import Row, to_json, write_atomically


@runtime_checkable
class Tracker(Protocol):
    """Where metrics can go besides the files of the run."""

    def log(self, metrics: Row, step: int) -> None:
        """Record the numbers among ``metrics`` at ``step``."""
        ...

    def close(self) -> None:
        """Send what is left and end the record."""
        ...


def _numbers(metrics: Row) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if key != "step" and not isinstance(value, str | None)}


class TensorBoard:
    """Scalars in ``run_dir/tensorboard``, written with tensorboardX.

    TensorBoard allows no ``@`` in a name: ``eval/pass@1`` is ``eval/pass_at_1`` there.
    On a resume, TensorBoard discards what an earlier process wrote for steps from ``first_step`` on.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        purge_step = first_step if first_step > 0 else None
        self._writer = package.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
        settings = json.dumps(to_json(config), indent=2, ensure_ascii=False).replace("\n", "\n    ")
        self._writer.add_text("config", f"    {settings}", first_step)

    def log(self, metrics: Row, step: int) -> None:
        """Record the numbers among ``metrics`` at ``step``."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)

    def close(self) -> None:
        """Send what is left and end the record."""
        self._writer.close()


class WandB:
    """A run on Weights & Biases; a resumed run continues it.

    The project is that of the environment variable ``WANDB_PROJECT``, else ``grpo_jax``. Curves are drawn over
    ``step``; the steps a resumed run repeats are drawn twice.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "grpo_jax"),
            id=_tracker_id(run_dir),
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=to_json(config),
            resume="allow",
        )
        # W&B's own step only ever grows, and would drop what a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Row, step: int) -> None:
        """Record the numbers among ``metrics`` at ``step``."""
        self._run.log({**_numbers(metrics), "step": step})

    def close(self) -> None:
        """Send what is left and end the record."""
        self._run.finish()


class Trackio:
    """A run in trackio's local dashboard; a resumed run continues it, and draws the steps it repeats twice.

    The project is that of the environment variable ``TRACKIO_PROJECT``, else ``grpo_jax``.
    """

    def __init__(self, package: ModuleType, run_dir: Path, config: Row, first_step: int) -> None:
        self._run = package.init(
            project=os.environ.get("TRACKIO_PROJECT", "grpo_jax"),
            # trackio knows a run by its name alone, and two run folders may share theirs.
            name=f"{run_dir.resolve().name}-{_tracker_id(run_dir)[:6]}",
            config=to_json(config),
            resume="allow",
            embed=False,
        )

    def log(self, metrics: Row, step: int) -> None:
        """Record the numbers among ``metrics`` at ``step``."""
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        """Send what is left and end the record."""
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
    """Open the trackers of these names, before anything is spent on a run that could not be tracked.

    Args:
        names: of ``tensorboard``, ``wandb``, ``trackio``.
        run_dir: the folder of the run; what the trackers keep goes here.
        config: the settings of the run, recorded with it.
        first_step: the first step that will be logged; above 0 the run is a resumed one.

    Raises:
        ValueError: a name is not among those.
        ImportError: a tracker's package is not installed; the message says how to install it.
        Exception: what a tracker itself raises as it opens. In every case no tracker stays open.
    """
    unknown = sorted(set(names) - set(TRACKERS))
    if unknown:
        raise ValueError(f"unknown trackers {unknown}; there are {sorted(TRACKERS)}")
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
