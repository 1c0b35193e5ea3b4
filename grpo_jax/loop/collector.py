"""Generation and scoring for online RL: batches of problems become scored completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.config.mixture import as_settings, shares
from grpo_jax.config.online import OnlineConfig
from grpo_jax.data.encoded import decode_completions, decode_one, undecoded
from grpo_jax.data.iterator import ProblemIterator
from grpo_jax.data.problems import reward_columns
from grpo_jax.hosts import is_main, joined_on_main, on_main
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.compilation import count_compilations
from grpo_jax.loop.experience import Experience, ProblemBatch, concatenate, has_reward_variance
from grpo_jax.loop.held_out import evaluate_tasks
from grpo_jax.loop.mixture import TASK, MixtureScorer
from grpo_jax.loop.report import LogPart, expert_metrics, samples_to_show, step_metrics, update_metrics
from grpo_jax.loop.run import Run
from grpo_jax.loop.run_folder import differences
from grpo_jax.loop.setup import (
    adapters_of,
    load_policy,
    make_sampler,
    model_facts,
    rollout_layout,
    start_model,
)
from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.monitor.alarms import Alarms
from grpo_jax.rewards.compose import Scores
from grpo_jax.rollout.host_batch import concatenated
from grpo_jax.sharding import bytes_on_devices, place, replicated
from grpo_jax.types import Params, Prompts, Rollout


class Collector:
    """Samples, scores, logs and evaluates the completions of a run.

    Its state for a checkpoint is ``state_dict``; sampling noise is a function of seed, step, prompt and sample.

    Args:
        config: problems, rewards, batch sizes.
        run: its folder and logs.
        mesh: the devices.
        sampling_mesh: other devices to sample on; None for the same.

    Attributes:
        start: folder or Hugging Face id of the model that the run starts from.
        policy: that model, without its parameters.
        params: its parameters, until ``take_params``.
        scorer: scores completions, of the one task or of all tasks of a mixture.
        mesh: the devices.
        shuffle: key for the order of minibatches.

    Raises:
        ValueError: whatever cannot run; before a model is loaded where it can be known.
    """

    def __init__(self, config: OnlineConfig, run: Run, mesh: Mesh, sampling_mesh: Mesh | None = None):
        self._config, self._run, self.mesh = config, run, mesh
        self._compilations = count_compilations()
        mixture = config.mixture
        # The run's configuration describes a single task; of a mixture, it has only the name of the file.
        self._mixture = {} if config.tasks is None else as_settings(mixture)
        make_task = partial(
            TaskRuntime,
            run=run,
            seed=config.seed,
            max_completion_length=config.completion_length,
            mesh=mesh,
            dtype=config.compute_dtype,
        )
        self.tasks = [make_task(task) for task in mixture]
        self.scorer = self.tasks[0].scorer if config.tasks is None else MixtureScorer(self.tasks)
        self.start = start_model(config, run, seed=config.seed)
        policy = load_policy(config, self.start, mesh, **adapters_of(config))
        self._encode(policy)
        self._batches = [
            ProblemIterator(task.problems.problems, num_prompts=count, seed=config.seed)
            for task, count in zip(self.tasks, shares(mixture, config.num_prompts), strict=True)
        ]
        self._layout = rollout_layout(config, policy, mesh, sampling_mesh)
        self._samplers = {
            size: make_sampler(config, policy, self._layout, group_size=size)
            for size in {config.group_size, config.eval_samples}
        }
        self._noise, self.shuffle, self._evaluation = jax.random.split(jax.random.key(config.seed), 3)
        if sampling_mesh is not None:  # keys that are computed beside the training would wait for it
            self._noise, self._evaluation = place((self._noise, self._evaluation), replicated(sampling_mesh))
        self._decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
        self._decode_ids = partial(decode_one, policy.tokenizer, eos_ids=policy.eos_ids)
        self._num_tokens = 0
        run.describe(self._facts(policy))
        self._alarms = Alarms(config.alarms, [], set())
        self.params: Params | None = policy.params
        self.policy: models.Pretrained = replace(policy, params=None)

    def reload(self) -> Params:
        """The parameters that the run started from, loaded again."""
        return load_policy(self._config, self.start, self.mesh, **adapters_of(self._config)).params

    def take_params(self) -> Params:
        """The parameters to start from; the collector keeps no reference, so that they can be donated."""
        params, self.params = self.params, None
        return params

    @property
    def prompt_format(self) -> dict[str, Any]:
        """The prompt format of the exported model; in a mixture, that of the first task."""
        return self.tasks[0].prompt_format

    def state_dict(self) -> dict[str, Any]:
        """Positions of the data iterators and the token count, as JSON."""
        return {
            "batches": [batches.get_state() for batches in self._batches],
            "num_tokens": self._num_tokens,
            "mixture": self._mixture,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``, once the run's logs are rewound to it.

        Args:
            state: of a checkpoint; empty for a new run.

        Raises:
            ValueError: it is of a run with other tasks or problems.
        """
        if state:
            different = differences(state["mixture"], self._mixture)
            if different:
                raise ValueError(
                    f"{self._config.tasks} does not have the tasks that {self._run.folder} was started with; restore "
                    "them, or use another run_dir:\n  " + "\n  ".join(different)
                )
            for batches, position in zip(self._batches, state["batches"], strict=True):
                batches.set_state(position)
            self._num_tokens = state["num_tokens"]
        alarms = on_main(lambda: read_jsonl(self._run.alarms_log.path), "reading the alarms")
        self._alarms = Alarms(self._config.alarms, self._run.rows(), {row["alarm"] for row in alarms})

    def sample(self, step: int, params: Params, *, attempt: int = 0) -> Experience:
        """Sample completions of the next prompts.

        Args:
            step: the number of the step.
            params: of the policy.
            attempt: 0, or the number of a further attempt within the step (dynamic sampling).
        """
        started = time.monotonic()
        batch = self._batch_at([next(batches)[0] for batches in self._batches])
        rollout_params = jax.block_until_ready(self._layout.reshard(params))
        resharded = time.monotonic()
        on_tokens = self.scorer.streaming_scorer(
            batch.texts,
            batch.columns,
            self._decode_ids,
            eos_ids=self.policy.eos_ids,
            max_completion_length=self._config.completion_length,
        )
        noise = jax.random.fold_in(self._noise, step)
        if attempt:  # 2**32 - attempt, because small numbers are folded in for prompts
            noise = jax.random.fold_in(noise, np.uint32(2**32 - attempt))
        sampler = self._samplers[self._config.group_size]
        rollout = sampler.on_host(rollout_params, batch.prompts, noise, on_tokens=on_tokens)
        sampled = time.monotonic()
        experience = self._experience(step, batch, rollout, started)
        experience.times = {
            "rollout_time": sampled - resharded,
            "rollout_tokens_per_second": float(experience.lengths.sum() / (sampled - resharded)),
            "reshard_time": resharded - started,
            "reshard_bytes": 0 if rollout_params is params else bytes_on_devices(rollout_params),
        }
        return experience

    def sampled_before(
        self, step: int, positions: Sequence[np.ndarray], rollout_of: Callable[[Prompts], Rollout]
    ) -> Experience:
        """The experience of completions that were sampled before the run was resumed.

        Args:
            step: the number of their step.
            positions: of their problems, an array for each task.
            rollout_of: gives the completions of the prompts.
        """
        batch = self._batch_at(positions)
        return self._experience(step, batch, rollout_of(batch.prompts), time.monotonic())

    def reshard(self, params: Params) -> Params:
        """Parameters in the sampler's layout, which ``sample`` takes too."""
        return self._layout.reshard(params)

    def start_scoring(self, experience: Experience) -> None:
        """Start to score a step's completions in the background; ``score`` then waits for it.

        Args:
            experience: of ``sample``.
        """
        experience.scoring = self.scorer.start(experience.prompts, experience.completions, **experience.columns)

    def score(self, experience: Experience) -> Scores:
        """The rewards of a step's completions.

        Args:
            experience: of ``sample``; the seconds are added to its ``times``.
        """
        started, scoring, times = time.monotonic(), experience.scoring, experience.times
        if scoring is None:
            scores = self.scorer.score(experience.prompts, experience.completions, **experience.columns)
            times["scoring_time"] = time.monotonic() - started
        else:
            scores = scoring.result()
            times |= {"scoring_time": scoring.seconds, "scoring_wait": time.monotonic() - started}
        self._num_tokens += int(experience.lengths.sum() + experience.rollout.prompt_mask.sum())
        return scores

    def sample_dynamically(self, step: int, params: Params, *, most: int) -> tuple[Experience, Scores, np.ndarray]:
        """Dynamic sampling: sample until ``num_prompts`` groups have non-constant rewards, at most ``most`` times.

        Groups with constant rewards have advantages of 0 and no gradient (DAPO, arXiv 2503.14476, section 3.2).

        Args:
            step: the number of the step.
            params: of the policy.
            most: attempts per step, the first included.

        Returns:
            All completions of the step, their rewards, and the rows of the ``num_prompts`` groups to train on, in the
            order of sampling. If too few groups have non-constant rewards, others fill up.
        """
        config = self._config
        attempts, scores, varied = [], [], 0
        while len(attempts) < most and varied < config.num_prompts:
            attempts.append(self.sample(step, params, attempt=len(attempts)))
            scores.append(self.score(attempts[-1]))
            varied += int(has_reward_variance(scores[-1].total, config.group_size).sum())
        experience, merged = concatenate(attempts), Scores.concatenate(scores)
        varies = has_reward_variance(merged.total, config.group_size)
        groups = np.sort(np.argsort(~varies, kind="stable")[: config.num_prompts])
        rows = groups[:, None] * config.group_size + np.arange(config.group_size)
        experience.times |= {"draws": len(attempts), "frac_groups_with_reward_variance": float(varies.mean())}
        return experience, merged, rows.reshape(-1)

    def log_step(
        self,
        experience: Experience,
        scores: Scores,
        metrics: dict[str, float],
        advantages: np.ndarray,
        *,
        passes: Sequence[models.Pretrained],
        prompts_are_shared: bool,
    ) -> bool:
        """Log a step: metrics, alarms, reward errors, sample completions.

        Args:
            experience: the step's completions.
            scores: their rewards.
            metrics: of the updates; the step's other metrics are added to it.
            advantages: ``[B]``; NaN for completions that were not trained on.
            passes: the trained model, for each pass of the updates over the completions.
            prompts_are_shared: whether a pass computes a prompt once for its group.

        Returns:
            Whether an alarm asks for a checkpoint.
        """
        config, step = self._config, experience.step

        def log(parts: list[LogPart]) -> bool:
            whole = LogPart.joined(parts)
            metrics.update(step_metrics(config, self.tasks, self.scorer, experience, scores, whole.facts))
            metrics.update(expert_metrics(experience, self.policy.model))
            per_second = float(experience.lengths.sum() / metrics["step_time"])
            metrics.update(num_tokens=self._num_tokens, tokens_per_second=per_second, compilations=self._compilations())
            shared_by = config.group_size if prompts_are_shared else 1
            rows, seconds = ~np.isnan(advantages), metrics["update_time"]
            metrics.update(update_metrics(experience, rows, passes, seconds, self.mesh, group_size=shared_by))
            self._run.log({"step": step, **metrics})
            self._run.log_reward_errors(step, whole.errors)
            wants_checkpoint = self._run.raise_alarms(self._alarms.update({"step": step, **metrics}))
            self._run.completions_log.append_lines(whole.lines)
            if step % config.samples_every == 0 or step == config.num_steps:
                self._run.log_samples(step, [], shown=samples_to_show(experience, scores, advantages))
            return wants_checkpoint

        own = LogPart.own(self.tasks, self.scorer.take_own_errors(), experience, scores, advantages)
        return joined_on_main(own, log, "logging the step")

    def save_is_due(self, step: int, wants_checkpoint: bool) -> bool:
        """Whether to save a checkpoint after a step.

        Args:
            step: its number.
            wants_checkpoint: of ``log_step``.
        """
        is_due = self.evaluation_is_due(step) or step % self._config.save_every == 0
        return self._run.save_is_due(is_due or wants_checkpoint)

    def evaluation_is_due(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        config = self._config
        return step in (0, config.num_steps) or bool(config.eval_every and step % config.eval_every == 0)

    def evaluate_if_due(self, step: int, params: Params) -> dict[str, float]:
        """Evaluate on all held-out problems, if an evaluation is due and not done yet.

        Args:
            step: the number of the step.
            params: of the policy.

        Returns:
            The metrics; empty if nothing was evaluated.
        """
        config, run = self._config, self._run
        if not self.evaluation_is_due(step) or run.has_row(step, "eval/mean_length"):
            return {}
        stream = partial(
            self._samplers[config.eval_samples].stream,
            self._layout.reshard(params),
            key=jax.random.fold_in(self._evaluation, step),
            num_prompts=config.num_prompts,
        )
        metrics = evaluate_tasks(self.tasks, stream, self._decode, run, group_size=config.eval_samples)
        run.log_reward_errors(step, self.scorer.take_errors())
        run.log({"step": step, **metrics})
        if is_main():  # as in log_step; a stop is agreed on
            run.raise_alarms(self._alarms.update({"step": step, **metrics}))
        run.stop_if_requested()
        return metrics

    def _facts(self, policy: models.Pretrained) -> dict[str, str]:
        """Model, data and settings, for the run's header."""
        config = self._config
        facts = model_facts(config, self.start, policy, self.mesh)
        for task in self.tasks:
            suffix = "" if task.name is None else f" of {task.name}"
            facts |= {f"{name}{suffix}": value for name, value in task.facts().items()}
        if self._layout.mesh is not self.mesh:
            facts["sampler"] = self._layout.description
        return facts | {
            "lengths": f"{config.prompt_length} + {config.completion_length} tokens of prompt and completion",
            "steps": f"{config.num_steps}, each {config.num_prompts} prompts x {config.group_size} samples at "
            f"temperature {config.sampling.temperature:g}",
            "evaluations": f"before the first step, every {config.eval_every or config.num_steps} steps and after the "
            f"last; {config.eval_samples} samples a problem",
        }

    def _batch_at(self, positions: Sequence[np.ndarray]) -> ProblemBatch:
        """The problems at some positions, one task after the other."""
        prompts, texts, problems, names = [], [], [], []
        for task, index in zip(self.tasks, positions, strict=True):
            prompts.append(task.problems.padded(index))
            texts += [task.problems.texts[i] for i in index]
            problems += [task.problems.problems[i] for i in index]
            names += [task.name] * len(index)
        group_size = self._config.group_size
        columns = reward_columns(problems, group_size=group_size)
        if self._config.tasks is not None:
            columns[TASK] = [name for name in names for _ in range(group_size)]
        texts = [text for text in texts for _ in range(group_size)]
        return ProblemBatch([*positions], problems, names, concatenated(prompts), texts, columns)

    def _experience(self, step: int, batch: ProblemBatch, rollout: Rollout, started: float) -> Experience:
        lengths = np.asarray(rollout.completion_mask).sum(1)
        columns = {"completion_length": lengths.tolist(), "truncated": np.asarray(rollout.truncated).tolist()}
        return Experience(
            step,
            batch.problems,
            batch.tasks,
            batch.texts,
            batch.columns | columns,
            rollout,
            undecoded(self.policy.tokenizer, rollout, self.policy.eos_ids),
            lengths,
            started,
            positions=batch.positions,
        )

    def _encode(self, policy: models.Pretrained) -> None:
        first = first_held_out = 0
        for task in self.tasks:
            task.encode(
                policy,
                max_prompt_length=self._config.prompt_length,
                first=first,
                first_held_out=first_held_out,
            )
            first, first_held_out = first + len(task.problems), first_held_out + len(task.held_out)
