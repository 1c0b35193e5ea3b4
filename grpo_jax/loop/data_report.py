"""Checks of a dataset before training, run by ``check_data.py``; each returns ``Finding``s."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.messages import Messages
from grpo_jax.data.preferences import Preference
from grpo_jax.data.problems import OTHER_ANSWERS, Problem
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.data.statistics import prompt_key
from grpo_jax.rewards.code.test_cases import why_untestable
from grpo_jax.rewards.math.answer import gold_answer
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.rewards.math.reward import math_reward, question_contains_answer
from grpo_jax.rewards.thought import after_thought

Grader = Literal["math", "exact", "code", "none"]
MAX_EXAMPLES = 50
MIN_ROWS_FOR_SHARES = 20
"""Minimum number of rows for findings about shares."""


@dataclass(frozen=True)
class Example:
    """A row of a finding.

    Attributes:
        where: location of the row, such as ``data.jsonl:3``.
        text: the problem with the row, or the text in question.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Finding:
    """Rows that share a problem.

    Attributes:
        name: a short name, such as ``duplicates``.
        explanation: the problem, as a predicate of the rows, and its consequence for training.
        count: number of rows with the problem.
        rows: number of rows checked.
        examples: the first ``MAX_EXAMPLES`` of them.
        is_fault: whether the rows are useless or misleading; False for information.
    """

    name: str
    explanation: str
    count: int
    rows: int
    examples: list[Example]
    is_fault: bool = True


def finding(
    name: str, explanation: str, examples: Iterable[Example], rows: int, *, is_fault: bool = True
) -> list[Finding]:
    """A list with the finding; empty without examples.

    Args:
        name, explanation, rows, is_fault: as for ``Finding``.
        examples: all examples; the finding counts them and keeps the first ``MAX_EXAMPLES``.
    """
    examples = list(examples)
    if not examples:
        return []
    return [Finding(name, explanation, len(examples), rows, examples[:MAX_EXAMPLES], is_fault)]


def check_problems(problems: Sequence[tuple[str, Problem]], grader: Grader) -> list[Finding]:
    """Findings in problems for reinforcement learning.

    Args:
        problems: ``(where, problem)`` for each row.
        grader: grader of the completions.
    """
    checks: dict[str, Callable[[Sequence[tuple[str, Problem]]], list[Finding]]] = {
        "math": _check_math,
        "exact": _check_exact,
        "code": _check_code,
        "none": lambda _: [],
    }
    keys = [(where, prompt_key(problem.prompt)) for where, problem in problems]
    answers = [problem.answer if grader in ("math", "exact") else None for _, problem in problems]
    same = _same_gold if grader == "math" else lambda a, b: a == b
    return [
        *check_duplicates(keys, "the prompt of an earlier row (case and blanks aside)"),
        *_check_contradictions(keys, answers, same),
        *checks[grader](problems),
    ]


def check_duplicates(keys: Sequence[tuple[str, str]], what: str) -> list[Finding]:
    """Rows with the key of an earlier row.

    Args:
        keys: ``(where, key)`` for each row.
        what: the repeated part of the rows, for the explanation.
    """
    first: dict[str, str] = {}
    repeated = [
        Example(where, f"as {first[key]}: {key}") for where, key in keys if first.setdefault(key, where) != where
    ]
    explanation = f"repeat {what}; they count several times in training"
    return finding("duplicates", explanation, repeated, len(keys), is_fault=False)


