"""Load problems from a local file, a folder or the Hugging Face hub, one problem per row."""

from __future__ import annotations

import math
import re
from typing import Any

from grpo_jax.data.columns import answer_column_of, check_length, prompt_column_of, required_column, without
from grpo_jax.data.files import read_rows
from grpo_jax.data.formats import Row
from grpo_jax.data.layouts import choice_answer, prompt_of
from grpo_jax.data.problems import OTHER_ANSWERS, REWARD_ARGUMENTS, Problem, checked_prompt, parsed_rows
from grpo_jax.rewards.code.test_cases import Test
from grpo_jax.rewards.code.test_formats import tests_from_row
from grpo_jax.rewards.math.answer import GSM8K_MARK, worked_answer

TEST_COLUMNS = (
    *("test", "test_list", "challenge_test_list", "test_cases", "input_output", "verification_info"),
    *("public_test_cases", "private_test_cases", "public_tests", "private_tests", "generated_tests"),
)
"""Columns that the column ``tests`` replaces."""
WITH_TESTS = frozenset({*TEST_COLUMNS, "tests", "reward_model", "ground_truth", "extra_info"})
"""Columns that may contain tests."""
NUMBER_AT_END = re.compile(r"####[ ]?([-+]?\d[\d,]*(?:\.\d+)?)\s*\Z")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


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
    r"""Load problems from a file, a folder or the hub, in any layout of ``docs/data.md``.

    If an answer is a worked solution, as in MATH and GSM8K, the gold answer is the content of its last ``\boxed{...}``
    or else the text after ``####``, without thousands separators. The solution is kept as the column ``solution``
    unless the row has one.

    Args:
        source: path of a file or folder, or id of a data set on the hub, such as ``openai/gsm8k``. Local paths take
            precedence.
        split: split of a folder or data set, by default "train".
        subset: configuration of a folder or data set, by default its own default or else "main".
        prompt_column: column of the prompt (text or messages), or a path such as ``extra_info.question``. By default
            the only one present of ``question``, ``prompt`` and ``problem``, or else the first of
            ``columns.OTHER_PROMPT_COLUMNS``.
        answer_column: column of the gold answer, or a path such as ``reward_model.ground_truth``: text, a number, a
            boolean, or a list of these of which each is correct. By default the first of ``columns.ANSWER_COLUMNS``.
        require_answer: whether a missing or null answer is an error (otherwise it is None). Rows with program tests
            never need one.
        skipped: if given, unreadable rows are skipped and the reasons appended to it.

    Returns:
        The problems in the order of the source. ``columns`` has further gold answers as ``other_answers`` and program
        tests as ``tests``, and lacks ``prompts``, ``completions`` and ``problem_prompt``, which rewards get from the
        rollout.

    Raises:
        FileNotFoundError: the file, folder, split or data set does not exist.
        KeyError: a column is missing or ambiguous; the message lists the row's columns.
        ValueError: the format is unknown; the source has no such split or subset, or no rows; a row is empty,
            malformed or too long.
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
    """As ``load_problems``, as pairs ``(where, problem)`` with a location such as ``data.jsonl:3``.

    Args:
        source, split, subset, prompt_column, answer_column, require_answer, skipped: as in ``load_problems``.
    """
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
        # Programs are graded by their tests; the answer column of such a row may contain anything.
        if tests is None and (require_answer or not isinstance(error, KeyError)):
            raise
        return Problem(prompt, None, rest)


def _gold(row: Row, answer: Any, place: str, rest: Row) -> tuple[str, Row]:
    """The gold answer, and the other columns with further answers and the worked solution."""
    answer = choice_answer(row, answer, place)
    check_length(answer, place)
    if isinstance(answer, list) and answer:
        text, *others = [_checked_answer(each, f"{place}, answer {n}") for n, each in enumerate(answer, 1)]
        rest = {**rest, **({OTHER_ANSWERS: others} if others else {})}
    else:
        text = _checked_answer(answer, place)
    gold = _worked_answer(text)
    if gold is None:
        return text, rest
    if THOUSANDS.fullmatch(gold):
        gold = gold.replace(",", "")
    if not gold:
        empty = "the last box is empty" if "boxed" in text else f"no text follows the last {GSM8K_MARK}"
        raise ValueError(f"{place}: {empty}")
    return gold, {"solution": text, **rest}


def _worked_answer(text: str) -> str | None:
    """As ``worked_answer``, which is slow: texts without an answer mark, or with a number at the end, skip it."""
    if "box" not in text:
        if GSM8K_MARK not in text:
            return None
        number = NUMBER_AT_END.search(text[-40:])
        if number is not None and text.count(GSM8K_MARK) == 1:
            return number[1]
    return worked_answer(text)


def _tests(row: Row, where: str) -> list[Test] | None:
    """The tests of a row's program; None without tests.

    Raises:
        ValueError: the tests cannot be read.
    """
    if WITH_TESTS.isdisjoint(row):  # fast path for most rows
        return None
    try:
        return tests_from_row(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: its tests cannot be read: {error!s:.300}") from error


def _checked_answer(answer: Any, where: str) -> str:
    is_number = isinstance(answer, (int, float)) and math.isfinite(answer)
    if is_number or (isinstance(answer, str) and answer.strip()):
        return str(answer)
    fields = f", whose fields {[*answer]} can be named as a path" if isinstance(answer, dict) else ""
    raise ValueError(
        f"{where} must be text that is not blank, a number, or a list of these; it is {answer!r:.200}{fields}"
    )
