"""Settings of the problems that completions are sampled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.prompts import Overlong
from grpo_jax.tasks.errands import ERRANDS
from grpo_jax.tasks.splits import (
    DEFAULT_HELD_OUT,
)


@dataclass(frozen=True)
class DataConfig(PromptConfig):
    """Problems to train on, problems held out, and how they become prompts."""

    dataset: str | None = None
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of them, or reasoning-gym:TASK.
    Default: built-in sums."""
    subset: str | None = None
    """Configuration of a hub dataset or folder, where it has several."""
    split: str | None = None
    """Split to train on; by default 'train' where there are splits."""
    eval_dataset: str | None = None
    """Where held-out problems come from. Default: the dataset's own split, or a tenth of it where it has one split, or
    the built-in sums that are held out."""
    eval_split: str | None = None
    """Their split; by default 'test' where there are splits, or else 'validation'."""
    eval_size: int | None = DEFAULT_HELD_OUT
    """How many of them at most; None for all."""
    prompt_column: str | None = None
    """Column with the question, or a path such as extra_info.question; found by itself where it has a usual name."""
    answer_column: str | None = None
    """Column with the gold answer, or a path such as reward_model.ground_truth; likewise."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them; otherwise the first one is an error."""
    grader: Literal["auto", "exact", "math", "code", "none"] = "auto"
    """What tells a right answer: exact (numbers by value, other texts as they stand), math (mathematics that is equal),
    code (programs, by the column tests). auto: code where there are tests, math elsewhere, exact for the built-in sums;
    a task of reasoning-gym brings its own. none: nothing is right or wrong, and a reward model or rewards of your own
    judge; prompts need no answers then."""
    partial_credit: bool = False
    """Score programs by the share of tests they pass."""
    program_seconds: float = 4.0
    """Processor time that a program may take for a test."""
    overlong_prompts: Overlong = "drop"
    """What happens to prompts that are too long: left out and counted, cut to their last tokens, or an error."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        if not self.program_seconds > 0:
            raise ValueError(f"program_seconds is {self.program_seconds}; it must be above 0")
        if self.grader == "none" and (self.dataset is None or self.dataset == ERRANDS):
            raise ValueError("grader is none, and the built-in problems have answers; name a dataset")
        if self.partial_credit and (self.dataset is None or self.grader not in ("auto", "code")):
            raise ValueError("partial_credit scores programs by their tests; these problems have none")
        if self.eval_size is not None and self.eval_size < 1:
            raise ValueError(f"eval_size is {self.eval_size}; at least 1 is held out")
