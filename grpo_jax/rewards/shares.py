"""Rewards of several processes: each scores a part of the completions, and all know all scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from grpo_jax.hosts import gather, interleaved, is_main, outcome, own_rows, portable
from grpo_jax.rewards.compose import Outputs, RewardFn, RewardOutput, score_with


def scored_here(count: int, is_split: bool) -> range:
    """The rows of a batch that this process scores with one reward.

    Args:
        count: rows of the batch.
        is_split: whether each process scores a part of them; otherwise the first one scores all.
    """
    return own_rows(count) if is_split else range(count if is_main() else 0)


def selected(
    rows: range, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Some rows of prompts, completions and columns.

    Args:
        rows: their numbers.
        prompts, completions: ``[B]`` texts.
        columns: ``[B]`` values each.
    """
    which = slice(rows.start, rows.stop, rows.step)
    return [*prompts[which]], [*completions[which]], {column: [*values[which]] for column, values in columns.items()}


def shared_out(name: str, reward: RewardFn, is_split: bool) -> RewardFn:
    """A reward that is computed once, not by each process, and known to all.

    Args:
        name: of the reward.
        reward: on the host.
        is_split: whether each process scores a part of the rows; otherwise the first one scores all.
    """
    if jax.process_count() == 1:
        return reward

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[RewardOutput]:
        rows = scored_here(len(completions), is_split)
        own = selected(rows, prompts, completions, columns)
        parts = _gathered(lambda: score_with(name, reward, *own) if rows else [], f"the reward {name}")
        return interleaved(parts) if is_split else parts[0]

    return score


def outputs_of_all(
    waits: Mapping[str, Callable[[], list[RewardOutput]]], is_split: Mapping[str, bool]
) -> dict[str, Outputs]:
    """The outputs of rewards for all rows, in one exchange; an error of a process is raised on all.

    Args:
        waits: gives this process's outputs by name of the reward.
        is_split: by name, as for ``scored_here``.
    """
    parts = _gathered(
        lambda: {name: Outputs.of(wait()) for name, wait in waits.items()}, f"the rewards {', '.join(waits)}"
    )
    return {
        name: Outputs.interleaved([part[name] for part in parts]) if is_split[name] else parts[0][name]
        for name in waits
    }


def _gathered(compute: Callable[[], Any], name: str) -> list[Any]:
    """The results of all processes; an error is raised on all, by the process where it was with its traceback."""
    if jax.process_count() == 1:
        return [compute()]
    own, error = outcome(compute)
    parts = gather((own, portable(error)), name, is_long=True)
    if error is not None:
        raise error
    for _, other in parts:
        if other is not None:
            raise other
    return [part for part, _ in parts]
