"""The problems of a run, as its data settings name them: loaded, graded, held out, encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from grpo_jax.config.data import DataConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.notes import DataNotes
from grpo_jax.data.problems import OTHER_ANSWERS, Problem
from grpo_jax.data.prompts import Rendering
from grpo_jax.rewards.code.reward import code_reward
from grpo_jax.rewards.code.sandbox import SandboxLimits
from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.math.answer import answer_reward, same_text
from grpo_jax.rewards.math.any_answer import any_answer_reward
from grpo_jax.rewards.math.compare import same_answers
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.tasks.dataset import load_problems
from grpo_jax.tasks.errands import ERRANDS, MOST_ERRANDS, errand_problems, errand_reward, sample_errands
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
from grpo_jax.tasks.sums import sample_sums, sum_problems
from grpo_jax.tasks.toy_model import ToyConfig

GRADERS: dict[str, RewardFn] = {"exact": answer_reward, "math": math_reward}


def same_answers_of(data: DataConfig) -> Callable[[str, str], bool]:
    """Whether two answers are the same for a majority vote: as the grader compares them."""
    is_text = data.dataset in (None, ERRANDS) or data.dataset.startswith(REASONING_GYM)
    return same_text if is_text or data.grader not in ("auto", "math") else same_answers


def load_problem_sets(
    data: DataConfig, seed: int, notes: DataNotes | None = None
) -> tuple[list[Problem], list[Problem], RewardFn, RewardFn]:
    """Problems to train on, problems held out, and the reward that tells a right answer, for each of the two.

    No held-out problem has the prompt of one that is trained on, case and blanks aside.

    Args:
        seed: of generated problems.
        notes: filled in with skipped rows, duplicates, leaks and the held-out share.

    Raises:
        ValueError: no problem is left to hold out; and as ``load_problems`` and ``reasoning_gym_problems``.
    """
    notes = DataNotes() if notes is None else notes
    if data.dataset is None:
        problems, reward = (
            _sums(data, np.random.default_rng(seed), GENERATED_PROBLEMS, held_out=False),
            answer_reward,
        )
    else:
        problems, reward = _read(data, data.dataset, data.split, GENERATED_PROBLEMS, seed, notes)
        if not is_generated(data.dataset):
            notes.note_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
    source, split = data.eval_dataset or data.dataset, data.eval_split
    if source is not None and split is None:
        split = default_split(source, data.subset, but=data.split or "train" if source == data.dataset else None)
    if source is None:
        held_out, held_out_reward = _held_out_sums(data), reward
    elif source == data.dataset and split is None:
        rows = len(problems)
        problems, held_out = hold_out(problems, data.eval_size, key=key_of, source=source)
        held_out_reward = reward
        notes.note_division(rows, len(held_out), source)
    else:
        held_out, held_out_reward = _sample(data, source, split, notes)
        held_out = notes.without_leaks(held_out, map(key_of, held_out), map(key_of, problems))
    if not held_out:
        raise ValueError(
            f"every held-out problem of {source} is also trained on; name others with eval_dataset or eval_split"
        )
    return problems, held_out[: data.eval_size], reward, held_out_reward


def load_evaluation_problems(data: DataConfig, notes: DataNotes | None = None) -> tuple[list[Problem], RewardFn]:
    """The problems of an evaluation and their reward: those of the source of held-out problems, nothing left out.

    A data set with one split or file is evaluated on all of it, up to ``eval_size``; one with several on its
    ``eval_split``, or else ``split``, or else the one that training would hold out.

    Args:
        notes: filled in with skipped rows, duplicates and how many of the problems are evaluated.

    Raises:
        ValueError: as ``load``.
    """
    notes = DataNotes() if notes is None else notes
    source = data.eval_dataset or data.dataset
    if source is None:
        return _held_out_sums(data), answer_reward
    named = data.eval_split or (data.split if source == data.dataset else None)
    problems, reward = _sample(data, source, named or default_split(source, data.subset), notes)
    if not is_generated(source):
        notes.note_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
    return problems[: data.eval_size], reward


def _sample(data: DataConfig, source: str, split: str | None, notes: DataNotes) -> tuple[list[Problem], RewardFn]:
    """The problems of a split, shuffled where a part of them is taken: many are sorted by subject or level."""
    generated = 2 * (data.eval_size or DEFAULT_HELD_OUT)
    problems, reward = _read(data, source, split, generated, HELD_OUT_SEED, notes)
    evaluated = min(len(problems), data.eval_size or len(problems))
    if not is_generated(source):
        where = source if split is None else f"{source} ({split})"
        notes.counts |= {"evaluation_rows": len(problems), "evaluated": evaluated}
        notes.remarks.append(f"{evaluated} of {len(problems)} problems of {where} are for evaluation")
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
    """The problems as prompts of token ids; see ``EncodedProblems`` for what it raises."""
    return EncodedProblems(
        problems,
        tokenizer,
        max_prompt_length=max_prompt_length,
        pad_id=pad_id,
        overlong_prompts=data.overlong_prompts,
        first_index=first_index,
        **rendering,
    )


def _held_out_sums(data: DataConfig) -> list[Problem]:
    rng = np.random.default_rng(HELD_OUT_SEED)
    return _sums(data, rng, data.eval_size or DEFAULT_HELD_OUT, held_out=True)


def _sums(data: DataConfig, rng: np.random.Generator, count: int, *, held_out: bool) -> list[Problem]:
    recipe = ToyConfig()
    return sum_problems(
        sample_sums(rng, count, min_terms=recipe.min_terms, max_terms=recipe.max_terms, held_out=held_out)
    )


def _errands(data: DataConfig, rng: np.random.Generator, *, held_out: bool) -> list[Problem]:
    count = (data.eval_size or DEFAULT_HELD_OUT) if held_out else MOST_ERRANDS
    return errand_problems(sample_errands(rng, count, held_out=held_out))


def _read(
    data: DataConfig, source: str, split: str | None, size: int, seed: int, notes: DataNotes
) -> tuple[list[Problem], RewardFn]:
    if data.partial_credit and (source.startswith(REASONING_GYM) or source == ERRANDS):
        raise ValueError(f"partial_credit scores programs by their tests; {source} has none")
    if source.startswith(REASONING_GYM):
        return reasoning_gym_problems(source.removeprefix(REASONING_GYM), size=size, seed=seed)
    if source == ERRANDS:
        return _errands(data, np.random.default_rng(seed), held_out=split == "test"), errand_reward
    try:
        problems = load_problems(
            source,
            split=split,
            subset=data.subset,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            require_answer=data.grader not in ("none", "code"),
            skipped=notes.skipped if data.skip_bad_rows else None,
        )
    except KeyError as error:
        if "answer" not in str(error):
            raise
        raise KeyError(f"{error.args[0]}. Where a reward model judges, set grader to none") from None
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
