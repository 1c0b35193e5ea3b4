"""A task at run time: encoded problems, graders, scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import TaskConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import R1_ZERO
from grpo_jax.data.statistics import DataStatistics
from grpo_jax.data.turns import check_turn_end
from grpo_jax.hosts import is_main
from grpo_jax.loop.problems import encode_problems, load_evaluation_problems, load_problem_sets, same_answers_of
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.loop.run import Run
from grpo_jax.loop.same_start import check_same
from grpo_jax.loop.scoring import open_scorer
from grpo_jax.models import Pretrained
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.tasks.generated import TASKS

ProblemSet = Literal["training", "held_out", "evaluation"]
"""Training problems, held-out problems, or the problems of an evaluation."""
COMPLETION_COLUMNS = ("completion_length", "truncated")
"""Columns that describe a completion rather than its problem."""


def asks_for_format(data: DataConfig) -> bool:
    """Whether the prompts ask for ``<think>...</think><answer>...</answer>``."""
    task = TASKS.get(data.dataset or "")
    if task is not None:
        return task.asks_for_format
    instructions = data.system_prompt if data.chat_template else data.template or R1_ZERO
    return instructions is not None and "<answer>" in instructions


def has_final_answers(data: DataConfig, problems: Sequence[Problem]) -> bool:
    """Whether completions end in a short answer, so that majority votes are defined: not for code or without grader.

    Args:
        data: dataset and grader.
        problems: the problems.
    """
    is_code = data.grader == "code" or (data.grader == "auto" and any("tests" in row.columns for row in problems))
    answered = any(problem.answer is not None for problem in problems)
    task = TASKS.get(data.dataset or "")
    is_voted = task is None or task.has_final_answers
    return answered and not is_code and data.grader != "none" and is_voted


class TaskRuntime:
    """Problems and scorer of a task.

    Attributes:
        name: name of the task; None if it is the run's only one.
        problems, held_out: encoded problems; available after ``encode``.
        scorer: scores completions; closed with the run.
        is_graded: whether an accuracy reward exists.
        has_final_answers: whether completions end in a short answer, so that majority votes are defined.
        same: equality of two answers in a majority vote.
        prompt_format: prompt format in effect, as in ``data.prompt_format``; available after ``encode``.

    Args:
        task: data and reward settings.
        run: the run; its folder receives the data statistics, and it closes the scorer.
        seed: seed of generated problems.
        max_completion_length: in tokens.
        mesh: mesh over which a reward model is sharded.
        dtype: computation dtype of a reward model.
        measures_format: measure the format reward even where the prompts do not ask for it and it has no weight.
        problem_set: problems whose completions ``scorer.score`` will get. With ``evaluation``, ``problems`` and
            ``held_out`` are both those of ``load_evaluation_problems``.

    Raises:
        ValueError: problems or rewards cannot be loaded or are incompatible.
    """

    problems: EncodedProblems
    held_out: EncodedProblems
    prompt_format: dict[str, Any]

    def __init__(
        self,
        task: TaskConfig,
        run: Run,
        *,
        seed: int,
        max_completion_length: int,
        mesh: Mesh,
        dtype: Any,
        problem_set: ProblemSet = "training",
        measures_format: bool = False,
    ):
        self.name, self._task, self._run = task.name, task, run
        self.is_graded = task.data.grader != "none"
        self.same = same_answers_of(task.data)
        if not self.is_graded and (task.rewards.accuracy_weight or task.rewards.gate_on_format):
            raise ValueError("grader is none, so there is no accuracy reward; set accuracy_weight to 0")
        stats = DataStatistics()
        if problem_set == "evaluation":
            self._problems, accuracy = load_evaluation_problems(task.data, stats)
            self._held_out, held_out_accuracy = self._problems, accuracy
        else:
            self._problems, self._held_out, accuracy, held_out_accuracy = load_problem_sets(task.data, seed, stats)
        stats.report(run.say, run.folder / ("data.json" if task.name is None else f"data-{task.name}.json"))
        run.stop_if_requested()
        self.has_final_answers = has_final_answers(task.data, self._problems)
        self.columns = frozenset(reward_columns(self._problems)) | {*COMPLETION_COLUMNS}
        self.scorer: Scorer = run.enter(
            open_scorer(
                task.rewards,
                accuracy if problem_set == "training" else held_out_accuracy,
                held_out_accuracy,
                max_completion_length=max_completion_length,
                needs_pool=task.data.dataset not in TASKS,
                mesh=mesh,
                dtype=dtype,
                today=run.start_date,
                show=run.say if is_main() else print,
                measures_format=measures_format or asks_for_format(task.data),
            )
        )
        scored = self._problems if problem_set == "training" else self._held_out
        self.scorer.probe(_first_row(scored), _first_row(self._held_out))

    def encode(self, policy: Pretrained, *, max_prompt_length: int, first: int = 0, first_held_out: int = 0) -> None:
        """Render and tokenize the problems.

        Args:
            policy: its tokenizer, and its prompt format as the default.
            max_prompt_length: in tokens.
            first, first_held_out: index of the first problem of each list, from which the sampling noise is derived.

        Raises:
            ValueError: as ``EncodedProblems``; or no stop token of the policy ends a turn of its chat template.
        """
        prefix = "" if self.name is None else f"{self.name}: "
        rendering = resolve_rendering(
            self._task.data, policy, say=lambda text: self._run.say(prefix + text), today=self._run.start_date
        )
        self.prompt_format = prompt_format_of(rendering, policy.tokenizer)
        first_problem = self._problems[0]
        check_turn_end(policy.tokenizer, policy.eos_ids, first_problem.prompt, first_problem.columns, **rendering)

        def encoded(problems: list[Problem], first_index: int) -> EncodedProblems:
            result = encode_problems(
                self._task.data,
                problems,
                policy.tokenizer,
                pad_id=policy.pad_id,
                max_prompt_length=max_prompt_length,
                rendering=rendering,
                first_index=first_index,
            )
            if result.dropped:
                self._run.say(f"{result.dropped} of {len(problems)} prompts dropped: over {max_prompt_length} tokens")
            return result

        self.problems = encoded(self._problems, first)
        is_same = self._held_out is self._problems
        self.held_out = self.problems if is_same else encoded(self._held_out, first_held_out)
        if jax.process_count() > 1:
            digests = {"problems": self.problems.digest, "held_out": self.held_out.digest}
            check_same("has other problems or tokens than", digests)

    def facts(self) -> dict[str, str]:
        """Rows, columns and rewards for the run's header; requires ``encode``."""
        data, weights = self._task.data, self.scorer.weights
        dropped = self.problems.dropped + self.held_out.dropped
        left_out = f"; {dropped} left out, with prompts that are too long" if dropped else ""
        first = self.problems.problems[0]
        prompt = data.prompt_column or "the one found by its name"
        answer = "none" if first.answer is None else data.answer_column or "the one found by its name"
        others = sorted(first.columns)
        return {
            "data": f"{data.dataset}: {len(self.problems)} problems to train on, "
            f"{len(self.held_out)} held out{left_out}",
            "columns": f"prompt: {prompt}; answer: {answer}; for rewards: {', '.join(others) or 'no others'}",
            "rewards": ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
        }


def _first_row(problems: list[Problem]) -> dict[str, Any]:
    """Columns of the first problem, one value each."""
    return {name: values[0] for name, values in reward_columns(problems[:1]).items()}
