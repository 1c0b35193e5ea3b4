"""Weak scaling of the framework itself: work on the host for each step, with 1 to 8 devices and 1 to 4 processes.

Runs ``experiments/grpo.py`` with a tiny model, so that the framework dominates, and with fixed work for each device.
All devices are threads of this machine, so wall time says nothing: reported are CPU seconds, medians over steps.
``cpu_per_device`` is that of all processes for a step and device, ``overhead_percent`` its excess over the first run.
``main_thread`` has the CPU milliseconds of the Python thread for a step of a process, the largest over processes:
exchanges between processes, prompts, decoding, scoring, logging, and the rest, which is dispatch, the sampler's loop on
the host, and small programs that JAX runs in the calling thread. ``other_threads`` are those of XLA, by name.
``exchanges`` has their number by name, and the kilobytes that a process sends, the most of any, for a step. Prints one
JSON line.

    python experiments/bench/hosts.py
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import runpy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from grpo_jax.loop.local_processes import distributed_flags, free_port, run_together

ROOT = Path(__file__).parent.parent.parent
WARM_UP = 2
PHASES = ("exchanges", "prompts", "decoding", "scoring", "logging")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices of one process."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes with one device each."""
    prompts: int = 8
    """Prompts a device and step."""
    group_size: int = 4
    """Completions a prompt."""
    num_steps: int = 10
    """Steps of each run; the first two and the last are not counted."""


class Meter:
    """CPU time of the main thread by phase, and the exchanges, for each step of this process."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self._inner = [0.0]
        self._current: dict[str, float] = defaultdict(float)
        self._started: tuple[float, float] | None = None
        self._threads: list[dict[str, float]] = []

    def begin_step(self) -> None:
        """End the step before, if there is one, and begin the next."""
        now = time.thread_time(), time.process_time()
        if self._started is not None:
            self._current |= {"main": now[0] - self._started[0], "process": now[1] - self._started[1]}
            self.steps.append(dict(self._current))
        self._threads.append(thread_seconds())
        self._current, self._started = defaultdict(float), now

    def threads(self) -> dict[str, float]:
        """CPU seconds of a step in the other threads, by their names; means, since the kernel counts in 10 ms."""
        first, last, count = self._threads[WARM_UP], self._threads[-1], len(self._threads) - 1 - WARM_UP
        return {name: (seconds - first.get(name, 0.0)) / count for name, seconds in last.items()}

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a phase, less that of phases within it."""

        def measured(*args, **options):
            started = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*args, **options)
            finally:
                spent = time.thread_time() - started
                self._current[phase] += spent - self._inner.pop()
                self._inner[-1] += spent

        return measured

    def exchanges(self, hosts: Any) -> None:
        """Measure and count those of the module ``grpo_jax.hosts``.

        Its own functions are replaced: what the first process computes within an exchange does not count as one.
        """
        begin, send = hosts._begin, self.wrap("exchanges", hosts._send)
        hosts._receive = self.wrap("exchanges", hosts._receive)

        def counted(name, is_long):
            self._current["count"] += 1
            self._current[f"exchange: {name}"] += 1
            return begin(name, is_long)

        def weighed(key, message):
            self._current["bytes"] += len(pickle.dumps(message))
            send(key, message)

        hosts._begin, hosts._send = counted, weighed


def thread_seconds() -> dict[str, float]:
    """CPU seconds so far of this process's threads but the main one, by their names."""
    seconds: dict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) == os.getpid():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
            user, system = fields.split()[11:13]
            seconds[name.rstrip("0123456789/:-")] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return dict(seconds)


