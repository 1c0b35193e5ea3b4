"""Scorer of completions: host-side rewards in worker processes, a reward model on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.hosts import gather, is_main, outcome, portable
from grpo_jax.rewards.calling import is_per_sample
from grpo_jax.rewards.compose import RewardFn, RewardOutput, Scores, score_with, weighted
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.rewards.reward_model_input import described_input, reward_model_reader
from grpo_jax.rewards.workers.pool import RewardError, RewardPool
from grpo_jax.sharding import param_shardings

HELD_OUT = "held-out accuracy"


class Scorer:
    """A context manager that scores completions: host-side rewards in worker processes, a reward model on the mesh.

    Args:
        rewards: host-side rewards by name.
        weights: weight of each part, ``reward_model`` included; parts with weight 0 are only recorded.
        held_out: the reward of held-out problems, 1 for a right answer.
        learned: the reward model, scored as the part ``reward_model``; None for none.
        judge: name of the part that is watched and not trained on; None for none.
        gates, clip, may_abstain: as in ``weighted``.
        workers: number of worker processes; 0 runs host-side rewards in this process.
        pool: further keyword arguments of ``RewardPool``.

    Attributes:
        judge: as given.
        weights: the nonzero weights.
        held_out: the reward of held-out problems, in worker processes if there are any.
        score: ``(prompts, completions, **columns) -> Scores``.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFn],
        weights: Mapping[str, float],
        held_out: RewardFn,
        *,
        learned: RewardFn | None,
        judge: str | None,
        gates: Mapping[str, str],
        clip: tuple[float, float] | None,
        workers: int,
        pool: Mapping[str, Any],
        may_abstain: Collection[str] = (),
    ):
        self.judge = judge
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.held_out = held_out
        with ExitStack() as stack:
            self._pool = self._held_out_pool = None
            is_split = {name: is_per_sample(reward) for name, reward in {**rewards, HELD_OUT: held_out}.items()}
            if workers:
                self._pool = stack.enter_context(RewardPool(rewards, workers=workers, **pool))
                self._held_out_pool = stack.enter_context(RewardPool({HELD_OUT: held_out}, workers=workers, **pool))
                rewards, self.held_out = self._pool.rewards, self._held_out_pool.rewards[HELD_OUT]
            rewards = {name: shared_out(name, reward, is_split[name]) for name, reward in rewards.items()}
            self.held_out = shared_out(HELD_OUT, self.held_out, is_split[HELD_OUT])
            parts = dict(rewards) if learned is None else {**rewards, "reward_model": learned}
            self.score: Callable[..., Scores] = weighted(
                parts, weights, gates=gates, clip=clip, may_abstain=may_abstain
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def probe(self, columns: Mapping[str, Any], held_out_columns: Mapping[str, Any]) -> None:
        """Score an empty completion, to find rewards that cannot run before compute is spent.

        With worker processes the reward model is left out.

        Args:
            columns: values of the first training problem by column.
            held_out_columns: values of the first held-out problem by column.

        Raises:
            ValueError: a reward raises or returns something other than a score.
        """
        columns = {**columns, "completion_length": 1, "truncated": False}
        if self._pool is not None and self._held_out_pool is not None:
            self._pool.probe("", "", columns)
            self._held_out_pool.probe("", "", held_out_columns)
        else:
            self.score([""], [""], **{name: [value] for name, value in columns.items()})
            score_with(HELD_OUT, self.held_out, [""], [""], {name: [value] for name, value in held_out_columns.items()})

    def streaming_scorer(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        decode: Callable[[list[int]], str],
        *,
        eos_ids: Sequence[int],
        max_completion_length: int,
    ) -> Callable[[int, Sequence[int]], None] | None:
        """A callback for a sampler's ``on_tokens`` that scores finished completions while others are being sampled.

        Args:
            prompts: ``[B]`` texts.
            columns: ``[B]`` values each, of the problems.
            decode: maps the token ids of a completion to its text.
            eos_ids: the tokens that end a completion.
            max_completion_length: the number of tokens at which a completion is cut off.

        Returns:
            ``(row, new token ids) -> None``; None without worker processes.
        """
        pool = self._pool
        if pool is None:
            return None
        sampled: dict[int, list[int]] = {}

        def on_tokens(row: int, ids: Sequence[int]) -> None:
            if row not in own_rows(len(prompts)):
                return
            completion_ids = sampled.setdefault(row, [])
            completion_ids.extend(map(int, ids))
            ended = bool(completion_ids) and completion_ids[-1] in eos_ids
            if ended or len(completion_ids) >= max_completion_length:
                values = {name: column[row] for name, column in columns.items()}
                values |= {"completion_length": len(completion_ids), "truncated": not ended}
                pool.score_ahead(prompts[row], decode(sampled.pop(row)), values)

        return on_tokens

    def take_errors(self) -> list[RewardError]:
        """The errors of worker processes since the last call, those of all hosts."""
        pools = [pool for pool in (self._pool, self._held_out_pool) if pool is not None]
        own = [error for pool in pools for error in pool.take_errors()]
        return [error for errors in gather(own, "the errors of rewards") for error in errors]


def own_rows(count: int) -> range:
    """The rows that this process scores of ``count``, in which the processes take turns."""
    return range(jax.process_index(), count, jax.process_count())


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
        count = len(completions)
        rows = own_rows(count) if is_split else range(count if is_main() else 0)
        own_prompts, own_completions = [prompts[i] for i in rows], [completions[i] for i in rows]
        own = {column: [values[i] for i in rows] for column, values in columns.items()}
        outputs, error = outcome(lambda: score_with(name, reward, own_prompts, own_completions, own) if rows else [])
        parts: list[Any] = gather((outputs, portable(error)), f"the reward {name}", is_long=True)
        if error is not None:
            raise error
        for _, other in parts:
            if other is not None:
                raise other
        if not is_split:
            return parts[0][0]
        turns = jax.process_count()
        return [parts[i % turns][0][i // turns] for i in range(count)]

    return score


def check_reward_model(model: models.Pretrained, name: str) -> None:
    """Check that a model can be used as a reward model.

    Args:
        model: the model with its tokenizer.
        name: Hugging Face id or folder, for errors.

    Raises:
        ValueError: it has no scalar head, or no tokenizer.
    """
    if not model.config.scalar_head:
        raise ValueError(f"the reward model {name} is a language model: it has no scalar head that scores a text")
    if model.tokenizer is None:
        raise ValueError(f"the reward model {name} has no tokenizer; its folder needs tokenizer.json")


def load_reward_model(
    name_or_folder: str,
    *,
    mesh: Mesh | None,
    dtype: Any,
    today: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> LearnedReward:
    """Load a reward model from a checkpoint onto the mesh.

    It reads prompts in the format of its own training (``reward_model_reader``), whatever the policy's format is.

    Args:
        name_or_folder: a Hugging Face id or local folder.
        mesh: the mesh over which parameters and batches are sharded; None for one device.
        dtype: the dtype of its computation.
        today: the date for its chat template if its format does not fix one; None means the current date.
        say: called with a line that describes its input.

    Raises:
        ValueError: it has no tokenizer or no scalar head, or ``models.from_pretrained`` cannot load it.
    """
    shardings = None if mesh is None else partial(param_shardings, mesh=mesh)
    loaded = models.from_pretrained(name_or_folder, dtype=dtype, mesh=mesh, shardings=shardings)
    check_reward_model(loaded, name_or_folder)
    say(f"reward model: reads {described_input(loaded)}")
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return LearnedReward(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        encode=reward_model_reader(loaded, today=today),
        max_length=loaded.model.max_length or 4096,
        batch_size=shards * max(1, 32 // shards),
        mesh=mesh,
    )
