"""Problems of a run and their graders: loaded, held out, encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from grpo_jax.config.data import DataConfig
from grpo_jax.config.offline import OfflineDataConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.problems import OTHER_ANSWERS, Problem
from grpo_jax.data.prompts import Rendering
from grpo_jax.data.statistics import DataStatistics
from grpo_jax.rewards.code.reward import code_reward
from grpo_jax.rewards.code.sandbox import SandboxLimits
from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.math.answer import answer_reward, same_text
from grpo_jax.rewards.math.any_answer import any_answer_reward
from grpo_jax.rewards.math.compare import same_answers
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.tasks.dataset import load_problems
from grpo_jax.tasks.generated import TASKS
from grpo_jax.tasks.reasoning_gym import reasoning_gym_problems
from grpo_jax.tasks.splits import (
    DEFAULT_HELD_OUT,
    GENERATED_PROBLEMS,
    HELD_OUT_SEED,
    REASONING_GYM,
    check_gold,
    default_split,
    hold_out,
    is_generated,
    key_of,
    ungraded,
)

GRADERS: dict[str, RewardFn] = {"exact": answer_reward, "math": math_reward}


def same_answers_of(data: DataConfig) -> Callable[[str, str], bool]:
    """Equality of two answers in a majority vote, by the rule of the grader."""
    is_text = is_generated(dataset_of(data)) or data.grader not in ("auto", "math")
    return same_text if is_text else same_answers


def dataset_of(data: DataConfig | OfflineDataConfig) -> str:
    """``data.dataset``.

    Raises:
        ValueError: no dataset is named.
    """
    if data.dataset is None:
        raise ValueError("dataset: no dataset is named; pass --dataset, or choose a preset that has one")
    return data.dataset


def load_problem_sets(
    data: DataConfig, seed: int, stats: DataStatistics | None = None
) -> tuple[list[Problem], list[Problem], RewardFn, RewardFn]:
    """Training problems, held-out problems, and the accuracy reward of each of the two.

    No held-out problem has the prompt of a training problem, ignoring case and white space.

    Args:
        data: sources and grader.
        seed: seed of generated problems.
        stats: receives skipped rows, duplicates, leaks and the held-out share.

    Raises:
        ValueError: no dataset is named, or every held-out problem is also trained on; and as ``load_problems`` and
            ``reasoning_gym_problems``.
    """
    stats = DataStatistics() if stats is None else stats
    dataset = dataset_of(data)
    problems, reward = _read(data, dataset, data.split, GENERATED_PROBLEMS, seed, stats)
    if not is_generated(dataset):
        stats.count_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
    source, split = data.eval_dataset or dataset, data.eval_split
    if split is None:
        split = default_split(source, data.subset, but=data.split or "train" if source == dataset else None)
    if source == dataset and split is None:
        rows = len(problems)
        problems, held_out = hold_out(problems, data.eval_size, key=key_of, source=source)
        held_out_reward = reward
        stats.count_held_out(rows, len(held_out), source)
    else:
        held_out, held_out_reward = _sample(data, source, split, stats)
        held_out = stats.drop_leaks(held_out, map(key_of, held_out), map(key_of, problems))
    if not held_out:
        raise ValueError(
            f"every held-out problem of {source} is also trained on; choose another eval_dataset or eval_split"
        )
    return problems, held_out[: data.eval_size], reward, held_out_reward


def load_evaluation_problems(data: DataConfig, stats: DataStatistics | None = None) -> tuple[list[Problem], RewardFn]:
    """The problems of an evaluation and their accuracy reward.

    A dataset with one split or file is evaluated on all of it, one with several on ``eval_split``, else ``split``, else
    the split that training would hold out; in either case up to ``eval_size`` problems.

    Args:
        data: sources and grader.
        stats: receives skipped rows, duplicates and the number of evaluated problems.

    Raises:
        ValueError: as ``load_problem_sets``.
    """
    stats = DataStatistics() if stats is None else stats
    source = data.eval_dataset or dataset_of(data)
    named = data.eval_split or (data.split if source == data.dataset else None)
    problems, reward = _sample(data, source, named or default_split(source, data.subset), stats)
    if not is_generated(source):
        stats.count_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
    return problems[: data.eval_size], reward


def _sample(data: DataConfig, source: str, split: str | None, stats: DataStatistics) -> tuple[list[Problem], RewardFn]:
    """The problems of a split; shuffled if only a part is used, as many datasets are sorted by subject or level."""
    generated = 2 * (data.eval_size or DEFAULT_HELD_OUT)
    problems, reward = _read(data, source, split, generated, HELD_OUT_SEED, stats)
    evaluated = min(len(problems), data.eval_size or len(problems))
    if not is_generated(source):
        where = source if split is None else f"{source} ({split})"
        stats.counts |= {"evaluation_rows": len(problems), "evaluated": evaluated}
        stats.remarks.append(f"{evaluated} of {len(problems)} problems of {where} are for evaluation")
    if evaluated == len(problems):
        return problems, reward
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(problems))
    return [problems[i] for i in order], reward


def encode_problems(
    data: DataConfig,
    problems: list[Problem],
    tokenizer: Any,
    *,
    pad_id: int,
    max_prompt_length: int,
    rendering: Rendering,
    first_index: int = 0,
) -> EncodedProblems:
    """The problems as token ids; errors as for ``EncodedProblems``.

    Args:
        data: settings, for ``overlong_prompts``.
        problems, tokenizer, pad_id, max_prompt_length, rendering, first_index: as for ``EncodedProblems``.
    """
    return EncodedProblems(
        problems,
        tokenizer,
        max_prompt_length=max_prompt_length,
        pad_id=pad_id,
        overlong_prompts=data.overlong_prompts,
        first_index=first_index,
        **rendering,
    )


def _read(
    data: DataConfig, source: str, split: str | None, size: int, seed: int, stats: DataStatistics
) -> tuple[list[Problem], RewardFn]:
    if data.partial_credit and is_generated(source):
        raise ValueError(f"partial_credit scores programs by their tests; {source} has none")
    if source.startswith(REASONING_GYM):
        return reasoning_gym_problems(source.removeprefix(REASONING_GYM), size=size, seed=seed)
    if source in TASKS:
        task, held_out = TASKS[source], split == "test"
        count = (data.eval_size or DEFAULT_HELD_OUT) if held_out else task.num_problems
        return task.sample(np.random.default_rng(seed), count, held_out), task.reward
    try:
        problems = load_problems(
            source,
            split=split,
            subset=data.subset,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            require_answer=data.grader not in ("none", "code"),
            skipped=stats.skipped if data.skip_bad_rows else None,
        )
    except KeyError as error:
        if "answer" not in str(error):
            raise
        raise KeyError(f"{error.args[0]}. With a reward model instead of answers, set grader to none") from None
    if data.grader == "none":
        return problems, ungraded
    has_tests = "tests" in problems[0].columns
    grader = ("code" if has_tests else "math") if data.grader == "auto" else data.grader
    if grader == "code" and not has_tests:
        raise ValueError(f"{source} has no column tests, which the grader code needs; it has {[*problems[0].columns]}")
    if grader != "code" and data.partial_credit:
        raise ValueError(f"partial_credit scores programs by their tests; {source} has none")
    check_gold(problems, grader, source)
    if grader == "code":
        limits = SandboxLimits(seconds=data.program_seconds, wall_seconds=3 * data.program_seconds)
        return problems, partial(code_reward, partial_credit=data.partial_credit, limits=limits)
    if any(OTHER_ANSWERS in problem.columns for problem in problems):
        return problems, partial(any_answer_reward, grader=GRADERS[grader])
    return problems, GRADERS[grader]
