"""The parts of an experiment's configuration that experiments share, each with what it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grpo_jax import loss
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.errands import ERRANDS, MOST_ERRANDS, errand_problems, errand_reward, sample_errands
from grpo_jax.data.files import split_names
from grpo_jax.data.notes import DataNotes, prompt_key
from grpo_jax.data.prompts import Overlong, Rendering
from grpo_jax.data.reasoning_gym import reasoning_gym_problems
from grpo_jax.data.sources import OTHER_ANSWERS, Problem, load_problems
from grpo_jax.data.tasks import sample_sums, sum_problems
from grpo_jax.prompt_settings import PromptSettings
from grpo_jax.rewards.answer import answer_reward, gold_answer, same_text
from grpo_jax.rewards.any_answer import any_answer_reward
from grpo_jax.rewards.code import code_reward
from grpo_jax.rewards.code_tests import why_untestable
from grpo_jax.rewards.compose import RewardFn
from grpo_jax.rewards.math import math_reward, same_answers
from grpo_jax.rewards.read_math import read_answer
from grpo_jax.rewards.sandbox import Limits
from grpo_jax.sharding import make_mesh
from grpo_jax.small_base import Recipe
from grpo_jax.train import LossFn, make_optimizer, make_schedule
from grpo_jax.types import Batch, Mean, Metrics, Params

LOSSES = {
    "grpo": loss.grpo_loss,
    "ppo": loss.ppo_loss,
    "dapo": loss.dapo_loss,
    "dr_grpo": loss.dr_grpo_loss,
    "gspo": loss.gspo_loss,
    "cispo": loss.cispo_loss,
    "sapo": loss.sapo_loss,
}
GRADERS: dict[str, RewardFn] = {"exact": answer_reward, "math": math_reward}
KL = {"k1": loss.kl_k1, "k2": loss.kl_k2, "k3": loss.kl_k3}
LogProbs = Callable[[Params, Batch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]
REASONING_GYM = "reasoning-gym:"
GENERATED_PROBLEMS = 4096
DEFAULT_HELD_OUT = 256
HELD_OUT_SEED = 1_000_003
Row = TypeVar("Row")


@dataclass(frozen=True)
class MeshSettings:
    """How the devices are used."""

    data: int = -1
    """Copies of the model that share the batch; -1 takes the devices that the other axes leave."""
    fsdp: int = 1
    """Devices that parameters, optimizer state and batch are split over."""
    tensor: int = 1
    """Devices that heads and hidden units are split over."""

    def build(self) -> Mesh:
        """The mesh; see ``sharding.make_mesh`` for what it raises."""
        return make_mesh(data=self.data, fsdp=self.fsdp, tensor=self.tensor)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW behind clipping by the global norm."""

    learning_rate: float | None = None
    """Peak. Default: 1e-6 with --model, 2.5e-4 for the embedded base."""
    warmup_updates: int = 5
    """Updates over which the learning rate rises."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """What it does after that: stay, or fall to 0 at the end of the run."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""

    def __post_init__(self):
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be above 0")
        for name in ("warmup_updates", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")

    def described(self, default_learning_rate: float) -> str:
        """The settings in effect in a few words, for a run's first lines."""
        rate = default_learning_rate if self.learning_rate is None else self.learning_rate
        return f"AdamW, learning rate {rate:g}, {self.decay} after {self.warmup_updates} updates of warm-up"

    def build(
        self, *, total_updates: int, default_learning_rate: float
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer, and its learning rate by update; see ``train.make_schedule`` for what it raises.

        A constant learning rate is the same function of the update for every ``total_updates``, warm-up included. In
        one that decays, a warm-up that would be longer than the run is as long as it.
        """
        is_constant = self.decay == "constant"
        schedule = make_schedule(
            default_learning_rate if self.learning_rate is None else self.learning_rate,
            warmup_steps=self.warmup_updates if is_constant else min(self.warmup_updates, total_updates),
            total_steps=max(self.warmup_updates, total_updates) if is_constant else total_updates,
            decay=self.decay,
        )
        return make_optimizer(
            schedule, max_grad_norm=self.max_grad_norm, weight_decay=self.weight_decay, b1=self.b1, b2=self.b2
        ), schedule


@dataclass(frozen=True)
class PolicyLossSettings:
    """A named policy loss, and what is added to it."""

    loss: Literal[tuple(LOSSES)] = "grpo"  # pyright: ignore[reportInvalidTypeForm]
    """The policy loss."""
    epsilon_low: float | None = None
    """How far the ratio counts below 1; by default the loss's own."""
    epsilon_high: float | None = None
    """How far above 1; by default the loss's own."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    importance_cap: float | None = None
    """Cap of the weights that correct for a sampler that is not quite the policy; None for no correction."""
    kl_coef: float = 0.0
    """Weight in the loss of the KL to the reference policy. (TRL: beta.)"""
    kl: Literal[tuple(KL)] = "k3"  # pyright: ignore[reportInvalidTypeForm]
    """Estimator of the KL in the loss."""
    kl_correction: bool = False
    """Weight the KL in the loss by the importance ratio, which makes its gradient that of the KL."""

    def __post_init__(self):
        for name in ("epsilon_low", "epsilon_high", "kl_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap is {self.importance_cap}; it bounds a weight and must be above 0")
        if self.kl == "k1" and self.kl_coef and not self.kl_correction:
            raise ValueError(
                "kl is k1 and kl_coef is not 0: as a loss, k1's gradient knows nothing of the reference; use k2 or k3, "
                "set kl_correction, or put it in the reward with kl_reward_coef"
            )
        if self.kl_correction and not self.kl_coef:
            raise ValueError("kl_correction is set, but kl_coef is 0, so there is no KL in the loss")

    def build(self, log_probs: LogProbs, *, max_completion_length: int, sampler_alters_policy: bool) -> LossFn:
        """The loss of a batch, as ``train.make_train_step`` takes it.

        Args:
            log_probs: ``(params, batch) -> (log-probabilities, entropy)``, such as ``train.completion_log_probs`` of a
                model.
            max_completion_length: what Dr.GRPO divides by.
            sampler_alters_policy: whether what is drawn from is not the policy itself, such as where tokens are
                removed. The sampler's log-probabilities then differ from the policy's by design, and are compared only
                where importance_cap corrects for it.
        """
        policy_loss = LOSSES[self.loss]
        if self.loss == "dr_grpo":
            policy_loss = partial(policy_loss, max_completion_length=max_completion_length)
        epsilons = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high}
        policy_loss = partial(policy_loss, **{name: value for name, value in epsilons.items() if value is not None})
        compare = self.importance_cap is not None or not sampler_alters_policy

        def loss_fn(params: Params, batch: Batch) -> tuple[Mean, Metrics]:
            new_log_probs, entropy = log_probs(params, batch)
            return policy_loss(
                new_log_probs,
                batch.advantages,
                batch.loss_mask,
                old_log_probs=batch.old_log_probs,
                ref_log_probs=batch.ref_log_probs,
                rollout_log_probs=batch.rollout_log_probs if compare else None,
                entropy=entropy,
                kl=KL[self.kl],
                kl_coef=self.kl_coef,
                kl_correction=self.kl_correction,
                entropy_coef=self.entropy_coef,
                importance_cap=self.importance_cap,
            )

        return loss_fn


@dataclass(frozen=True)
class DataSettings(PromptSettings):
    """Problems to train on, problems held out, and how they become prompts."""

    dataset: str | None = None
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of them, or reasoning-gym:TASK.
    Default: built-in sums."""
    subset: str | None = None
    """Configuration of a hub dataset or folder, where it has several."""
    split: str | None = None
    """Split to train on; by default 'train' where there are splits."""
    eval_dataset: str | None = None
    """Where held-out problems come from. Default: the dataset's own split, or a tenth of it where it has one split, or
    the built-in sums that are held out."""
    eval_split: str | None = None
    """Their split; by default 'test' where there are splits, or else 'validation'."""
    eval_problems: int | None = DEFAULT_HELD_OUT
    """How many of them at most; None for all."""
    prompt_column: str | None = None
    """Column with the question, or a path such as extra_info.question; found by itself where it has a usual name."""
    answer_column: str | None = None
    """Column with the gold answer, or a path such as reward_model.ground_truth; likewise."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them; otherwise the first one is an error."""
    grader: Literal["auto", "exact", "math", "code", "none"] = "auto"
    """What tells a right answer: exact (numbers by value, other texts as they stand), math (mathematics that is equal),
    code (programs, by the column tests). auto: code where there are tests, math elsewhere, exact for the built-in sums;
    a task of reasoning-gym brings its own. none: nothing is right or wrong, and a reward model or rewards of your own
    judge; prompts need no answers then."""
    partial_credit: bool = False
    """Score programs by the share of tests they pass."""
    program_seconds: float = 4.0
    """Processor time that a program may take for a test."""
    overlong_prompts: Overlong = "drop"
    """What happens to prompts that are too long: left out and counted, cut to their last tokens, or an error."""

    def __post_init__(self):
        PromptSettings.__post_init__(self)
        if not self.program_seconds > 0:
            raise ValueError(f"program_seconds is {self.program_seconds}; it must be above 0")
        if self.grader == "none" and (self.dataset is None or self.dataset == ERRANDS):
            raise ValueError("grader is none, and the built-in problems have answers; name a dataset")
        if self.partial_credit and (self.dataset is None or self.grader not in ("auto", "code")):
            raise ValueError("partial_credit scores programs by their tests; these problems have none")
        if self.eval_problems is not None and self.eval_problems < 1:
            raise ValueError(f"eval_problems is {self.eval_problems}; at least 1 is held out")

    @property
    def same(self) -> Callable[[str, str], bool]:
        """Whether two answers are the same for a majority vote: as the grader compares them."""
        is_text = self.dataset in (None, ERRANDS) or self.dataset.startswith(REASONING_GYM)
        return same_text if is_text or self.grader not in ("auto", "math") else same_answers

    def load(
        self, seed: int, notes: DataNotes | None = None
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
        if self.dataset is None:
            problems, reward = (
                self._sums(np.random.default_rng(seed), GENERATED_PROBLEMS, held_out=False),
                answer_reward,
            )
        else:
            problems, reward = self._read(self.dataset, self.split, GENERATED_PROBLEMS, seed, notes)
            if not is_generated(self.dataset):
                notes.note_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
        source, split = self.eval_dataset or self.dataset, self.eval_split
        if source is not None and split is None:
            split = default_split(source, self.subset, but=self.split or "train" if source == self.dataset else None)
        if source is None:
            held_out, held_out_reward = self._held_out_sums(), reward
        elif source == self.dataset and split is None:
            rows = len(problems)
            problems, held_out = hold_out(problems, self.eval_problems, key=key_of, source=source)
            held_out_reward = reward
            notes.note_division(rows, len(held_out), source)
        else:
            held_out, held_out_reward = self._sample(source, split, notes)
            held_out = notes.without_leaks(held_out, map(key_of, held_out), map(key_of, problems))
        if not held_out:
            raise ValueError(
                f"every held-out problem of {source} is also trained on; name others with eval_dataset or eval_split"
            )
        return problems, held_out[: self.eval_problems], reward, held_out_reward

    def load_for_evaluation(self, notes: DataNotes | None = None) -> tuple[list[Problem], RewardFn]:
        """The problems of an evaluation and their reward: those of the source of held-out problems, nothing left out.

        A data set with one split or file is evaluated on all of it, up to ``eval_problems``; one with several on its
        ``eval_split``, or else ``split``, or else the one that training would hold out.

        Args:
            notes: filled in with skipped rows, duplicates and how many of the problems are evaluated.

        Raises:
            ValueError: as ``load``.
        """
        notes = DataNotes() if notes is None else notes
        source = self.eval_dataset or self.dataset
        if source is None:
            return self._held_out_sums(), answer_reward
        named = self.eval_split or (self.split if source == self.dataset else None)
        problems, reward = self._sample(source, named or default_split(source, self.subset), notes)
        if not is_generated(source):
            notes.note_duplicates([*map(key_of, problems)], [problem.answer for problem in problems])
        return problems[: self.eval_problems], reward

    def _sample(self, source: str, split: str | None, notes: DataNotes) -> tuple[list[Problem], RewardFn]:
        """The problems of a split, shuffled where a part of them is taken: many are sorted by subject or level."""
        generated = 2 * (self.eval_problems or DEFAULT_HELD_OUT)
        problems, reward = self._read(source, split, generated, HELD_OUT_SEED, notes)
        evaluated = min(len(problems), self.eval_problems or len(problems))
        if not is_generated(source):
            where = source if split is None else f"{source} ({split})"
            notes.counts |= {"evaluation_rows": len(problems), "evaluated": evaluated}
            notes.remarks.append(f"{evaluated} of {len(problems)} problems of {where} are for evaluation")
        if evaluated == len(problems):
            return problems, reward
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(problems))
        return [problems[i] for i in order], reward

    def encode(
        self,
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
            overlong_prompts=self.overlong_prompts,
            first_index=first_index,
            **rendering,
        )

    def _held_out_sums(self) -> list[Problem]:
        rng = np.random.default_rng(HELD_OUT_SEED)
        return self._sums(rng, self.eval_problems or DEFAULT_HELD_OUT, held_out=True)

    def _sums(self, rng: np.random.Generator, count: int, *, held_out: bool) -> list[Problem]:
        recipe = Recipe()
        return sum_problems(
            sample_sums(rng, count, min_terms=recipe.min_terms, max_terms=recipe.max_terms, held_out=held_out)
        )

    def _errands(self, rng: np.random.Generator, *, held_out: bool) -> list[Problem]:
        count = (self.eval_problems or DEFAULT_HELD_OUT) if held_out else MOST_ERRANDS
        return errand_problems(sample_errands(rng, count, held_out=held_out))

    def _read(
        self, source: str, split: str | None, size: int, seed: int, notes: DataNotes
    ) -> tuple[list[Problem], RewardFn]:
        if self.partial_credit and (source.startswith(REASONING_GYM) or source == ERRANDS):
            raise ValueError(f"partial_credit scores programs by their tests; {source} has none")
        if source.startswith(REASONING_GYM):
            return reasoning_gym_problems(source.removeprefix(REASONING_GYM), size=size, seed=seed)
        if source == ERRANDS:
            return self._errands(np.random.default_rng(seed), held_out=split == "test"), errand_reward
        try:
            problems = load_problems(
                source,
                split=split,
                subset=self.subset,
                prompt_column=self.prompt_column,
                answer_column=self.answer_column,
                require_answer=self.grader not in ("none", "code"),
                skipped=notes.skipped if self.skip_bad_rows else None,
            )
        except KeyError as error:
            if "answer" not in str(error):
                raise
            raise KeyError(f"{error.args[0]}. Where a reward model judges, set grader to none") from None
        if self.grader == "none":
            return problems, ungraded
        has_tests = "tests" in problems[0].columns
        grader = ("code" if has_tests else "math") if self.grader == "auto" else self.grader
        if grader == "code" and not has_tests:
            raise ValueError(
                f"{source} has no column tests, which the grader code needs; it has {[*problems[0].columns]}"
            )
        if grader != "code" and self.partial_credit:
            raise ValueError(f"partial_credit scores programs by their tests; {source} has none")
        check_gold(problems, grader, source)
        if grader == "code":
            limits = Limits(seconds=self.program_seconds, wall_seconds=3 * self.program_seconds)
            return problems, partial(code_reward, partial_credit=self.partial_credit, limits=limits)
        if any(OTHER_ANSWERS in problem.columns for problem in problems):
            return problems, partial(any_answer_reward, grader=GRADERS[grader])
        return problems, GRADERS[grader]


def ungraded(prompts: list[str], completions: list[str], **_columns: object) -> list[None]:
    """The reward of completions that nothing tells right from wrong: absent."""
    return [None] * len(completions)


def key_of(problem: Problem) -> str:
    """The key that tells problems apart; see ``notes.prompt_key``."""
    return prompt_key(problem.prompt)


def is_generated(source: str) -> bool:
    """Whether a data source is generated rather than read."""
    return source.startswith(REASONING_GYM) or source == ERRANDS


def default_split(source: str, subset: str | None, but: str | None = None) -> str | None:
    """The split of a source for evaluation, "test" or else "validation"; None where it has neither.

    Args:
        source: a file, a folder, a data set on the hub, or one that is generated.
        subset: of a folder or of a data set on the hub.
        but: a split that is used otherwise.
    """
    names = ["test"] if is_generated(source) else [name for name in split_names(source, subset) if name != but]
    return next((name for name in ("test", "validation") if name in names), None)


def hold_out(
    rows: list[Row], most: int | None, *, key: Callable[[Row], str], source: str
) -> tuple[list[Row], list[Row]]:
    """Divide rows into those that are trained on and a tenth that is held out; always the same one.

    Rows with one key stay together.

    Args:
        rows: all of them.
        most: rows that are held out at most; None for no other limit.
        key: what tells rows apart, such as their prompt.
        source: where they come from, for the error.

    Raises:
        ValueError: fewer than ten keys.
    """
    key_of_row = [*map(key, rows)]
    keys = list(dict.fromkeys(key_of_row))
    if len(keys) < 10:
        raise ValueError(
            f"{source} has {len(keys)} problems, too few to hold a tenth of them out; name others with "
            "eval_dataset or eval_split"
        )
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(keys))
    count = len(keys) // 10 if most is None else min(most, len(keys) // 10)
    chosen = {keys[n] for n in order[:count]}
    kept: list[Row] = []
    held_out: list[Row] = []
    for row, of_row in zip(rows, key_of_row, strict=True):
        (held_out if of_row in chosen else kept).append(row)
    return kept, held_out[:most]


def check_gold(problems: list[Problem], grader: str, source: str) -> None:
    """See whether what is right can be read, of the first hundred problems: of others no completion gets a score.

    Raises:
        ValueError: of more than half of them it cannot; with an example.
    """
    first = problems[:100]
    if grader == "code":
        unread = [problem.columns.get("tests") for problem in first if why_untestable(problem.columns.get("tests"))]
    elif grader == "math":
        gold = [problem.answer or "" for problem in first]
        unread = [each for each in gold if read_answer(gold_answer(each)) is None]
    else:
        unread = [problem.answer for problem in first if not (problem.answer or "").strip()]
    if 2 * len(unread) > len(first):
        raise ValueError(
            f"of the first {len(first)} problems of {source} the grader {grader} cannot read {len(unread)}, such as "
            f"{unread[0]!r:.200}; choose another grader or answer_column"
        )
