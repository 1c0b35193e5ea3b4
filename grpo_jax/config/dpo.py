"""Settings and presets of DPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro

from grpo_jax.config.model import TOY_POLICY, PolicyConfig
from grpo_jax.config.offline import OfflineConfig, PreferenceConfig
from grpo_jax.config.ppo import TOY_ERRANDS
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.loss import hinge_preference, sigmoid_preference, squared_preference
from grpo_jax.rewards.plugin import import_reward
from grpo_jax.tasks.errands import ERRANDS

OBJECTIVES: dict[str, Callable] = {
    "sigmoid": sigmoid_preference,
    "hinge": hinge_preference,
    "ipo": squared_preference,
}


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig, PolicyConfig):
    """Direct preference optimization."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --chat-template --loss --beta --learning-rate --num-epochs --num-pairs "
        "--max-prompt-length --max-completion-length --eval-every --mesh.fsdp --trackers"
    )

    data: Annotated[PreferenceConfig, tyro.conf.arg(name="")] = PreferenceConfig()
    """Preferences."""
    run_dir: Path = Path("runs/dpo")
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of a pair's margin: DPO's sigmoid, SLiC's hinge or IPO's square."""
    beta: float = 0.1
    """Strength of the regularization towards the reference policy."""
    label_smoothing: float = 0.0
    """With sigmoid, the assumed share of pairs with flipped labels (cDPO)."""
    target_margin: float = 0.0
    """With sigmoid, the margin by which the chosen completion should win, after beta (SimPO's gamma)."""
    per_token: bool | None = None
    """Divide log-probabilities by the number of tokens. Default: with ipo."""
    reference_free: bool = False
    """Train without a reference policy."""
    sft_coef: float = 0.0
    """Coefficient of the negative log-likelihood of the chosen completions."""
    num_pairs: int = 32
    """Pairs per update."""
    optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig(learning_rate=5e-7)
    """Optimizer."""
    judge: str | None = None
    """module:function, a reward that scores completions of held-out prompts. Default: none."""
    num_eval_prompts: int = 64
    """Held-out prompts to sample completions for at an evaluation; 0 for none."""
    eval_samples: int = 4
    """Completions per such prompt."""

    def __post_init__(self):
        OfflineConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(self, num_eval_prompts=0, eval_samples=1, sft_coef=0)
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0")
        if self.loss != "sigmoid" and (self.label_smoothing or self.target_margin):
            raise ValueError(f"label_smoothing and target_margin belong to the loss sigmoid, not to {self.loss}")
        # Checks its range. Traced: a computation would start JAX's devices before processes are connected.
        margin = jax.ShapeDtypeStruct((1,), jnp.float32)
        jax.eval_shape(partial(sigmoid_preference, label_smoothing=self.label_smoothing), margin)

    def check(self) -> None:
        """Check that the judge exists, and that the pairs of a micro-batch divide over the mesh."""
        OfflineConfig.check(self)
        if self.judge is not None:
            import_reward(self.judge)

    @property
    def has_sampler(self) -> bool:
        """Whether completions are sampled."""
        return self.num_eval_prompts > 0

    @property
    def by_token(self) -> bool:
        """Whether log-probabilities are divided by the number of tokens."""
        return self.loss == "ipo" if self.per_token is None else self.per_token

    @property
    def objective(self) -> Callable:
        """``margin -> loss`` in effect."""
        if self.loss != "sigmoid":
            return OBJECTIVES[self.loss]
        return partial(sigmoid_preference, label_smoothing=self.label_smoothing, target_margin=self.target_margin)


PRESETS: dict[str, Preset[DPOConfig]] = {
    "toy": Preset(
        lambda: DPOConfig(
            **TOY_POLICY,
            toy=TOY_ERRANDS,
            data=PreferenceConfig(dataset=ERRANDS),
            judge="grpo_jax.tasks.errands:errand_reward",
            optimizer=OptimizerConfig(learning_rate=3e-4),
        ),
        "pairs of replies to errands with the toy model; minutes on one CPU",
        paper="DPO (arXiv 2305.18290) in the small",
        hardware="one CPU core",
    ),
}
