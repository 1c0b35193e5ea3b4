"""Generation, scoring, logging and evaluation for online RL."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.config.mixture import as_settings, shares
from grpo_jax.config.online import OnlineConfig
from grpo_jax.data.encoded import decode_completions, decode_one
from grpo_jax.data.iterator import ProblemIterator
from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import held_out
from grpo_jax.loop.compilation import count_compilations
from grpo_jax.loop.experience import Experience, as_samples, has_reward_variance, joined
from grpo_jax.loop.mixture import TASK, MixtureScorer
from grpo_jax.loop.run import Run
from grpo_jax.loop.run_folder import differences
from grpo_jax.loop.setup import load_policy, make_sampler, model_facts, start_model
from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.monitor.alarms import Alarms
from grpo_jax.monitor.samples import spot_checks
from grpo_jax.monitor.step_metrics import completion_metrics, reward_metrics
from grpo_jax.rewards.compose import Scores
from grpo_jax.rewards.diagnostics import text_metrics
from grpo_jax.rollout.host_batch import concatenated
from grpo_jax.sharding import ROLLOUT_RULES, bytes_on_devices, make_reshard, param_shardings, shard_rows
from grpo_jax.types import Params, Prompts


class Collector:
    """The problems of a run and what is done with them: iterated over, drawn for, graded, evaluated, told of.

    Its state, for a checkpoint, is ``position``; noise follows from the seed and the step.

    Attributes:
        start: where the model that is drawn from was loaded.
        policy: that model, without its parameters.
        params: those it starts with, until they are taken.
        scoring: what scores: of the one task, or of all of a mixture.
        mesh: how the devices are used.

    Raises:
        ValueError: on construction, for whatever cannot run; before a model is loaded where it can be known.
    """

    def __init__(self, config: OnlineConfig, run: Run, mesh: Mesh):
        self._config, self._run, self.mesh = config, run, mesh
        self._compilations = count_compilations()
        mixture = config.mixture
        # Of one task the run's own configuration says everything; of several, only the file's name.
        self._mixture = {} if config.tasks is None else as_settings(mixture)
        open_task = partial(
            TaskRuntime,
            run=run,
            seed=config.seed,
            max_completion_length=config.completion_length,
            mesh=mesh,
            dtype=config.compute_dtype,
        )
        self._tasks = [open_task(task) for task in mixture]
        self.scoring = self._tasks[0].scoring if config.tasks is None else MixtureScorer(self._tasks)
        self.start = start_model(config, run, seed=config.seed)
        policy = load_policy(config, self.start, mesh)
        self._encode(policy)
        self._batches = [
            ProblemIterator(task.problems.problems, num_prompts=count, seed=config.seed)
            for task, count in zip(self._tasks, shares(mixture, config.num_prompts), strict=True)
        ]
        self._samplers = {
            n: make_sampler(config, policy, mesh, group_size=n) for n in {config.group_size, config.num_eval_samples}
        }
        self._to_rollout = make_reshard(param_shardings(policy.params, mesh, ROLLOUT_RULES), config.compute_dtype)
        self._noise, self.shuffle, self._evaluation = jax.random.split(jax.random.key(config.seed), 3)
        self._decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
        self._decode_ids = partial(decode_one, policy.tokenizer, eos_ids=policy.eos_ids)
        self._num_tokens = 0
        run.describe(self._facts(policy))
        self.params: Params | None = policy.params
        self.policy: models.Pretrained = replace(policy, params=None)

    def reload(self) -> Params:
        """The parameters that the run started with, loaded again."""
        return load_policy(self._config, self.start, self.mesh).params

    def _facts(self, policy: models.Pretrained) -> dict[str, str]:
        """What the run works with, for its first lines."""
        config = self._config
        facts = model_facts(config, self.start, policy, self.mesh)
        for task in self._tasks:
            of = "" if task.name is None else f" of {task.name}"
            facts |= {f"{name}{of}": value for name, value in task.facts().items()}
        return facts | {
            "lengths": f"{config.prompt_length} + {config.completion_length} tokens of prompt and completion",
            "steps": f"{config.num_steps}, each {config.num_prompts} prompts x {config.group_size} samples at "
            f"temperature {config.sampling.temperature:g}",
            "evaluations": f"before the first step, every {config.eval_every or config.num_steps} steps and after the "
            f"last; {config.num_eval_samples} samples a problem",
        }

    @property
    def prompt_format(self) -> dict[str, Any]:
        """How prompts are made, for the exported model; of a mixture, those of the first task."""
        return self._tasks[0].prompt_format

    def take_params(self) -> Params:
        """The parameters to start with; nothing else holds them then."""
        params, self.params = self.params, None
        return params

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from a position; call it once logs are rewound to it.

        Raises:
            ValueError: the run was begun with other tasks, or other problems.
        """
        if position:
            different = differences(position["mixture"], self._mixture)
            if different:
                raise ValueError(
                    f"{self._config.tasks} does not hold the tasks that {self._run.folder} was begun with; restore "
                    "them, or use another run_dir:\n  " + "\n  ".join(different)
                )
            for batches, state in zip(self._batches, position["batches"], strict=True):
                batches.set_state(state)
            self._num_tokens = position["num_tokens"]
        fired_before = {row["alarm"] for row in read_jsonl(self._run.alarms_log.path)}
        self._alarms = Alarms(self._config.alarms, read_jsonl(self._run.metrics_log.path), fired_before)

    @property
    def position(self) -> dict[str, Any]:
        """Where the problems and counts stand, as JSON."""
        return {
            "batches": [batches.get_state() for batches in self._batches],
            "num_tokens": self._num_tokens,
            "mixture": self._mixture,
        }

    def draw(self, step: int, params: Params, *, attempt: int = 0) -> Experience:
        """Completions of the step's prompts; of other prompts in a further attempt at the same step."""
        config, group_size = self._config, self._config.group_size
        started = time.monotonic()
        prompts, texts, problems, names = self._next_prompts()
        in_place = jax.block_until_ready(self._to_rollout(params))
        moved = time.monotonic()
        texts = [text for text in texts for _ in range(group_size)]
        columns = reward_columns(problems, group_size=group_size)
        if config.tasks is not None:
            columns[TASK] = [name for name in names for _ in range(group_size)]
        on_tokens = self.scoring.streaming_scorer(
            texts,
            columns,
            self._decode_ids,
            eos_ids=self.policy.eos_ids,
            max_completion_length=config.completion_length,
        )
        noise = jax.random.fold_in(self._noise, step)
        if attempt:  # counted from the far end: from the near one, the key would be that of a prompt
            noise = jax.random.fold_in(noise, np.uint32(2**32 - attempt))
        rollout = self._samplers[group_size](in_place, prompts, noise, on_tokens=on_tokens)
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
        completions = self._decode(rollout)
        return Experience(step, problems, names, texts, columns, rollout, completions, lengths, started, times)

    def _next_prompts(self) -> tuple[Prompts, list[str], list[Problem], list[str | None]]:
        """What is asked next: prompts, their texts, problems and the names of their tasks, one task after the other."""
        prompts, texts, problems, names = [], [], [], []
        for task, batches in zip(self._tasks, self._batches, strict=True):
            index, chosen = next(batches)
            prompts.append(task.problems.padded(index))
            texts += [task.problems.texts[i] for i in index]
            problems += chosen
            names += [task.name] * len(chosen)
        return shard_rows(concatenated(prompts), self.mesh), texts, problems, names

    def score(self, drawn: Experience) -> Scores:
        """What the completions are worth."""
        return self.scoring.score(drawn.texts, drawn.completions, **drawn.columns)

    def sample_dynamically(self, step: int, params: Params, *, most: int) -> tuple[Experience, Scores, np.ndarray]:
        """Completions whose groups differ in what they are worth, as far as they can be had: dynamic sampling.

        Groups whose samples are all worth the same teach nothing. Others are drawn, of the next prompts, until there
        are enough that do not, or ``most`` times (DAPO, arXiv 2503.14476, section 3.2).

        Args:
            step: which.
            params: the policy's.
            most: how often a step's prompts may be drawn, the first time included.

        Returns:
            Everything that was drawn, what it is worth, and the rows of the ``num_prompts`` groups that are learnt
            from, in the order of drawing; among them others, where too few teach anything.
        """
        config = self._config
        rounds, scores, telling = [], [], 0
        while len(rounds) < most and telling < config.num_prompts:
            rounds.append(self.draw(step, params, attempt=len(rounds)))
            scores.append(self.score(rounds[-1]))
            telling += int(has_reward_variance(scores[-1].total, config.group_size).sum())
        drawn, scored = joined(rounds), Scores.joined(scores)
        differs = has_reward_variance(scored.total, config.group_size)
        chosen = np.sort(np.argsort(~differs, kind="stable")[: config.num_prompts])
        rows = chosen[:, None] * config.group_size + np.arange(config.group_size)
        drawn.times |= {"draws": len(rounds), "frac_groups_with_reward_variance": float(differs.mean())}
        return drawn, scored, rows.reshape(-1)

    def log_step(self, drawn: Experience, scores: Scores, metrics: dict[str, float], advantages: np.ndarray) -> bool:
        """Add a step's figures to those of its updates, write them down, raise alarms, show samples.

        Args:
            drawn: the step's completions.
            scores: what they are worth.
            metrics: those of the updates; the others are added to it.
            advantages: one for each completion; NaN for one that was left out of the update.

        Returns:
            Whether an alarm wants a checkpoint of this step.
        """
        config, step = self._config, drawn.step
        seconds = time.monotonic() - drawn.started
        metrics |= reward_metrics(scores.total, scores.parts, group_size=config.group_size)
        if config.tasks is not None:
            metrics |= self._of_tasks(drawn, scores)
        metrics |= completion_metrics(drawn.lengths, np.asarray(drawn.rollout.truncated))
        metrics |= text_metrics(
            drawn.texts,
            drawn.completions,
            group_size=config.group_size,
            answers=self._final_answers(drawn),
            tests=drawn.columns.get("tests", ()),
        )
        if not any(name.rpartition("/")[2] == "format" for name in scores.parts):
            del metrics["completions/empty_thought_share"]  # it is about completions of that form
        for name, part in (("judge", self.scoring.judge), ("pass_rate", "accuracy")):
            if f"rewards/{part}/mean" in metrics:
                metrics[name] = metrics[f"rewards/{part}/mean"]
        metrics |= {
            "num_tokens": self._num_tokens,
            "tokens_per_second": float(drawn.lengths.sum() / seconds),
            **drawn.times,
            "step_time": seconds,
            "compilations": self._compilations(),
        }
        self._run.log({"step": step, **metrics})
        self._run.log_reward_errors(step, self.scoring.take_errors())
        wants_checkpoint = self._run.raise_alarms(self._alarms.update({"step": step, **metrics}))
        samples = as_samples(drawn, scores, advantages)
        is_shown = step % config.samples_every == 0 or step == config.num_steps
        shown = spot_checks(samples, group_size=config.group_size, seed=step) if is_shown else []
        self._run.log_samples(step, samples, shown=shown)
        return wants_checkpoint

    def _final_answers(self, drawn: Experience) -> list[str | None]:
        """The gold answers of the completions that end in an answer."""
        has_answers = {task.name: task.has_final_answers for task in self._tasks}
        of_rows = [name for name in drawn.tasks for _ in range(self._config.group_size)]
        return [
            answer if has_answers[name] else None for answer, name in zip(drawn.columns["answer"], of_rows, strict=True)
        ]

    def _of_tasks(self, drawn: Experience, scores: Scores) -> dict[str, float]:
        """The rewards of each task by itself."""
        metrics = {}
        of_rows = np.repeat(np.array(drawn.tasks), self._config.group_size)
        for task in self._tasks:
            rows = of_rows == task.name
            parts = {name: values[rows] for name, values in scores.parts.items()}
            own = reward_metrics(scores.total[rows], parts, group_size=self._config.group_size)
            metrics |= {f"tasks/{task.name}/{name}": value for name, value in own.items()}
        return metrics

    def save_is_due(self, step: int, wants_checkpoint: bool) -> bool:
        """Whether the state after a step is to be saved."""
        is_due = self.evaluation_is_due(step) or step % self._config.save_every == 0
        return is_due or wants_checkpoint or self._run.stop_requested

    def evaluation_is_due(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        config = self._config
        return step in (0, config.num_steps) or bool(config.eval_every and step % config.eval_every == 0)

    def evaluate_if_due(self, step: int, params: Params) -> dict[str, float]:
        """Grade completions of all held-out problems where an evaluation is due and was not done."""
        config, run = self._config, self._run
        if not self.evaluation_is_due(step) or run.has_row(step, "eval/mean_length"):
            return {}
        with run.progress.phase("evaluation", sum(len(task.held_out) for task in self._tasks)) as phase:
            done, found = 0, {}
            for task in self._tasks:

                def report(so_far: int, before: int = done) -> None:
                    phase.update(before + so_far)
                    run.stop_if_requested()

                found[task.name] = self._evaluated(task, step, params, report)
                done += len(task.held_out)
        metrics = found[None] if config.tasks is None else held_out.mean_over_tasks(found)
        run.log_reward_errors(step, self.scoring.take_errors())
        run.log({"step": step, **metrics})
        run.raise_alarms(self._alarms.update({"step": step, **metrics}))
        run.stop_if_requested()
        return metrics

    def _evaluated(
        self, task: TaskRuntime, step: int, params: Params, report: Callable[[int], None]
    ) -> dict[str, float]:
        group_size = self._config.num_eval_samples
        drawn = self._samplers[group_size].stream(
            self._to_rollout(params),
            [task.held_out.padded(range(len(task.held_out)))],
            jax.random.fold_in(self._evaluation, step),
            num_prompts=self._config.num_prompts,
        )
        if not task.is_graded:
            return held_out.held_out_rewards(
                task.held_out, drawn, self._decode, task.scoring.score, group_size=group_size, report=report
            )
        metrics = held_out.held_out(
            task.held_out,
            drawn,
            self._decode,
            task.scoring.held_out,
            group_size=group_size,
            same=task.same,
            report=report,
        )
        return {name: value for name, value in metrics.items() if task.has_final_answers or "/maj@" not in name}

    def _encode(self, policy: models.Pretrained) -> None:
        first = first_held_out = 0
        for task in self._tasks:
            task.encode(
                policy,
                max_prompt_length=self._config.prompt_length,
                first=first,
                first_held_out=first_held_out,
            )
            first, first_held_out = first + len(task.problems), first_held_out + len(task.held_out)
