"""Random faults in short runs of two processes: every run goes on, and ends as the unbroken one, bit for bit.

    python -m tests.faults --faults 200 --seed 0 --model runs/grpo/model

Each fault strikes a run at a random moment of a phase (start, rollout, scoring, save, export); every pair of a kind and
a phase comes equally often. The processes must end within the time that the settings state; the same commands then go
on. A finished run is compared with the unbroken one, and the next begins. Prints a table and one JSON line. Faults of
the network need network namespaces, and those of the disk a small file system of its own: both are left out where they
are not allowed.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from grpo_jax.jsonl import read_jsonl
from tests import processes
from tests.runs import TIMING

KINDS = ("kill", "kill both", "SIGTERM", "stop", "pause", "cut", "disk full")
PHASES = ("start", "rollout", "scoring", "save", "export")
STEPS = 4
SILENCE = 8
"""Seconds after which the processes count a silent one as lost."""
CONNECTION = 30
"""Seconds in which they must have found each other."""
LIMIT = CONNECTION + 40
"""Seconds in which processes must have ended after a fault: the silence, the grace of an error, and a busy machine."""
DISK = 24 * 2**20
"""Bytes of the disk of a run."""


def slow_length(completions, **kwargs):
    """A reward that takes long enough to be struck, and says when it is at work."""
    marker = Path(os.environ["GRPO_JAX_FAULTS"])
    marker.touch()
    time.sleep(0.3)
    marker.unlink(missing_ok=True)
    return [-float(len(completion)) for completion in completions]


def command(model, folder):
    flags = {
        "model": model,
        "dataset": "sums",
        "template": "{question}",
        "num-steps": STEPS,
        "num-prompts": 8,
        "group-size": 4,
        "max-prompt-length": 12,
        "max-completion-length": 16,
        "eval-size": 8,
        "eval-every": 2,
        "save-every": 1,
        "format-weight": 0.5,
        "reward": "tests.faults:slow_length",
        "kl-coef": 0.05,
        "learning-rate": 3e-3,
        "run-dir": folder,
        "distributed.silence": SILENCE,
        "distributed.connection-timeout": CONNECTION,
    }
    return ["experiments/grpo.py", *(x for name, value in flags.items() for x in (f"--{name}", value)), "--plain"]


def results(folder):
    """Metrics without times, completions and weights of a finished run, as digests."""
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_jsonl(folder / "metrics.jsonl")]
    parts = {"metrics": json.dumps(rows).encode()}
    for name in ("completions.jsonl", "model/model.safetensors"):
        parts[name] = (folder / name).read_bytes()
    return {name: hashlib.sha256(part).hexdigest()[:12] for name, part in parts.items()}


class Campaign:
    """Runs that are struck one after the other, in one folder.

    Args:
        model: folder of the model.
        folder: scratch folder; the run's is on a disk of its own where that is allowed.
        namespaces: of ``processes.network``, or None.
        rng: chooses the faults.
    """

    def __init__(self, model, folder, namespaces, rng):
        self.model, self.folder, self.namespaces, self.rng = model, folder, namespaces, rng
        self.disk = folder / "disk"
        self.disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", self.disk], capture_output=True
        )
        self.has_disk = mounted.returncode == 0
        self.marker = folder / "scoring"
        os.environ["GRPO_JAX_FAULTS"] = str(self.marker)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        absent = {"cut": namespaces is None, "disk full": not self.has_disk}
        self.kinds = [kind for kind in KINDS if not absent.get(kind)]
        self.run = self.disk / "run"

    def close(self):
        if self.has_disk:
            subprocess.run(["umount", self.disk], capture_output=True)

    def start(self):
        self.started = time.time()
        return processes.start(command(self.model, self.run), processes=2, devices=1, namespaces=self.namespaces)

    @property
    def is_trained(self):
        return (self.run / "checkpoints" / str(STEPS)).is_dir()

    def next_fault(self, deck):
        """Take the next kind and phase that a run in this state comes to; None if none of the deck is left."""
        possible = [fault for fault in deck if not self.is_trained or fault[1] in ("start", "export")]
        if possible:
            deck.remove(possible[0])
        return possible[0] if possible else None

    def is_in(self, phase):
        """Whether a run is in a phase now, by its files."""
        if phase == "start":
            return True
        lock = self.run / ".lock"  # opened anew by each run once its processes are connected
        if not lock.exists() or lock.stat().st_mtime < self.started:
            return False
        if phase == "scoring":
            return self.marker.exists()
        if phase == "save":
            return any("tmp" in path.name for path in self.run.glob("checkpoints/*"))
        if phase == "export":
            return self.is_trained
        return any(self.run.glob("metrics.jsonl"))

    def strike(self, kind, phase, started):
        """Wait for a moment in the phase and do it; None if the run ended before."""
        longest = {"start": 5.0, "rollout": 3.0, "export": 1.5}.get(phase, 0.2)
        while True:
            if any(process.poll() is not None for process, _ in started):
                return None
            time.sleep(0.005)
            if self.is_in(phase):
                time.sleep(self.rng.random() * longest)
                if self.is_in(phase):
                    break
        if any(process.poll() is not None for process, _ in started):
            return None
        victim = self.rng.randrange(2)
        pids = [process.pid for process, _ in started]
        if kind in ("kill", "kill both"):
            for pid in pids if kind == "kill both" else [pids[victim]]:
                os.kill(pid, signal.SIGKILL)
        elif kind == "SIGTERM":
            os.kill(pids[victim], signal.SIGTERM)
        elif kind in ("stop", "pause"):
            os.kill(pids[victim], signal.SIGSTOP)
            if kind == "pause":
                time.sleep(2)
                os.kill(pids[victim], signal.SIGCONT)
        elif kind == "cut":
            processes.cut(self.namespaces, 1)
        else:
            free = shutil.disk_usage(self.disk).free
            with contextlib.suppress(OSError), open(self.disk / "filler", "wb") as file:
                file.write(bytes(free))
        return victim

    def fault(self, kind, phase):
        """One fault and the end of its processes; what was seen."""
        started = self.start()
        victim = self.strike(kind, phase, started)
        struck = time.monotonic()
        seen = {"kind": kind, "phase": phase, "victim": victim, "hung": False}
        left = [n for n in range(2) if kind != "stop" or n != victim]
        for number in left:
            try:
                # A run that goes on, and one that ends well, take as long as they take.
                started[number][0].wait(240 if kind == "pause" or victim is None else LIMIT)
            except subprocess.TimeoutExpired:
                seen["hung"] = kind not in ("SIGTERM", "disk full") or self.is_idle(started)
                if not seen["hung"]:
                    started[number][0].wait(240)
        seen["seconds"] = round(time.monotonic() - struck, 1)
        for process, _ in started:
            process.kill()
        ended = processes.finish(started)
        seen["status"] = [status for status, _ in ended]
        seen["output"] = [text[-400:] for _, text in ended]
        if kind == "cut":
            processes.mend(self.namespaces, 1)
        (self.disk / "filler").unlink(missing_ok=True)
        self.marker.unlink(missing_ok=True)
        return seen

    def is_idle(self, started):
        """Whether the processes compute nothing for a while."""

        def ticks():
            fields = [Path(f"/proc/{process.pid}/stat").read_text().split() for process, _ in started]
            return sum(int(each[13]) + int(each[14]) for each in fields)

        before = ticks()
        time.sleep(5)
        return ticks() - before < 50

    @property
    def is_finished(self):
        return (self.run / "summary.json").exists() and (self.run / "model" / "model.safetensors").exists()


def campaign(model, count, seed, folder, namespaces, phases):
    """Faults of runs in a folder; a row for each, and whether every finished run was right."""
    rng = random.Random(seed)
    runs = Campaign(model, folder, namespaces, rng)
    rows, wrong = [], []
    try:
        processes.finish(runs.start())
        if not runs.is_finished:
            raise RuntimeError("the unbroken run failed")
        unbroken = results(runs.run)
        shutil.rmtree(runs.run)
        finished = 0
        deck = []
        while len(rows) < count:
            if not deck:
                pairs = list(itertools.product(runs.kinds, phases))
                deck = rng.sample(pairs, len(pairs))
            is_unbroken = True
            if (pair := runs.next_fault(deck)) is None:
                processes.finish(runs.start())
            elif (seen := runs.fault(*pair))["victim"] is None:  # the run ended before
                deck.append(pair)
            else:
                is_unbroken = False
                rows.append(seen)
                shown = {k: v for k, v in seen.items() if k != "output"}
                print(shown, *([seen["output"]] if seen["hung"] else []), file=sys.stderr, flush=True)
            if runs.is_finished or is_unbroken or len(rows) >= count:
                if not runs.is_finished and not is_unbroken:
                    processes.finish(runs.start())
                finished += 1
                found = results(runs.run) if runs.is_finished else None
                if found != unbroken:
                    wrong.append({"found": found, "after": rows[-6:]})
                    print(f"WRONG: {found}, not {unbroken}", file=sys.stderr, flush=True)
                shutil.rmtree(runs.run)
    finally:
        runs.close()
    return rows, finished, wrong, runs.kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", required=True)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, processes.network(2) as namespaces:
        rows, finished, wrong, kinds = campaign(
            args.model, args.faults, args.seed, Path(folder), namespaces, args.phases
        )
    table = defaultdict(lambda: {"faults": 0, "hung": 0, "longest_seconds": 0.0})
    for row in rows:
        for key in (row["kind"], f"in {row['phase']}"):
            table[key]["faults"] += 1
            table[key]["hung"] += row["hung"]
            if row["kind"] != "pause":
                table[key]["longest_seconds"] = max(table[key]["longest_seconds"], row["seconds"])
    for key, counts in sorted(table.items()):
        print(f"{key:>12}: {counts}", file=sys.stderr)
    result = {"faults": len(rows), "hung": sum(row["hung"] for row in rows), "runs": finished, "wrong_runs": len(wrong)}
    result |= {"kinds": list(kinds), "table": table, "seed": args.seed, "silence": SILENCE, "limit": LIMIT}
    print(json.dumps(result | {"seconds": round(time.monotonic() - started), "wrong": wrong}))
    return bool(wrong or result["hung"])


if __name__ == "__main__":
    sys.exit(main())
