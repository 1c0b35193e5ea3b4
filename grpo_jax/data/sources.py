"""Problems from a local file, a folder or the Hugging Face hub: one row, one problem."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpo_jax.data.files import Row, Rows, read_rows
from grpo_jax.data.layouts import (
    answer_column_of,
    check_length,
    choice_answer,
    prompt_column_of,
    prompt_of,
    required_column,
    without,
)
from grpo_jax.data.messages import Messages, checked_messages, is_message
from grpo_jax.rewards.answer import GSM8K_MARK, worked_answer
from grpo_jax.rewards.code_tests import Test, tests_from_row

OTHER_ANSWERS = "other_answers"
"""The column with the right answers after the first, where a row has several."""
TEST_COLUMNS = (
    *("test", "test_list", "challenge_test_list", "test_cases", "input_output", "verification_info"),
    *("public_test_cases", "private_test_cases", "public_tests", "private_tests", "generated_tests"),
)
"""Columns that ``tests`` takes the place of."""
WITH_TESTS = frozenset({*TEST_COLUMNS, "tests", "reward_model", "ground_truth", "extra_info"})
"""Columns that may hold tests."""
NUMBER_AT_END = re.compile(r"####[ ]?([-+]?\d[\d,]*(?:\.\d+)?)\s*\Z")
PROMPT = "problem_prompt"
"""The column with which rewards get a problem's own prompt, before any template."""
REWARD_ARGUMENTS = ("prompts", "completions", PROMPT)
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Problem:
    """One problem: what is asked, what is right, and what else a reward may want to know.

    Attributes:
        prompt: the question as text, or a conversation as messages with "role" and "content".
        answer: the gold answer; None where the source has none.
        columns: every other column of the row.
    """

    prompt: str | Messages
    answer: str | None
    columns: Row = field(default_factory=dict)


def load_problems(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    require_answer: bool = True,
    skipped: list[str] | None = None,
) -> list[Problem]:
    r"""The problems of a file, of a folder of files, or of a data set on the hub, in any layout of ``docs/data.md``.

    GSM8K and MATH work as they are: where an answer is a worked solution with ``\boxed{...}`` or, without one, with
    ``#### ...`` at its end, the gold answer is what stands there (without its commas, if it is a number with
    thousands), and the whole text is kept as the column ``solution`` unless the row has one of its own.

    Args:
        source: a file, a folder, or the id of a data set on the hub, such as ``openai/gsm8k``; see
            ``files.read_rows``. What exists locally comes first.
        split: the split of a folder or of a data set on the hub, by default "train".
        subset: the configuration of a folder or of a data set on the hub. By default its own default, or else "main".
        prompt_column: the column with the question or the messages, or a path such as ``extra_info.question``. By
            default the only one present of ``question``, ``prompt`` and ``problem``, or the first one present of
            ``layouts.OTHER_PROMPT_COLUMNS``.
        answer_column: the column with the gold answer, or a path such as ``reward_model.ground_truth``: text, a number
            or a truth value, which become text, or a list of answers each of which is right. By default the first one
            present of ``layouts.ANSWER_COLUMNS``.
        require_answer: whether a row needs an answer, unless it has tests of a program; if not, answers that are
            missing or null are None.
        skipped: where given, rows that cannot be read are left out and the reasons are appended to it.

    Returns:
        The problems in the order of the source. Columns named ``prompts``, ``completions`` or ``problem_prompt`` are
        left out of ``columns``: rewards get these from the rollout. Of several right answers, those after the first are
        in the column ``other_answers``. Tests of a program are in the column ``tests``.

    Raises:
        FileNotFoundError: no such file, folder, split or data set.
        KeyError: a column is missing, or cannot be told; the error lists those present.
        ValueError: another kind of file; a split or subset of something that has none; a source without rows; an
            empty, malformed or overlong row. The error names file and line, or row counted from 1.
    """
    placed = load_placed_problems(
        source,
        split=split,
        subset=subset,
        prompt_column=prompt_column,
        answer_column=answer_column,
        require_answer=require_answer,
        skipped=skipped,
    )
    return [problem for _, problem in placed]


def load_placed_problems(
    source: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    require_answer: bool = True,
    skipped: list[str] | None = None,
) -> list[tuple[str, Problem]]:
    """The problems as ``load_problems`` gives them, each after its place, such as ``data.jsonl:3``."""
    columns: tuple[str, str | None] | None = None

    def parse(row: Row, where: str) -> tuple[str, Problem]:
        nonlocal columns
        if columns is None:
            tests = _tests(row, where)
            answers = answer_column or answer_column_of(row, where, required=require_answer and tests is None)
            columns = prompt_column or prompt_column_of(row, where), answers
        return where, _problem(row, where, *columns, require_answer=require_answer)

    problems = parsed_rows(read_rows(source, split, subset, skipped=skipped), parse, skipped)
    if not problems:
        raise ValueError(f"{source} is empty: it has no problems")
    return problems


def reward_columns(problems: Sequence[Problem], *, group_size: int = 1) -> dict[str, list[Any]]:
    """The columns of ``problems`` as rewards take them, ``answer`` first, each row ``group_size`` times in a row.

    ``problem_prompt`` is the problem's own prompt, a text or messages, before any template. A row without a column that
    another row has gets None there.
    """
    names = dict.fromkeys(["answer", *(name for problem in problems for name in problem.columns), PROMPT])
    rows = [
        {**problem.columns, "answer": problem.answer, PROMPT: problem.prompt}
        for problem in problems
        for _ in range(group_size)
    ]
    return {name: [row.get(name) for row in rows] for name in names}


