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
from dataclasses import dataclass, replace
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
from grpo_jax.loop.comparison import WITH_REWARD_MODEL, claims, draw, learning, memories, reached, seconds_of, spread
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
"""Methods that train in steps."""
IN_ROUNDS = ("dpo", "sft")
METHODS = (*ONLINE, *IN_ROUNDS)
BASE = "base"
PAIRS = "preferences.jsonl"
STAGES = (*METHODS, "drawing", "evaluation")
POLICY_FIELDS = ("max_prompt_length", "max_completion_length", "stop_tokens", "sampling", "cache_dtype", "cache_bytes")
TRAILING = 5
"""Steps over which the reward is averaged to measure its falls."""


@dataclass(frozen=True, kw_only=True)
class Config(PipelineConfig, PolicyConfig):
    """The comparison. Its data, rewards, samples, model and devices apply to all methods."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --methods --num-seeds --seed --num-steps --num-rounds --num-prompts --group-size "
        "--max-prompt-length --max-completion-length --mesh.fsdp --dry-run"
    )

    run_dir: Path = Path("runs/compare")
    """Folder of the comparison, with a run folder for each seed, method and round."""
    methods: tuple[Literal[METHODS], ...] = METHODS  # pyright: ignore[reportInvalidTypeForm]
    """Methods to compare."""
    num_seeds: int = 1
    """Number of seeds, starting at seed; each has its own problems, noise and toy model."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """Problems."""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig()
    """Rewards."""
    num_steps: int = 9
    """Steps of the online methods."""
    num_rounds: int = 3
    """Rounds of DPO and SFT, with an equal share of the samples each. Online methods are evaluated as often."""
    num_prompts: int = 32
    """Prompts per step."""
    group_size: int = 16
    """Samples per prompt, also for PPO."""
    eval_samples: int = 4
    """Samples per held-out problem."""
    pairs_per_problem: int = 4
    """Maximum number of pairs of a right and a wrong completion per problem, for DPO."""
    level: float = 0.8
    """pass@1 for the number of samples needed to reach it."""

    grpo: GRPOConfig = GRPOConfig(num_epochs=2, num_minibatches=2)
    """GRPO without a KL penalty."""
    rloo: GRPOConfig = GRPOConfig(advantage="rloo", num_epochs=2, num_minibatches=2)
    """RLOO: the baseline is the mean of the group's other samples."""
    ppo: PPOConfig = PPOConfig(rewards=RewardConfig(), kl_reward_coef=0.0)
    """PPO with a critic of the policy's size, without a KL penalty."""
    dpo: DPOConfig = DPOConfig(
        data=PreferenceConfig(eval_size=1), num_epochs=4, sft_coef=0.2, eval_every=0, num_eval_prompts=0
    )
    """DPO on right completions against wrong ones, with a small SFT loss on the right ones."""
    sft: SFTConfig = SFTConfig(data=DemonstrationConfig(eval_size=1), num_epochs=4, eval_every=0, num_eval_prompts=0)
    """SFT on right completions."""
    drawing: RejectionSamplingConfig = RejectionSamplingConfig()
    """Sampling of a round and selection of the right completions. Problems are used in their order."""
    evaluation: EvaluationConfig = EvaluationConfig(k=(1,))
    """Evaluation of the base model and each round's model."""

    memory_report: Path | None = None
    """File with the output of bench/memory.py for a larger model, to report too."""

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
            raise ValueError("grader is none, but the comparison needs right answers; choose a grader")
        if self.sft.max_length is not None:
            self.check_positions(self.sft.max_length, "sft.max_length")
        if self.memory_report is not None:
            _ = self.larger
        for method in ONLINE:
            stage = getattr(self, method)
            if stage.tasks is not None or getattr(stage, "max_draws", 1) > 1:
                raise ValueError(
                    f"{method}: tasks and max_draws would give it other samples than the other methods; leave them out"
                )
        # Checks the settings of all runs; GRPO's in any case, since memory is measured at its batch size.
        _ = self.in_steps("grpo"), self.measured(self.run_dir, None)
        for method in self.methods:
            _ = self.in_steps(method) if method in ONLINE else (self.sampled(method, 1), self.trained(method, 1))

    @property
    def of_seeds(self) -> list[Config]:
        """The comparison of each seed."""
        return [
            replace(self, seed=seed, num_seeds=1, run_dir=self.run_dir / f"seed{seed}")
            for seed in range(self.seed, self.seed + self.num_seeds)
        ]

    @property
    def larger(self) -> dict[str, Any]:
        """Contents of ``memory_report``: memory by update; empty if it is not set.

        Raises:
            ValueError: the file is not output of bench/memory.py.
        """
        if self.memory_report is None:
            return {}
        try:
            report = json.loads(self.memory_report.read_text())
            if report["bench"] != "memory":
                raise ValueError(f"it is output of bench {report['bench']}")
            return {name: value for name, value in report.items() if isinstance(value, dict) and value["peak_bytes"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"memory_report: {self.memory_report} is not output of bench/memory.py: {error}") from None

    @property
    def steps_of_a_round(self) -> int:
        """Number of online steps with as many samples as a round."""
        return self.num_steps // self.num_rounds

    @property
    def origin(self) -> Path | str | None:
        """The model that all methods start from."""
        return self.run_dir / BASE / TOY_FOLDER if self.model == TOY else self.model

    def folder(self, method: str, number: int, part: str) -> Path:
        """Run folder of a part of a round."""
        return self.run_dir / method / f"{number}_{part}"

    def stage_config(self, stage: AnyConfig, folder: Path, start: Path | str | None, **changes: Any) -> AnyConfig:
        """``stage`` with its own run folder, the comparison's shared fields and ``changes``."""
        shared = {name: getattr(self, name) for name in POLICY_FIELDS}
        return stage_config(stage, self, folder, start, **shared, **changes)

    def in_steps(self, method: str) -> GRPOConfig | PPOConfig:
        """Settings of an online method's run."""
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
        """Model that a round starts from."""
        return self.origin if number == 1 else self.folder(method, number - 1, "learnt") / "model"

    def sampled(self, method: str, number: int) -> RejectionSamplingConfig:
        """Settings of a round's sampling run, on problems that no earlier round used."""
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

    def trained(self, method: str, number: int) -> DPOConfig | SFTConfig:
        """Settings of a round's training run on its samples."""
        stage = getattr(self, method)
        sampled = self.folder(method, number, "drawn")
        prompt_format = prompt_fields(self.data)
        dataset = sampled / (PAIRS if method == "dpo" else DATASET)
        changes: dict[str, Any] = {"data": replace(stage.data, dataset=str(dataset), **prompt_format)}
        if method == "sft":
            longest = self.prompt_length + self.completion_length
            changes["max_length"] = stage.max_length or max(longest, min(ROW_LENGTH, self.positions or ROW_LENGTH))
        # As many sequences per micro-batch as GRPO has.
        if self.grpo.num_micro_batches is None and stage.num_micro_batches == 1:
            rows = stage.num_pairs if method == "dpo" else stage.num_sequences
            parts = self.in_steps("grpo").micro_batches_of(rows) * (2 if method == "dpo" else 1)
            changes["num_micro_batches"] = min(parts, rows)
        return self.stage_config(stage, self.folder(method, number, "learnt"), self.before(method, number), **changes)

    def measured(self, folder: Path, start: Path | str | None) -> EvaluationConfig:
        """Settings of an evaluation of a model."""
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
    """Run or resume; returns exit status 0 if all stages finished and 130 if one was stopped."""
    return run_stages(config, learn_all, write_summary, title="comparison", check=check_data, again=True)


def learn_all(config: Config) -> list[Stage]:
    """The stages of all methods for all seeds, in order."""
    return [stage for seed in config.of_seeds for stage in learn(seed)]


def check_data(config: Config) -> None:
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


def learn(config: Config) -> list[Stage]:
    """The stages of all methods for one seed, in order."""
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

    def pairs() -> None:
        write_pairs(sampled.run_dir, sampled.selection, most=config.pairs_per_problem, least=config.dpo.num_pairs)

    needs = [sampled.run_dir, *start]
    return [
        Stage(rejection_sampling, sampled, start),
        Stage(SCRIPTS[method], trained, needs, pairs) if method == "dpo" else Stage(SCRIPTS[method], trained, needs),
        Stage(evaluate, measured, [trained.run_dir]),
    ]


def write_pairs(folder: Path, selection: SelectionConfig, *, most: int, least: int) -> None:
    """Write preferences of right over wrong completions of the same problem.

    Args:
        folder: run folder with samples; receives the preferences.
        selection: criteria of right completions.
        most: maximum number of pairs per problem.
        least: pairs per update.

    Raises:
        ValueError: there are too few pairs for an update.
    """
    rows = [
        {
            "prompt": samples.problem.prompt,
            "chosen": samples.completions[chosen],
            "rejected": samples.completions[rejected],
        }
        for samples in read_samples(folder)
        for chosen, rejected in preference_pairs(samples, selection, max_pairs=most)
    ]
    if len(rows) <= most + least:  # the pairs of a problem are held out
        raise ValueError(
            f"{folder}: {len(rows)} pairs of right and wrong completions are too few for DPO's updates of {least}: the "
            "model is almost never or almost always right. Sample more per round, lower dpo.num_pairs, or leave dpo "
            "out of methods; the runs of the other methods are kept"
        )
    write_atomically(folder / PAIRS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_summary(config: Config, run: Run) -> None:
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


def curve(config: Config, method: str) -> list[dict[str, float]]:
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


def pace(config: Config, method: str) -> float | None:
    """Median seconds per step, which excludes compilation; None for offline methods."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    return float(np.median([row["step_time"] for row in rows if "step_time" in row]))


def fall(config: Config, method: str) -> float | None:
    """Largest fall of the training pass rate below its running maximum; None for offline methods."""
    if method not in ONLINE:
        return None
    rows = read_jsonl(config.run_dir / method / "metrics.jsonl")
    right = np.array([row["pass_rate"] for row in rows if "pass_rate" in row])
    width = min(TRAILING, len(right))
    means = np.convolve(right, np.full(width, 1 / width), mode="valid")
    return float((np.maximum.accumulate(means) - means).max())


def update_of(method: str) -> str:
    """Name of a method's update in ``bench_memory``; RLOO has the same as GRPO."""
    return "grpo" if method == "rloo" else method


def memory_of(memory: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Memory of a method without and with a reward model, as far as ``memory`` has them."""
    names = update_of(method), update_of(method) + WITH_REWARD_MODEL
    return {name: memory[name] for name in names if name in memory}


def memory_of_steps(config: Config, report: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Memory of the methods' updates with this model on one device, by ``bench_memory``'s names.

    For all methods with GRPO's number of sequences per micro-batch, and for PPO with a separate critic.

    Args:
        config: the comparison.
        report: called with the number of methods done.
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
    memory: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(dict.fromkeys(map(update_of, config.methods)), 1):
        memory |= {name: dataclasses.asdict(step) for name, step in bench_memory.step_memory(shapes, method).items()}
        report(number)
    return memory


if __name__ == "__main__":
    sys.exit(run_command(Config, main, presets=PRESETS, description=__doc__))
