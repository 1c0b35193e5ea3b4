"""What an experiment does that learns from its own completions: draw, grade, tell, evaluate. The update is its own."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax import evaluate, models
from grpo_jax.data.encoded import EncodedProblems, decode_completions, decode_one
from grpo_jax.data.errands import ERRANDS
from grpo_jax.data.iterator import ProblemIterator
from grpo_jax.data.prompts import R1_ZERO
from grpo_jax.data.sources import Problem, reward_columns
from grpo_jax.data.tasks import PLAIN
from grpo_jax.experiment import PolicySettings, RunSettings, at_least
from grpo_jax.monitor.alarms import Alarms, AlarmSettings
from grpo_jax.monitor.metrics import read_jsonl
from grpo_jax.monitor.rollouts import completion_metrics, reward_metrics
from grpo_jax.monitor.samples import Sample
from grpo_jax.monitor.signals import text_metrics
from grpo_jax.monitor.spot_checks import spot_checks
from grpo_jax.reward_settings import RewardSettings, Scoring
from grpo_jax.rewards.compose import Scores
from grpo_jax.run import Run, count_compilations
from grpo_jax.settings import DataSettings
from grpo_jax.sharding import ROLLOUT_RULES, bytes_on_devices, make_reshard, param_shardings, shard_rows
from grpo_jax.types import Params, Rollout

MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class RoundSettings(RunSettings, PolicySettings):
    """What is asked, drawn, paid for, watched and evaluated."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")] = DataSettings()
    """What is asked."""
    num_steps: int = 60
    """Rollouts with the updates that follow each."""
    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 16
    """Samples for each prompt."""
    rewards: Annotated[RewardSettings, tyro.conf.arg(name="")] = RewardSettings()
    """What is paid for."""
    alarms: AlarmSettings = AlarmSettings()
    """What is watched for."""
    eval_every: int = 10
    """Steps between evaluations; there is one before the first and one after the last. 0 for these two alone."""
    eval_samples: int | None = None
    """Samples for each held-out problem, from which pass@1 and the majority vote are taken. Default: 4 with --model,
    16 without."""
    samples_every: int = 10
    """Steps between tables of sample completions."""

    def __post_init__(self):
        RunSettings.__post_init__(self)
        PolicySettings.__post_init__(self)
        at_least(self, num_steps=1, num_prompts=1, group_size=1, eval_every=0, eval_samples=1, samples_every=1)
        embedded = self.data.dataset in (None, ERRANDS) and not (self.data.template or self.data.chat_template)
        if self.model is None and not embedded:
            raise ValueError(
                "the embedded base knows its own sums and errands only; with a dataset or template, name a model too"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy samples of a group are all alike and teach nothing")

    @property
    def num_eval_samples(self) -> int:
        """The samples of an evaluation in effect."""
        return self.eval_samples or (4 if self.model else 16)

    def micro_batches_of(self, rows: int) -> int:
        """The fewest equal parts of an update of so many rows that have few enough tokens each."""
        parts = self.mesh.build().shape
        devices = parts["data"] * parts["fsdp"]
        most = max(devices, devices * MICRO_BATCH_TOKENS // (self.prompt_length + self.completion_length))
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most and rows // n % devices == 0]
        return min(fitting, default=1)


MAY_CHANGE = ("cache_bytes", "samples_every", "eval_every", "alarms")
"""Settings that a resumed run may have other values of, besides those of every experiment."""


@dataclass
class Round:
    """What was drawn in a step, and what is known of it; B completions.

    Attributes:
        step: which.
        problems: what was asked, one for each group.
        texts: the prompt of each completion.
        columns: of its problem, and what its reward wants to know of itself.
        rollout: what was drawn.
        completions: the same as text.
        lengths: in tokens.
        started: when the step began, by ``time.monotonic``.
        times: what parts of it took, and the bytes that were moved.
    """

    step: int
    problems: list[Problem]
    texts: list[str]
    columns: dict[str, list[Any]]
    rollout: Rollout
    completions: list[str]
    lengths: np.ndarray
    started: float
    times: dict[str, float] = field(default_factory=dict)


class Rounds:
    """The problems of a run and what is done with them: iterated over, drawn for, graded, evaluated, told of.

    Its state, for a checkpoint, is ``position``; noise follows from the seed and the step.

    Attributes:
        start: where the model that is drawn from was loaded.
        policy: that model, without its parameters.
        params: those it starts with, until they are taken.
        scoring: what grades.

    Raises:
        ValueError: on construction, for whatever cannot run; before a model is loaded where it can be known.
    """

    def __init__(self, config: RoundSettings, run: Run, mesh: Mesh):
        self._config, self._run, self._mesh = config, run, mesh
        self._compilations = count_compilations()
        problems, held_out, accuracy, held_out_accuracy = config.data.load(config.seed)
        self.scoring: Scoring = run.enter(
            config.rewards.open(
                accuracy,
                held_out_accuracy,
                max_completion_length=config.completion_length,
                needs_pool=config.data.dataset not in (None, ERRANDS),
                mesh=mesh,
                dtype=config.compute_dtype,
            )
        )
        self.scoring.probe(*(first_row(each) for each in (problems, held_out)))
        self.start = config.start(run, config.seed)
        policy = config.as_sampled(config.load(self.start, mesh))
        self._problems, self._held_out = self._encoded(problems, policy), self._encoded(held_out, policy)
        self._batches = ProblemIterator(self._problems.problems, num_prompts=config.num_prompts, seed=config.seed)
        self._samplers = {n: config.sampler(policy, mesh, n) for n in {config.group_size, config.num_eval_samples}}
        self._to_rollout = make_reshard(param_shardings(policy.params, mesh, ROLLOUT_RULES), config.compute_dtype)
        self._noise, self.shuffle, self._evaluation = jax.random.split(jax.random.key(config.seed), 3)
        self._decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
        self._decode_ids = partial(decode_one, policy.tokenizer, eos_ids=policy.eos_ids)
        self._num_tokens = 0
        self.params: Params | None = policy.params
        self.policy: models.Pretrained = replace(policy, params=None)

    def take_params(self) -> Params:
        """The parameters to start with; nothing else holds them then."""
        params, self.params = self.params, None
        return params

    def begin(self, position: Mapping[str, Any]) -> None:
        """Go on from a position; call it once logs are rewound to it."""
        if position:
            self._batches.set_state(position["batches"])
            self._num_tokens = position["num_tokens"]
        fired_before = {row["alarm"] for row in read_jsonl(self._run.alarms_log.path)}
        self._alarms = Alarms(self._config.alarms, read_jsonl(self._run.metrics_log.path), fired_before)

    @property
    def position(self) -> dict[str, Any]:
        """Where the problems and counts stand, as JSON."""
        return {"batches": self._batches.get_state(), "num_tokens": self._num_tokens}

    def draw(self, step: int, params: Params) -> Round:
        """Completions of the step's prompts."""
        config = self._config
        started = time.monotonic()
        index, chosen = next(self._batches)
        prompts = shard_rows(self._problems.padded(index), self._mesh)
        in_place = jax.block_until_ready(self._to_rollout(params))
        moved = time.monotonic()
        texts = [self._problems.texts[i] for i in index for _ in range(config.group_size)]
        columns = reward_columns(chosen, group_size=config.group_size)
        watch = self.scoring.as_drawn(
            texts,
            columns,
            self._decode_ids,
            eos_ids=self.policy.eos_ids,
            max_completion_length=config.completion_length,
        )
        sampler = self._samplers[config.group_size]
        rollout = sampler(in_place, prompts, jax.random.fold_in(self._noise, step), watch=watch)
        drawn = time.monotonic()
        lengths, truncated = np.asarray(rollout.completion_mask.sum(1)), np.asarray(rollout.truncated)
        columns |= {"completion_length": lengths.tolist(), "truncated": truncated.tolist()}
        times = {
            "rollout_time": drawn - moved,
            "rollout_tokens_per_second": float(lengths.sum() / (drawn - moved)),
            "reshard_time": moved - started,
            "reshard_bytes": 0 if in_place is params else bytes_on_devices(in_place),
        }
        self._num_tokens += int(lengths.sum() + rollout.prompt_mask.sum())
        return Round(step, chosen, texts, columns, rollout, self._decode(rollout), lengths, started, times)

    def score(self, drawn: Round) -> Scores:
        """What the completions are worth."""
        return self.scoring.score(drawn.texts, drawn.completions, **drawn.columns)

    def tell(self, drawn: Round, scores: Scores, metrics: dict[str, float], advantages: np.ndarray) -> bool:
        """Add a step's figures to those of its updates, write them down, raise alarms, show samples.

        Args:
            drawn: the step's completions.
            scores: what they are worth.
            metrics: those of the updates; the others are added to it.
            advantages: one for each completion.

        Returns:
            Whether an alarm wants a checkpoint of this step.
        """
        config, step = self._config, drawn.step
        seconds = time.monotonic() - drawn.started
        metrics |= reward_metrics(scores.total, scores.parts, group_size=config.group_size)
        metrics |= completion_metrics(drawn.lengths, np.asarray(drawn.rollout.truncated))
        metrics |= text_metrics(
            drawn.texts,
            drawn.completions,
            group_size=config.group_size,
            answers=drawn.columns["answer"],
            tests=drawn.columns.get("tests", ()),
        )
        if self.scoring.judge is not None:
            metrics["judge"] = metrics.get(f"rewards/{self.scoring.judge}/mean", math.nan)
        metrics |= {
            "pass_rate": metrics.get("rewards/accuracy/mean", math.nan),
            "num_tokens": self._num_tokens,
            "tokens_per_second": float(drawn.lengths.sum() / seconds),
            **drawn.times,
            "step_time": seconds,
            "compilations": self._compilations(),
        }
        self._run.log({"step": step, **metrics})
        self._run.log_faults(step, self.scoring.take_faults())
        wants_checkpoint = self._run.raise_alarms(self._alarms.update({"step": step, **metrics}))
        if step % config.samples_every == 0:
            samples = as_samples(drawn, scores, advantages)
            shown = spot_checks(samples, group_size=config.group_size, seed=step)
            self._run.log_samples(step, samples, shown=shown)
        return wants_checkpoint

    def save_is_due(self, step: int, wants_checkpoint: bool) -> bool:
        """Whether the state after a step is to be saved."""
        is_due = step == self._config.num_steps or step % self._config.save_every == 0
        return is_due or wants_checkpoint or self._run.stop_requested

    def evaluate_if_due(self, step: int, params: Params) -> dict[str, float]:
        """Grade completions of all held-out problems where an evaluation is due and was not done."""
        config, run = self._config, self._run
        is_due = step in (0, config.num_steps) or bool(config.eval_every and step % config.eval_every == 0)
        if not is_due or run.has_row(step, "eval/pass@1"):
            return {}
        with run.progress.phase("evaluation", len(self._held_out)) as phase:

            def report(done: int) -> None:
                phase.update(done)
                run.stop_if_requested()

            drawn = self._samplers[config.num_eval_samples].stream(
                self._to_rollout(params),
                [self._held_out.padded(range(len(self._held_out)))],
                jax.random.fold_in(self._evaluation, step),
                num_prompts=config.num_prompts,
            )
            metrics = evaluate.held_out(
                self._held_out,
                drawn,
                self._decode,
                self.scoring.held_out,
                group_size=config.num_eval_samples,
                report=report,
            )
        run.log_faults(step, self.scoring.take_faults())
        run.log({"step": step, **metrics})
        return metrics

    def _encoded(self, problems: list[Problem], policy: models.Pretrained) -> EncodedProblems:
        config = self._config
        encoded = config.data.encode(
            problems,
            policy.tokenizer,
            pad_id=policy.pad_id,
            max_prompt_length=config.prompt_length,
            default_template=R1_ZERO if config.model else PLAIN,
        )
        if encoded.dropped:
            self._run.say(f"{encoded.dropped} of {len(problems)} prompts dropped: over {config.prompt_length} tokens")
        return encoded


def first_row(problems: list[Problem]) -> dict[str, Any]:
    """The columns of a first problem, one value each."""
    return {name: values[0] for name, values in reward_columns(problems[:1]).items()}


def as_samples(drawn: Round, scores: Scores, advantages: np.ndarray) -> list[Sample]:
    """A step's completions with what they were worth."""
    group_size = len(drawn.completions) // len(drawn.problems)
    return [
        Sample(
            prompt=drawn.texts[i],
            completion=drawn.completions[i],
            rewards={name: float(part[i]) for name, part in scores.parts.items()},
            reward=float(scores.total[i]),
            advantage=float(advantages[i]),
            answer=drawn.problems[i // group_size].answer,
            note=scores.notes[i],
        )
        for i in range(len(drawn.completions))
    ]
