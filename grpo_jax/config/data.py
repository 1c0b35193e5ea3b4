"""Settings of the problems that completions are sampled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.prompts import Overlong
from grpo_jax.tasks.generated import TASKS
from grpo_jax.tasks.splits import DEFAULT_HELD_OUT


@dataclass(frozen=True)
class DataConfig(PromptConfig):
    """Training and held-out problems, and how they become prompts."""

    dataset: str | None = None
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of them, reasoning-gym:TASK, or a
    toy task: sums or errands."""
    subset: str | None = None
    """Configuration of a hub dataset or folder that has several."""
    split: str | None = None
    """Training split. Default: 'train' where there are splits."""
    eval_dataset: str | None = None
    """Source of held-out problems. Default: another split of the dataset, or a tenth of it where it has one split."""
    eval_split: str | None = None
    """Held-out split. Default: 'test' or else 'validation' where there are splits."""
    eval_size: int | None = DEFAULT_HELD_OUT
    """Largest number of held-out problems; None for all."""
    prompt_column: str | None = None
    """Column of the question, or a path such as extra_info.question. Default: found by its usual names."""
    answer_column: str | None = None
    """Column of the gold answer, or a path such as reward_model.ground_truth. Default: found by its usual names."""
    skip_bad_rows: bool = False
    """Leave out and count rows that cannot be read. By default the first such row is an error."""
    grader: Literal["auto", "exact", "math", "code", "none"] = "auto"
    """Accuracy reward. exact: numbers by value, other answers as text; math: mathematical equality; code: programs are
    run against the column tests. auto: code where there are tests, math otherwise; reasoning-gym and toy tasks bring
    their own. none: no accuracy, for a reward model or rewards of your own."""
    partial_credit: bool = False
    """Score a program by the share of tests that it passes."""
    program_seconds: float = 4.0
    """CPU seconds that a program may use for one test."""
    overlong_prompts: Overlong = "drop"
    """Prompts that are too long: drop (and count), truncate (to their last tokens), or error."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        if not self.program_seconds > 0:
            raise ValueError(f"program_seconds is {self.program_seconds}; it must be above 0")
        if self.grader == "none" and self.dataset in TASKS:
            raise ValueError(f"grader is none, but the problems of {self.dataset} have answers; name another dataset")
        if self.partial_credit and (self.dataset in TASKS or self.grader not in ("auto", "code")):
            raise ValueError("partial_credit scores programs by their tests; these problems have none")
        if self.eval_size is not None and self.eval_size < 1:
            raise ValueError(f"eval_size is {self.eval_size}; it must be at least 1")
