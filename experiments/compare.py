r"""GRPO, RLOO, PPO, DPO, and SFT on what is right, side by side: one base, one task, equally many samples.

Without arguments it does so on the embedded base and its sums, on one CPU. With arguments it is the real thing:

    python experiments/compare.py
    python experiments/compare.py --num-seeds 3
    python experiments/compare.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --num-steps 200 --num-rounds 5

GRPO, RLOO and PPO draw and learn in steps. DPO and SFT learn from what was drawn before, and so go in rounds: the model
draws its share of the samples, right completions are set against wrong ones or imitated, and the next round begins
with the model that came out. The first three go over each step's samples equally often; for the rest each is as its
own script has it, so that PPO's critic learns alone in the first two steps. What is measured: held-out pass@1 by
samples and by time, how far the reward falls back, and the memory of an update by the compiler's analysis
(bench/memory.py has that of a larger model).

Every part is a run of its own in a folder of this one; the same command goes on at the part and step where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import TOY_POLICY, PolicyConfig
from grpo_jax.config.offline import DemonstrationConfig, PreferenceConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.prompts import prompt_fields
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import PipelineConfig, Preset, RunConfig, require_at_least
from grpo_jax.config.sft import ROW_LENGTH, SFTConfig
from grpo_jax.data.selection import SelectionConfig, preference_pairs
from grpo_jax.jsonl import read_jsonl, write_atomically
from grpo_jax.loop.batch_inference import read_samples
from grpo_jax.loop.command import run_command
from grpo_jax.loop.eval_report import format_table, read_report
from grpo_jax.loop.problems import load_problem_sets
from grpo_jax.loop.run import AnyConfig, Run
from grpo_jax.loop.setup import TOY_FOLDER
from grpo_jax.loop.stages import Stage, check_no_models, load_scripts, run_stages, stage_config
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY

DATASET = "dataset.jsonl"
dpo, evaluate, grpo, ppo, rejection_sampling, sft = load_scripts(
    Path(__file__).parent, "dpo", "evaluate", "grpo", "ppo", "rejection_sampling", "sft"
)
(bench_memory,) = load_scripts(Path(__file__).parent / "bench", "memory")
ONLINE = ("grpo", "rloo", "ppo")
"""What learns in steps."""
IN_ROUNDS = ("dpo", "sft")
METHODS = (*ONLINE, *IN_ROUNDS)
BASE = "base"
PAIRS = "preferences.jsonl"
STAGES = (*METHODS, "drawing", "evaluation")
COLOURS: Mapping[str, str] = {
    "grpo": "tab:blue",
    "rloo": "tab:cyan",
    "ppo": "tab:orange",
    "dpo": "tab:purple",
    "sft": "tab:green",
}
OF_A_POLICY = ("max_prompt_length", "max_completion_length", "stop_tokens", "sampling", "cache_dtype", "cache_bytes")
TRAILING = 5
"""Steps that a fall of the reward is told by the mean of."""


@dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig, PolicyConfig):
    """The comparison. Its data, rewards, samples, models and devices hold for all methods."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --methods --num-seeds --seed --num-steps --num-rounds --num-prompts --group-size "
        "--max-prompt-length --max-completion-length --mesh.fsdp --dry-run"
    )

    run_dir: Path = Path("runs/compare")
    """The comparison's own folder, with one for each seed, method and round."""
    methods: tuple[Literal[METHODS], ...] = METHODS  # pyright: ignore[reportInvalidTypeForm]
    """What is compared."""
    num_seeds: int = 1
    """How many seeds, from seed on; each has problems and noise of its own, and a base unless one is named."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """What is asked."""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig()
    """What is paid for."""
    num_steps: int = 9
    """Steps of what learns in steps."""
    num_rounds: int = 3
    """Collector of what learns in rounds, with an equal part of the samples each. All are evaluated as often."""
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 16
    """Samples for each prompt, of PPO too."""
    eval_samples: int = 4
    """Samples for each held-out problem."""
    pairs_per_problem: int = 4
    """For DPO, pairs of a right and a wrong completion that are made of a problem's samples at most."""
    level: float = 0.8
    """The pass@1 that samples are counted until."""

    grpo: GRPOConfig = GRPOConfig(num_epochs=2, num_minibatches=2)
    """GRPO, without a KL."""
    rloo: GRPOConfig = GRPOConfig(advantage="rloo", num_epochs=2, num_minibatches=2)
    """The same with the mean of a group's others as its baseline."""
    ppo: PPOConfig = PPOConfig(rewards=RewardConfig(), kl_reward_coef=0.0)
    """PPO with a critic of the policy's size; without a KL as well."""
    dpo: DPOConfig = DPOConfig(
        data=PreferenceConfig(eval_size=1), num_epochs=4, sft_coef=0.2, eval_every=0, num_eval_prompts=0
    )
    """DPO on right completions against wrong ones, with a little imitation of the right ones."""
    sft: SFTConfig = SFTConfig(data=DemonstrationConfig(eval_size=1), num_epochs=4, eval_every=0, num_eval_prompts=0)
    """SFT on right completions: rejection sampling."""
    drawing: RejectionSamplingConfig = RejectionSamplingConfig()
    """How a round draws, and what of it is imitated, or preferred to the rest. It asks problems in their order."""
    evaluation: EvaluationConfig = EvaluationConfig(k=(1,))
    """How the base and each round's model are measured."""

    memory_report: Path | None = None
    """File with what bench/memory.py printed of another model, to be told beside this one's."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_seeds=1, num_steps=1, num_rounds=1, num_prompts=1, group_size=2, eval_samples=1)
        require_at_least(self, pairs_per_problem=1)
        check_known(self.model, [self.data])
        check_no_models(self, STAGES)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods is {self.methods}; name at least one, and each once")
        if self.num_steps % self.num_rounds:
            raise ValueError(f"{self.num_steps} steps do not divide into {self.num_rounds} rounds of equal samples")
        if not 0 < self.level <= 1:
            raise ValueError(f"level is {self.level}; it is a share above 0 and at most 1")
        if self.data.grader == "none":
            raise ValueError("grader is none, and what is compared is the share of right answers")
        if self.sft.max_length is not None:
            self.check_positions(self.sft.max_length, "sft.max_length")
        if self.memory_report is not None:
            _ = self.larger
        for method in ONLINE:
            stage = getattr(self, method)
            if stage.tasks is not None or getattr(stage, "max_draws", 1) > 1:
                raise ValueError(f"{method}: tasks and max_draws give it other samples than the others have")
        # What does not fit is found now; of GRPO in any case, for its sequences are those that memory is told of.
        _ = self.in_steps("grpo"), self.measured(self.run_dir, None)
        for method in self.methods:
            _ = self.in_steps(method) if method in ONLINE else (self.drawn(method, 1), self.learnt(method, 1))

    @property
    def of_seeds(self) -> list[Config]:
        """The comparison with each seed, by itself."""
        return [
            replace(self, seed=seed, num_seeds=1, run_dir=self.run_dir / f"seed{seed}")
            for seed in range(self.seed, self.seed + self.num_seeds)
        ]

    @property
    def larger(self) -> dict[str, Any]:
        """What bench/memory.py told of another model; empty if no report is named.

        Raises:
            ValueError: the file is none of its reports.
        """
        if self.memory_report is None:
            return {}
        try:
            report = json.loads(self.memory_report.read_text())
            if report["bench"] != "memory":
                raise ValueError(f"it is of bench {report['bench']}")
            return {name: each for name, each in report.items() if isinstance(each, dict) and each["peak_bytes"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"memory_report: {self.memory_report} is no line of bench/memory.py: {error}") from None

    @property
    def steps_of_a_round(self) -> int:
        """The steps of the others that have as many samples as a round."""
        return self.num_steps // self.num_rounds

    @property
    def origin(self) -> Path | str | None:
        """The model that all methods start from."""
        return self.run_dir / BASE / TOY_FOLDER if self.model == TOY else self.model

    def folder(self, method: str, number: int, part: str) -> Path:
        """Where a part of a round lies."""
        return self.run_dir / method / f"{number}_{part}"

    def stage_config(self, stage: AnyConfig, folder: Path, start: Path | str | None, **changes: Any) -> AnyConfig:
        """A stage's settings in a folder of its own, with those of the comparison."""
        of_policy = {each: getattr(self, each) for each in OF_A_POLICY}
        return stage_config(stage, self, folder, start, **of_policy, **changes)

    def in_steps(self, method: str) -> GRPOConfig | PPOConfig:
        """The run of a method that learns in steps."""
        return self.stage_config(
            getattr(self, method),
            self.run_dir / method,
            self.origin,
            data=self.data,
            rewards=self.rewards,
            num_prompts=self.num_prompts,
            group_size=self.group_size,
            num_steps=self.num_steps,
            eval_every=self.steps_of_a_round,
            eval_samples=self.eval_samples,
        )

    def before(self, method: str, number: int) -> Path | str | None:
        """The model that a round starts from."""
        return self.origin if number == 1 else self.folder(method, number - 1, "learnt") / "model"

    def drawn(self, method: str, number: int) -> RejectionSamplingConfig:
        """The run that draws in a round: of problems that no round before had."""
        num_problems = self.num_prompts * self.steps_of_a_round
        return self.stage_config(
            self.drawing,
            self.folder(method, number, "drawn"),
            self.before(method, number),
            data=self.data,
            rewards=self.rewards,
            num_samples=self.group_size,
            num_prompts=self.num_prompts,
            skip_problems=(number - 1) * num_problems,
            max_problems=num_problems,
        )

    def learnt(self, method: str, number: int) -> DPOConfig | SFTConfig:
        """The run that learns from what a round drew."""
        stage = getattr(self, method)
        drawn = self.folder(method, number, "drawn")
        asked = prompt_fields(self.data)
        dataset = drawn / (PAIRS if method == "dpo" else DATASET)
        changes: dict[str, Any] = {"data": replace(stage.data, dataset=str(dataset), **asked)}
        if method == "sft":
            longest = self.prompt_length + self.completion_length
            changes["max_length"] = stage.max_length or max(longest, min(ROW_LENGTH, self.positions or ROW_LENGTH))
        if (
            self.grpo.num_micro_batches is None and stage.num_micro_batches == 1
        ):  # in memory at once is what GRPO has there
            rows = stage.num_pairs if method == "dpo" else stage.num_sequences
            parts = self.in_steps("grpo").micro_batches_of(rows) * (2 if method == "dpo" else 1)
            changes["num_micro_batches"] = min(parts, rows)
        return self.stage_config(stage, self.folder(method, number, "learnt"), self.before(method, number), **changes)

    def measured(self, folder: Path, start: Path | str | None) -> EvaluationConfig:
        """The run that measures a model."""
        return self.stage_config(
            self.evaluation, folder, start, data=self.data, rewards=self.rewards, num_samples=self.eval_samples
        )