def check_leaks(training: Iterable[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> list[Finding]:
    """Held-out rows with the key of a training row.

    Args:
        training: ``(where, key)`` for each training row.
        held_out: ``(where, key)`` for each held-out row.
    """
    first = {key: where for where, key in reversed([*training])}
    leaked = [Example(where, f"as {first[key]}: {key}") for where, key in held_out if key in first]
    return finding(
        "leaks",
        "are trained on and held out (case and blanks aside); training leaves them out of evaluation",
        leaked,
        len(held_out),
    )


def check_prompt_lengths(
    prompts: Sequence[tuple[str, str | Messages, dict[str, Any]]],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    **rendering: Any,
) -> list[Finding]:
    """Prompts of more than ``max_prompt_length`` tokens.

    Args:
        prompts: ``(where, prompt, columns)`` for each row.
        tokenizer: a transformers tokenizer.
        max_prompt_length: in tokens.
        rendering: further arguments of ``prompts.encode_prompts``.

    Raises:
        ValueError: as ``prompts.encode_prompts``.
    """
    lengths = [len(ids) for ids in encode_prompts([prompt for _, prompt, _ in prompts], tokenizer, **rendering)]
    too_long = [
        Example(where, f"{length} tokens")
        for (where, _, _), length in zip(prompts, lengths, strict=True)
        if length > max_prompt_length
    ]
    explanation = f"have prompts of more than max_prompt_length = {max_prompt_length} tokens; training drops them"
    return finding("long prompts", explanation, too_long, len(prompts))


def check_demonstrations(demonstrations: Sequence[Demonstration]) -> list[Finding]:
    """Findings in demonstrations for SFT.

    A column ``answer`` is read as the row's gold answer.
    """
    keys = [(row.where, f"{prompt_key(row.prompt)}\n{prompt_key(row.completion)}") for row in demonstrations]
    wrong, unfinished = [], []
    for row in demonstrations:
        if after_thought("", row.completion) is None:
            unfinished.append(Example(row.where, _short(row.completion[-200:])))
            continue
        answer = row.columns.get("answer")
        if isinstance(answer, (str, int, float)) and math_reward([""], [row.completion], answer=[str(answer)]) == [0]:
            wrong.append(Example(row.where, f"answer {answer!r:.60}, completion ...{_short(row.completion[-120:])}"))
    rows = len(demonstrations)
    return [
        *check_duplicates(keys, "the prompt and completion of an earlier row (case and blanks aside)"),
        *finding("unfinished thoughts", "begin a <think> that does not end", unfinished, rows),
        *finding("wrong completions", "have a final answer that is not the one in the column answer", wrong, rows),
    ]


def check_preferences(preferences: Sequence[Preference]) -> list[Finding]:
    """Findings in preferences for DPO and reward models.

    A column ``margin``, or the difference of ``score_chosen`` and ``score_rejected``, is the strength of a preference.
    """
    rows = len(preferences)
    pairs = [tuple(map(prompt_key, (row.prompt, row.chosen, row.rejected))) for row in preferences]
    keys = [(row.where, "\n".join(pair)) for row, pair in zip(preferences, pairs, strict=True)]
    first: dict[tuple[str, ...], str] = {}
    opposite, weak, equal = [], [], []
    longer = 0
    for row, (prompt, chosen, rejected) in zip(preferences, pairs, strict=True):
        first.setdefault((prompt, chosen, rejected), row.where)
        if chosen == rejected:
            equal.append(Example(row.where, _short(row.chosen)))
        elif (prompt, rejected, chosen) in first:
            opposite.append(Example(row.where, f"as {first[prompt, rejected, chosen]}: {_short(row.chosen)}"))
        strength = strength_of(row)
        if strength is not None and strength <= 0:
            weak.append(Example(row.where, f"by {strength:g}: {_short(row.chosen)}"))
        longer += len(row.chosen) > len(row.rejected)
    majority = max(longer, rows - longer) if rows >= MIN_ROWS_FOR_SHARES else 0
    side = "longer" if 2 * longer > rows else "shorter"
    examples = [Example("all rows", f"{majority} of {rows}")] if majority >= 0.7 * rows > 0 else []
    return [
        *check_duplicates(keys, "an earlier row (case and blanks aside)"),
        *finding("equal pairs", "chosen and rejected differ in case and blanks only", equal, rows),
        *finding(
            "contradictions",
            "reject what an earlier row chooses for the same prompt, and choose what it rejects",
            opposite,
            rows,
        ),
        *finding("weak preferences", "have a margin, or a difference of scores, that is not above 0", weak, rows),
        *finding(
            "length",
            f"the chosen completion is {side}: length alone separates most pairs",
            examples,
            rows,
            is_fault=False,
        ),
    ]


def strength_of(preference: Preference) -> float | None:
    """Margin of the chosen completion, from ``margin`` or the two scores; None without them."""
    chosen, rejected = (preference.columns.get(f"score_{side}") for side in ("chosen", "rejected"))
    if preference.margin is None and isinstance(chosen, (int, float)) and isinstance(rejected, (int, float)):
        return chosen - rejected
    return preference.margin


def _short(text: str | Messages, limit: int = 120) -> str:
    """A text, or the last message of a conversation, on one line of at most ``limit`` characters and an ellipsis."""
    if not isinstance(text, str):
        text = str(text[-1].get("content") or "")
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + "..."


def _same_gold(answer: str, other: str) -> bool:
    """Whether two gold answers are mathematically equal, or the same text where they cannot be parsed."""
    return answer == other or math_reward([""], [boxed(other)], answer=[answer]) == [1]


def boxed(answer: str) -> str:
    """A completion with ``answer`` as its final answer."""
    return f"\\boxed{{{gold_answer(answer)}}}"


# Checks of problems ---------------------------------------------------------------------------------------------------


def _check_contradictions(
    keys: Sequence[tuple[str, str]], answers: Sequence[str | None], same: Callable[[str, str], bool]
) -> list[Finding]:
    first: dict[str, tuple[str, str]] = {}
    contradictions = []
    for (where, key), answer in zip(keys, answers, strict=True):
        if answer is None:
            continue
        other_where, other = first.setdefault(key, (where, answer))
        if other != answer and not same(other, answer):
            contradictions.append(Example(where, f"{answer!r:.60}, and {other!r:.60} in {other_where}"))
    explanation = "contradict the answer of an earlier row with the same prompt; one of the two is wrong"
    return finding("contradictions", explanation, contradictions, len(keys))


def _check_math(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    unread, unequal, copied = [], [], []
    for where, problem in problems:
        for answer in golds(problem):
            if read_answer(gold_answer(answer)) is None:
                unread.append(Example(where, _short(answer)))
                continue
            score = math_reward([""], [boxed(answer)], answer=[answer])[0]
            if score != 1:
                unequal.append(Example(where, f"{_short(answer)} ({'scored wrong' if score == 0 else 'not graded'})"))
            elif question_contains_answer(text_of(problem), gold_answer(answer)):
                copied.append(Example(where, f"{_short(answer)} in: {_short(problem.prompt)}"))
    rows = len(problems)
    return [
        *_without_answer(problems),
        *finding(
            "unreadable answers",
            "have an answer that the grader math cannot parse: their completions get no score",
            unread,
            rows,
        ),
        *finding(
            "ungradable answers",
            "have an answer that does not equal itself, such as an identity: no completion is right",
            unequal,
            rows,
        ),
        *finding(
            "answers in the question",
            "have an answer that occurs in the question: copying it is right. Require a format, or drop them",
            copied,
            rows,
        ),
        *_check_variety(problems),
    ]


def _check_exact(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    return [*_without_answer(problems), *_check_variety(problems)]


def _check_code(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    missing, untestable = [], []
    for where, problem in problems:
        tests = problem.columns.get("tests")
        if not tests:
            missing.append(Example(where, _short(problem.prompt)))
        elif (reason := why_untestable(tests)) is not None:
            untestable.append(Example(where, _short(reason, 200)))
    rows = len(problems)
    return [
        *finding("missing tests", "have no tests: their programs get no score", missing, rows),
        *finding("tests that say nothing", "have tests that cannot fail or cannot run", untestable, rows),
    ]


def _without_answer(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    missing = [Example(where, _short(problem.prompt)) for where, problem in problems if not any(golds(problem))]
    return finding("missing answers", "have no answer: their completions get no score", missing, len(problems))


def _check_variety(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    answers = [problem.answer for _, problem in problems if problem.answer is not None]
    if len(answers) < MIN_ROWS_FOR_SHARES:
        return []
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count <= len(answers):
        return []
    example = Example("all rows", f"{_short(answer)} in {count} of {len(answers)}")
    return finding("one answer", "always giving the same answer is right in most rows", [example], len(problems))


def golds(problem: Problem) -> Iterator[str]:
    """The gold answers of a problem."""
    if problem.answer is not None:
        yield problem.answer
        yield from problem.columns.get(OTHER_ANSWERS) or []


def text_of(problem: Problem) -> str:
    """The text of a problem's prompt."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(turn["content"] for turn in problem.prompt if isinstance(turn.get("content"), str))
