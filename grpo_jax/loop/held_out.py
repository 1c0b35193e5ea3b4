"""Evaluation on held-out problems: pass@1, majority vote, rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.problems import reward_columns
from grpo_jax.evaluate import STDERR, maj_at_k, pass_at_k, standard_error
from grpo_jax.loop.run import Run
from grpo_jax.loop.task_runtime import TaskRuntime
from grpo_jax.rewards.compose import RewardFn, Scores, score_with
from grpo_jax.rewards.math.answer import extract_answer, same_text
from grpo_jax.rewards.math.vote import identify_answers
from grpo_jax.types import Prompts, Rollout


def evaluate_tasks(
    tasks: Sequence[TaskRuntime],
    stream: Callable[[Iterable[Prompts]], Iterable[tuple[int, Rollout]]],
    decode: Callable[[Rollout], list[str]],
    run: Run,
    *,
    group_size: int,
) -> dict[str, float]:
    """Metrics on the held-out problems of all tasks.

    Args:
        tasks: a single task without a name, or those of a mixture.
        stream: ``prompts -> (index, rollout), ...``, such as ``Sampler.stream`` with its other arguments bound.
        decode: ``rollout -> texts``.
        run: shows the progress.
        group_size: completions per problem.

    Raises:
        Stopped: a stop was requested.
    """
    with run.progress.phase("evaluation", sum(len(task.held_out) for task in tasks)) as phase:
        done, metrics_of_tasks = 0, {}
        for task in tasks:

            def report(so_far: int, before: int = done) -> None:
                phase.update(before + so_far)
                run.stop_if_requested()

            samples = stream([task.held_out.padded(range(len(task.held_out)))])
            if task.is_graded:
                metrics = held_out(
                    task.held_out,
                    samples,
                    decode,
                    task.scorer.held_out,
                    group_size=group_size,
                    same=task.same,
                    report=report,
                )
                if not task.has_final_answers:
                    metrics = {name: value for name, value in metrics.items() if "/maj@" not in name}
            else:
                metrics = held_out_rewards(
                    task.held_out, samples, decode, task.scorer.score, group_size=group_size, report=report
                )
            metrics_of_tasks[task.name] = metrics
            done += len(task.held_out)
    return metrics_of_tasks[None] if None in metrics_of_tasks else mean_over_tasks(metrics_of_tasks)


def held_out(
    problems: EncodedProblems,
    samples: Iterable[tuple[int, Rollout]],
    decode: Callable[[Rollout], list[str]],
    reward: RewardFn,
    *,
    group_size: int,
    same: Callable[[str, str], bool] = same_text,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """pass@1 and majority vote on held-out problems, from ``group_size`` completions each.

    A completion is right if its reward is 1. Problems with a sample whose reward is absent (None) are excluded.

    Args:
        problems: the held-out problems.
        samples: index and rollout of each problem, in any order, as from ``Sampler.stream``.
        decode: ``rollout -> texts``.
        reward: accuracy reward, called once per problem.
        group_size: G, completions per problem.
        same: equality of two answers in the majority vote, as for ``identify_answers``.
        report: called after each problem with the number of problems done.

    Returns:
        ``eval/pass@1``, its standard error over problems ``eval/pass@1_stderr`` (with two or more problems),
        ``eval/maj@<G>`` by ``extract_answer``, ``eval/mean_length`` in tokens, and ``eval/frac_ungraded``, the fraction
        of excluded problems, if there are any.

    Raises:
        ValueError: all problems are excluded, or one has no rollout or two.
    """
    answers: dict[int, list[str | None]] = {}
    scores: dict[int, list[float | None]] = {}
    lengths = []
    for place, rollout in samples:
        if place in scores:
            raise ValueError(f"held-out problem {place} was sampled twice")
        texts = decode(rollout)
        columns = reward_columns([problems.problems[place]], group_size=group_size)
        outputs = score_with("accuracy", reward, [problems.texts[place]] * group_size, texts, columns)
        scores[place] = [output.score for output in outputs]
        answers[place] = [extract_answer(text, problems.texts[place]) for text in texts]
        lengths.append(np.asarray(rollout.completion_mask).sum(1))
        report(len(scores))
    if len(scores) != len(problems):
        raise ValueError(f"only {len(scores)} of {len(problems)} held-out problems were sampled")
    graded = sorted(place for place, row in scores.items() if None not in row)
    if not graded:
        raise ValueError(f"each of the {len(scores)} held-out problems has a sample that the reward could not grade")
    is_right = jnp.array([[score == 1 for score in scores[place]] for place in graded])
    answer_ids = identify_answers([answers[place] for place in graded], same)
    metrics = {
        "eval/pass@1": float(pass_at_k(is_right, 1)),
        f"eval/maj@{group_size}": float(maj_at_k(answer_ids, is_right, group_size)),
        "eval/mean_length": float(np.concatenate(lengths).mean()),
    }
    metrics |= standard_error("eval/pass@1", np.asarray(is_right).mean(1))
    if len(graded) < len(scores):
        metrics["eval/frac_ungraded"] = 1 - len(graded) / len(scores)
    return metrics


def held_out_rewards(
    problems: EncodedProblems,
    samples: Iterable[tuple[int, Rollout]],
    decode: Callable[[Rollout], list[str]],
    score: Callable[..., Scores],
    *,
    group_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Mean training reward on held-out problems that have no accuracy reward.

    Args:
        problems, samples, decode, group_size, report: as in ``held_out``.
        score: the training reward, such as ``Scorer.score``.

    Returns:
        ``eval/reward``, the mean of the rewards that are present (omitted if none is), its standard error over problems
        ``eval/reward_stderr`` (if two or more have one), and ``eval/mean_length`` in tokens.
    """
    places, texts, lengths, truncated = [], [], [], []
    for place, rollout in samples:
        places.append(place)
        texts += decode(rollout)
        lengths += np.asarray(rollout.completion_mask).sum(1).tolist()
        truncated += np.asarray(rollout.truncated).tolist()
        report(len(places))
    columns = reward_columns([problems.problems[place] for place in places], group_size=group_size)
    prompts = [problems.texts[place] for place in places for _ in range(group_size)]
    rewards = score(prompts, texts, **columns, completion_length=lengths, truncated=truncated).total
    present = rewards[~np.isnan(rewards)]
    metrics = {"eval/reward": float(present.mean())} if len(present) else {}
    groups = rewards.reshape(-1, group_size)
    groups = groups[~np.isnan(groups).all(1)]
    metrics |= standard_error("eval/reward", np.nanmean(groups, axis=1)) if len(groups) else {}
    return {**metrics, "eval/mean_length": float(np.mean(lengths))}


def mean_over_tasks(metrics_of_tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each task's metrics as ``eval/<task>/...``, and ``eval/...``, their mean over the tasks that have them.

    Standard errors are those of the mean.

    Args:
        metrics_of_tasks: task name -> metrics of ``held_out``.
    """
    names = dict.fromkeys(name for metrics in metrics_of_tasks.values() for name in metrics)
    means = {}
    for name in names:
        values = np.array([metrics[name] for metrics in metrics_of_tasks.values() if name in metrics])
        # The tasks' problems are independent samples, so the variances of their means add.
        means[name] = float(np.sqrt((values**2).sum()) / len(values) if name.endswith(STDERR) else values.mean())
    by_task = {
        f"eval/{task}/{name.removeprefix('eval/')}": value
        for task, metrics in metrics_of_tasks.items()
        for name, value in metrics.items()
    }
    return means | by_task
