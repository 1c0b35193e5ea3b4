"""Metrics and sample completions of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.config.online import OnlineConfig
from grpo_jax.hosts import interleaved, own_rows
from grpo_jax.jsonl import to_line
from grpo_jax.loop.experience import Experience
from grpo_jax.loop.mixture import MixtureScorer
from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.monitor.devices import device_metrics
from grpo_jax.monitor.samples import Sample, spot_checks
from grpo_jax.monitor.step_metrics import completion_metrics, reward_metrics, routing_metrics
from grpo_jax.rewards.compose import Scores
from grpo_jax.rewards.diagnostics import TextFacts, text_facts, text_metrics
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rewards.workers.pool import RewardError
from grpo_jax.types import Model


def over_updates(updates: Sequence[Mapping[str, jax.Array | float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: the maximum of ``.../max``, the mean of the others.

    Args:
        updates: metrics of each update; the first has all of them.
    """
    values = {name: [float(update[name]) for update in updates if name in update] for name in updates[0]}
    return {
        # NumPy's maximum of NaN is NaN; Python's depends on the order.
        name: float(np.max(series)) if name.endswith("/max") else sum(series) / len(series)
        for name, series in values.items()
    }


def step_metrics(
    config: OnlineConfig,
    tasks: Sequence[TaskRuntime],
    scorer: Scorer | MixtureScorer,
    experience: Experience,
    scores: Scores,
    facts: TextFacts,
) -> dict[str, float]:
    """Metrics of a step's rewards, completions and times.

    Args:
        config: of the run.
        tasks: of the run.
        scorer: of the run.
        experience: the step's completions.
        scores: their rewards.
        facts: about their texts, as of ``LogPart.joined``.

    Returns:
        ``reward...``, ``rewards/...``, ``completions/...``, ``tasks/<task>/...`` of a mixture, and seconds:
        ``rollout_time``, ``scoring_time``, ``reshard_time``, ``step_time`` and the rest, ``update_time``. Of a batch
        that was sampled ahead (``RolloutQueue``), the first three are of that time, and the step itself has
        ``rollout_wait`` and ``scoring_wait``.
    """
    metrics = reward_metrics(scores.total, scores.parts, group_size=config.group_size)
    if config.tasks is not None:
        metrics |= task_metrics(tasks, experience, scores)
    metrics |= completion_metrics(experience.lengths, np.asarray(experience.rollout.truncated))
    metrics |= text_metrics(facts, group_size=config.group_size)
    if not any(name.rpartition("/")[2] == "format" for name in scores.parts):
        del metrics["completions/empty_thought_share"]  # it is about completions of that form
    for name, part in (("judge", scorer.judge), ("pass_rate", "accuracy")):
        if f"rewards/{part}/mean" in metrics:
            metrics[name] = metrics[f"rewards/{part}/mean"]
    seconds = time.monotonic() - experience.started
    is_ahead = "rollout_wait" in experience.times  # sampled and scored in other steps
    names = ("rollout_wait", "scoring_wait") if is_ahead else ("rollout_time", "scoring_time", "reshard_time")
    phases = sum(experience.times.get(name, 0.0) for name in names)
    return metrics | experience.times | {"update_time": max(seconds - phases, 0.0), "step_time": seconds}


def expert_metrics(experience: Experience, model: Model) -> dict[str, float]:
    """``routing_metrics`` of a step's completions; nothing if the sampler did not record the experts.

    Args:
        experience: the step's completions.
        model: that sampled them.
    """
    experts, mask = experience.rollout.completion_experts, experience.rollout.completion_mask
    if experts is None or model.routing is None:
        return {}
    return routing_metrics(np.asarray(experts), np.asarray(mask), model.routing.num_experts)


def update_metrics(
    experience: Experience,
    rows: np.ndarray,
    passes: Sequence[models.Pretrained],
    seconds: float,
    mesh: Mesh,
    *,
    group_size: int = 1,
) -> dict[str, float]:
    """Speed of a step's updates, and device memory.

    ``seconds`` is all of the step but sampling, scoring and resharding: the log-probabilities before the updates take
    part of it and are not counted, so that both rates are lower bounds.

    Args:
        experience: the step's completions.
        rows: ``[B]`` bool, the completions in the updates.
        passes: the trained model, for each pass of the updates over them.
        seconds: of the updates.
        mesh: the devices.
        group_size: completions that an update computes a prompt once for.

    Returns:
        ``update_tokens_per_second``, tokens of prompts and completions in all passes per second, and the metrics of
        ``device_metrics``; nothing if ``seconds`` is 0.
    """
    prompts = np.asarray(experience.rollout.prompt_mask).sum(1)[rows]
    completions = experience.lengths[rows]
    if seconds <= 0:  # by the clock's resolution
        return {}
    of_passes = (
        models.training_flops(model.config, prompts, completions, group_size=group_size, lora=model.lora)
        for model in passes
    )
    flops = sum(of_passes, 0.0)
    rate = len(passes) * float((prompts + completions).sum()) / seconds
    return {"update_tokens_per_second": rate} | device_metrics(mesh, flops=flops, seconds=seconds)