def parsed_rows(rows: Rows, parse: Callable[[Row, str], Parsed], skipped: list[str] | None) -> list[Parsed]:
    """What ``parse`` makes of each row.

    Args:
        rows: as of ``files.read_rows``.
        parse: takes a row and its place.
        skipped: where given, rows that ``parse`` refuses are left out and the reasons are appended to it.

    Raises:
        ValueError: every row is refused; a text has half of a surrogate pair; and what ``parse`` raises, a KeyError or
            ValueError.
    """
    parsed: list[Parsed] = []
    for where, row in rows:
        try:
            _check_characters(row, where)
            parsed.append(parse(row, where))
        except (KeyError, ValueError) as error:
            if skipped is None:
                raise
            skipped.append(str(error.args[0]))
    if skipped and not parsed:
        raise ValueError(f"all {len(skipped)} rows were skipped as unreadable, the first because: {skipped[0]}")
    return parsed


def _check_characters(row: Row, where: str) -> None:
    """Check that all texts can be encoded, which half of a surrogate pair, as JSON can write it, cannot."""
    for name, value in row.items():
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if isinstance(each, str):
                try:
                    each.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"{where}, column {name!r}: its character {error.start} is half of a surrogate pair "
                        f"({each[error.start]!a}), which no tokenizer can encode"
                    ) from error
            elif isinstance(each, dict):
                waiting += each.values()
            elif isinstance(each, (list, tuple)):
                waiting += each


def _problem(row: Row, where: str, prompt_column: str, answer_column: str | None, *, require_answer: bool) -> Problem:
    prompt = prompt_of(row, prompt_column, where)
    place = f"{where}, column {prompt_column!r}"
    check_length(prompt, place)
    prompt = checked_prompt(prompt, place)
    rest = without(row, prompt_column, *REWARD_ARGUMENTS)
    tests = _tests(row, where)
    if tests is not None:
        rest = {**without(rest, *TEST_COLUMNS), "tests": tests}
    if answer_column is None:
        return Problem(prompt, None, rest)
    try:
        answer = required_column(row, answer_column, where, "answer_column=")
        rest.pop(answer_column, None)
        if not require_answer and (answer is None or answer == "" or answer == []):
            return Problem(prompt, None, rest)
        return Problem(prompt, *_gold(row, answer, f"{where}, column {answer_column!r}", rest))
    except (KeyError, ValueError) as error:
        # A program is judged by its tests; its row may hold anything as a solution.
        if tests is None and (require_answer or not isinstance(error, KeyError)):
            raise
        return Problem(prompt, None, rest)


def _gold(row: Row, answer: Any, place: str, rest: Row) -> tuple[str, Row]:
    """The gold answer, and the other columns with what else the answer's column holds."""
    answer = choice_answer(row, answer, place)
    check_length(answer, place)
    if isinstance(answer, list) and answer:
        text, *others = [_checked_answer(each, f"{place}, answer {n}") for n, each in enumerate(answer, 1)]
        rest = {**rest, **({OTHER_ANSWERS: others} if others else {})}
    else:
        text = _checked_answer(answer, place)
    found = _worked_answer(text)
    if found is None:
        return text, rest
    if THOUSANDS.fullmatch(found):
        found = found.replace(",", "")
    if not found:
        empty = "nothing is in the last box" if "boxed" in text else f"nothing follows the last {GSM8K_MARK}"
        raise ValueError(f"{place}: {empty}")
    return found, {"solution": text, **rest}


def _worked_answer(text: str) -> str | None:
    """As ``worked_answer``; the usual ends of texts are recognised without reading them whole, which is slow."""
    if "box" not in text:
        if GSM8K_MARK not in text:
            return None
        number = NUMBER_AT_END.search(text[-40:])
        if number is not None and text.count(GSM8K_MARK) == 1:
            return number[1]
    return worked_answer(text)


def _tests(row: Row, where: str) -> list[Test] | None:
    """The tests of a row's program.

    Raises:
        ValueError: they are there and cannot be read.
    """
    if WITH_TESTS.isdisjoint(row):  # most rows, and asking is slower than reading them
        return None
    try:
        return tests_from_row(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: its tests cannot be read: {error!s:.300}") from error


def checked_prompt(prompt: Any, where: str) -> str | Messages:
    """A question or a conversation, if it is one: its messages with their content as text.

    Raises:
        ValueError: it is neither, or a message has content that is not text; says what stands at that place.
    """
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt):
        return checked_messages(prompt, where)
    raise ValueError(
        f"{where} must be text that is not blank, or messages with a text as role and as content; it is {prompt!r:.200}"
    )


def checked_text(text: Any, where: str) -> str:
    """A text, if it is one and not blank.

    Raises:
        ValueError: it is not; says what stands at that place.
    """
    if isinstance(text, str) and text.strip():
        return text
    raise ValueError(f"{where} must be text that is not blank; it is {text!r:.200}")


def _checked_answer(answer: Any, where: str) -> str:
    is_number = isinstance(answer, (int, float)) and math.isfinite(answer)
    if is_number or (isinstance(answer, str) and answer.strip()):
        return str(answer)
    fields = f", whose fields {[*answer]} can be named as a path" if isinstance(answer, dict) else ""
    raise ValueError(
        f"{where} must be text that is not blank, a number, or a list of these; it is {answer!r:.200}{fields}"
    )