def run_measured(args: list[str], out: Path) -> None:
    """Run the script in this process and write the steps' measurements."""
    from grpo_jax import hosts
    from grpo_jax.data import encoded
    from grpo_jax.loop.collector import Collector

    meter = Meter()
    meter.exchanges(hosts)
    encoded.decode_following = meter.wrap("decoding", encoded.decode_following)
    Collector._batch_at = meter.wrap("prompts", Collector._batch_at)
    Collector.score = meter.wrap("scoring", Collector.score)
    Collector.log_step = meter.wrap("logging", Collector.log_step)
    sample = Collector.sample

    def sample_in_new_step(*args, **options):
        meter.begin_step()
        return sample(*args, **options)

    Collector.sample = sample_in_new_step
    sys.argv = ["experiments/grpo.py", *args]
    try:
        runpy.run_path(str(ROOT / "experiments/grpo.py"), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    out.write_text(json.dumps({"steps": meter.steps[WARM_UP:], "threads": meter.threads()}))


def make_model(folder: Path) -> None:
    """Write a tiny model with random weights."""
    import jax

    from grpo_jax.models import from_hf_config, init_params, save_pretrained
    from grpo_jax.tasks.sums import make_tokenizer
    from grpo_jax.tasks.toy_config import HF_CONFIG, PROMPT_FORMAT

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    hf_config = {**HF_CONFIG, **sizes, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    params = init_params(from_hf_config(hf_config), jax.random.key(0))
    save_pretrained(folder, params, hf_config=hf_config, tokenizer=make_tokenizer(), prompt_format=PROMPT_FORMAT)


def measure(config: Config, model: Path, folder: Path, processes: int, devices: int) -> dict[str, Any]:
    """Figures of a run by some processes with some devices each."""
    settings = {
        "model": model,
        "dataset": "sums",
        "template": "{question}",
        "num-steps": config.num_steps,
        "num-prompts": config.prompts * processes * devices,
        "group-size": config.group_size,
        "max-prompt-length": 12,
        "max-completion-length": 16,
        "eval-size": 8,
        "eval-every": config.num_steps,
        "save-every": config.num_steps,
        "run-dir": folder,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    coordinator = f"localhost:{free_port()}"
    outs = [folder.with_name(f"{folder.name}-{number}.json") for number in range(processes)]
    commands = [
        [sys.executable, __file__, str(out), *flags, "--plain", *distributed_flags(number, processes, coordinator)]
        for number, out in enumerate(outs)
    ]
    run_together(commands, devices=devices)
    measured = [json.loads(out.read_text()) for out in outs]
    steps = [of_one["steps"] for of_one in measured]

    def median(name: str) -> list[float]:
        return [statistics.median(step.get(name, 0.0) for step in of_one) for of_one in steps]

    thread = {phase: max(median(phase)) for phase in PHASES}
    thread["rest"] = max(
        statistics.median(step["main"] - sum(step.get(phase, 0.0) for phase in PHASES) for step in of_one)
        for of_one in steps
    )
    names = sorted({name for step in steps[0] for name in step if name.startswith("exchange: ")})
    return {
        "processes": processes,
        "devices": processes * devices,
        "cpu_per_device": sum(median("process")) / (processes * devices),
        "main_thread": {name: round(1000 * seconds, 2) for name, seconds in thread.items()},
        "other_threads": {
            name: round(1000 * seconds, 1) for name, seconds in measured[0]["threads"].items() if seconds >= 0.0005
        },
        "exchanges": {
            "count": max(median("count")),
            "kilobytes": round(max(median("bytes")) / 1000, 2),
            **{name.removeprefix("exchange: "): median(name)[0] for name in names if median(name)[0]},
        },
    }


def main(config: Config) -> None:
    """Measure each number of devices and of processes."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        make_model(model)
        layouts = [(1, devices) for devices in config.devices] + [(processes, 1) for processes in config.processes]
        runs = [
            measure(config, model, Path(temporary) / f"run{number}", *layout) for number, layout in enumerate(layouts)
        ]
    first = runs[0]["cpu_per_device"]
    for run in runs:
        run["overhead_percent"] = round(100 * (run["cpu_per_device"] / first - 1), 1)
        run["cpu_per_device"] = round(run["cpu_per_device"], 4)
    print(json.dumps({"completions_per_device": config.prompts * config.group_size, "runs": runs}))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].endswith(".json"):  # a process of a run
        run_measured(sys.argv[2:], Path(sys.argv[1]))
    else:
        main(tyro.cli(Config))
