"""Settings and presets of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.staleness import check_stale_loss, corrected
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.tasks.errands import ERRANDS
from grpo_jax.tasks.toy_config import TOY, ToyConfig


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """PPO with actor, critic, reference and reward model."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --reward-model --critic --kl-reward-coef --learning-rate "
        "--critic-optimizer.learning-rate --num-steps --num-prompts --group-size --num-epochs --num-minibatches "
        "--max-prompt-length --max-completion-length --eval-every --mesh.fsdp --trackers"
    )

    run_dir: Path = Path("runs/ppo")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    num_prompts: int = 128
    """Prompts per step."""
    group_size: int = 1
    """Completions per prompt."""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig(accuracy_weight=0.0)
    """Rewards: by default the score of the reward model alone."""

    critic: Literal["model", "head"] = "model"
    """model: a critic of its own, initialized from the reward model where there is one; head: a value head on the
    actor's trunk."""
    critic_warmup_steps: int = 2
    """Steps at the start in which only the critic is updated."""
    value_coef: float = 0.1
    """Coefficient of the value loss where the critic is a head."""
    value_epsilon: float | None = 0.2
    """Clip range of values around their old ones; None for no clipping."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation."""
    whiten: bool = True
    """Normalize advantages to mean 0 and variance 1 over the tokens of a step."""
    kl_reward_coef: float = 0.05
    """Coefficient of each token's KL to the reference policy in the reward."""
    kl_target: float | None = None
    """Adapt kl_reward_coef towards this KL in nats per completion; None for a fixed coefficient."""
    kl_horizon: float = 10_000.0
    """Completions over which the adapted coefficient may change by a fifth."""

    policy: Annotated[PolicyLossConfig, tyro.conf.arg(name="")] = PolicyLossConfig(loss="ppo")
    """Policy loss of the actor."""
    num_epochs: int = 2
    """Passes over each step's completions."""
    num_minibatches: int = 2
    """Updates per pass."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    """Optimizer of the actor."""
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Optimizer of the critic, where it is a model of its own."""

    def __post_init__(self):
        OnlineConfig.__post_init__(self)
        require_at_least(self, critic_warmup_steps=0, kl_reward_coef=0, value_coef=0)
        for name in ("value_epsilon", "kl_target", "kl_horizon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.policy.kl_coef:
            raise ValueError("kl_coef is set, but PPO has the KL in the reward: set kl_reward_coef instead")
        self.check_old_log_probs(self.policy.importance_cap)
        check_stale_loss(self, self.policy)
        if self.kl_target is not None and not self.kl_reward_coef:
            raise ValueError("kl_target is set, but kl_reward_coef, which it would adapt, is 0")
        if self.model not in (None, TOY) and not self.has_reward:
            raise ValueError("no reward has a weight; name a reward_model, or give a reward a weight above 0")

    def check(self) -> None:
        """As ``OnlineConfig.check``, and call the loss and the optimizers on small arrays."""
        OnlineConfig.check(self)
        self.optimizer.check()
        self.critic_optimizer.check()
        first_has_old = self.old_log_probs == "recompute" or self.staleness > 0
        for has_old in {True, first_has_old}:
            is_added_to = self.critic == "head"
            self.policy_loss.check(has_old=has_old, has_reference=False, needs_token_mean=is_added_to)

    @property
    def policy_loss(self) -> PolicyLossConfig:
        """``policy``, corrected for stale samples."""
        return corrected(self, self.policy)

    @property
    def trained_models(self) -> int:
        """The actor, and a critic of its own."""
        return 2 if self.critic == "model" else 1

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept."""
        return bool(self.kl_reward_coef)

    @property
    def has_reward(self) -> bool:
        """Whether a reward has a weight; the toy preset trains a reward model if none has."""
        weights = (self.rewards.accuracy_weight, self.rewards.format_weight, self.rewards.language_weight)
        return any(weights) or bool(self.rewards.reward or self.rewards.reward_model)


TOY_ERRANDS = ToyConfig(errand_share=0.5)
"""The toy model of the presets about errands."""
PRESETS: dict[str, Preset[PPOConfig]] = {
    "toy": Preset(
        lambda: PPOConfig(
            **TOY_POLICY,
            toy=TOY_ERRANDS,
            data=DataConfig(dataset=ERRANDS),
            optimizer=OptimizerConfig(learning_rate=3e-4),
            critic_optimizer=OptimizerConfig(learning_rate=1e-3),
            eval_samples=16,
            num_micro_batches=1,
        ),
        "polite replies with a toy model and a reward model that is trained first; minutes on one CPU",
        paper="InstructGPT (arXiv 2203.02155) in the small",
        hardware="one CPU core",
    ),
}
