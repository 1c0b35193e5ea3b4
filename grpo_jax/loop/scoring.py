"""The scorer of a run, built from its reward settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.config.rewards import RewardConfig
from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.format import format_reward, pattern_reward
from grpo_jax.rewards.language import language_reward
from grpo_jax.rewards.length import soft_overlong_reward
from grpo_jax.rewards.plugin import import_reward, read_weighted, reward_name
from grpo_jax.rewards.repetition import repetition_reward
from grpo_jax.rewards.scorer import Scorer, load_reward_model
from grpo_jax.rewards.steps import equation_steps_reward
from grpo_jax.rewards.workers.pool import default_workers


def open_scorer(
    config: RewardConfig,
    accuracy: RewardFn,
    held_out_accuracy: RewardFn,
    *,
    max_completion_length: int,
    needs_pool: bool,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    today: str | None = None,
    show: Callable[[str], None] = print,
    measures_format: bool = True,
) -> Scorer:
    """The scorer for ``config``.

    Args:
        config: rewards and weights.
        accuracy: accuracy reward of training problems.
        held_out_accuracy: accuracy reward of held-out problems.
        max_completion_length: in tokens.
        needs_pool: whether the accuracy reward may hang or crash, so that it runs in worker processes by default.
        mesh: mesh over which a reward model is sharded.
        dtype: computation dtype of a reward model.
        today: date on which the run was started, for the chat template of a reward model.
        show: called with each line that a reward prints in a worker process.
        measures_format: measure the format reward even if it has no weight.

    Raises:
        ValueError: a reward cannot be imported or loaded, two rewards have the same name, or no reward has a weight.
    """
    rewards: dict[str, RewardFn] = {"accuracy": accuracy}
    weights = {"accuracy": config.accuracy_weight}
    pattern = config.format_pattern
    if measures_format or config.format_weight or config.gate_on_format or pattern is not None:
        rewards["format"] = format_reward if pattern is None else partial(pattern_reward, pattern=pattern)
        weights["format"] = config.format_weight
    if config.target_language is not None:
        rewards["language"] = partial(language_reward, target_language=config.target_language)
        weights["language"] = config.language_weight
    if config.overlong_cache is not None:
        rewards["overlong"] = partial(
            soft_overlong_reward, max_length=max_completion_length, cache=config.overlong_cache
        )
        weights["overlong"] = 1.0
    if config.repetition_weight:
        rewards["repetition"] = repetition_reward
        weights["repetition"] = config.repetition_weight
    if config.steps_weight:
        rewards["steps"] = equation_steps_reward
        weights["steps"] = config.steps_weight
    for name, weight in map(read_weighted, config.reward):
        short = reward_name(name)
        if short in (*rewards, "format", "judge", "reward_model"):
            raise ValueError(
                f"two rewards are named {short!r}; rename yours, the names in use are {[*rewards, 'judge']}"
            )
        rewards[short], weights[short] = import_reward(name), weight
    user_rewards = [reward_name(name) for name, _ in map(read_weighted, config.reward)]
    judge = None
    if config.judge is not None:
        judge = "judge"
        rewards[judge], weights[judge] = import_reward(config.judge), 0.0
    elif config.reward_model is not None and not config.reward_model_weight:
        judge = "reward_model"
    elif not config.accuracy_weight:
        judge = "accuracy"
    learned = (
        None
        if config.reward_model is None
        else load_reward_model(config.reward_model, mesh=mesh, dtype=dtype, today=today, say=show)
    )
    runs_user_code = bool(config.reward or config.judge or config.format_pattern)
    default = default_workers() if needs_pool or runs_user_code else 0
    workers = default if config.reward_workers is None else config.reward_workers
    return Scorer(
        rewards,
        weights | ({} if learned is None else {"reward_model": config.reward_model_weight}),
        held_out_accuracy,
        learned=learned,
        judge=judge,
        gates={"accuracy": "format"} if config.gate_on_format else {},
        clip=config.clip_reward,
        workers=workers,
        may_abstain=user_rewards if config.reward_abstain == "skip" else (),
        pool={
            "deadline": config.reward_deadline,
            "batch_deadline": config.reward_batch_deadline,
            "memory_bytes": config.reward_memory,
            "show": show,
        },
    )