def task_metrics(tasks: Sequence[TaskRuntime], experience: Experience, scores: Scores) -> dict[str, float]:
    """The reward metrics of each task of a mixture.

    Args:
        tasks: of the mixture.
        experience: the step's completions.
        scores: their rewards.
    """
    metrics = {}
    task_of_row = np.repeat(np.array(experience.tasks), experience.group_size)
    for task in tasks:
        rows = task_of_row == task.name
        parts = {name: values[rows] for name, values in scores.parts.items()}
        own = reward_metrics(scores.total[rows], parts, group_size=experience.group_size)
        metrics |= {f"tasks/{task.name}/{name}": value for name, value in own.items()}
    return metrics


@dataclass(frozen=True)
class LogPart:
    """The part of a step's log that needs the completions' texts.

    Each process makes that of its ``hosts.own_rows``, so that its work does not grow with their number.

    Attributes:
        errors: of rewards, in this process's workers.
        facts: about the texts.
        lines: the rows of ``completions.jsonl``.
    """

    errors: list[RewardError]
    facts: TextFacts
    lines: list[bytes]

    @classmethod
    def own(
        cls,
        tasks: Sequence[TaskRuntime],
        errors: list[RewardError],
        experience: Experience,
        scores: Scores,
        advantages: np.ndarray,
    ) -> LogPart:
        """The part of this process.

        Args:
            tasks: of the run.
            errors: as of ``Scorer.take_own_errors``.
            experience: the step's completions.
            scores: their rewards.
            advantages: ``[B]``, NaN where not trained on.
        """
        rows = own_rows(len(experience.completions))
        texts = experience.completions[rows.start : rows.stop : rows.step]  # decodes them together
        has_answers = {task.name: task.has_final_answers for task in tasks}
        answers, tests = experience.columns["answer"], experience.columns.get("tests")
        facts = text_facts(
            [experience.prompts[i] for i in rows],
            texts,
            answers=[answers[i] if has_answers[experience.tasks[i // experience.group_size]] else None for i in rows],
            tests=() if tests is None else [tests[i] for i in rows],
        )
        samples = to_samples(experience, scores, advantages, rows)
        return cls(errors, facts, [to_line(sample.row(experience.step)) for sample in samples])

    @classmethod
    def joined(cls, parts: Sequence[LogPart]) -> LogPart:
        """The part of all rows from those of all processes, in their order."""
        return cls(
            [error for part in parts for error in part.errors],
            TextFacts.interleaved([part.facts for part in parts]),
            interleaved([part.lines for part in parts]),
        )


def samples_to_show(experience: Experience, scores: Scores, advantages: np.ndarray) -> list[Sample]:
    """The samples of ``spot_checks``.

    Args:
        experience: the step's completions.
        scores: their rewards.
        advantages: ``[B]``, NaN where not trained on.
    """
    chosen = spot_checks(scores.total, scores.parts, group_size=experience.group_size, seed=experience.step)
    samples = to_samples(experience, scores, advantages, chosen)
    return [replace(sample, why=why) for sample, why in zip(samples, chosen.values(), strict=True)]


def to_samples(experience: Experience, scores: Scores, advantages: np.ndarray, rows: Iterable[int]) -> list[Sample]:
    """Completions of a step with their rewards and advantages, for logs.

    Args:
        experience: the step's completions.
        scores: their rewards.
        advantages: ``[B]``, NaN where not trained on.
        rows: which completions.
    """
    return [
        Sample(
            prompt=experience.prompts[i],
            completion=experience.completions[i],
            rewards={name: float(part[i]) for name, part in scores.parts.items() if not math.isnan(part[i])},
            reward=float(scores.total[i]),
            advantage=None if math.isnan(advantages[i]) else float(advantages[i]),
            answer=experience.problems[i // experience.group_size].answer,
            note=scores.notes[i],
        )
        for i in rows
    ]
