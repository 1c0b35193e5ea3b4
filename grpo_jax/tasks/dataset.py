"""Problems from a local file, a folder or the Hugging Face hub: one row, one problem."""

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
"""Columns that ``tests`` takes the place of."""
WITH_TESTS = frozenset({*TEST_COLUMNS, "tests", "reward_model", "ground_truth", "extra_info"})
"""Columns that may hold tests."""
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


def _checked_answer(answer: Any, where: str) -> str:
    is_number = isinstance(answer, (int, float)) and math.isfinite(answer)
    if is_number or (isinstance(answer, str) and answer.strip()):
        return str(answer)
    fields = f", whose fields {[*answer]} can be named as a path" if isinstance(answer, dict) else ""
    raise ValueError(
        f"{where} must be text that is not blank, a number, or a list of these; it is {answer!r:.200}{fields}"
    )
