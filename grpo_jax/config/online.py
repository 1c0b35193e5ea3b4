"""Settings of online RL: prompts, group size, evaluation, alarms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.memory import (
    check_memory,
    choose_rollout_tensor,
    fewest_micro_batches,
    micro_batch_tokens,
    warn_of_narrow_shards,
)
from grpo_jax.config.mixture import TaskConfig, check_known, read_tasks, shares
from grpo_jax.config.model import PolicyConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import Export, RunConfig, check_divides, require_at_least
from grpo_jax.config.training import GUARD_FIELDS, BadUpdates
from grpo_jax.devices import first_device, platform
from grpo_jax.models.lora_config import LoRA
from grpo_jax.monitor.alarms import AlarmConfig
from grpo_jax.sharding import num_row_shards, rollout_mesh
from grpo_jax.train.step import Offloaded

CPU_PACKED_TOKENS = 1024
"""Tokens of a micro-batch of packed rows on a CPU: its activations stay in the caches, and little is left unused."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RunConfig, PolicyConfig):
    """Problems, rewards, batch sizes and evaluation of online RL."""

    RESUMABLE_FIELDS = (
        *("cache_bytes", "samples_every", "eval_every", "alarms", "num_micro_batches", "offload"),
        *GUARD_FIELDS,
    )
    EXTENDABLE_FIELDS = ("num_steps", "export")
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """Problems."""
    num_steps: int = 60
    """Steps; each samples a batch and updates the policy on it. A finished run continues when this is raised; with a
    decaying learning rate, later steps follow the new schedule."""
    num_prompts: int = 32
    """Prompts per step."""
    group_size: int = 16
    """Completions per prompt. (TRL: num_generations.)"""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig()
    """Rewards."""
    tasks: Path | None = None
    """JSON file with a mixture of tasks, each with a weight and with data and reward settings that replace those of the
    command line. Default: one task."""
    alarms: Annotated[AlarmConfig, tyro.conf.Suppress] = AlarmConfig()
    """Alarms."""
    eval_every: int = 10
    """Steps between evaluations; 0 for only those before the first and after the last step, which always run."""
    eval_samples: int = 4
    """Completions per held-out problem, for pass@1 and the majority vote."""
    samples_every: Annotated[int, tyro.conf.Suppress] = 10
    """Steps between tables of sample completions in the terminal; completions.jsonl has all."""
    lora: LoRA = LoRA()
    """LoRA adapters."""
    offload: Annotated[tuple[Offloaded, ...], tyro.conf.Suppress] = ()
    """What lies in the host's memory, and, all of it, on the devices while they compute with it: optimizer, its state;
    reference, the reference policy."""
    num_epochs: int = 1
    """Passes over each step's completions."""
    num_minibatches: int = 1
    """Updates per pass."""
    num_micro_batches: int | None = None
    """Gradient accumulation: parts of each update (TRL: gradient_accumulation_steps). Results do not depend on it.
    Default: as few as the devices' memory allows by an estimate; where it is unknown (CPU), as few as keep a part
    within 16,384 tokens per device."""
    packing: Annotated[Literal["auto", "shared", "separate", "none"], tyro.conf.Suppress] = "auto"
    """Layout of updates and frozen-policy log-probabilities: shared packs the completions of a group into rows after
    one copy of their prompt, separate packs whole sequences, none pads. auto: what the attention kernel supports, but
    none in float32, where padded rows agree with the sampler to the last bits."""
    old_log_probs: Annotated[Literal["recompute", "sampler"], tyro.conf.Suppress] = "recompute"
    """Log-probabilities at the start of a step with several updates: recomputed by the trainer, or the sampler's own,
    which saves a forward pass where both agree. The gap between them is then measured in the first update of a step."""
    staleness: Annotated[int, tyro.conf.Suppress] = 0
    """Steps that sampling is ahead of training: batch n is sampled from the policy after step n - 1 - staleness, while
    earlier batches are scored. Importance weights correct for it (importance_cap, or old_log_probs sampler). 0: on
    policy. (AReaL: max_head_offpolicyness; NeMo RL: max_trajectory_age_steps.)"""
    router_replay: Annotated[bool, tyro.conf.Suppress] = True
    """In updates of a mixture of experts, use the experts that the sampler chose for each token (arXiv 2510.11370), and
    not those that the trainer would choose: rounding makes them differ, and then so do the log-probabilities."""
    bad_updates: Annotated[BadUpdates, tyro.conf.Suppress] = "refuse"
    """Updates with a loss or gradient that is not finite, or a gradient above skip_grad_norm, are never applied. refuse
    (also with skip_grad_norm) ends the run at the first; skip goes on without them, for up to 10 steps in a row."""
    export: Export = "last"
    """Checkpoint to export to model/: the last, or the one with the best held-out evaluation. May be changed after the
    run."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_steps=1, num_prompts=1, group_size=1, eval_every=0, eval_samples=1, samples_every=1)
        require_at_least(self, num_epochs=1, num_minibatches=1, num_micro_batches=1, staleness=0)
        parts = self.num_minibatches * (self.num_micro_batches or 1)
        if self.num_completions % parts:
            raise ValueError(
                f"num_prompts x group_size = {self.num_prompts} x {self.group_size} = {self.num_completions} "
                "completions do not divide into num_minibatches x num_micro_batches = "
                f"{self.num_minibatches} x {self.num_micro_batches or 1} parts"
            )
        mixture = self.mixture
        check_known(self.model, [task.data for task in mixture])
        shares(mixture, self.num_prompts)
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature is 0: greedy completions of a group are identical and give no signal"
            )

    @property
    def mixture(self) -> list[TaskConfig]:
        """The tasks in effect."""
        if self.tasks is None:
            return [TaskConfig(None, self.data, self.rewards)]
        return read_tasks(self.tasks, self.data, self.rewards)

    @property
    def trained_models(self) -> int:
        """The policy."""
        return 1

    @property
    def num_completions(self) -> int:
        """Completions per step."""
        return self.num_prompts * self.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step."""
        return self.num_epochs * self.num_minibatches

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update in effect."""
        return self.micro_batches_of(self.num_completions // self.num_minibatches)

    def check(self) -> None:
        """Check rewards, the memory of the devices, and that prompts and completions divide over the mesh."""
        self.check_lora(self.lora)
        self.check_offload(self.offload)
        for task in self.mixture:
            task.rewards.check()
        PolicyConfig.check(self)
        check_memory(self)
        if first_device().platform == "tpu" and self.decoder is not None:
            warn_of_narrow_shards(self.decoder.hidden_size, self.mesh.build().shape)
        self.mesh.check_divides(self.num_prompts, "num_prompts")
        rows = self.num_completions // (self.num_minibatches * self.micro_batches)
        self.mesh.check_divides(rows, "the completions of a micro-batch")
        if self.mesh.context > 1:
            mesh, tensor, decoder = self.mesh.build(), self.mesh.rollout_tensor, self.decoder
            if tensor is None and decoder is not None:
                tensor = choose_rollout_tensor(self, decoder, mesh.shape)
            sampling = rollout_mesh(mesh, tensor or mesh.shape["tensor"])
            check_divides(
                self.num_completions, sampling, "num_prompts x group_size, in the sampler over mesh.context too"
            )

    def check_old_log_probs(self, importance_cap: float | None) -> None:
        """Check that the sampler's log-probabilities can stand in for the policy's, if they are to.

        Args:
            importance_cap: of the policy loss.

        Raises:
            ValueError: they cannot.
        """
        if self.old_log_probs == "recompute":
            return
        if self.sampling.alters_policy:
            raise ValueError(
                "old_log_probs is sampler, but the sampler draws from a modified distribution (top-k, top-p, min-p, "
                "penalties, biases), whose log-probabilities are not the policy's; use recompute"
            )
        if importance_cap is not None:
            raise ValueError(
                f"importance_cap is {importance_cap}, which corrects for the gap between old_log_probs and the "
                "sampler's; with old_log_probs sampler there is none: use recompute, or leave importance_cap out"
            )

    @property
    def packed_micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch of packed rows on a device: those of a padded one, if their number is set."""
        if self.num_micro_batches is not None:
            rows = self.num_completions // (self.num_minibatches * self.num_micro_batches)
            shape = self.mesh.build().shape
            return rows * self.sequence_length // (num_row_shards(shape) * shape["context"])
        return CPU_PACKED_TOKENS if platform() == "cpu" else micro_batch_tokens(self)

    def micro_batches_of(self, rows: int) -> int:
        """``num_micro_batches``, or as few as the devices' memory allows.

        Args:
            rows: sequences of an update.
        """
        return self.num_micro_batches or fewest_micro_batches(self, rows)
