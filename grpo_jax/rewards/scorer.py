"""Scorer of completions: host-side rewards in worker processes, a reward model on the mesh."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.hosts import gather, own_rows
from grpo_jax.rewards.calling import is_per_sample
from grpo_jax.rewards.compose import Outputs, RewardFn, RewardOutput, Scores, combined, score_with, weighted
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.rewards.reward_model_input import described_input, reward_model_reader
from grpo_jax.rewards.shares import outputs_of_all, scored_here, selected, shared_out
from grpo_jax.rewards.workers.pool import RewardError, RewardPool
from grpo_jax.sharding import num_row_shards, param_shardings

HELD_OUT = "held-out accuracy"
_TURN = threading.Lock()
"""Held while a reward is called in this process, for all tasks: a reward need not be safe for threads."""


class Scoring:
    """Scores that are being computed in the background.

    Args:
        futures: of the parts that are computed there.
        finish: waits for them and returns the scores; may use the devices and other processes.
    """

    def __init__(self, futures: Sequence[Future[Any]], finish: Callable[[], Scores]):
        self.futures = futures
        self._finish, self._started = finish, time.monotonic()
        self._done = [self._started]
        for future in futures:
            future.add_done_callback(lambda _: self._done.append(time.monotonic()))

    def result(self) -> Scores:
        """The scores, waited for; to be called once, on all processes in the same order.

        Raises:
            ValueError: as ``Scorer.score``.
        """
        return self._finish()

    @property
    def seconds(self) -> float:
        """Seconds from the start until the last part in the background was there."""
        return max(self._done) - self._started


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
            self._host_rewards, self._learned, self._is_split = dict(rewards), learned, is_split
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="scores")
            stack.callback(self._thread.shutdown, wait=False, cancel_futures=True)
            if workers:
                self._pool = stack.enter_context(RewardPool(rewards, workers=workers, **pool))
                self._held_out_pool = stack.enter_context(RewardPool({HELD_OUT: held_out}, workers=workers, **pool))
                rewards, self.held_out = self._pool.rewards, self._held_out_pool.rewards[HELD_OUT]
            else:
                self.held_out = in_turn(HELD_OUT, held_out)
            self.held_out = shared_out(HELD_OUT, self.held_out, is_split[HELD_OUT])
            parts = dict(rewards) if learned is None else {**rewards, "reward_model": learned}
            rules: dict[str, Any] = {"gates": gates, "clip": clip, "may_abstain": may_abstain}
            self._score = weighted(parts, weights, **rules, score_all=self._score_all)
            self._combined = partial(combined, weights=weights, **rules)
            self._stack = stack.pop_all()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def score(self, prompts: Sequence[str], completions: Sequence[str], **columns: list[Any]) -> Scores:
        """The rewards of completions.

        Args:
            prompts, completions: ``[B]`` texts.
            columns: ``[B]`` values each.

        Raises:
            ValueError: as the function that ``weighted`` returns.
        """
        with _TURN:
            scores = self._score(prompts, completions, **columns)
        self._drop_ahead()
        return scores

    def start(self, prompts: Sequence[str], completions: Sequence[str], **columns: list[Any]) -> Scoring:
        """Start to score completions in the background: host-side rewards in worker processes or in a thread.

        A reward model computes on the devices, in ``Scoring.result``. There, too, several processes exchange the scores
        of their rows: only the thread that dispatches programs keeps an order that is the same on all of them.

        Args:
            prompts, completions, columns: as for ``score``.
        """
        futures: list[Future[Any]] = []
        waits: dict[str, Callable[[], list[RewardOutput]]] = {}
        for name in self._host_rewards:
            futures_of_reward, waits[name] = self._start_reward(name, prompts, completions, columns)
            futures += futures_of_reward
        self._drop_ahead()

        def finish() -> Scores:
            graded = outputs_of_all(waits, self._is_split) | self._learned_outputs(prompts, completions, columns)
            return self._combined(graded, count=len(completions))

        return Scoring(futures, finish)

    def _score_all(
        self,
        rewards: Mapping[str, RewardFn],
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[str, Outputs]:
        """The outputs of all rewards, of which each process computes those of its rows."""

        def score(name: str) -> list[RewardOutput]:
            rows = scored_here(len(completions), self._is_split[name])
            return score_with(name, rewards[name], *selected(rows, prompts, completions, columns)) if rows else []

        graded = outputs_of_all({name: partial(score, name) for name in self._host_rewards}, self._is_split)
        return graded | self._learned_outputs(prompts, completions, columns)

    def _learned_outputs(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Outputs]:
        """The scores of the reward model, which all processes compute together; nothing without one."""
        if self._learned is None:
            return {}
        rows = range(len(completions))
        return {
            "reward_model": Outputs.of(
                score_with("reward_model", self._learned, *selected(rows, prompts, completions, columns))
            )
        }

    def _start_reward(
        self, name: str, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, list[Any]]
    ) -> tuple[Sequence[Future[Any]], Callable[[], list[RewardOutput]]]:
        pool, rows = self._pool, scored_here(len(completions), self._is_split[name])
        own = selected(rows, prompts, completions, columns)
        if pool is not None:
            jobs = pool.start(name, *own)
            futures, wait = [job.future for job in jobs], partial(pool.result, jobs)
        else:
            future = self._thread.submit(self._score_in_turn, name, *own) if rows else None
            futures = [] if future is None else [future]
            wait = (lambda: []) if future is None else future.result
        return futures, wait

    def _drop_ahead(self) -> None:
        """Scores of the streaming scorer that the batch has not taken, such as those of an interrupted step."""
        if self._pool is not None:
            self._pool.drop_ahead()

    def _score_in_turn(
        self, name: str, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[RewardOutput]:
        with _TURN:
            return score_with(name, self._host_rewards[name], prompts, completions, columns)

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
        return [error for errors in gather(self.take_own_errors(), "the errors of rewards") for error in errors]

    def take_own_errors(self) -> list[RewardError]:
        """The errors of this host's worker processes since the last call."""
        pools = [pool for pool in (self._pool, self._held_out_pool) if pool is not None]
        return [error for pool in pools for error in pool.take_errors()]


def in_turn(name: str, reward: RewardFn) -> RewardFn:
    """A reward that is not called while another one is.

    Args:
        name: of the reward.
        reward: on the host.
    """

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[RewardOutput]:
        with _TURN:
            return score_with(name, reward, prompts, completions, columns)

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
    shards = num_row_shards(mesh)
    return LearnedReward(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        encode=reward_model_reader(loaded, today=today),
        max_length=loaded.model.max_length or 4096,
        batch_size=shards * max(1, 32 // shards),
        mesh=mesh,
    )
