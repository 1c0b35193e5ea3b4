"""Settings and presets of GRPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from grpo_jax import advantage
from grpo_jax.config.data import DataConfig
from grpo_jax.config.functions import accepted, call_with, find_function
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import Preset, check_divides, require_at_least
from grpo_jax.config.staleness import check_stale_loss, corrected
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.sharding import make_mesh
from grpo_jax.tasks.generated import SUMS

# Names of the arguments that the run passes to an advantage.
ADVANTAGE_INPUTS = (
    *("rewards", "group_size", "reward_parts", "reward_weights", "step_rewards", "is_step_end"),
    "require_all",  # False: a completion counts by the rewards that it has
)
ADVANTAGES: dict[str, Callable] = {
    "group_relative": advantage.group_relative,
    "dr_grpo": advantage.dr_grpo,
    "rloo": advantage.rloo,
    "reinforce_plus_plus": advantage.reinforce_plus_plus,
    "reinforce_plus_plus_baseline": advantage.reinforce_plus_plus_baseline,
    "gdpo": advantage.gdpo,
    "process_supervised": advantage.process_supervised,
}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """GRPO and its relatives without a critic."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --loss --advantage --learning-rate --num-steps --num-prompts "
        "--group-size --max-prompt-length --max-completion-length --sampling.temperature --kl-coef --format-weight "
        "--reward --reward-model --eval-every --mesh.fsdp --trackers"
    )

    RESUMABLE_FIELDS = (*OnlineConfig.RESUMABLE_FIELDS, "rollout_mesh")
    run_dir: Path = Path("runs/grpo")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    advantage: str = "group_relative"
    """group_relative, dr_grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, gdpo (normalizes each reward
    separately), process_supervised (rewards of reasoning steps), or module:function of your own, called with those of
    rewards, group_size, reward_parts, reward_weights, step_rewards and is_step_end that it takes."""
    policy: Annotated[PolicyLossConfig, tyro.conf.arg(name="")] = PolicyLossConfig()
    """Policy loss."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    """Optimizer."""
    kl_reward_coef: float = 0.0
    """Coefficient of the KL to the reference policy in the reward, instead of kl_coef. With both at 0 no reference is
    kept."""
    ref_refresh_every: int | None = None
    """Steps between reference refreshes, which set the reference to the current policy. Default: never."""
    max_draws: int = 1
    """Dynamic sampling (DAPO): sample further prompts, at most this many times per step, until num_prompts groups have
    non-constant rewards. 1: off."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss."""
    rollout_mesh: Annotated[int | None, tyro.conf.Suppress] = None
    """Sample on this many devices, the last ones, while the first mesh.data x mesh.fsdp x mesh.tensor train. Needs
    staleness. Default: all devices of the mesh do both in turn."""

    def __post_init__(self):
        OnlineConfig.__post_init__(self)
        require_at_least(self, ref_refresh_every=1, kl_reward_coef=0, max_draws=1, rollout_mesh=1)
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; an advantage needs at least 2 completions per prompt")
        if self.policy.kl_coef and self.kl_reward_coef:
            raise ValueError(
                f"kl_coef is {self.policy.kl_coef} and kl_reward_coef is {self.kl_reward_coef}: the KL belongs in the "
                "loss or in the reward, not in both; set one of them to 0"
            )
        inputs = self.advantage_inputs
        clips = any(task.rewards.clip_reward for task in self.mixture)
        if "rewards" not in inputs and (self.kl_reward_coef or clips):
            raise ValueError(f"the advantage {self.advantage} has no sum of rewards for kl_reward_coef or clip_reward")
        if "step_rewards" in inputs and not any(
            task.rewards.steps_weight or task.rewards.reward for task in self.mixture
        ):
            raise ValueError(
                f"the advantage {self.advantage} needs rewards of reasoning steps: set steps_weight, or name a reward "
                "of your own"
            )
        self.check_old_log_probs(self.policy.importance_cap)
        if self.rollout_mesh is not None and not self.staleness:
            raise ValueError(
                f"rollout_mesh is {self.rollout_mesh} and staleness is 0: on policy, sampling and training wait for "
                "each other, and a part of the devices would be idle at any time; set staleness to 1 or more"
            )
        if self.staleness and self.max_draws > 1:
            raise ValueError(
                f"staleness is {self.staleness} and max_draws is {self.max_draws}: whether to sample again is known "
                "once the samples are scored, so that sampling could not run ahead; set one of them to its default"
            )
        check_stale_loss(self, self.policy)
        if self.old_log_probs == "sampler" and not (self.has_old_log_probs or self.kl_reward_coef):
            raise ValueError(
                "old_log_probs is sampler, but a step has one update, which needs none: it is strictly on policy"
            )
        if self.ref_refresh_every is not None and not self.has_reference:
            raise ValueError(
                "ref_refresh_every is set, but there is no reference to refresh: kl_coef and kl_reward_coef are 0; set "
                "one of them, or leave ref_refresh_every out"
            )

    def check(self) -> None:
        """As ``OnlineConfig.check``, and call the loss, the optimizer and the advantage on small arrays."""
        sampling = self.sampling_mesh()
        OnlineConfig.check(self)
        if sampling is not None:
            check_divides(self.num_prompts, sampling, "num_prompts")
        self.optimizer.check()
        first_has_old = self.has_old_log_probs and (self.old_log_probs == "recompute" or self.staleness > 0)
        for has_old in {self.has_old_log_probs, first_has_old}:
            self.policy_loss.check(has_old=has_old, has_reference=bool(self.policy.kl_coef))
        G = self.group_size
        inputs = {
            "rewards": jnp.arange(2.0 * G),
            "group_size": G,
            "reward_parts": jnp.ones((1, 2 * G)),
            "reward_weights": jnp.ones(1),
            "step_rewards": jnp.ones((2 * G, 1)),
            "is_step_end": jnp.ones((2 * G, 1), bool),
            "require_all": False,
        }
        try:
            advantages = call_with(self.advantage_function, **inputs)
        except Exception as error:
            if ":" not in self.advantage:
                raise
            raise ValueError(f"the advantage {self.advantage} failed: {type(error).__name__}: {error}") from error
        shape = getattr(advantages, "shape", None)
        if shape not in ((2 * G,), (2 * G, 1)):
            kind = f"an array of shape {list(shape)}" if shape is not None else f"a {type(advantages).__name__}"
            raise ValueError(
                f"the advantage {self.advantage} returned {kind} for {2 * G} completions; it must return an array [B] "
                "or [B, T]"
            )

    @property
    def advantage_function(self) -> Callable[..., jax.Array]:
        """The function that ``advantage`` names."""
        return find_function(self.advantage, "advantage", ADVANTAGES, ADVANTAGE_INPUTS)

    @property
    def advantage_inputs(self) -> list[str]:
        """Names of the inputs that the advantage function takes."""
        known = accepted(self.advantage_function)
        return ["rewards", "group_size"] if known is None else known

    def sampling_mesh(self) -> Mesh | None:
        """The devices of ``rollout_mesh``; None if sampling has none of its own.

        Raises:
            ValueError: there are not as many beside those of training, or they belong to several processes.
        """
        if self.rollout_mesh is None:
            return None
        devices, wanted = jax.devices(), self.rollout_mesh
        if jax.process_count() > 1:
            raise ValueError(
                f"rollout_mesh is {wanted}, and the run has {jax.process_count()} processes; weights are handed to "
                "other devices of one process only: leave rollout_mesh out"
            )
        training, axes = self.mesh.build().size, self.mesh
        if training + wanted > len(devices):
            left = len(devices) - wanted
            data = left // (axes.fsdp * axes.context * axes.tensor)
            hint = f"set mesh.data to {data}" if data > 0 else "lower it"
            raise ValueError(
                f"rollout_mesh is {wanted}, and mesh.data x mesh.fsdp x mesh.context x mesh.tensor is {training} "
                f"(mesh.data -1 is all); there are {len(devices)} devices: {hint}"
            )
        tensor = axes.rollout_tensor or axes.tensor
        if wanted % tensor:
            raise ValueError(
                f"rollout_mesh is {wanted}; it must be a multiple of the {tensor} devices on its tensor axis"
            )
        return make_mesh(data=wanted // tensor, tensor=tensor, devices=devices[-wanted:])

    @property
    def policy_loss(self) -> PolicyLossConfig:
        """``policy``, corrected for stale samples."""
        return corrected(self, self.policy)

    @property
    def has_old_log_probs(self) -> bool:
        """Whether updates get old log-probabilities: later ones of a step, or all of them those of stale samples."""
        return self.updates_per_step > 1 or (self.old_log_probs == "sampler" and self.staleness > 0)

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept."""
        return bool(self.policy.kl_coef or self.kl_reward_coef)


GSM8K = DataConfig(dataset="openai/gsm8k", subset="main")
DAPO_MATH = DataConfig(
    dataset="BytedTsinghua-SIA/DAPO-Math-17k", eval_dataset="BytedTsinghua-SIA/AIME-2024", eval_size=None
)
PRESETS: dict[str, Preset[GRPOConfig]] = {
    "toy": Preset(
        lambda: GRPOConfig(
            **TOY_POLICY,
            data=DataConfig(dataset=SUMS),
            optimizer=OptimizerConfig(learning_rate=2.5e-4),
            eval_samples=16,
            num_micro_batches=1,
        ),
        "sums of several numbers with a toy model that is trained first; minutes on one CPU",
        paper="R1-Zero in the small (DeepSeek-AI, arXiv 2501.12948, section 2.2)",
        hardware="one CPU core",
        cost="2 to 3 minutes (measured)",
        score="held-out pass@1 from .09-.10 to .88-.92, maj@16 from .21 to .96-.98 (measured, several machines)",
    ),
    "r1-zero-gsm8k": Preset(
        lambda: GRPOConfig(
            model="Qwen/Qwen2.5-0.5B",
            data=GSM8K,
            rewards=RewardConfig(format_weight=0.2),
            num_prompts=64,
            group_size=8,
            num_steps=200,
            optimizer=OptimizerConfig(decay="constant"),
        ),
        "R1-Zero on grade-school mathematics from a 0.5B base model",
        paper="DeepSeek-R1-Zero (arXiv 2501.12948, section 2.2) at a small size",
        hardware="one large GPU, or several devices with --mesh.fsdp (only the memory of an update is planned)",
        memory="5.4 GB a device in an update over 4 devices, with 8 sequences of 1,536 tokens at once on each, in "
        "bfloat16 (by the TPU compiler's plan for v5e 2x2, experiments/bench/memory.py; nothing ran on it)",
        score="not measured here",
    ),
    "dr-grpo": Preset(
        lambda: GRPOConfig(
            model="Qwen/Qwen2.5-Math-1.5B",
            data=GSM8K,
            advantage="dr_grpo",
            policy=PolicyLossConfig(loss="dr_grpo"),
            num_prompts=128,
            group_size=8,
            num_steps=200,
            optimizer=OptimizerConfig(decay="constant"),
        ),
        "Dr.GRPO: no division by length or standard deviation",
        paper="Understanding R1-Zero-like training (arXiv 2503.20783)",
        hardware="one GPU or TPU chip, or several with --mesh.fsdp (memory not measured)",
        score="not measured here",
    ),
    "dapo-math": Preset(
        lambda: GRPOConfig(
            model="Qwen/Qwen2.5-32B",
            data=DAPO_MATH,
            max_prompt_length=2048,
            max_completion_length=20480,
            policy=PolicyLossConfig(loss="dapo"),
            rewards=RewardConfig(overlong_cache=4096),
            num_prompts=512,
            group_size=16,
            num_minibatches=16,
            max_draws=3,
            num_steps=300,
            eval_samples=32,
            optimizer=OptimizerConfig(decay="constant", warmup_updates=20, weight_decay=0.1),
        ),
        "DAPO on competition mathematics from a 32B base model; needs --mesh",
        paper="DAPO (arXiv 2503.14476)",
        hardware="a pod: the paper used 128 H20 GPUs",
        score="50 % on AIME 2024 (avg@32) as published; not measured here",
    ),
    "rloo": Preset(
        lambda: GRPOConfig(
            model="Qwen/Qwen2.5-0.5B",
            data=GSM8K,
            advantage="rloo",
            policy=PolicyLossConfig(loss="ppo"),
            kl_reward_coef=0.01,
            num_prompts=128,
            group_size=4,
            num_steps=200,
            optimizer=OptimizerConfig(decay="constant"),
        ),
        "RLOO: leave-one-out baseline, KL in the reward",
        paper="Back to Basics (arXiv 2402.14740)",
        hardware="one GPU or TPU chip (memory not measured)",
        score="not measured here",
    ),
}