def toy() -> Config:
    """The toy preset."""
    grpo = replace(preset("grpo"), num_epochs=2, num_minibatches=2)
    return Config(
        **TOY_POLICY,
        data=DataConfig(dataset=SUMS),
        grpo=grpo,
        rloo=replace(grpo, advantage="rloo"),
        ppo=replace(preset("ppo"), data=DataConfig(dataset=SUMS), rewards=RewardConfig(), kl_reward_coef=0.0),
        dpo=replace(
            preset("dpo"),
            data=PreferenceConfig(eval_size=1),
            num_epochs=4,
            sft_coef=0.2,
            eval_every=0,
            num_eval_prompts=0,
            judge=None,
        ),
        sft=replace(
            preset("sft"), data=DemonstrationConfig(eval_size=1), num_epochs=4, eval_every=0, num_eval_prompts=0
        ),
        drawing=replace(preset("rejection_sampling"), max_problems=None),
        evaluation=replace(preset("evaluate"), k=(1,)),
    )


PRESETS: dict[str, Preset[Config]] = {
    "toy": Preset(toy, "all methods on sums with a toy model; minutes on one CPU", hardware="one CPU core"),
}
SCRIPTS = {"grpo": grpo, "rloo": grpo, "ppo": ppo, "dpo": dpo, "sft": sft}


