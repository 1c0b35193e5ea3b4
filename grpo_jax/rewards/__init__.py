"""Rewards: functions from prompts and completions to scores, their weighted sum, and worker processes to run them in.

The names in ``LATE`` are imported on first use: reward models need jax, which worker processes do not import, and
worker processes need a POSIX system.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo_jax.rewards.calling import per_sample as per_sample
from grpo_jax.rewards.code.reward import code_reward as code_reward
from grpo_jax.rewards.code.sandbox import Sandbox as Sandbox
from grpo_jax.rewards.code.sandbox import SandboxLimits as SandboxLimits
from grpo_jax.rewards.compose import RewardFn as RewardFn
from grpo_jax.rewards.compose import RewardOutput as RewardOutput
from grpo_jax.rewards.compose import Scores as Scores
from grpo_jax.rewards.compose import weighted as weighted
from grpo_jax.rewards.format import format_reward as format_reward
from grpo_jax.rewards.format import pattern_reward as pattern_reward
from grpo_jax.rewards.language import language_reward as language_reward
from grpo_jax.rewards.length import cosine_length_reward as cosine_length_reward
from grpo_jax.rewards.length import soft_overlong_reward as soft_overlong_reward
from grpo_jax.rewards.math.answer import answer_reward as answer_reward
from grpo_jax.rewards.math.answer import extract_answer as extract_answer
from grpo_jax.rewards.math.compare import same_answer as same_answer
from grpo_jax.rewards.math.reward import math_reward as math_reward
from grpo_jax.rewards.math.reward import question_contains_answer as question_contains_answer
from grpo_jax.rewards.repetition import repetition_reward as repetition_reward
from grpo_jax.rewards.steps import equation_steps_reward as equation_steps_reward

if TYPE_CHECKING:
    from grpo_jax.rewards.learned import LearnedReward as LearnedReward
    from grpo_jax.rewards.workers.pool import RewardError as RewardError
    from grpo_jax.rewards.workers.pool import RewardPool as RewardPool

LATE = {"LearnedReward": "learned", "RewardError": "workers.pool", "RewardPool": "workers.pool"}


def __getattr__(name: str) -> Any:
    if name in LATE:
        return getattr(import_module(f"grpo_jax.rewards.{LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LATE})
