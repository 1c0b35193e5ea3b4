"""Columns of a row by their usual names, and their values."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
PROMPT_COLUMNS = ("question", "prompt", "problem")
OTHER_PROMPT_COLUMNS = (
    *("query", "instruction", "question_content", "problem_statement", "problem_description", "description", "input"),
    *("messages", "conversations"),
)
ANSWER_COLUMNS = (
    *("answer", "final_answer", "ground_truth", "expected_answer", "correct_answer", "reference_answer"),
    *("gold_answer", "gold", "answerKey", "reward_model.ground_truth", "solution"),
)
COMPLETION_COLUMNS = ("completion", "response", "output", "generated_solution", "solution")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
MAX_CHARACTERS = 1_000_000
"""Maximum characters of a prompt or completion, far more than the context of any supported model."""


# Columns --------------------------------------------------------------------------------------------------------------


def listed(columns: Iterable[str], most: int = 30) -> str:
    """Column names as text.

    Args:
        columns: the names.
        most: maximum number of names in the text; it ends with the number of the others.
    """
    names = [*columns]
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def find_column(row: Mapping[str, Any], name: str) -> str | None:
    """Find a column by name in any case, or a path through objects and lists such as ``a.b.0``.

    Args:
        row: the row.
        name: name or path.

    Returns:
        The name as ``column`` takes it; None if the row has no such column.
    """
    if name in row:
        return name
    matches = [each for each in row if isinstance(each, str) and each.lower() == name.lower()]
    if matches:
        return matches[0]
    if "." in name:
        try:
            column(row, name)
        except KeyError:
            return None
        return name
    return None


def column(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column.

    Args:
        row: the row.
        name: the column, or a path through objects and lists such as ``reward_model.ground_truth``.

    Raises:
        KeyError: the row has no such column or path.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = _parsed(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(name)
    return value


def required_column(row: Mapping[str, Any], name: str, where: str, option: str) -> Any:
    """The value of a column by name in any case, or by path.

    Args:
        row: the row.
        name: name or path.
        where: source location, for the error.
        option: the option that names the column, for the error.

    Raises:
        KeyError: the row has no such column; the message lists its columns, or the fields where the path ends.
    """
    found = find_column(row, name)
    if found is not None:
        return column(row, found)
    parent, _, _ = name.rpartition(".")
    nested = column(row, parent) if parent and find_column(row, parent) == parent else None
    fields = f"{parent!r} has the fields {listed(nested)}" if isinstance(nested, Mapping) else f"it has {listed(row)}"
    raise KeyError(f"{where} has no column {name!r}; {fields}; name one of these with {option}")


def without(row: Mapping[str, Any], *names: str | None) -> Row:
    """The row without these columns. Paths are ignored: the column with the nested field stays."""
    return {name: value for name, value in row.items() if name not in names}


def text_length(value: Any) -> int:
    """Number of characters of a text or of all texts in a nested value, such as messages."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(text_length(each) for each in value.values())
    return sum(text_length(each) for each in value) if isinstance(value, list) else 0


def check_length(value: Any, where: str) -> None:
    """Check that a text has at most ``MAX_CHARACTERS``, before it is tokenized.

    Args:
        value: a text, or lists and objects of texts.
        where: source location, for the error.

    Raises:
        ValueError: it is longer.
    """
    length = text_length(value)
    if length > MAX_CHARACTERS:
        raise ValueError(
            f"{where} has {length:,} characters; the maximum is {MAX_CHARACTERS:,}. Shorten it, or skip such rows with "
            "--skip-bad-rows"
        )


# Problems -------------------------------------------------------------------------------------------------------------


def prompt_column_of(row: Row, where: str) -> str:
    """The column of the prompt: the only one of ``PROMPT_COLUMNS``, or else the first of ``OTHER_PROMPT_COLUMNS``.

    Args:
        row: a row of the data.
        where: source location, for the error.

    Raises:
        KeyError: the row has none of them, or several of ``PROMPT_COLUMNS``; the message lists its columns.
    """
    usual = [found for name in PROMPT_COLUMNS if (found := find_column(row, name))]
    if len(usual) == 1:
        return usual[0]
    others = ("text", *OTHER_PROMPT_COLUMNS) if "test_list" in row else OTHER_PROMPT_COLUMNS  # MBPP
    candidates = usual or [found for name in others if (found := find_column(row, name))]
    if candidates and not usual:
        return candidates[0]
    problem = f"several columns could be the prompt: {candidates}" if candidates else "no column is known as a prompt"
    raise KeyError(f"{where}: {problem}; set prompt_column to one of {listed(row)}")


def answer_column_of(row: Row, where: str, *, required: bool) -> str | None:
    """The column of the gold answer, the first of ``ANSWER_COLUMNS`` in the row; None without one.

    Args:
        row: the row.
        where: source location, for the error.
        required: whether a missing column is an error.

    Raises:
        KeyError: the column is missing and ``required``; the message lists the row's columns.
    """
    found = next((found for name in ANSWER_COLUMNS if (found := find_column(row, name))), None)
    if required and found is None:
        raise KeyError(
            f"{where}: no column is known as an answer; set answer_column to one of {listed(row)} (or to a path such "
            "as reward_model.ground_truth), or require_answer=False for problems without an answer"
        )
    return found


def _parsed(text: str) -> Any:
    """Parse a JSON or Python literal; None if ``text`` is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
