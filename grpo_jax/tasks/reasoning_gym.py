"""Tasks of reasoning-gym: generated problems with their verifiers."""

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
    """Generate problems of a reasoning-gym task, with a reward that calls the task's verifier.

    The reward is ``score_answer(answer, entry)`` for the answer that ``extract_answer`` finds in a completion. It is 0
    without an answer, and if the verifier raises: some do for answers that they cannot parse.

    Args:
        name: name of the task, such as ``chain_sum``.
        size: number of problems.
        seed: seed of the problems.
        config: settings of the task.

    Returns:
        The problems, with the generated entry as the column ``entry``, and the reward.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: the task is unknown (the message lists similar names) or rejects ``config``.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError('reasoning-gym is not installed: pip install "grpo_jax[tasks]"') from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5) or sorted(DATASETS)
        raise ValueError(f"reasoning-gym has no task {name!r}; similar names: {close}")
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"the task {name!r} rejects the settings {config}: {error}") from error

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
