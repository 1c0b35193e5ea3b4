"""Settings of the rewards and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_jax.rewards.format import pattern_reward
from grpo_jax.rewards.language import language_share
from grpo_jax.rewards.plugin import read_weighted


@dataclass(frozen=True)
class RewardConfig:
    """What completions are paid for. A part with weight 0 is measured and not learnt from."""

    accuracy_weight: float = 1.0
    """Weight of the reward for a right final answer, or for a program that passes its tests."""
    format_weight: float = 0.0
    """Weight of the reward for <think>...</think><answer>...</answer>; at 0 it is only measured, where prompts ask for
    it."""
    format_pattern: str | None = None
    """A regular expression that the whole completion must match, instead of that format."""
    gate_on_format: bool = False
    """Count accuracy only where the format holds."""
    target_language: str | None = None
    """Language that thoughts are to be in, such as en or zh; measured where set."""
    language_weight: float = 0.0
    """Weight of the share of a thought's words that are in that language."""
    overlong_cache: int | None = None
    """Tokens before the longest completion over which a punishment grows from 0 to 1 (DAPO's soft overlong)."""
    repetition_weight: float = 0.0
    """Weight of the punishment for n-grams that stood in the completion before."""
    steps_weight: float = 0.0
    """Weight of the reward for a thought's equations that hold; with process supervision, of each step by itself."""
    reward: tuple[str, ...] = ()
    """Rewards of your own: module:function, or module:function=0.5 with a weight other than 1."""
    reward_model: str | None = None
    """Hugging Face id or folder of a reward model with a scalar head."""
    reward_model_weight: float = 1.0
    """Weight of its score."""
    judge: str | None = None
    """A reward that is watched and never learnt from, module:function: an alarm rises when it falls as the reward
    rises. Default: the reward model at weight 0, or else accuracy at weight 0, where there is one."""
    clip_reward: tuple[float, float] | None = None
    """The least and the greatest sum of all."""
    reward_workers: int | None = None
    """Processes that score; 0 scores in this one, without deadline. Default: 0 for the built-in sums without rewards of
    your own, one more than there are processors otherwise."""
    reward_deadline: float = 30.0
    """Seconds for one completion and one reward."""
    reward_batch_deadline: float = 300.0
    """Seconds for one call of a reward of your own with a whole batch, as it is called unless it is declared
    per_sample."""
    reward_memory: int = 4 << 30
    """Bytes of memory for each of those processes."""
    reward_abstain: Literal["skip", "absent"] = "skip"
    """What None from a reward of your own means. skip: the other rewards are summed, as in TRL; absent: the completion
    has no reward and is left out of the update."""

    def __post_init__(self):
        for text in self.reward:
            read_weighted(text)
        for name, least in (("reward_workers", 0), ("overlong_cache", 1), ("reward_memory", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("reward_deadline", "reward_batch_deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.language_weight and self.target_language is None:
            raise ValueError("language_weight is set, but no target_language")
        if self.target_language is not None:
            language_share("", self.target_language)  # an unknown one is found here
        if self.format_pattern is not None:
            pattern_reward([], [], pattern=self.format_pattern)

    @property
    def part_names(self) -> list[str]:
        """What completions are scored by: the names of the parts that ``open`` makes."""
        there = {
            "language": self.target_language is not None,
            "overlong": self.overlong_cache is not None,
            "repetition": bool(self.repetition_weight),
            "steps": bool(self.steps_weight),
            **{read_weighted(text)[0].rpartition(":")[2]: True for text in self.reward},
            "judge": self.judge is not None,
            "reward_model": self.reward_model is not None,
        }
        return ["accuracy", "format", *(name for name, is_there in there.items() if is_there)]
