"""Scorer of completions: host-side rewards in worker processes, a reward model on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from jax.sharding import Mesh

from grpo_jax.models import Pretrained, from_pretrained
from grpo_jax.rewards.compose import RewardFn, Scores, score_with, weighted
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.rewards.reward_model_input import described_input, reward_model_reader
from grpo_jax.rewards.workers.pool import RewardError, RewardPool
from grpo_jax.sharding import param_shardings

HELD_OUT = "held-out accuracy"


class Scorer:
    """A context in which completions are scored: host-side rewards in a pool or here, a learned one on the mesh.

    Attributes:
        judge: the name of the part that is watched and not learnt from; None where there is none.
        weights: what each part that is learnt from counts.
        held_out: the reward that tells a right answer of held-out problems.
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
            if workers:
                self._pool = stack.enter_context(RewardPool(rewards, workers=workers, **pool))
                self._held_out_pool = stack.enter_context(RewardPool({HELD_OUT: held_out}, workers=workers, **pool))
                rewards, self.held_out = self._pool.rewards, self._held_out_pool.rewards[HELD_OUT]
            whole = dict(rewards) if learned is None else {**rewards, "reward_model": learned}
            self.score: Callable[..., Scores] = weighted(
                whole, weights, gates=gates, clip=clip, may_abstain=may_abstain
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def probe(self, columns: Mapping[str, Any], held_out_columns: Mapping[str, Any]) -> None:
        """Score an empty completion with all but a reward model, to find what cannot run before compute is spent.

        Args:
            columns: of a first problem, one value each.
            held_out_columns: of a first held-out one.

        Raises:
            ValueError: a reward raises, or returns what is no score.
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
        """What a sampler's ``on_tokens`` calls, so that a completion is scored while others are still being drawn.

        None where nothing runs beside the sampler.

        Args:
            prompts: ``[B]``, the text that each completion follows.
            columns: those of its problem.
            decode: from a completion's ids to its text.
            eos_ids, max_completion_length: when a completion is complete.
        """
        pool = self._pool
        if pool is None:
            return None
        drawn: dict[int, list[int]] = {}

        def on_tokens(row: int, ids: Sequence[int]) -> None:
            so_far = drawn.setdefault(row, [])
            so_far.extend(int(each) for each in ids)
            ended = bool(so_far) and so_far[-1] in eos_ids
            if ended or len(so_far) >= max_completion_length:
                own = {name: values[row] for name, values in columns.items()}
                lengths = {"completion_length": len(so_far), "truncated": not ended}
                pool.score_ahead(prompts[row], decode(drawn.pop(row)), own | lengths)

        return on_tokens

    def take_errors(self) -> list[RewardError]:
        """What could not be scored since the last call."""
        pools = [pool for pool in (self._pool, self._held_out_pool) if pool is not None]
        return [fault for pool in pools for fault in pool.take_errors()]


def check_reward_model(model: Pretrained, name: str) -> None:
    """Check that a model is one that gives a score for a text.

    Raises:
        ValueError: it has no scalar head, or no tokenizer.
    """
    if not model.config.scalar_head:
        raise ValueError(f"the reward model {name} is a language model: its head gives tokens, and no score for a text")
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
    """A reward model from a checkpoint, laid out on the mesh.

    It reads prompts in the format that it was trained on, whatever the policy's is; see ``reward_model_reader``.

    Args:
        name_or_folder: a Hugging Face id or local folder.
        mesh: that it is laid out on; None for one device.
        dtype: the precision it computes in.
        today: the date for its chat template where it was not trained with one; None is today.
        say: called with a line on what it reads.

    Raises:
        ValueError: it has no tokenizer or no scalar head; and as ``models.from_pretrained``.
    """
    shardings = None if mesh is None else partial(param_shardings, mesh=mesh)
    loaded = from_pretrained(name_or_folder, dtype=dtype, mesh=mesh, shardings=shardings)
    check_reward_model(loaded, name_or_folder)
    say(f"reward model: reads {described_input(loaded)}")
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return LearnedReward(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        encode=reward_model_reader(loaded, today=today),
        max_length=loaded.model.max_length or 4096,
        batch_size=parts * max(1, 32 // parts),
        mesh=mesh,
    )
