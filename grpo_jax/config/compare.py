"""Settings and presets of the comparison of methods."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import TOY_POLICY, PolicyConfig
from grpo_jax.config.offline import DemonstrationConfig, PreferenceConfig
from grpo_jax.config.pipeline import PipelineConfig, check_no_models, stage_config
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.prompts import prompt_fields
from grpo_jax.config.rejection_sampling import DATASET, PAIRS, RejectionSamplingConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import AnyConfig, Preset, RunConfig, require_at_least
from grpo_jax.config.sft import ROW_LENGTH, SFTConfig
from grpo_jax.tasks.generated import SUMS
from grpo_jax.tasks.toy_config import TOY, TOY_FOLDER

ONLINE = ("grpo", "rloo", "ppo")
"""Methods that train in steps."""
IN_ROUNDS = ("dpo", "sft")
METHODS = (*ONLINE, *IN_ROUNDS)
BASE = "base"
WITH_REWARD_MODEL = "_with_reward_model"
"""Suffix of the memory of an update that also has a reward model and a reference policy."""
STAGES = (*METHODS, "drawing", "evaluation")
POLICY_FIELDS = ("max_prompt_length", "max_completion_length", "stop_tokens", "sampling", "cache_dtype", "cache_bytes")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(PipelineConfig, PolicyConfig):
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
    def of_seeds(self) -> list[CompareConfig]:
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
        """Run folder of a part of a round.

        Args:
            method: one of ``METHODS``.
            number: the round, from 1.
            part: ``drawn``, ``learnt`` or ``measured``.
        """
        return self.run_dir / method / f"{number}_{part}"

    def _stage_config(self, stage: AnyConfig, folder: Path, start: Path | str | None, **changes: Any) -> AnyConfig:
        """``stage`` with its own run folder, the comparison's shared fields and ``changes``."""
        shared = {name: getattr(self, name) for name in POLICY_FIELDS}
        return stage_config(stage, self, folder, start, **shared, **changes)

    def in_steps(self, method: str) -> GRPOConfig | PPOConfig:
        """Settings of an online method's run."""
        return self._stage_config(
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

    def _before(self, method: str, number: int) -> Path | str | None:
        """Model that a round starts from."""
        return self.origin if number == 1 else self.folder(method, number - 1, "learnt") / "model"

    def sampled(self, method: str, number: int) -> RejectionSamplingConfig:
        """Settings of a round's sampling run, on problems that no earlier round used.

        Args:
            method: one of ``IN_ROUNDS``; only "dpo" makes pairs.
            number: the round, from 1.
        """
        num_problems = self.num_prompts * self.steps_of_a_round
        return self._stage_config(
            self.drawing,
            self.folder(method, number, "drawn"),
            self._before(method, number),
            data=self.data,
            rewards=self.rewards,
            num_samples=self.group_size,
            num_prompts=self.num_prompts,
            skip_problems=(number - 1) * num_problems,
            max_problems=num_problems,
            pairs_per_problem=self.pairs_per_problem if method == "dpo" else 0,
        )

    def trained(self, method: str, number: int) -> DPOConfig | SFTConfig:
        """Settings of a round's training run on its samples.

        Args:
            method: one of ``IN_ROUNDS``.
            number: the round, from 1.
        """
        stage = getattr(self, method)
        sampled = self.folder(method, number, "drawn")
        prompt_format = prompt_fields(self.data)
        dataset = sampled / (PAIRS if method == "dpo" else DATASET)
        changes: dict[str, Any] = {"data": replace(stage.data, dataset=str(dataset), **prompt_format)}
        if method == "sft":
            longest = self.prompt_length + self.completion_length
            changes["max_length"] = stage.max_length or max(longest, min(ROW_LENGTH, self.positions or ROW_LENGTH))
        # As many sequences per micro-batch as GRPO has.
        if self.grpo.num_micro_batches is None and stage.num_micro_batches is None:
            rows = stage.num_pairs if method == "dpo" else stage.num_sequences
            parts = self.in_steps("grpo").micro_batches_of(rows) * (2 if method == "dpo" else 1)
            changes["num_micro_batches"] = min(parts, rows)
        return self._stage_config(stage, self.folder(method, number, "learnt"), self._before(method, number), **changes)

    def measured(self, folder: Path, start: Path | str | None) -> EvaluationConfig:
        """Settings of an evaluation of a model.

        Args:
            folder: the evaluation's run folder.
            start: the model; None for the comparison's own.
        """
        return self._stage_config(
            self.evaluation, folder, start, data=self.data, rewards=self.rewards, num_samples=self.eval_samples
        )


def toy() -> CompareConfig:
    """The toy preset."""
    grpo = replace(preset("grpo"), num_epochs=2, num_minibatches=2)
    return CompareConfig(
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


PRESETS: dict[str, Preset[CompareConfig]] = {
    "toy": Preset(toy, "all methods on sums with a toy model; minutes on one CPU", hardware="one CPU core"),
}
