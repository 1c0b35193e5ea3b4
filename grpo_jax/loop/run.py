"""The frame around an experiment's loop: run folder, logs, live view, checkpoints and signals."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.text import Text

from grpo_jax.hosts import gather, is_main, on_main
from grpo_jax.jsonl import JsonlLog, NoLog, Row, read_jsonl, to_json, write_atomically
from grpo_jax.loop.compilation import enable_compilation_cache, reporting_compilations
from grpo_jax.loop.run_folder import (
    START_DATE,
    claim_folder,
    device_summary,
    package_versions,
    read_settings,
    read_start_date,
)
from grpo_jax.loop.same_start import check_folder_is_shared, check_same_modules, check_same_start, settings_of
from grpo_jax.loop.stop import Reason, Stopped, StopSignals, first_reason
from grpo_jax.monitor.alarms import Alarm
from grpo_jax.monitor.display import best_evaluation, closing_line
from grpo_jax.monitor.plots import plot_curves
from grpo_jax.monitor.progress import Progress
from grpo_jax.monitor.samples import Sample, print_samples, printable
from grpo_jax.monitor.trackers import Tracker, open_trackers
from grpo_jax.rewards.workers.pool import RewardError
from grpo_jax.train.trainable import with_frozen, without_frozen

Entered = TypeVar("Entered")


class Run:
    """A context in which an experiment runs in its own folder.

    The folder holds ``config.json``, ``metrics.jsonl``, ``completions.jsonl``, ``alarms.jsonl``,
    ``reward_errors.jsonl``, ``checkpoints/``, and at the end ``curves.png`` and ``summary.json``. Entering an existing
    run's folder with the same configuration resumes the run. SIGTERM and Ctrl-C request a stop after the current step
    (``StopSignals``, ``stop_if_requested``). Of several processes, the first holds the folder, writes the logs and
    prints.

    Args:
        folder: created if it does not exist.
        config: the experiment's configuration, a dataclass.
        title: title of the live view.
        resumable_fields: fields of ``config`` that may change on resume, those of nested settings with dots.
        trackers: among ``tensorboard``, ``wandb`` and ``trackio``; they receive the metrics, and the samples that are
            shown.
        keep_checkpoints: number of newest checkpoints to keep.
        save_minutes: minutes between checkpoints, in addition to those of the loop.
        plain: print plain lines instead of the live view. Default: where there is no terminal.
        console: rich console to print to.

    Raises:
        ValueError: the folder holds a run with another configuration (the differences are listed), or files but no run.
        RuntimeError: another process is running in the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        config: Any,
        *,
        title: str,
        resumable_fields: Collection[str] = (),
        trackers: Sequence[str] = (),
        keep_checkpoints: int = 2,
        save_minutes: float | None = None,
        plain: bool | None = None,
        console: Console | None = None,
    ):
        self.folder = Path(folder)
        self.settings = settings_of(config)
        self._signals = StopSignals(self.say)
        self._stop: Reason | None = None
        self._was_asked = False
        self._save_minutes = save_minutes
        self._earlier_seconds = 0.0
        self._started = self._saved = time.monotonic()
        if not is_main():
            console, plain = Console(quiet=True), True
        self.progress = Progress(title, console=console, plain=plain)
        self.previous: dict[str, Any] | None = None
        with ExitStack() as stack:  # closes what is open if a later step fails
            self._open(stack, resumable_fields, trackers, keep_checkpoints)
            self._stack = stack.pop_all()

    def _open(
        self, stack: ExitStack, resumable_fields: Collection[str], trackers: Sequence[str], keep_checkpoints: int
    ) -> None:
        from grpo_jax.checkpoint import Checkpoints  # late, because it imports orbax

        def claim() -> dict[str, Any] | None:
            claimed = claim_folder(self.folder, self.settings, resumable_fields)
            stack.enter_context(claimed)
            return claimed.previous

        self.previous = on_main(claim, "opening the run's folder")
        check_folder_is_shared(self.folder)
        log = JsonlLog if is_main() else NoLog
        self.metrics_log = log(self.folder / "metrics.jsonl")
        self.completions_log = log(self.folder / "completions.jsonl")
        self.alarms_log = log(self.folder / "alarms.jsonl")
        self.reward_errors_log = log(self.folder / "reward_errors.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=keep_checkpoints)
        stack.callback(self.checkpoints.close)
        first_step = self._next_step()
        self.trackers: list[Tracker] = []

        def track() -> None:
            self.trackers = open_trackers(trackers, self.folder, self.settings, first_step=first_step)

        on_main(track, "opening the trackers")
        for tracker in self.trackers:
            stack.callback(tracker.close)

    def __enter__(self) -> Run:
        self._stack.enter_context(self.progress)
        self._stack.enter_context(reporting_compilations(self.progress.compiling))
        self._stack.enter_context(self._signals)
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        try:
            self._stack.close()
        except OSError as failure:  # a checkpoint that could not be written
            if error is None:
                raise
            self.say(f"error: {failure}")

    def enter(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter a context that is exited with the run."""
        return self._stack.enter_context(context)

    @property
    def seconds(self) -> float:
        """Wall time of this run, including the processes it is resumed from."""
        return self._earlier_seconds + time.monotonic() - self._started

    @property
    def start_date(self) -> str:
        """The date on which the run was first started, such as "2026-11-27"; kept on resume."""
        return on_main(lambda: read_start_date(self.folder / START_DATE), "reading the run's date")

    @property
    def is_finished(self) -> bool:
        """Whether the folder has a ``summary.json``."""
        return on_main((self.folder / "summary.json").exists, "looking for the run's summary")

    def is_finished_with(self, names: Collection[str]) -> bool:
        """Whether the run is finished and was finished with the present values of these settings."""
        if not self.is_finished:
            return False
        summary = on_main(lambda: read_settings(self.folder / "summary.json"), "reading the run's summary")
        config = summary.get("config", {})
        return all(config.get(name, self.settings.get(name)) == self.settings.get(name) for name in names)

    def changed(self, name: str) -> tuple[Any, Any] | None:
        """``(before, now)`` for a setting that differs from the previous process; None if it does not."""
        now = self.settings.get(name)
        before = now if self.previous is None else self.previous.get(name, now)
        return None if before == now else (before, now)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return on_main(lambda: read_jsonl(self.metrics_log.path), "reading the metrics")

    def save_is_due(self, is_due: bool) -> bool:
        """Whether to save after a step: if the loop says so, save_minutes have passed, or a stop was requested.

        ``stop_if_requested`` acts on the same request, so that no step is left unsaved by a signal between the two.

        Args:
            is_due: what the loop says, the same on every process.
        """
        minutes = (time.monotonic() - self._saved) / 60  # a change of the system's clock does not matter
        answers = gather(
            (self._signals.reason, self.checkpoints.is_written, self.checkpoints.has_failed, minutes),
            "asking whether to stop, and what is written",
        )
        reasons, are_written, have_failed, (minutes, *_) = zip(*answers, strict=True)
        if all(are_written) or any(have_failed):
            self.checkpoints.wait()  # an error of the writing ends the run now, not at the next checkpoint
        self._stop, self._was_asked = first_reason(reasons), True
        passed = self._save_minutes is not None and minutes >= self._save_minutes
        return is_due or passed or self._stop is not None

    def describe(self, facts: Mapping[str, object]) -> None:
        """Print facts about the run, a line with name and value for each."""
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            self.say(f"  {name.ljust(width)}  {printable(str(value))}")

    def stop_if_requested(self) -> None:
        """Raise if a stop was requested. Call it where a stop loses no work.

        Raises:
            Stopped: a stop was requested of any process; all must ask at the same time.
        """
        if not self._was_asked:
            self.save_is_due(False)
        self._was_asked = False
        if self._stop is not None:
            raise Stopped(self._stop)

    def say(self, text: str) -> None:
        """Print a line above the live view."""
        self.progress.console.print(Text(text), soft_wrap=True)

    def resume(self, like: Any) -> tuple[int, Any, dict]:
        """Step, state and position of the newest checkpoint; ``(0, like, {})`` for a new run.

        The logs are rewound to that step, so that they read as if the run had never been interrupted.

        Args:
            like: the state of a new run. A checkpoint is restored with its shapes and shardings, and its arrays are
                deleted, except for frozen parameters, which become part of the state.
        """
        saved = without_frozen(like)
        self.checkpoints.require_space(saved)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
        if self.checkpoints.steps():
            jax.tree.map(lambda x: x.delete(), saved)  # so that the state is in memory once, not twice
        restored = self.checkpoints.restore(shapes)
        step, state, position = (-1, like, {}) if restored is None else restored
        for log in (self.metrics_log, self.completions_log, self.alarms_log, self.reward_errors_log):
            log.rewind(step)
        if restored is None:
            return 0, state, position
        self._earlier_seconds = position["seconds"]
        self.say(f"resumed at step {step} from {self.checkpoints.folder}")
        return step, with_frozen(state, like), position["loop"]

    def has_row(self, step: int, name: str) -> bool:
        """Whether a metric was logged at a step.

        Args:
            step: the step.
            name: the metric.
        """
        return any(row["step"] == step and name in row for row in self.rows())

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Start to write a checkpoint; that of the best evaluation so far is kept along with the newest.

        Args:
            step: the step.
            state: a pytree of arrays; of a ``TrainState`` with LoRA adapters, the frozen parameters are left out.
            position: JSON state of the loop, returned by ``resume``.
        """
        self._saved = time.monotonic()
        best = best_evaluation(self.rows())
        protected = () if best is None else (best["step"],)
        self.checkpoints.save(
            step, without_frozen(state), {"seconds": self.seconds, "loop": dict(position)}, protected=protected
        )

    def log(self, row: Row) -> None:
        """Log a row of metrics, with its ``step``, to ``metrics.jsonl`` and the trackers."""
        self.metrics_log.append(row)
        for tracker in self.trackers:
            tracker.log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))

    def log_samples(self, step: int, samples: Sequence[Sample], *, shown: Sequence[Sample]) -> None:
        """Write samples to ``completions.jsonl``.

        Args:
            step: the step.
            samples: those to write.
            shown: those to print and to log to the trackers.
        """
        self.completions_log.append(*(sample.row(step) for sample in samples))
        for tracker in self.trackers if shown else ():
            tracker.log_samples([sample.row(step) for sample in shown], step)
        print_samples(shown, step, self.progress.console, plain=self.progress.plain)

    def log_reward_errors(self, step: int, errors: Sequence[RewardError]) -> None:
        """Write reward errors to ``reward_errors.jsonl``; print their number and the first.

        Args:
            step: the step.
            errors: the errors of its scores; nothing is done if there are none.
        """
        if errors:
            self.reward_errors_log.append(*({"step": step, **dataclasses.asdict(error)} for error in errors))
            first = f"{errors[0].reward} {errors[0].kind}: {errors[0].detail.strip().splitlines()[-1]}"
            self.say(f"step {step}: {len(errors)} scores are absent (reward_errors.jsonl); the first: {first:.300}")

    def raise_alarms(self, fired: Sequence[Alarm]) -> bool:
        """Print alarms and write them to ``alarms.jsonl``; True if a checkpoint of this step should be written.

        An alarm of level ``stop`` requests a stop, as a signal does.
        """
        for alarm in fired:
            self.alarms_log.append(alarm.row())
            self.say(f"ALARM at step {alarm.step}: {alarm.name} ({alarm.level}): {alarm.text}")
            if alarm.level == "stop":
                self._signals.request("alarm")
        return any(alarm.level != "warn" for alarm in fired)

    def finish(self, before: Row, after: Row, *, steps: int, summary: Mapping[str, Any]) -> None:
        """Plot the curves, write ``summary.json`` and print the change from ``before`` to ``after``.

        Args:
            before: metrics of an evaluation before training.
            after: metrics of the same evaluation after training.
            steps: number of steps.
            summary: the experiment's entries; ``steps``, the first step of each alarm, and the entries of
                ``write_summary`` are added.
        """
        self.checkpoints.wait()  # the summary marks the run as finished

        def write() -> None:
            plot_curves(read_jsonl(self.metrics_log.path), self.folder / "curves.png", title=self.folder.name)
            alarms = {alarm["alarm"]: alarm["step"] for alarm in reversed(read_jsonl(self.alarms_log.path))}
            self.write_summary({**summary, "steps": steps, "alarms": alarms})

        on_main(write, "writing the summary")
        self.say(closing_line(before, after, steps=steps, seconds=self.seconds, run_dir=self.folder))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, which marks the run as finished; ``finish`` does it for runs with steps.

        Args:
            summary: the experiment's entries. ``config`` is added, and ``seconds``, ``device`` and ``versions`` unless
                they are present.
        """
        defaults = {"seconds": self.seconds, "device": device_summary(), "versions": package_versions()}
        entries = {**summary, **{name: value for name, value in defaults.items() if name not in summary}}
        entries["config"] = self.settings
        if is_main():
            write_atomically(self.folder / "summary.json", json.dumps(to_json(entries), indent=2).encode() + b"\n")

    def _next_step(self) -> int:
        steps = self.checkpoints.steps()
        return max(steps) + 1 if steps else 0


AnyConfig = TypeVar("AnyConfig", bound=Any)


def run_experiment(
    config: AnyConfig,
    train: Callable[[AnyConfig, Run], None],
    *,
    title: str,
    again: bool = False,
) -> int:
    """Run or resume an experiment; returns exit status 0 if it finished, or that of ``Stopped``.

    Args:
        config: a dataclass with the fields of ``RunConfig`` and ``ModelConfig``.
        train: the experiment's loop.
        title: title of the live view.
        again: call ``train`` for a finished run too.
    """
    config.distributed.connect()
    check_same_start(config)
    config.check()
    check_same_modules()  # which the settings name
    enable_compilation_cache()
    # On a GPU or TPU the default precision of float32 products is lower than float32.
    exact = jax.default_matmul_precision("highest") if config.compute_dtype == jnp.float32 else nullcontext()
    with (
        exact,
        Run(
            config.run_dir,
            config,
            title=title,
            resumable_fields=config.resumable_fields,
            trackers=config.trackers,
            keep_checkpoints=config.keep_checkpoints,
            save_minutes=config.save_minutes,
            plain=config.plain or None,
        ) as run,
    ):
        try:
            if run.is_finished_with(config.extendable_fields) and not again:
                run.say(f"this run is finished; everything is in {run.folder}")
            else:
                train(config, run)
        except Stopped as stopped:
            steps = run.checkpoints.steps()
            kept = f"checkpoints of steps {steps}; the same command resumes from the last"
            run.say(f"stopped; {kept if steps else 'the same command goes on from what is written'}")
            return stopped.status
    return 0
