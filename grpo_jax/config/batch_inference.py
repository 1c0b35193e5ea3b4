"""Settings of batch inference: what is sampled and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from grpo_jax.config.data import DataSettings
from grpo_jax.config.mixture import check_known
from grpo_jax.config.model import PolicySettings
from grpo_jax.config.rewards import RewardSettings
from grpo_jax.config.run import RunSettings, at_least


@dataclass(frozen=True, kw_only=True)
class CollectSettings(RunSettings, PolicySettings):
    """What is asked, drawn and scored."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")] = DataSettings()
    """What is asked."""
    rewards: Annotated[RewardSettings, tyro.conf.arg(name="")] = RewardSettings()
    """How completions are scored."""
    num_samples: int = 16
    """Completions of each problem."""
    num_prompts: int = 64
    """Problems drawn for at once."""

    def __post_init__(self):
        RunSettings.__post_init__(self)
        PolicySettings.__post_init__(self)
        at_least(self, num_samples=1, num_prompts=1)
        check_known(self.model, [self.data])
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"sampling.temperature is 0, so that {self.num_samples} samples of a problem are all the same; set "
                "num_samples to 1"
            )
