"""What a run pays for: the part of an experiment's configuration that says it, and the scoring it builds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.models import Pretrained, from_pretrained
from grpo_jax.reward_model_input import described_input, reward_model_reader
from grpo_jax.rewards.compose import RewardFn, Scores, score_with, weighted
from grpo_jax.rewards.format import format_reward, pattern_reward
from grpo_jax.rewards.language import language_reward, language_share
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.rewards.length import soft_overlong_reward
from grpo_jax.rewards.plugin import import_reward, read_weighted
from grpo_jax.rewards.pool import Fault, RewardPool, default_workers
from grpo_jax.rewards.repetition import repetition_reward
from grpo_jax.rewards.steps import equation_steps_reward
from grpo_jax.sharding import param_shardings

HELD_OUT = "held-out accuracy"


@dataclass(frozen=True)
class RewardSettings:
    """What completions are paid for. A part with weight 0 is measured and not learnt from."""

    accuracy_weight: float = 1.0
    """Weight of the reward for a right final answer, or for a program that passes its tests."""
    format_weight: float = 0.0
    """Weight of the reward for <think>...</think><answer>...</answer>; at 0 it is only measured, where prompts ask for
    it."""
    format_pattern: str | None = None
    """A regular expression that the whole completion must match, instead of that format."""
    gate_on_format: bool = False
    """Count accuracy only where the format holds."""
    target_language: str | None = None
    """Language that thoughts are to be in, such as en or zh; measured where set."""
    language_weight: float = 0.0
    """Weight of the share of a thought's words that are in that language."""
    overlong_cache: int | None = None
    """Tokens before the longest completion over which a punishment grows from 0 to 1 (DAPO's soft overlong)."""
    repetition_weight: float = 0.0
    """Weight of the punishment for n-grams that stood in the completion before."""
    steps_weight: float = 0.0
    """Weight of the reward for a thought's equations that hold; with process supervision, of each step by itself."""
    reward: tuple[str, ...] = ()
    """Rewards of your own: module:function, or module:function=0.5 with a weight other than 1."""
    reward_model: str | None = None
    """Hugging Face id or folder of a reward model with a scalar head."""
    reward_model_weight: float = 1.0
    """Weight of its score."""
    judge: str | None = None
    """A reward that is watched and never learnt from, module:function: an alarm rises when it falls as the reward
    rises. Default: the reward model at weight 0, or else accuracy at weight 0, where there is one."""
    clip_reward: tuple[float, float] | None = None
    """The least and the greatest sum of all."""
    reward_workers: int | None = None
    """Processes that score; 0 scores in this one, without deadline. Default: 0 for the built-in sums without rewards of
    your own, one more than there are processors otherwise."""
    reward_deadline: float = 30.0
    """Seconds for one completion and one reward."""
    reward_batch_deadline: float = 300.0
    """Seconds for one call of a reward of your own with a whole batch, as it is called unless it is declared
    per_sample."""
    reward_memory: int = 4 << 30
    """Bytes of memory for each of those processes."""
    reward_abstain: Literal["skip", "absent"] = "skip"
    """What None from a reward of your own means. skip: the other rewards are summed, as in TRL; absent: the completion
    has no reward and is left out of the update."""

    def __post_init__(self):
        for text in self.reward:
            read_weighted(text)
        for name, least in (("reward_workers", 0), ("overlong_cache", 1), ("reward_memory", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("reward_deadline", "reward_batch_deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.language_weight and self.target_language is None:
            raise ValueError("language_weight is set, but no target_language")
        if self.target_language is not None:
            language_share("", self.target_language)  # an unknown one is found here
        if self.format_pattern is not None:
            pattern_reward([], [], pattern=self.format_pattern)

    @property
    def part_names(self) -> list[str]:
        """What completions are scored by: the names of the parts that ``open`` makes."""
        there = {
            "language": self.target_language is not None,
            "overlong": self.overlong_cache is not None,
            "repetition": bool(self.repetition_weight),
            "steps": bool(self.steps_weight),
            **{read_weighted(text)[0].rpartition(":")[2]: True for text in self.reward},
            "judge": self.judge is not None,
            "reward_model": self.reward_model is not None,
        }
        return ["accuracy", "format", *(name for name, is_there in there.items() if is_there)]

    def open(
        self,
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
    ) -> Scoring:
        """The rewards, ready to score.

        Args:
            accuracy: tells a right answer, of problems that are trained on.
            held_out_accuracy: the same, of held-out problems.
            max_completion_length: in tokens.
            needs_pool: whether accuracy may hang or fail, so that by default it runs in processes of its own.
            mesh: that a reward model is split over.
            dtype: the precision a reward model computes in.
            today: the date on which the run began, for the chat template of a reward model.
            show: called with each line that a reward in a process of its own prints.
            measures_format: whether the format is measured where it has no weight: not where prompts do not ask for it.

        Raises:
            ValueError: a reward cannot be imported or loaded, two have one name, or nothing has a weight.
        """
        rewards: dict[str, RewardFn] = {"accuracy": accuracy}
        weights = {"accuracy": self.accuracy_weight}
        pattern = self.format_pattern
        if measures_format or self.format_weight or self.gate_on_format or pattern is not None:
            rewards["format"] = format_reward if pattern is None else partial(pattern_reward, pattern=pattern)
            weights["format"] = self.format_weight
        if self.target_language is not None:
            rewards["language"] = partial(language_reward, target_language=self.target_language)
            weights["language"] = self.language_weight
        if self.overlong_cache is not None:
            rewards["overlong"] = partial(
                soft_overlong_reward, max_length=max_completion_length, cache=self.overlong_cache
            )
            weights["overlong"] = 1.0
        if self.repetition_weight:
            rewards["repetition"] = repetition_reward
            weights["repetition"] = self.repetition_weight
        if self.steps_weight:
            rewards["steps"] = equation_steps_reward
            weights["steps"] = self.steps_weight
        for name, weight in map(read_weighted, self.reward):
            short = name.rpartition(":")[2]
            if short in (*rewards, "format", "judge", "reward_model"):
                raise ValueError(f"two rewards are named {short!r}; name yours otherwise than {[*rewards, 'judge']}")
            rewards[short], weights[short] = import_reward(name), weight
        own = [name.rpartition(":")[2] for name, _ in map(read_weighted, self.reward)]
        judge = None
        if self.judge is not None:
            judge = "judge"
            rewards[judge], weights[judge] = import_reward(self.judge), 0.0
        elif self.reward_model is not None and not self.reward_model_weight:
            judge = "reward_model"
        elif not self.accuracy_weight:
            judge = "accuracy"
        learned = (
            None
            if self.reward_model is None
            else load_reward_model(self.reward_model, mesh=mesh, dtype=dtype, today=today, say=show)
        )
        own_code = bool(self.reward or self.judge or self.format_pattern)
        by_default = default_workers() if needs_pool or own_code else 0
        workers = by_default if self.reward_workers is None else self.reward_workers
        return Scoring(
            rewards,
            weights | ({} if learned is None else {"reward_model": self.reward_model_weight}),
            held_out_accuracy,
            learned=learned,
            judge=judge,
            gates={"accuracy": "format"} if self.gate_on_format else {},
            clip=self.clip_reward,
            workers=workers,
            may_abstain=own if self.reward_abstain == "skip" else (),
            pool={
                "deadline": self.reward_deadline,
                "batch_deadline": self.reward_batch_deadline,
                "memory_bytes": self.reward_memory,
                "show": show,
            },
        )


class Scoring:
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

    def __enter__(self) -> Scoring:
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

    def as_drawn(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        decode: Callable[[list[int]], str],
        *,
        eos_ids: Sequence[int],
        max_completion_length: int,
    ) -> Callable[[int, Sequence[int]], None] | None:
        """What a sampler's ``watch`` calls, so that a completion is scored while others are still being drawn.

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

        def watch(row: int, ids: Sequence[int]) -> None:
            so_far = drawn.setdefault(row, [])
            so_far.extend(int(each) for each in ids)
            ended = bool(so_far) and so_far[-1] in eos_ids
            if ended or len(so_far) >= max_completion_length:
                own = {name: values[row] for name, values in columns.items()}
                lengths = {"completion_length": len(so_far), "truncated": not ended}
                pool.ahead(prompts[row], decode(drawn.pop(row)), own | lengths)

        return watch

    def take_faults(self) -> list[Fault]:
        """What could not be scored since the last call."""
        pools = [pool for pool in (self._pool, self._held_out_pool) if pool is not None]
        return [fault for pool in pools for fault in pool.take_faults()]


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
