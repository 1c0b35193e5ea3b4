"""A task that is ready to be sampled for and scored: problems as prompts, graders, rewards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import TaskConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import R1_ZERO
from grpo_jax.data.statistics import DataStatistics
from grpo_jax.data.turns import check_turn_end
from grpo_jax.loop.problems import encode_problems, load_evaluation_problems, load_problem_sets, same_answers_of
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.loop.run import Run
from grpo_jax.loop.scoring import open_scorer
from grpo_jax.models import Pretrained
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.tasks.generated import TASKS

Asked = Literal["training", "held_out", "evaluation"]
"""Problems of a task that completions are sampled for."""
OF_COMPLETIONS = ("completion_length", "truncated")
"""Columns that are of no problem but of what was drawn for it."""


def asks_for_format(data: DataConfig) -> bool:
    """Whether completions should have the form ``<think>...</think><answer>...</answer>``: the prompt asks for it."""
    task = TASKS.get(data.dataset or "")
    if task is not None:
        return task.asks_for_format
    asked = data.system_prompt if data.chat_template else data.template or R1_ZERO
    return asked is not None and "<answer>" in asked


def has_final_answers(data: DataConfig, problems: Sequence[Problem]) -> bool:
    """Whether completions of these problems end in an answer that votes can be counted by, rather than being one."""
    is_code = data.grader == "code" or (data.grader == "auto" and any("tests" in each.columns for each in problems))
    answered = any(each.answer is not None for each in problems)
    task = TASKS.get(data.dataset or "")
    is_voted = task is None or task.has_final_answers
    return answered and not is_code and data.grader != "none" and is_voted


class TaskRuntime:
    """A task that is ready to be asked and scored.

    Attributes:
        name: of the task.
        problems, held_out: lists of problems, until ``encode`` made prompts of them.
        scorer: scores completions; closed with the run.
        is_graded: whether anything tells a right completion.
        has_final_answers: whether its completions end in an answer, so that there is a majority vote.
        same: whether two answers are the same for a majority vote.
        prompt_format: how prompts are made, once ``encode`` was called; see ``data.prompt_format``.

    Args:
        task: which.
        run: that it is for.
        seed: of what is drawn.
        max_completion_length: in tokens.
        mesh: that a reward model is split over.
        dtype: the precision a reward model computes in.
        measured: parts of the reward that are measured in any case; without it, the format is where it is asked for
            or paid for.
        asked: the problems whose completions ``scorer.score`` will get: those to train on, those held out from them,
            or those of ``DataConfig.load_for_evaluation``, which are then ``problems`` and ``held_out`` alike.

    Raises:
        ValueError: problems or rewards that cannot be had, or do not fit each other.
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
        asked: Asked = "training",
        measured: Collection[str] = (),
    ):
        self.name, self._task, self._run = task.name, task, run
        self.is_graded = task.data.grader != "none"
        self.same = same_answers_of(task.data)
        if not self.is_graded and (task.rewards.accuracy_weight or task.rewards.gate_on_format):
            raise ValueError("grader is none, so that there is no accuracy to be paid for; set accuracy_weight to 0")
        stats = DataStatistics()
        if asked == "evaluation":
            self._problems, accuracy = load_evaluation_problems(task.data, stats)
            self._held_out, held_out_accuracy = self._problems, accuracy
        else:
            self._problems, self._held_out, accuracy, held_out_accuracy = load_problem_sets(task.data, seed, stats)
        stats.report(run.say, run.folder / ("data.json" if task.name is None else f"data-{task.name}.json"))
        run.stop_if_requested()
        self.has_final_answers = has_final_answers(task.data, self._problems)
        self.columns = frozenset(reward_columns(self._problems)) | {*OF_COMPLETIONS}
        self.scorer: Scorer = run.enter(
            open_scorer(
                task.rewards,
                accuracy if asked == "training" else held_out_accuracy,
                held_out_accuracy,
                max_completion_length=max_completion_length,
                needs_pool=task.data.dataset not in TASKS,
                mesh=mesh,
                dtype=dtype,
                today=run.begun,
                show=run.say,
                measures_format="format" in measured or asks_for_format(task.data),
            )
        )
        scored = self._problems if asked == "training" else self._held_out
        self.scorer.probe(_first_row(scored), _first_row(self._held_out))

    def encode(self, policy: Pretrained, *, max_prompt_length: int, first: int = 0, first_held_out: int = 0) -> None:
        """Make prompts of the problems.

        Args:
            policy: whose tokens they are made of, and whose prompt format is the default.
            max_prompt_length: in tokens.
            first, first_held_out: what the prompts' noise is counted from.

        Raises:
            ValueError: as ``EncodedProblems``; and the policy does not stop where its chat template ends a turn.
        """
        of_task = "" if self.name is None else f"{self.name}: "
        rendering = resolve_rendering(
            self._task.data, policy, say=lambda text: self._run.say(of_task + text), today=self._run.begun
        )
        self.prompt_format = prompt_format_of(rendering, policy.tokenizer)
        first_problem = self._problems[0]
        check_turn_end(policy.tokenizer, policy.eos_ids, first_problem.prompt, first_problem.columns, **rendering)

        def encoded(problems: list[Problem], first_index: int) -> EncodedProblems:
            found = encode_problems(
                self._task.data,
                problems,
                policy.tokenizer,
                pad_id=policy.pad_id,
                max_prompt_length=max_prompt_length,
                rendering=rendering,
                first_index=first_index,
            )
            if found.dropped:
                self._run.say(f"{found.dropped} of {len(problems)} prompts dropped: over {max_prompt_length} tokens")
            return found

        self.problems = encoded(self._problems, first)
        is_same = self._held_out is self._problems
        self.held_out = self.problems if is_same else encoded(self._held_out, first_held_out)

    def facts(self) -> dict[str, str]:
        """Rows, columns and rewards, for a run's first lines; call it after ``encode``."""
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
    """The columns of a first problem, one value each."""
    return {name: values[0] for name, values in reward_columns(problems[:1]).items()}
