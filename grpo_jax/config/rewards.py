"""Settings of the rewards and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from grpo_jax.rewards.format import pattern_reward
from grpo_jax.rewards.language import language_share
from grpo_jax.rewards.plugin import import_reward, parse_call, read_weighted, reward_name


@dataclass(frozen=True)
class RewardConfig:
    """Rewards and their weights. A reward with weight 0 is measured but not trained on."""

    accuracy_weight: float = 1.0
    """Weight of the reward for a right final answer, or for a program that passes its tests."""
    format_weight: float = 0.0
    """Weight of the reward for <think>...</think><answer>...</answer>. With weight 0 it is measured where prompts ask
    for this format."""
    format_pattern: str | None = None
    """Regular expression that the whole completion must match, instead of the default format."""
    gate_on_format: bool = False
    """Give the accuracy reward only to completions with the right format."""
    target_language: str | None = None
    """Language of the thoughts, such as en or zh, which is then measured. Default: not measured."""
    language_weight: float = 0.0
    """Weight of the fraction of a thought's words that are in the target language."""
    overlong_cache: int | None = None
    """DAPO's soft overlong penalty: it grows from 0 to 1 over this many tokens before max_completion_length."""
    repetition_weight: float = 0.0
    """Weight of the penalty for repeated n-grams."""
    steps_weight: float = 0.0
    """Weight of the reward for correct equations in a thought; with process supervision, given per step."""
    reward: tuple[str, ...] = ()
    """User-defined rewards, module:function, module:function(max_length=24), each with =WEIGHT after it (by default
    1)."""
    reward_model: str | None = None
    """Hugging Face id or folder of a reward model with a scalar head."""
    reward_model_weight: float = 1.0
    """Weight of the reward model's score."""
    judge: str | None = None
    """A reward that is only monitored, module:function: an alarm is raised if it falls while the reward rises. Default:
    the reward model if its weight is 0, else accuracy if its weight is 0."""
    clip_reward: tuple[float, float] | None = None
    """Range to which the sum of the rewards is clipped."""
    reward_workers: Annotated[int | None, tyro.conf.Suppress] = None
    """Worker processes that score; 0 scores in the main process, without deadlines. Default: 0 for toy tasks without
    user-defined rewards, otherwise the number of processors plus one."""
    reward_deadline: Annotated[float, tyro.conf.Suppress] = 30.0
    """Time limit in seconds for one completion and one reward."""
    reward_batch_deadline: Annotated[float, tyro.conf.Suppress] = 300.0
    """Time limit in seconds for one call of a user-defined reward, which gets the whole batch unless it is declared
    per_sample."""
    reward_memory: Annotated[int, tyro.conf.Suppress] = 4 << 30
    """Memory limit of each worker process in bytes."""
    reward_abstain: Literal["skip", "absent"] = "skip"
    """Meaning of None from a user-defined reward. skip: sum the other rewards, as in TRL; absent: the completion has no
    reward and is left out of the update."""

    def __post_init__(self):
        for text in self.reward:
            parse_call(read_weighted(text)[0], "reward")
        for name, least in (("reward_workers", 0), ("overlong_cache", 1), ("reward_memory", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("reward_deadline", "reward_batch_deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.language_weight and self.target_language is None:
            raise ValueError("language_weight needs target_language; set it, such as en")
        if self.target_language is not None:
            language_share("", self.target_language)  # raises if the language is unknown
        if self.format_pattern is not None:
            pattern_reward([], [], pattern=self.format_pattern)

    def check(self) -> None:
        """Import the user's rewards.

        Raises:
            ValueError: one does not exist, or does not take an argument that is given in parentheses.
        """
        for text in self.reward:
            import_reward(read_weighted(text)[0])
        if self.judge is not None:
            import_reward(self.judge)

    @property
    def part_names(self) -> list[str]:
        """Names of the parts that ``open_scorer`` may measure."""
        optional = {
            "language": self.target_language is not None,
            "overlong": self.overlong_cache is not None,
            "repetition": bool(self.repetition_weight),
            "steps": bool(self.steps_weight),
            **{reward_name(read_weighted(text)[0]): True for text in self.reward},
            "judge": self.judge is not None,
            "reward_model": self.reward_model is not None,
        }
        return ["accuracy", "format", *(name for name, is_set in optional.items() if is_set)]