def main(config: Config) -> int:
    """Run, or go on; the exit status is 0 when the comparison is finished and 130 when it was asked to stop."""
    return run_stages(config, learn_all, write_summary, title="comparison", check=check_data, again=True)


def learn_all(config: Config) -> list[Stage]:
    """All methods with all seeds, in order."""
    return [stage for each in config.of_seeds for stage in learn(each)]


def check_data(config: Config) -> None:
    """Check that there are problems for all rounds, each of which asks others.

    Raises:
        ValueError: there are too few; and as ``DataConfig.load``.
    """
    problems, *_ = load_problem_sets(config.data, config.seed)
    wanted = config.num_prompts * config.num_steps
    if len(problems) < wanted and set(config.methods) & set(IN_ROUNDS):
        raise ValueError(
            f"{config.num_steps} steps of {config.num_prompts} prompts ask {wanted} problems, and there are "
            f"{len(problems)}; take fewer steps, or leave {' and '.join(IN_ROUNDS)} out of methods"
        )


def learn(config: Config) -> list[Stage]:
    """All methods with one seed, in order."""
    base = config.run_dir / BASE
    stages = [Stage(evaluate, config.measured(base, None))]
    made_here = [base] if config.model == TOY else []
    for method in config.methods:
        if method in ONLINE:
            stages.append(Stage(SCRIPTS[method], config.in_steps(method), made_here))
        else:
            for number in range(1, config.num_rounds + 1):
                stages += round_of(config, method, number, made_here)
    return stages


