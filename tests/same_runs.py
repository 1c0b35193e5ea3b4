"""Runs of every experiment by several processes, compared with those of one process that has as many devices.

    python -m tests.same_runs --model runs/grpo/model --processes 4 --devices 2

For each experiment: whether metrics (without times), completions and weights are the same to the last bit, and by how
much losses (relative) and weights differ; null for what a run does not have. One JSON line each. The exit status is 1
if completions differ, or losses or weights by more than 1e-5.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from grpo_jax.jsonl import read_jsonl
from tests import processes
from tests.runs import TIMING

TOLERANCE = 1e-5
LENGTHS = "--max-prompt-length 12 --max-completion-length 16"
ONLINE = f"--num-steps 2 --num-prompts 8 {LENGTHS} --eval-size 8"
SUMS = "--dataset sums --template {question}"
PAIRS = f"--dataset pairs.jsonl --template {{question}} --num-pairs 8 --num-epochs 1 {LENGTHS}"
FLAGS = {
    "grpo": f"{SUMS} {ONLINE} --group-size 4 --format-weight 0.5 --kl-coef 0.05 --mesh.fsdp 2",
    "ppo": f"{SUMS} {ONLINE} --group-size 2 --format-weight 0.5 --kl-reward-coef 0.05",
    "sft": f"{SUMS} --num-generated 64 --num-epochs 1 --max-length 64 --num-sequences 8 {LENGTHS} --num-eval-prompts 8",
    "dpo": f"{PAIRS} --num-eval-prompts 8",
    "reward_model": PAIRS,
    "rejection_sampling": f"{SUMS} --max-problems 16 --num-samples 16 {LENGTHS}",
    "evaluate": f"{SUMS} --eval-size 16 --num-samples 4 {LENGTHS}",
    "context": f"{SUMS} {ONLINE} --group-size 4 --kl-coef 0.05 --mesh.fsdp 2 --mesh.context 2",
    "tasks": f"--tasks tasks.json {ONLINE} --group-size 4",
}
"""Flags of each experiment; ``context`` and ``tasks`` are ``grpo.py`` with sequence parallelism and with a mixture."""


def write_files(folder):
    """The files that the flags name, by name."""
    rng = random.Random(0)
    pairs = [(str(rng.randrange(1000)), str(rng.randrange(10000))) for _ in range(64)]
    rows = [{"prompt": f"?{n}", "chosen": f"{n}!", "rejected": other} for n, other in pairs]
    sums = {"dataset": "sums", "template": "{question}"}
    tasks = {"easy": {**sums, "weight": 2, "format_weight": 0.2}, "other": {**sums, "repetition_weight": 0.1}}
    files = {"pairs.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows), "tasks.json": json.dumps(tasks)}
    for name, text in files.items():
        (folder / name).write_text(text)
    return {name: str(folder / name) for name in files}


def results(folder):
    """Metrics without times, completions and weights of a run."""
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_jsonl(folder / "metrics.jsonl")]
    completions, weights = folder / "completions.jsonl", folder / "model" / "model.safetensors"
    text = completions.read_bytes() if completions.exists() else b""
    return rows, text, load_file(weights) if weights.exists() else {}


def compared(first, second):
    """Of the results of two runs."""
    (rows, completions, weights), (other_rows, other_completions, other_weights) = first, second
    losses = [(a[k], b[k]) for a, b in zip(rows, other_rows, strict=True) for k in a if k.rpartition("/")[2] == "loss"]
    pairs = [(value, other_weights[name]) for name, value in weights.items()]
    return {
        "metrics": rows == other_rows,
        "completions": completions == other_completions if completions or other_completions else None,
        "weights": all(np.array_equal(a, b) for a, b in pairs) if pairs else None,
        "loss_differs_by": float(np.max([abs(a - b) / max(abs(a), 1e-30) for a, b in losses])) if losses else None,
        "weights_differ_by": float(np.max([abs(a - b).max() for a, b in pairs])) if pairs else None,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(FLAGS), help=f"of {', '.join(FLAGS)}; default: all")
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, processes.network(args.processes) as namespaces:
        folder = Path(scratch)
        files = write_files(folder)
        has_differed = False
        for name in args.experiments:
            flags = [files.get(flag, flag) for flag in FLAGS[name].split()]
            script = f"experiments/{'grpo' if name in ('context', 'tasks') else name}.py"
            found = []
            for count, devices in ((1, args.processes * args.devices), (args.processes, args.devices)):
                run = folder / f"{name}-{count}"
                command = [script, "--model", args.model, *flags, "--run-dir", run, "--plain"]
                where = namespaces if count > 1 else None
                processes.run(command, processes=count, devices=devices, namespaces=where)
                found.append(results(run))
            described = {"experiment": name, "processes": args.processes, "devices": args.devices}
            same = compared(*found)
            print(json.dumps(described | same), flush=True)
            differences = [same["loss_differs_by"] or 0.0, same["weights_differ_by"] or 0.0]
            has_differed |= same["completions"] is False or not all(each <= TOLERANCE for each in differences)
    return has_differed


if __name__ == "__main__":
    sys.exit(main())
