r"""Comparison of GRPO, RLOO, PPO, DPO and rejection-sampling SFT: same base model, task and number of samples.

Without arguments it compares them with the toy model on sums, on one CPU. For real models:

    python experiments/compare.py
    python experiments/compare.py --num-seeds 3
    python experiments/compare.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --num-steps 200 --num-rounds 5

GRPO, RLOO and PPO are online: they sample and train in steps, with the same number of passes over each step's samples.
DPO and SFT are offline and run in rounds: sample, train on the right completions (for DPO: against wrong ones), and
start the next round from the trained model. All other settings are those of each method's own script; PPO's critic, for
instance, is trained alone in the first two steps. Measured are held-out pass@1 by samples and by time, the largest fall
of the reward, and the memory of an update by the compiler's analysis (bench/memory.py: of a larger model).

Each part is a run with its own folder in run_dir; the same command resumes at the part and step where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.compare import BASE, IN_ROUNDS, ONLINE, PRESETS, WITH_REWARD_MODEL, CompareConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import claims, draw, learning, memories, reached, seconds_of, spread
from grpo_jax.loop.eval_report import format_table, read_report
from grpo_jax.loop.problems import load_problem_sets
from grpo_jax.loop.run import Run
from grpo_jax.loop.stages import Stage, run_stages
from grpo_jax.sharding import make_mesh
from grpo_jax.tasks.toy_config import TOY

TRAILING = 5
"""Steps over which the reward is averaged to measure its falls."""
SCRIPTS = Path(__file__).parent
SCRIPT_OF = {"rloo": "grpo"}
"""Scripts with another name than the method."""


def main(config: CompareConfig) -> int:
    """Run or resume; returns exit status 0 if all stages finished, 75 or 130 if one was stopped."""
    return run_stages(config, learn_all, write_summary, title="comparison", check=check_data, again=True)


def learn_all(config: CompareConfig) -> list[Stage]:
    """The stages of all methods for all seeds, in order."""
    return [stage for seed in config.of_seeds for stage in learn(seed)]


def check_data(config: CompareConfig) -> None:
    """Check that there are enough problems for all rounds, as no two rounds share a problem.

    Raises:
        ValueError: there are too few; and as ``load_problem_sets``.
    """
    problems, *_ = load_problem_sets(config.data, config.seed)
    wanted = config.num_prompts * config.num_steps
    if len(problems) < wanted and set(config.methods) & set(IN_ROUNDS):
        raise ValueError(
            f"{config.num_steps} steps of {config.num_prompts} prompts need {wanted} problems, and there are "
            f"{len(problems)}; take fewer steps, or leave {' and '.join(IN_ROUNDS)} out of methods"
        )


def learn(config: CompareConfig) -> list[Stage]:
    """The stages of all methods for one seed, in order."""
    base = config.run_dir / BASE
    stages = [Stage(SCRIPTS / "evaluate.py", config.measured(base, None))]
    made_here = [base] if config.model == TOY else []
    for method in config.methods:
        if method in ONLINE:
            stages.append(Stage(SCRIPTS / f"{SCRIPT_OF.get(method, method)}.py", config.in_steps(method), made_here))
        else:
            for number in range(1, config.num_rounds + 1):
                stages += round_of(config, method, number, made_here)
    return stages


def round_of(config: CompareConfig, method: str, number: int, made_here: list[Path]) -> list[Stage]:
    """The stages of a round of an offline method: sampling, training, evaluation.

    Args:
        config: the comparison of one seed.
        method: an offline method.
        number: number of the round, from 1.
        made_here: run folder of the toy model; empty for an existing base model.
    """
    sampled, trained = config.sampled(method, number), config.trained(method, number)
    measured = config.measured(config.folder(method, number, "measured"), trained.run_dir / "model")
    start = made_here if number == 1 else [config.folder(method, number - 1, "learnt")]
    return [
        Stage(SCRIPTS / "rejection_sampling.py", sampled, start),
        Stage(SCRIPTS / f"{method}.py", trained, [sampled.run_dir, *start]),
        Stage(SCRIPTS / "evaluate.py", measured, [trained.run_dir]),
    ]


def write_summary(config: CompareConfig, run: Run) -> None:
    """Print tables of results, times and memory, plot the curves, and write the summary."""
    curves = {method: [curve(seed, method) for seed in config.of_seeds] for method in config.methods}
    falls = {method: [fall(seed, method) for seed in config.of_seeds] for method in config.methods}
    paces = {method: [pace(seed, method) for seed in config.of_seeds] for method in config.methods}
    with run.progress.phase("memory of an update", len(set(map(update_of, config.methods)))) as phase:
        memory = memory_of_steps(config, phase.update)
    figures = {
        method: {
            "pass@1": spread([points[-1]["pass@1"] for points in curves[method]]),
            "samples_to_level": spread([reached(points, config.level) for points in curves[method]]),
            "seconds": spread([points[-1]["seconds"] for points in curves[method]]),
            "step_seconds": spread(paces[method]),
            "largest_fall": spread(falls[method]),
            "memory": memory_of(memory, method),
            "memory_of_larger": memory_of(config.larger, method),
        }
        for method in config.methods
    }
    for rows in (learning(figures, config.level), memories(figures)):
        run.say("\n" + format_table(rows))
    run.say("\nclaims about GRPO against PPO, and measurements")
    for claim, measured in claims(figures):
        run.say(f"  {claim}: {measured}")
    draw(curves, run.folder / "curves.png")
    base = read_report(config.of_seeds[0].run_dir / BASE)
    parts = [json.loads(path.read_text()) for seed in config.of_seeds for path in seed.run_dir.rglob("summary.json")]
    run.write_summary(
        {
            "figures": figures,
            "curves": curves,
            "seeds": [seed.seed for seed in config.of_seeds],
            "seconds": sum(part["seconds"] for part in parts),
            "device": base["device"],
            "versions": base["versions"],
        }
    )


def curve(config: CompareConfig, method: str) -> list[dict[str, float]]:
    """Held-out pass@1 of one seed by number of samples and by seconds of sampling and training, without evaluations."""
    base = read_report(config.run_dir / BASE)
    points = [{"samples": 0, "seconds": 0.0, "pass@1": base["figures"]["pass@1"]["mean"]}]
    if method in ONLINE:
        rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
        for row in rows:
            if "eval/pass@1" in row and row["step"]:
                samples = row["step"] * config.num_prompts * config.group_size
                points.append(
                    {"samples": samples, "seconds": seconds_of(rows, row["step"]), "pass@1": row["eval/pass@1"]}
                )
        return points
    samples, seconds = 0, 0.0
    for number in range(1, config.num_rounds + 1):
        sampled, trained = (
            read_jsonl(config.folder(method, number, part) / "metrics.jsonl") for part in ("drawn", "learnt")
        )
        samples += config.group_size * sum(row["num_problems"] for row in sampled)
        seconds += seconds_of(sampled) + seconds_of(trained)
        report = read_report(config.folder(method, number, "measured"))
        points.append({"samples": samples, "seconds": seconds, "pass@1": report["figures"]["pass@1"]["mean"]})
    return points


def pace(config: CompareConfig, method: str) -> float | None:
    """Median seconds per step, which excludes compilation; None for offline methods."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    return float(np.median([row["step_time"] for row in rows if "step_time" in row]))


