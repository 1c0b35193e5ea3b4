"""Problems of reasoning-gym: generated tasks that bring their own verifiers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from grpo_jax.data.problems import Problem
from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.answer import extract_answer


def reasoning_gym_problems(
    name: str, *, size: int, seed: int, **config: Any
) -> tuple[list[Problem], Callable[..., list[float]]]:
    """``size`` problems of the task ``name``, and the reward that asks the task's own verifier.

    Each problem has the generated entry as the column ``entry``; its answer is the entry's, None where that has none.
    The reward calls ``score_answer(answer, entry)`` on what ``extract_answer`` finds in a completion. A completion
    without an answer scores 0, and so does an answer on which the verifier raises: some take only what they can parse.

    Args:
        name: such as ``chain_sum``.
        size: how many problems.
        seed: the problems follow from it and ``config`` alone.
        config: the task's own settings.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such task (the error lists names that are close); the task refuses ``config``.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError('reasoning-gym is not installed: pip install "grpo_jax[tasks]"') from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name!r}; close to it: {close}")
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"the task {name!r} refuses its settings {config}: {error}") from error

    def score(prompt: str, completion: str, entry: dict[str, Any]) -> float:
        answer = extract_answer(completion, prompt)
        if answer is None:
            return 0.0
        try:
            return float(dataset.score_answer(answer, entry))
        except Exception:
            return 0.0

    @per_sample(columns=("entry",))
    def reasoning_gym_reward(
        prompts: list[str], completions: list[str], *, entry: list[dict[str, Any]], **_columns: list[Any]
    ) -> list[float]:
        prompts = prompts or [""] * len(completions)
        return [score(*row) for row in zip(prompts, completions, entry, strict=True)]

    return [Problem(entry["question"], entry["answer"], {"entry": entry}) for entry in dataset], reasoning_gym_reward
