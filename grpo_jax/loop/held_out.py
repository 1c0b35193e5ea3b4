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
    """Evaluate on the held-out problems of all tasks.

    Args:
        tasks: of the run; one without a name, or those of a mixture.
        stream: ``prompts -> (place, completions), ...``, such as ``Sampler.stream`` with its other arguments bound.
        decode: ``completions -> texts``.
        run: shows the progress and may be asked to stop.
        group_size: completions per problem.

    Raises:
        Stopped: the run was asked to stop.
    """
    with run.progress.phase("evaluation", sum(len(task.held_out) for task in tasks)) as phase:
        done, found = 0, {}
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
            found[task.name] = metrics
            done += len(task.held_out)
    return found[None] if None in found else mean_over_tasks(found)


def held_out(
    problems: EncodedProblems,
    drawn: Iterable[tuple[int, Rollout]],
    decode: Callable[[Rollout], list[str]],
    reward: RewardFn,
    *,
    group_size: int,
    same: Callable[[str, str], bool] = same_text,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Grade ``group_size`` completions of every held-out problem.

    A completion is right if its reward is 1; a problem with a sample whose reward is absent (None) is not counted.

    Args:
        problems: what is asked.
        drawn: the place of each problem and its completions, in any order, as ``Sampler.stream`` hands them on.
        decode: from completions to their texts.
        reward: called for each problem with its prompt's text, its completions and its columns.
        group_size: G, samples for each problem.
        same: whether two answers are the same for the majority vote; see ``identify_answers``.
        report: called with the number of problems done after each.

    Returns:
        ``eval/pass@1`` and its standard error over problems ``eval/pass@1_stderr`` (where there are two or more),
        ``eval/maj@<G>`` by ``extract_answer`` and ``eval/mean_length`` in tokens; with
        ``eval/frac_ungraded``, the share of problems left out, where there are any.

    Raises:
        ValueError: no problem could be graded; a problem was not drawn for, or twice.
    """
    answers: dict[int, list[str | None]] = {}
    scores: dict[int, list[float | None]] = {}
    lengths = []
    for place, completions in drawn:
        if place in scores:
            raise ValueError(f"held-out problem {place} was drawn for twice")
        texts = decode(completions)
        columns = reward_columns([problems.problems[place]], group_size=group_size)
        graded = score_with("accuracy", reward, [problems.texts[place]] * group_size, texts, columns)
        scores[place] = [each.score for each in graded]
        answers[place] = [extract_answer(text, problems.texts[place]) for text in texts]
        lengths.append(np.asarray(completions.completion_mask).sum(1))
        report(len(scores))
    if len(scores) != len(problems):
        raise ValueError(f"completions of {len(scores)} of {len(problems)} held-out problems were drawn")
    graded = sorted(place for place, row in scores.items() if None not in row)
    if not graded:
        raise ValueError(f"the reward graded all samples of none of the {len(scores)} held-out problems")
    is_right = jnp.array([[score == 1 for score in scores[place]] for place in graded])
    chosen = identify_answers([answers[place] for place in graded], same)
    metrics = {
        "eval/pass@1": float(pass_at_k(is_right, 1)),
        f"eval/maj@{group_size}": float(maj_at_k(chosen, is_right, group_size)),
        "eval/mean_length": float(np.concatenate(lengths).mean()),
    }
    metrics |= standard_error("eval/pass@1", np.asarray(is_right).mean(1))
    if len(graded) < len(scores):
        metrics["eval/frac_ungraded"] = 1 - len(graded) / len(scores)
    return metrics


def held_out_rewards(
    problems: EncodedProblems,
    drawn: Iterable[tuple[int, Rollout]],
    decode: Callable[[Rollout], list[str]],
    score: Callable[..., Scores],
    *,
    group_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """What completions of held-out problems are worth, where nothing is right or wrong.

    Args:
        problems, drawn, decode, group_size, report: see ``held_out``.
        score: what is learnt from, such as ``Scorer.score``.

    Returns:
        ``eval/reward``, the mean of what is present (left out where nothing is), its standard error over problems
        ``eval/reward_stderr`` (where two or more have one), and ``eval/mean_length`` in tokens.
    """
    places, texts, lengths, truncated = [], [], [], []
    for place, completions in drawn:
        places.append(place)
        texts += decode(completions)
        lengths += np.asarray(completions.completion_mask).sum(1).tolist()
        truncated += np.asarray(completions.truncated).tolist()
        report(len(places))
    columns = reward_columns([problems.problems[place] for place in places], group_size=group_size)
    prompts = [problems.texts[place] for place in places for _ in range(group_size)]
    worth = score(prompts, texts, **columns, completion_length=lengths, truncated=truncated).total
    present = worth[~np.isnan(worth)]
    reward = {"eval/reward": float(present.mean())} if len(present) else {}
    of_problems = worth.reshape(-1, group_size)
    of_problems = of_problems[~np.isnan(of_problems).all(1)]
    reward |= standard_error("eval/reward", np.nanmean(of_problems, axis=1)) if len(of_problems) else {}
    return {**reward, "eval/mean_length": float(np.mean(lengths))}


def mean_over_tasks(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures of each task as ``eval/<task>/...``, and under their own names the mean of the tasks that have them.

    A standard error is that of this mean.

    Args:
        found: what ``held_out`` told of each.
    """
    names = dict.fromkeys(name for metrics in found.values() for name in metrics)
    means = {}
    for name in names:
        values = np.array([each[name] for each in found.values() if name in each])
        # The tasks' problems are drawn apart: variances of their means add up.
        means[name] = float(np.sqrt((values**2).sum()) / len(values) if name.endswith(STDERR) else values.mean())
    apart = {
        f"eval/{task}/{name.removeprefix('eval/')}": value
        for task, metrics in found.items()
        for name, value in metrics.items()
    }
    return means | apart
