"""The frame around an experiment's loop: the run's folder, its logs and live view, checkpoints, and signals.

The loop itself stays in the experiment's script.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.text import Text

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.monitor.alarms import Fired
from grpo_jax.monitor.metrics import JsonlLog, Row, read_jsonl, to_json, write_atomically
from grpo_jax.monitor.plots import plot_curves
from grpo_jax.monitor.progress import Progress
from grpo_jax.monitor.samples import Sample, print_samples
from grpo_jax.monitor.summary import closing_line
from grpo_jax.monitor.trackers import Tracker, open_trackers
from grpo_jax.rewards.pool import Fault

BEGUN = "begun.txt"
PACKAGES = ("grpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


Entered = TypeVar("Entered")


class Stopped(Exception):  # noqa: N818 - no error
    """A run was asked to stop, and did."""


class Run:
    """A context in which an experiment runs, in a folder of its own.

    The folder holds ``config.json``, ``metrics.jsonl``, ``completions.jsonl``, ``alarms.jsonl``, ``faults.jsonl`` (what
    could not be scored), ``checkpoints/``, and at the end ``curves.png`` and ``summary.json``. Entering it a second
    time with the same configuration goes on where the first stopped. SIGTERM and Ctrl-C ask the loop to stop after its
    step (``stop_requested``); a second Ctrl-C interrupts.

    Args:
        folder: created if need be.
        config: the experiment's configuration, a dataclass.
        title: what the live view is called.
        may_change: names of top-level fields of ``config`` that do not change what is computed, so that a run may be
            resumed with other values (where it is displayed, the mesh it is laid out on).
        trackers: of ``tensorboard``, ``wandb``, ``trackio``; where metrics go besides the folder.
        keep_checkpoints: how many of the newest stay.
        plain: print plain lines instead of the live view; by default where there is no terminal.
        console: where to print.

    Raises:
        ValueError: the folder holds a run with another configuration (the differences are listed), or holds files
            and no run.
        RuntimeError: another process is running in the folder.
        NotImplementedError: there are several hosts.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Any,
        *,
        title: str,
        may_change: Collection[str] = (),
        trackers: Sequence[str] = (),
        keep_checkpoints: int = 2,
        plain: bool | None = None,
        console: Console | None = None,
    ):
        if jax.process_count() > 1:
            raise NotImplementedError("a run on several hosts is not supported yet; start it on one")
        self.folder = Path(folder)
        self.settings = to_json(dataclasses.asdict(config))
        self.stop_requested = False
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self.progress = Progress(title, console=console, plain=plain)
        with ExitStack() as stack:  # what was opened is closed again if a later part cannot be
            self._open(stack, may_change, trackers, keep_checkpoints)
            self._stack = stack.pop_all()

    def _open(
        self, stack: ExitStack, may_change: Collection[str], trackers: Sequence[str], keep_checkpoints: int
    ) -> None:
        stack.enter_context(claim_folder(self.folder, self.settings, may_change))
        self.metrics_log = JsonlLog(self.folder / "metrics.jsonl")
        self.completions_log = JsonlLog(self.folder / "completions.jsonl")
        self.alarms_log = JsonlLog(self.folder / "alarms.jsonl")
        self.faults_log = JsonlLog(self.folder / "faults.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=keep_checkpoints)
        stack.callback(self.checkpoints.close)
        self.trackers: list[Tracker] = open_trackers(trackers, self.folder, self.settings, first_step=self._next_step())
        for tracker in self.trackers:
            stack.callback(tracker.close)

    def __enter__(self) -> Run:
        self._stack.enter_context(self.progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._stack.callback(signal.signal, number, signal.signal(number, self._request_stop))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def enter(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter a context that is left with the run."""
        return self._stack.enter_context(context)

    @property
    def seconds(self) -> float:
        """Wall time spent in this run, that of the processes it is resumed from included."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def begun(self) -> str:
        """The date on which the run began, such as "2026-11-27"; the same in every process that goes on with it."""
        return (self.folder / BEGUN).read_text().strip()

    @property
    def is_finished(self) -> bool:
        """Whether ``finish`` or ``conclude`` was reached before."""
        return (self.folder / "summary.json").exists()

    def stop_if_requested(self) -> None:
        """Raise if the run was asked to stop: called where everything is saved, or nothing would be lost.

        Raises:
            Stopped: it was.
        """
        if self.stop_requested:
            raise Stopped

    def say(self, text: str) -> None:
        """Print a line above the live view."""
        self.progress.console.print(Text(text), soft_wrap=True)

    def resume(self, like: Any) -> tuple[int, Any, dict]:
        """The step, state and position to go on from: those of the newest checkpoint, or 0, ``like`` and ``{}``.

        Logs are rewound to that step, so that they read as if the run had never been interrupted.

        Args:
            like: the state a new run starts with; a checkpoint is restored with its shapes and shardings, and its
                arrays are given up for it.
        """
        self.checkpoints.require_space(like)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        if self.checkpoints.steps():
            jax.tree.map(lambda x: x.delete(), like)  # so that the state is in memory once, not twice
        found = self.checkpoints.restore(shapes)
        step, state, position = (-1, like, {}) if found is None else found
        for log in (self.metrics_log, self.completions_log, self.alarms_log, self.faults_log):
            log.rewind(step)
        if found is None:
            return 0, state, position
        self._earlier_seconds = position["seconds"]
        self.say(f"resumed at step {step} from {self.checkpoints.folder}")
        return step, state, position["loop"]

    def has_row(self, step: int, name: str) -> bool:
        """Whether a metric of this name was logged at this step."""
        return any(row["step"] == step and name in row for row in read_jsonl(self.metrics_log.path))

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Write a checkpoint; ``position`` is what else the loop needs to go on, as JSON."""
        self.checkpoints.save(step, state, {"seconds": self.seconds, "loop": dict(position)})

    def log(self, row: Row) -> None:
        """Send a row of metrics, ``step`` among them, to ``metrics.jsonl`` and the trackers."""
        self.metrics_log.append(row)
        for tracker in self.trackers:
            tracker.log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))

    def log_samples(self, step: int, samples: Sequence[Sample], *, shown: Sequence[Sample]) -> None:
        """Write samples to ``completions.jsonl``, and print those that a person is to read."""
        self.completions_log.append(*(sample.row(step) for sample in samples))
        print_samples(shown, step, self.progress.console, plain=self.progress.plain)

    def log_faults(self, step: int, faults: Sequence[Fault]) -> None:
        """Write what could not be scored to ``faults.jsonl``, and say how much it was and the first of it."""
        if faults:
            self.faults_log.append(*({"step": step, **dataclasses.asdict(fault)} for fault in faults))
            first = f"{faults[0].reward} {faults[0].kind}: {faults[0].detail.strip().splitlines()[-1]}"
            self.say(f"step {step}: {len(faults)} scores are absent (faults.jsonl); the first: {first:.300}")

    def raise_alarms(self, fired: Sequence[Fired]) -> bool:
        """Say what alarms fired and write them to ``alarms.jsonl``; True if a checkpoint of this step is wanted.

        One whose level is to stop asks the run to stop, as a signal does.
        """
        for alarm in fired:
            self.alarms_log.append(alarm.row())
            self.say(f"ALARM at step {alarm.step}: {alarm.name} ({alarm.level}): {alarm.text}")
            self.stop_requested |= alarm.level == "stop"
        return any(alarm.level != "warn" for alarm in fired)

    def finish(self, before: Row, after: Row, *, steps: int, summary: Mapping[str, Any]) -> None:
        """Draw the curves, write ``summary.json`` and say what was gained.

        Args:
            before: an evaluation before training.
            after: the same after it.
            steps: how many steps were taken.
            summary: the experiment's own figures; seconds, the first step of each alarm, versions and the configuration
                are added.
        """
        plot_curves(read_jsonl(self.metrics_log.path), self.folder / "curves.png", title=self.folder.name)
        alarms = {each["alarm"]: each["step"] for each in reversed(read_jsonl(self.alarms_log.path))}
        self.conclude({**summary, "steps": steps, "alarms": alarms})
        self.say(closing_line(before, after, steps=steps, seconds=self.seconds, run_dir=self.folder))

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, which makes the run a finished one: by itself for a run without steps.

        Args:
            summary: the experiment's own figures; the configuration is added, and seconds, device and versions where
                it does not have them.
        """
        added = {"seconds": self.seconds, "device": device_summary(), "versions": package_versions()}
        whole = {**summary, **{name: value for name, value in added.items() if name not in summary}}
        whole["config"] = self.settings
        write_atomically(self.folder / "summary.json", json.dumps(to_json(whole), indent=2).encode() + b"\n")

    def _next_step(self) -> int:
        steps = self.checkpoints.steps()
        return max(steps) + 1 if steps else 0

    def _request_stop(self, number: int, _frame: Any) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.say(f"{signal.Signals(number).name}: stopping at the next safe place; again to interrupt at once")


class claim_folder:  # noqa: N801 - used as a function
    """A context that holds the folder of a run for this process; see ``Run`` for what it raises."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], may_change: Collection[str]):
        known = folder / "config.json"
        if not known.exists() and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run (no config.json); choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RuntimeError(
                f"another process is running in {folder}; wait for it or choose another folder"
            ) from error
        if known.exists() and has_results(folder):
            different = differences(json.loads(known.read_text()), settings, may_change)
            if different:
                self._lock.close()
                raise ValueError(
                    f"{folder} holds a run with another configuration; choose another folder, remove this one, or "
                    "run with what it was started with:\n  " + "\n  ".join(different)
                )
        begun = folder / BEGUN
        if not begun.exists() or not has_results(folder):
            write_atomically(begun, f"{date.today().isoformat()}\n".encode())
        write_atomically(known, json.dumps(settings, indent=2).encode() + b"\n")

    def __enter__(self) -> None: ...

    def __exit__(self, *error) -> None:
        self._lock.close()


def has_results(folder: Path) -> bool:
    """Whether anything was computed in a run's folder: a run that failed before that may be started differently."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.json", BEGUN, ".lock")]
    return any(path.stat().st_size for path in files)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """The settings that are not the same in both, as lines ``name: old -> new``.

    Args:
        old: settings, nested.
        new: others.
        may_change: names on the top level that are passed over.
    """
    old, new = flatten(old, may_change), flatten(new, may_change)
    names = [*old, *(name for name in new if name not in old)]
    absent = "(absent)"
    return [
        f"{n}: {old.get(n, absent)!r} -> {new.get(n, absent)!r}"
        for n in names
        if old.get(n, absent) != new.get(n, absent)
    ]


def flatten(settings: Mapping[str, Any], without: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in without:
            continue
        flat |= flatten(value, prefix=f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def keep_programs() -> None:
    """Have later runs on this host find the programs that this one compiles, in ``~/.cache/grpo_jax``.

    JAX_COMPILATION_CACHE_DIR names another folder. Programs are kept for each host apart: one compiled for a processor
    may not run on another.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path.home() / ".cache" / "grpo_jax" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def count_compilations() -> Callable[[], int]:
    """A function that says how many programs were compiled since this call; those found again are not counted."""
    compiled = 0

    def listen_for_requests(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    def listen_for_hits(event: str, **_: Any) -> None:
        nonlocal compiled
        compiled -= event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(listen_for_requests)
    jax.monitoring.register_event_listener(listen_for_hits)
    return lambda: compiled


def package_versions() -> dict[str, str]:
    """Python's version, and that of every package a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_summary() -> str:
    """Such as ``8 x cpu``."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
