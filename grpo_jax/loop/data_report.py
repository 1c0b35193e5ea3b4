"""Faults of a data set, found before anything is trained on it. Functions of rows; ``check_data.py`` runs them.

Each check gives a ``Finding``: how many rows, which, and why it matters.
"""

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
MOST_EXAMPLES = 50
FEWEST_FOR_SHARES = 20
"""Shares of fewer rows say nothing."""


@dataclass(frozen=True)
class Example:
    """A row of a finding.

    Attributes:
        where: its place, such as ``data.jsonl:3``.
        text: what is wrong there, or the text that it is about.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Finding:
    """Rows that have something in common.

    Attributes:
        name: a short name, such as ``duplicates``.
        explanation: what the rows have in common, and what follows for training.
        count: how many rows.
        rows: how many were looked at.
        examples: the first of them, at most ``MOST_EXAMPLES``.
        is_fault: whether it makes rows useless or misleading, rather than being good to know.
    """

    name: str
    explanation: str
    count: int
    rows: int
    examples: list[Example]
    is_fault: bool = True


def finding(
    name: str, explanation: str, found: Iterable[Example], rows: int, *, is_fault: bool = True
) -> list[Finding]:
    """A list of the finding; empty where no row is found."""
    examples = list(found)
    if not examples:
        return []
    return [Finding(name, explanation, len(examples), rows, examples[:MOST_EXAMPLES], is_fault)]


def check_problems(problems: Sequence[tuple[str, Problem]], grader: Grader) -> list[Finding]:
    """The faults of problems for reinforcement learning.

    Args:
        problems: each after its place.
        grader: what grades their completions.
    """
    checks: dict[str, Callable[[Sequence[tuple[str, Problem]]], list[Finding]]] = {
        "math": _check_math,
        "exact": _check_exact,
        "code": _check_code,
        "none": lambda _: [],
    }
    keys = [(where, prompt_key(problem.prompt)) for where, problem in problems]
    answers = [problem.answer if grader in ("math", "exact") else None for _, problem in problems]
    same = same_gold if grader == "math" else lambda a, b: a == b
    return [
        *check_duplicates(keys, "the prompt of an earlier row (case and blanks aside)"),
        *_check_contradictions(keys, answers, same),
        *checks[grader](problems),
    ]


def check_duplicates(keys: Sequence[tuple[str, str]], what: str) -> list[Finding]:
    """Rows whose key an earlier row has.

    Args:
        keys: for each row its place and key.
        what: they repeat, in words.
    """
    first: dict[str, str] = {}
    found = [Example(where, f"as {first[key]}: {key}") for where, key in keys if first.setdefault(key, where) != where]
    explanation = f"repeat {what}; they count several times in training"
    return finding("duplicates", explanation, found, len(keys), is_fault=False)


def check_leaks(trained_on: Iterable[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> list[Finding]:
    """Held-out rows whose key a training row has.

    Args:
        trained_on: place and key of each training row.
        held_out: place and key of each held-out row.
    """
    first = {key: where for where, key in reversed([*trained_on])}
    found = [Example(where, f"as {first[key]}: {key}") for where, key in held_out if key in first]
    return finding(
        "leaks",
        "are trained on and held out (case and blanks aside); training leaves them out of evaluation",
        found,
        len(held_out),
    )


def check_prompt_lengths(
    prompts: Sequence[tuple[str, str | Messages, dict[str, Any]]],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    **rendering: Any,
) -> list[Finding]:
    """Prompts that take more tokens than ``max_prompt_length``.

    Args:
        prompts: the place, prompt and columns of each row.
        tokenizer: a transformers tokenizer.
        max_prompt_length: in tokens.
        rendering: as of ``prompts.encode_prompts``.

    Raises:
        ValueError: as ``prompts.encode_prompts``.
    """
    lengths = [len(ids) for ids in encode_prompts([prompt for _, prompt, _ in prompts], tokenizer, **rendering)]
    found = [
        Example(where, f"{length} tokens")
        for (where, _, _), length in zip(prompts, lengths, strict=True)
        if length > max_prompt_length
    ]
    explanation = f"have prompts of more than max_prompt_length = {max_prompt_length} tokens; training drops them"
    return finding("long prompts", explanation, found, len(prompts))


def check_demonstrations(demonstrations: Sequence[Demonstration]) -> list[Finding]:
    """The faults of demonstrations for supervised training.

    A column ``answer`` is taken as the gold answer of its row.
    """
    keys = [(each.where, f"{prompt_key(each.prompt)}\n{prompt_key(each.completion)}") for each in demonstrations]
    wrong, unfinished = [], []
    for each in demonstrations:
        if after_thought("", each.completion) is None:
            unfinished.append(Example(each.where, short(each.completion[-200:])))
            continue
        answer = each.columns.get("answer")
        if isinstance(answer, (str, int, float)) and math_reward([""], [each.completion], answer=[str(answer)]) == [0]:
            wrong.append(Example(each.where, f"answer {answer!r:.60}, completion ...{short(each.completion[-120:])}"))
    rows = len(demonstrations)
    return [
        *check_duplicates(keys, "the prompt and completion of an earlier row (case and blanks aside)"),
        *finding("unfinished thoughts", "begin a <think> that does not end", unfinished, rows),
        *finding("wrong completions", "have a final answer that is not the one in the column answer", wrong, rows),
    ]


def check_preferences(preferences: Sequence[Preference]) -> list[Finding]:
    """The faults of preferences for DPO and reward models.

    Columns ``margin``, or ``score_chosen`` and ``score_rejected``, are taken as the strength of a preference.
    """
    rows = len(preferences)
    pairs = [tuple(map(prompt_key, (each.prompt, each.chosen, each.rejected))) for each in preferences]
    keys = [(each.where, "\n".join(pair)) for each, pair in zip(preferences, pairs, strict=True)]
    first: dict[tuple[str, ...], str] = {}
    opposite, weak, equal = [], [], []
    longer = 0
    for each, (prompt, chosen, rejected) in zip(preferences, pairs, strict=True):
        first.setdefault((prompt, chosen, rejected), each.where)
        if chosen == rejected:
            equal.append(Example(each.where, short(each.chosen)))
        elif (prompt, rejected, chosen) in first:
            opposite.append(Example(each.where, f"as {first[prompt, rejected, chosen]}: {short(each.chosen)}"))
        strength = strength_of(each)
        if strength is not None and strength <= 0:
            weak.append(Example(each.where, f"by {strength:g}: {short(each.chosen)}"))
        longer += len(each.chosen) > len(each.rejected)
    one_sided = max(longer, rows - longer) if rows >= FEWEST_FOR_SHARES else 0
    side = "longer" if 2 * longer > rows else "shorter"
    examples = [Example("all rows", f"{one_sided} of {rows}")] if one_sided >= 0.7 * rows > 0 else []
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
            f"the chosen completion is {side}: length alone tells most pairs apart",
            examples,
            rows,
            is_fault=False,
        ),
    ]


def strength_of(preference: Preference) -> float | None:
    """By how much the chosen completion is better, where a row says it."""
    chosen, rejected = (preference.columns.get(f"score_{side}") for side in ("chosen", "rejected"))
    if preference.margin is None and isinstance(chosen, (int, float)) and isinstance(rejected, (int, float)):
        return chosen - rejected
    return preference.margin


def short(text: str | Messages, limit: int = 120) -> str:
    """A text, or the last message of a conversation, on one line and cut."""
    if not isinstance(text, str):
        text = str(text[-1].get("content") or "")
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + "..."


def same_gold(answer: str, other: str) -> bool:
    """Whether two gold answers are equal as mathematics; those that cannot be read, whether they are the same text."""
    return answer == other or math_reward([""], [boxed(other)], answer=[answer]) == [1]


def boxed(answer: str) -> str:
    """A completion with this final answer."""
    return f"\\boxed{{{gold_answer(answer)}}}"


# Checks of problems ---------------------------------------------------------------------------------------------------


def _check_contradictions(
    keys: Sequence[tuple[str, str]], answers: Sequence[str | None], same: Callable[[str, str], bool]
) -> list[Finding]:
    first: dict[str, tuple[str, str]] = {}
    found = []
    for (where, key), answer in zip(keys, answers, strict=True):
        if answer is None:
            continue
        other_where, other = first.setdefault(key, (where, answer))
        if other != answer and not same(other, answer):
            found.append(Example(where, f"{answer!r:.60}, and {other!r:.60} in {other_where}"))
    explanation = "have another answer than an earlier row with the same prompt; one of the two is wrong"
    return finding("contradictions", explanation, found, len(keys))


def _check_math(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    unread, unequal, copied = [], [], []
    for where, problem in problems:
        for answer in golds(problem):
            if read_answer(gold_answer(answer)) is None:
                unread.append(Example(where, short(answer)))
                continue
            score = math_reward([""], [boxed(answer)], answer=[answer])[0]
            if score != 1:
                unequal.append(Example(where, f"{short(answer)} ({'scored wrong' if score == 0 else 'not graded'})"))
            elif question_contains_answer(text_of(problem), gold_answer(answer)):
                copied.append(Example(where, f"{short(answer)} in: {short(problem.prompt)}"))
    rows = len(problems)
    return [
        *_without_answer(problems),
        *finding("unreadable answers", "have an answer that the grader math cannot read: no score, ever", unread, rows),
        *finding(
            "ungradable answers",
            "have an answer that does not equal itself, such as an identity: no completion is right",
            unequal,
            rows,
        ),
        *finding(
            "answers in the question",
            "have an answer that stands in the question: copying it is right. Ask for a form, or drop them",
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
            missing.append(Example(where, short(problem.prompt)))
        elif (reason := why_untestable(tests)) is not None:
            untestable.append(Example(where, short(reason, 200)))
    rows = len(problems)
    return [
        *finding("missing tests", "have no tests: their programs get no score", missing, rows),
        *finding("tests that say nothing", "have tests that cannot fail or cannot run", untestable, rows),
    ]


def _without_answer(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    found = [Example(where, short(problem.prompt)) for where, problem in problems if not any(golds(problem))]
    return finding("missing answers", "have no answer: their completions get no score", found, len(problems))


def _check_variety(problems: Sequence[tuple[str, Problem]]) -> list[Finding]:
    answers = [problem.answer for _, problem in problems if problem.answer is not None]
    if len(answers) < FEWEST_FOR_SHARES:
        return []
    answer, count = Counter(answers).most_common(1)[0]
    if 2 * count <= len(answers):
        return []
    example = Example("all rows", f"{short(answer)} in {count} of {len(answers)}")
    return finding("one answer", "the same answer, always given, is right in most rows", [example], len(problems))


def golds(problem: Problem) -> Iterator[str]:
    """The right answers of a problem."""
    if problem.answer is not None:
        yield problem.answer
        yield from problem.columns.get(OTHER_ANSWERS) or []


def text_of(problem: Problem) -> str:
    """What a problem asks, as text."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return "\n".join(each["content"] for each in problem.prompt if isinstance(each.get("content"), str))