def fall(config: CompareConfig, method: str) -> float | None:
    """Largest fall of the training pass rate below its running maximum; None for offline methods."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    right = np.array([row["pass_rate"] for row in rows if "pass_rate" in row])
    width = min(TRAILING, len(right))
    means = np.convolve(right, np.full(width, 1 / width), mode="valid")
    return float((np.maximum.accumulate(means) - means).max())


def update_of(method: str) -> str:
    """Name of a method's update in ``update_memory``; RLOO has the same as GRPO."""
    return "grpo" if method == "rloo" else method


def memory_of(memory: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Memory of a method without and with a reward model, as far as ``memory`` has them."""
    names = update_of(method), update_of(method) + WITH_REWARD_MODEL
    return {name: memory[name] for name in names if name in memory}


def memory_of_steps(config: CompareConfig, report: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Memory of the methods' updates with this model on one device, by the names of ``update_memory``.

    For all methods with GRPO's number of sequences per micro-batch, and for PPO with a separate critic.

    Args:
        config: the comparison.
        report: called with the number of methods done.
    """
    from grpo_jax.loop.update_memory import UpdateShapes, update_memory  # late, since it imports flax

    seed, first = config.of_seeds[0], config.methods[0]
    trained = seed.run_dir / first if first in ONLINE else seed.folder(first, config.num_rounds, "learnt")
    grpo = config.in_steps("grpo")
    rows = grpo.num_completions // (grpo.num_minibatches * grpo.micro_batches)
    shapes = UpdateShapes(
        hf_config=json.loads((trained / "model" / "config.json").read_text()),
        rows=max(2, rows - rows % 2),
        num_micro_batches=grpo.micro_batches,
        max_prompt_length=config.prompt_length,
        max_completion_length=config.completion_length,
        remat=config.remat,
        dtype="float32" if config.compute_dtype == jnp.float32 else "bfloat16",
        packing=grpo.packing,
        group_size=grpo.group_size,
    )
    device = make_mesh(devices=jax.devices()[:1])
    memory: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(dict.fromkeys(map(update_of, config.methods)), 1):
        memory |= {name: dataclasses.asdict(step) for name, step in update_memory(shapes, method, device).items()}
        report(number)
    return memory


if __name__ == "__main__":
    sys.exit(run_command(CompareConfig, main, presets=PRESETS, description=__doc__))
