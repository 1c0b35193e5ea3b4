"""Settings of online RL: prompts, group size, evaluation, alarms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import TaskConfig, check_known, read_tasks, shares
from grpo_jax.config.model import PolicyConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import Export, RunConfig, require_at_least
from grpo_jax.monitor.alarms import AlarmConfig

MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RunConfig, PolicyConfig):
    """What is asked, drawn, paid for, watched and evaluated."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """What is asked."""
    num_steps: int = 60
    """Rollouts with the updates that follow each. A finished run that is given more goes on; where the learning rate
    decays, it is from there on that of the new number."""
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 16
    """Samples for each prompt."""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig()
    """What is paid for."""
    tasks: Path | None = None
    """File with a mixture of tasks, each with a weight and with settings of its own in place of those above; see
    ``tasks.read_tasks``. Default: one task."""
    alarms: AlarmConfig = AlarmConfig()
    """What is watched for."""
    eval_every: int = 10
    """Steps between evaluations; there is one before the first and one after the last. 0 for these two alone."""
    eval_samples: int | None = None
    """Samples for each held-out problem, from which pass@1 and the majority vote are taken. Default: 4 with --model,
    16 without."""
    samples_every: int = 10
    """Steps between tables of sample completions; there is one after the last step. completions.jsonl has all."""
    export: Export = "last"
    """Which model becomes model/: that of the last step, or that of the best held-out evaluation. A finished run can be
    given the other one."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_steps=1, num_prompts=1, group_size=1, eval_every=0, eval_samples=1, samples_every=1)
        mixture = self.mixture
        check_known(self.model, [task.data for task in mixture])
        shares(mixture, self.num_prompts)
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy samples of a group are all alike and teach nothing")

    @property
    def mixture(self) -> list[TaskConfig]:
        """The tasks in effect."""
        if self.tasks is None:
            return [TaskConfig(None, self.data, self.rewards)]
        return read_tasks(self.tasks, self.data, self.rewards)

    @property
    def num_eval_samples(self) -> int:
        """The samples of an evaluation in effect."""
        return self.eval_samples or (4 if self.model else 16)

    def micro_batches_of(self, rows: int) -> int:
        """The fewest equal parts of an update of so many rows that have few enough tokens each."""
        parts = self.mesh.build().shape
        devices = parts["data"] * parts["fsdp"]
        most = max(devices, devices * MICRO_BATCH_TOKENS // (self.prompt_length + self.completion_length))
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most and rows // n % devices == 0]
        return min(fitting, default=1)


RESUMABLE_FIELDS = ("cache_bytes", "samples_every", "eval_every", "alarms", "num_micro_batches")
"""Settings that a resumed run may have other values of, besides those of every experiment."""
EXTENDABLE_FIELDS = ("num_steps", "export")
"""Settings with other values of which a finished run goes on."""
