"""The live view of a run: progress bars, metrics and their trends."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich import box
from rich import progress as bars
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.jsonl import Row
from grpo_jax.monitor.display import DISPLAY_METRICS, DisplayMetric, duration, select_metrics, sparkline
from grpo_jax.monitor.samples import printable

REFRESHES_PER_SECOND = 2
SECONDS_UNTIL_SAID = 1.0
TREND_WIDTH = 14
TREND_VALUES = 512
WIDTH_WITH_TRENDS = 108
WIDTH_WITH_TWO_COLUMNS = 76


class Phase:
    """A part of a run with a known number of steps; made by ``Progress.phase``."""

    def __init__(self, name: str, task: bars.Task, record: Callable[[Phase, int, Row], None]) -> None:
        self.name = name
        self.task = task
        self.start = int(task.completed)
        self.history: dict[str, array] = {}
        self._record = record

    def update(self, step: int, metrics: Row | None = None) -> None:
        """Record the number of finished steps and the metrics of the last one.

        Args:
            step: number of finished steps, including those before a resume.
            metrics: metrics by name; text and None are ignored. Without metrics (a batch of an evaluation), only the
                bar moves, and plain output prints nothing.
        """
        self._record(self, step, metrics or {})


class Progress:
    """Context manager that displays a run: a live panel on a terminal, otherwise one line for each step.

    A separate thread draws the panel at most twice a second, so that an update takes less than a millisecond. On exit,
    also by an exception, the last panel remains unless it is empty, and the terminal is restored. Output to ``console``
    or by ``print`` appears above the panel.

    Args:
        title: title of the panel.
        console: output console, a new one by default. ``Console(quiet=True)`` displays nothing.
        plain: whether to print lines; by default, if ``console`` cannot draw the panel.
        metrics: metrics to display.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        console: Console | None = None,
        plain: bool | None = None,
        metrics: Sequence[DisplayMetric] = DISPLAY_METRICS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        can_draw = self.console.is_terminal and not self.console.is_dumb_terminal
        self.plain = not (can_draw and self.console.encoding.startswith("utf")) if plain is None else plain
        self._title = title
        self._metrics = metrics
        self._lock = threading.Lock()
        self._shown: Phase | None = None
        self._depth = 0
        self._compiling: str | None = None
        self._compile_timer: threading.Timer | None = None
        self._said_compiling = False
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=None, complete_style="cyan"),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("[dim]left"),
            bars.TimeRemainingColumn(),
            console=self.console,
            expand=True,
            get_time=clock,
            # An estimate needs two steps within the period, and steps can be slow.
            speed_estimate_period=3600,
        )
        self._live = Live(
            get_renderable=self._panel, console=self.console, refresh_per_second=REFRESHES_PER_SECOND, screen=False
        )

    def __enter__(self) -> Progress:
        if self.plain:
            self._print_line(self._title)
        else:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.transient = self._shown is None and not self._bars.tasks  # remove an empty panel
        self.compiling(None)
        self._live.stop()

    @contextmanager
    def phase(self, name: str, total: int, *, start: int = 0, earlier: Sequence[Row] = ()) -> Iterator[Phase]:
        """Context manager for a part of the run with its own progress bar; nested phases are shown below the outer one.

        The panel shows the metrics of the phase that reported last. An outermost phase ends with a permanent line:
        done or stopped, the time, and the first and last value of its first metric.

        Args:
            name: label of the bar.
            total: number of steps.
            start: number of steps finished before a resume.
            earlier: metrics rows of those steps and of the initial evaluation; the column "start" shows the first.
        """
        task = self._bars.add_task("  " * self._depth + name, total=total, completed=start)
        phase = Phase(name, self._bars.tasks[-1], self._record)
        for row in earlier:
            _append(phase.history, row)
        if self._depth == 0:
            self._said_compiling = False
        if self.plain and self._depth == 0:
            self._print_line(f"{name}: from {start} to {total}")
        self._depth += 1
        ending = "stopped"
        try:
            yield phase
            ending = "done" if phase.task.completed >= total else "stopped"
        finally:
            self._depth -= 1
            self._bars.remove_task(task)
            if self._depth == 0:
                self._print_line(self._last_words(phase, ending))

    def _record(self, phase: Phase, step: int, metrics: Row) -> None:
        self._bars.update(phase.task.id, completed=step)
        with self._lock:
            values = _append(phase.history, metrics)
            if values:
                self._shown = phase
        if values and self.plain:
            self._print_line(self._line(phase, step, values))

    def compiling(self, name: str | None) -> None:
        """Display that a program is being compiled; None ends it.

        Plain output prints a line if it takes over a second, once for each outermost phase.
        """
        self._compiling = name
        if self._compile_timer is not None:
            self._compile_timer.cancel()
            self._compile_timer = None
        if name is not None and self.plain and not self._said_compiling:
            self._compile_timer = threading.Timer(SECONDS_UNTIL_SAID, self._say_compiling, (name,))
            self._compile_timer.daemon = True
            self._compile_timer.start()

    def _say_compiling(self, name: str) -> None:
        if self._compiling is not None and not self._said_compiling:
            self._said_compiling = True
            self._print_line(f"compiling {name} ... (steps take their usual time once all programs are compiled)")

    def _print_line(self, text: str) -> None:
        self.console.print(Text(printable(text, self.console.encoding)), soft_wrap=True)

    def _line(self, phase: Phase, step: int, values: dict[str, float]) -> str:
        total = f"{phase.task.total:.0f}"
        shown = [metric for metric in select_metrics(self._metrics, values) if metric.main]
        # Evaluations are rare. At the end of the line they do not shift the columns of the others.
        shown.sort(key=lambda metric: metric.key.startswith("eval/"))
        parts = [f"{metric.label} {metric.show(values[metric.key]):>8}" for metric in shown]
        place = f"{phase.name} {step:>{len(total)}}/{total}"
        return "  ".join([place, f"left {duration(phase.task.time_remaining)}", *parts])

    def _last_words(self, phase: Phase, ending: str) -> str:
        task = phase.task
        resumed = f", resumed at {phase.start}" if phase.start else ""
        words = f"{phase.name}: {ending}, {task.completed:.0f} of {task.total:.0f} in {duration(task.elapsed)}{resumed}"
        for metric in select_metrics(self._metrics, phase.history)[:1]:
            values = phase.history[metric.key]
            words += f", {metric.label} {metric.show(values[0])} -> {metric.show(values[-1])}"
        return words

    def _panel(self) -> RenderableType:
        parts: list[RenderableType] = [self._bars] if self._bars.tasks else []
        if self._compiling is not None:
            parts.append(Text(f"compiling {self._compiling} ...", style="dim"))
        with self._lock:
            if self._shown is not None:
                parts += [Text(), self._table(self._shown)] if parts else [self._table(self._shown)]
        return Panel(Group(*parts), title=Text(self._title), title_align="left", box=box.ROUNDED, border_style="dim")

    def _table(self, phase: Phase) -> Table:
        width = self.console.width
        blocks = 2 if width >= WIDTH_WITH_TWO_COLUMNS else 1
        trends = width >= WIDTH_WITH_TRENDS
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
        for _ in range(blocks):
            table.add_column("", no_wrap=True, ratio=1, min_width=15)
            table.add_column("now", justify="right", style="bold", no_wrap=True, min_width=8)
            table.add_column("start", justify="right", style="dim", no_wrap=True, min_width=8)
            if trends:
                table.add_column("", style="cyan", no_wrap=True, min_width=TREND_WIDTH)
        metrics = select_metrics(self._metrics, phase.history)
        cells = [_cells(metric, phase.history[metric.key], trends) for metric in metrics]
        height = -(-len(cells) // blocks)
        for row in range(height):
            columns = [cells[place] for place in range(row, len(cells), height)]
            table.add_row(*[cell for column in columns for cell in column])
        return table


def _append(history: dict[str, array], metrics: Row) -> dict[str, float]:
    """Append the numbers of a metrics row to the history and return them."""
    values = {
        key: float(value) for key, value in metrics.items() if key != "step" and not isinstance(value, str | None)
    }
    for key, value in values.items():
        history.setdefault(key, array("d")).append(value)
    return values


def _cells(metric: DisplayMetric, values: array, trends: bool) -> list[Text]:
    cells = [Text(metric.label), Text(metric.show(values[-1])), Text(metric.show(values[0]))]
    if trends:
        cells.append(Text(sparkline(values[:: max(1, len(values) // TREND_VALUES)], TREND_WIDTH)))
    return cells
