"""Settings of batch inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import PolicyConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import RunConfig, require_at_least


@dataclass(frozen=True, kw_only=True)
class BatchInferenceConfig(RunConfig, PolicyConfig):
    """Problems to sample completions for, and the rewards that score them."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig()
    """Problems."""
    rewards: Annotated[RewardConfig, tyro.conf.arg(name="")] = RewardConfig()
    """Rewards."""
    num_samples: int = 16
    """Completions per problem."""
    num_prompts: int = 64
    """Problems sampled at once."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_samples=1, num_prompts=1)
        check_known(self.model, [self.data])
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"sampling.temperature is 0, so all {self.num_samples} completions of a problem would be identical; "
                "set num_samples to 1"
            )

    def check(self) -> None:
        """Check that rewards exist, and the mesh."""
        self.rewards.check()
        self.mesh.build()
