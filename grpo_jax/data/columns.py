"""Columns of a row, found by their usual names."""

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
"""The longest prompt or completion, in characters; no model here takes as many tokens."""


# Columns --------------------------------------------------------------------------------------------------------------


def listed(columns: Iterable[str], most: int = 30) -> str:
    """Names of columns as text, the first ``most`` of them."""
    names = [*columns]
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def find_column(row: Mapping[str, Any], name: str) -> str | None:
    """How a row spells a column: as it is, in another case, or as a path through objects and lists such as ``a.b.0``.

    Returns:
        The name that ``column`` takes; None where the row has no such column.
    """
    if name in row:
        return name
    same = [each for each in row if isinstance(each, str) and each.lower() == name.lower()]
    if same:
        return same[0]
    if "." in name:
        try:
            column(row, name)
        except KeyError:
            return None
        return name
    return None


def column(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a path through objects and lists such as ``reward_model.ground_truth``.

    Raises:
        KeyError: there is no such column or path.
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
    """As ``column``, in any case.

    Raises:
        KeyError: there is no such column; the error lists those of the row, or the fields where the path ends.
    """
    found = find_column(row, name)
    if found is not None:
        return column(row, found)
    parent, _, _ = name.rpartition(".")
    inside = column(row, parent) if parent and find_column(row, parent) == parent else None
    fields = f"{parent!r} has the fields {listed(inside)}" if isinstance(inside, Mapping) else f"it has {listed(row)}"
    raise KeyError(f"{where} has no column {name!r}; {fields}; name one of these with {option}")


def without(row: Mapping[str, Any], *names: str | None) -> Row:
    """The columns of a row but for those named; of a path, the column that it begins with stays."""
    return {name: value for name, value in row.items() if name not in names}


def text_length(value: Any) -> int:
    """The characters of a text, or of the messages of a conversation."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(text_length(each) for each in value.values())
    return sum(text_length(each) for each in value) if isinstance(value, list) else 0


def check_length(value: Any, where: str) -> None:
    """Check that a text is short enough to be split into tokens.

    Raises:
        ValueError: it has more than ``MAX_CHARACTERS``.
    """
    length = text_length(value)
    if length > MAX_CHARACTERS:
        raise ValueError(
            f"{where} has {length:,} characters; at most {MAX_CHARACTERS:,} are read, more than any model here takes. "
            "Shorten it, or leave such rows out with --skip-bad-rows"
        )


# Problems -------------------------------------------------------------------------------------------------------------


def prompt_column_of(row: Row, where: str) -> str:
    """The column with the prompt: the only one of the usual three, or the first of those less usual.

    Raises:
        KeyError: there is none, or several could be it; the error lists the columns.
    """
    usual = [found for name in PROMPT_COLUMNS if (found := find_column(row, name))]
    if len(usual) == 1:
        return usual[0]
    others = ("text", *OTHER_PROMPT_COLUMNS) if "test_list" in row else OTHER_PROMPT_COLUMNS  # MBPP
    candidates = usual or [found for name in others if (found := find_column(row, name))]
    if candidates and not usual:
        return candidates[0]
    problem = f"several columns could be the prompt: {candidates}" if candidates else "no column is known as a prompt"
    raise KeyError(f"{where}: {problem}; name it with prompt_column= one of {listed(row)}")


def answer_column_of(row: Row, where: str, *, required: bool) -> str | None:
    """The column with the gold answer, the first of ``ANSWER_COLUMNS`` that a row has; None where it has none.

    Raises:
        KeyError: there is none although it is required; the error lists the columns.
    """
    found = next((found for name in ANSWER_COLUMNS if (found := find_column(row, name))), None)
    if required and found is None:
        raise KeyError(
            f"{where}: no column is known as an answer; name it with answer_column= one of {listed(row)} (a path such "
            "as reward_model.ground_truth names a field), or pass require_answer=False for problems without one"
        )
    return found


def _parsed(text: str) -> Any:
    """A value from its JSON, or from Python's way to write it; None from anything else."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