def round_of(config: Config, method: str, number: int, made_here: list[Path]) -> list[Stage]:
    """A round of a method that learns in rounds: what it draws, what learns from it, and how that is measured."""
    drawn, learnt = config.drawn(method, number), config.learnt(method, number)
    measured = config.measured(config.folder(method, number, "measured"), learnt.run_dir / "model")
    start = made_here if number == 1 else [config.folder(method, number - 1, "learnt")]

    def pairs() -> None:
        write_pairs(drawn.run_dir, drawn.selection, most=config.pairs_per_problem, least=config.dpo.num_pairs)

    needs = [drawn.run_dir, *start]
    return [
        Stage(rejection_sampling, drawn, start),
        Stage(SCRIPTS[method], learnt, needs, pairs) if method == "dpo" else Stage(SCRIPTS[method], learnt, needs),
        Stage(evaluate, measured, [learnt.run_dir]),
    ]


def write_pairs(folder: Path, selection: SelectionConfig, *, most: int, least: int) -> None:
    """Set right completions in a run's folder against wrong ones of the same problem.

    Args:
        folder: of a run that drew completions.
        selection: what is right.
        most: pairs of a problem at most.
        least: pairs that one update takes.

    Raises:
        ValueError: there are fewer than an update takes.
    """
    rows = [
        {
            "prompt": each.problem.prompt,
            "chosen": each.completions[chosen],
            "rejected": each.completions[rejected],
        }
        for each in read_samples(folder)
        for chosen, rejected in preference_pairs(each, selection, max_pairs=most)
    ]
    if len(rows) <= most + least:  # the pairs of a problem are held out
        raise ValueError(
            f"{folder}: {len(rows)} pairs of right and wrong completions are too few for DPO's updates of {least}: the "
            "model is almost never or almost always right. Draw more in a round, lower dpo.num_pairs, or leave dpo out "
            "of methods; what the others learnt stays"
        )
    write_atomically(folder / PAIRS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_summary(config: Config, run: Run) -> None:
    """Put curves, times and memory side by side."""
    curves = {method: [curve(each, method) for each in config.of_seeds] for method in config.methods}
    falls = {method: [fall(each, method) for each in config.of_seeds] for method in config.methods}
    paces = {method: [pace(each, method) for each in config.of_seeds] for method in config.methods}
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
    run.say("\nsaid of GRPO beside PPO, and what was measured")
    for claim, measured in claims(figures):
        run.say(f"  {claim}: {measured}")
    draw(curves, run.folder / "curves.png")
    base = read_report(config.of_seeds[0].run_dir / BASE)
    parts = [json.loads(path.read_text()) for each in config.of_seeds for path in each.run_dir.rglob("summary.json")]
    run.write_summary(
        {
            "figures": figures,
            "curves": curves,
            "seeds": [each.seed for each in config.of_seeds],
            "seconds": sum(part["seconds"] for part in parts),
            "device": base["device"],
            "versions": base["versions"],
        }
    )


def curve(config: Config, method: str) -> list[dict[str, float]]:
    """Held-out pass@1 of one seed by samples drawn and seconds spent on drawing and learning, evaluations left out."""
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
        drawn, learnt = (
            read_jsonl(config.folder(method, number, part) / "metrics.jsonl") for part in ("drawn", "learnt")
        )
        samples += config.group_size * sum(row["num_problems"] for row in drawn)
        seconds += seconds_of(drawn) + seconds_of(learnt)
        report = read_report(config.folder(method, number, "measured"))
        points.append({"samples": samples, "seconds": seconds, "pass@1": report["figures"]["pass@1"]["mean"]})
    return points


def seconds_of(rows: Sequence[Mapping[str, Any]], last: int | None = None) -> float:
    """The seconds of all steps, or of those up to one."""
    return sum(row.get("step_time", 0.0) for row in rows if last is None or row["step"] <= last)


def pace(config: Config, method: str) -> float | None:
    """The median seconds of a step, in which nothing is compiled; None of what goes in rounds."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    return float(np.median([row["step_time"] for row in rows if "step_time" in row]))


def fall(config: Config, method: str) -> float | None:
    """How far the share of right answers in training fell below its best, at most; None of what goes in rounds."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    right = np.array([row["pass_rate"] for row in rows if "pass_rate" in row])
    width = min(TRAILING, len(right))
    means = np.convolve(right, np.full(width, 1 / width), mode="valid")
    return float((np.maximum.accumulate(means) - means).max())


def reached(points: Sequence[Mapping[str, float]], level: float) -> float | None:
    """The samples at which pass@1 is at a level, between two evaluations on a straight line; None if it never is."""
    if points[0]["pass@1"] >= level:
        return 0.0
    for before, after in pairwise(points):
        if before["pass@1"] < level <= after["pass@1"]:
            part = (level - before["pass@1"]) / (after["pass@1"] - before["pass@1"])
            return before["samples"] + part * (after["samples"] - before["samples"])
    return None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """The mean over seeds, the least and the greatest; all None where a seed has none."""
    present = [value for value in values if value is not None]
    if len(present) < len(values):
        return {"mean": None, "low": None, "high": None, "of_seeds": list(values)}
    return {"mean": float(np.mean(present)), "low": min(present), "high": max(present), "of_seeds": present}


def update_of(method: str) -> str:
    """The name of a method's update in ``bench_memory``: RLOO's is GRPO's."""
    return "grpo" if method == "rloo" else method


def memory_of(found: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a method takes, without a reward model and with one, where it was found."""
    names = update_of(method), update_of(method) + bench_memory.WITH_JUDGE
    return {name: found[name] for name in names if name in found}


def memory_of_steps(config: Config, report: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """What the methods' updates take with this model, by ``bench_memory``'s names, on one device.

    All with as many sequences at once as GRPO has, a KL to a reference only where a reward model is there too, and PPO
    with a critic that is a model of its own, whatever is set.
    """
    seed, first = config.of_seeds[0], config.methods[0]
    trained = seed.run_dir / first if first in ONLINE else seed.folder(first, config.num_rounds, "learnt")
    grpo = config.in_steps("grpo")
    rows = config.num_prompts * config.group_size // (grpo.num_minibatches * grpo.micro_batches)
    shapes = bench_memory.Config(
        config=trained / "model" / "config.json",
        rows=max(2, rows - rows % 2),
        num_micro_batches=grpo.micro_batches,
        max_prompt_length=config.prompt_length,
        max_completion_length=config.completion_length,
        remat=config.remat,
        dtype="float32" if config.compute_dtype == jnp.float32 else "bfloat16",
    )
    found: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(dict.fromkeys(map(update_of, config.methods)), 1):
        found |= {name: dataclasses.asdict(each) for name, each in bench_memory.step_memory(shapes, method).items()}
        report(number)
    return found


def learning(figures: Mapping[str, Mapping[str, Any]], level: float) -> list[tuple[str, ...]]:
    """How the methods learn, side by side; the first row is the head."""
    rows = [("", "pass@1", "of the seeds", f"samples to {level:g}", "seconds", "of a step", "largest fall")]
    for method, each in figures.items():
        at_end = each["pass@1"]
        rows.append(
            (
                method,
                f"{at_end['mean']:.3f}",
                f"{at_end['low']:.3f} to {at_end['high']:.3f}",
                shown(each["samples_to_level"]["mean"], ",.0f"),
                shown(each["seconds"]["mean"], ".0f"),
                shown(each["step_seconds"]["mean"], ".2f"),
                shown(each["largest_fall"]["mean"], ".3f"),
            )
        )
    return rows


def memories(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What the methods' updates take, side by side; the first row is the head."""
    rows = [("", "copies of the model", "MiB of an update", "GiB with the larger model")]
    for method, each in figures.items():
        larger = each["memory_of_larger"]
        for name, own in each["memory"].items():
            judged = " with reward model and reference" if name.endswith(bench_memory.WITH_JUDGE) else ""
            gib = larger[name]["peak_bytes"] / 2**30 if name in larger else None
            mib = own["peak_bytes"] / 2**20
            rows.append((method + judged, f"{own['copies']:g}", f"{mib:.1f}", shown(gib, ".1f")))
    return rows


def claims(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What is said of GRPO beside PPO, and what was measured; nothing where one of them was not compared."""
    if not {"grpo", "ppo"} <= figures.keys():
        return []
    rows, grpo, ppo = [], figures["grpo"], figures["ppo"]
    for suffix, what in (("", "rules as rewards"), (bench_memory.WITH_JUDGE, "reward model and reference")):
        shares = {
            where: grpo[kind]["grpo" + suffix]["peak_bytes"] / ppo[kind]["ppo" + suffix]["peak_bytes"]
            for where, kind in (("this model", "memory"), ("the larger one", "memory_of_larger"))
            if "grpo" + suffix in grpo[kind] and "ppo" + suffix in ppo[kind]
        }
        told = ", ".join(f"{share:.0%} of PPO's with {where}" for where, share in shares.items())
        rows.append((f"nearly halves memory: {what}", told))
    named = (("GRPO", grpo), ("PPO", ppo))
    control = ""
    if "rloo" in figures:
        same = figures["rloo"]["step_seconds"]["mean"] / grpo["step_seconds"]["mean"]
        control = f" (RLOO's, which is the same program: {same:.2f})"
    slower = ppo["step_seconds"]["mean"] / grpo["step_seconds"]["mean"]
    samples = ", ".join(f"{name} {shown(each['samples_to_level']['mean'], ',.0f')}" for name, each in named)
    ends = ", ".join(f"{name} {each['pass@1']['low']:.3f} to {each['pass@1']['high']:.3f}" for name, each in named)
    falls = ", ".join(f"{name} {each['largest_fall']['high']:.3f}" for name, each in named)
    return [
        *rows,
        ("three times faster: a step", f"PPO's takes {slower:.2f} times as long{control}"),
        ("three times faster: samples to the level", samples),
        ("more stable: pass@1 of the seeds", ends),
        ("more stable: largest fall of the reward", falls),
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Held-out pass@1 by samples and by time: a line for each seed, a colour for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    labels = {"samples": "samples", "seconds": "seconds of drawing and learning"}
    for axes, (across, label) in zip(panels, labels.items(), strict=True):
        for method, of_seeds in curves.items():
            for number, points in enumerate(of_seeds):
                axes.plot(
                    [point[across] for point in points],
                    [point["pass@1"] for point in points],
                    "o-",
                    color=COLOURS[method],
                    alpha=0.7,
                    markersize=3,
                    label=None if number else method,
                )
        axes.set_xlabel(label)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_title("pass@1, held out", loc="left")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(run_command(Config, main, presets=PRESETS, description=__doc__))
