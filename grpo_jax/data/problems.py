"""Problems, their columns for rewards, and the parsing of rows with errors collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpo_jax.data.formats import Row, Rows
from grpo_jax.data.messages import Messages, checked_messages, is_message

OTHER_ANSWERS = "other_answers"
"""The column with further gold answers, for a row with several."""
PROMPT = "problem_prompt"
"""The reward argument with the problem's prompt before any template."""
REWARD_ARGUMENTS = ("prompts", "completions", PROMPT)
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Problem:
    """A problem of a task.

    Attributes:
        prompt: text, or a conversation as messages with "role" and "content".
        answer: the gold answer; None without one.
        columns: the other columns of the row, for rewards.
    """

    prompt: str | Messages
    answer: str | None
    columns: Row = field(default_factory=dict)


def reward_columns(problems: Sequence[Problem], *, group_size: int = 1) -> dict[str, list[Any]]:
    """The keyword arguments of rewards: columns of ``problems``, each value repeated ``group_size`` times.

    Args:
        problems: problems with G samples each.
        group_size: G.

    Returns:
        ``[len(problems) * G]`` values of each column: ``answer``, the problems' other columns (None where a problem
        lacks one), and ``problem_prompt``, the prompts before any template.
    """
    names = dict.fromkeys(["answer", *(name for problem in problems for name in problem.columns), PROMPT])
    rows = [
        {**problem.columns, "answer": problem.answer, PROMPT: problem.prompt}
        for problem in problems
        for _ in range(group_size)
    ]
    return {name: [row.get(name) for row in rows] for name in names}


def parsed_rows(rows: Rows, parse: Callable[[Row, str], Parsed], skipped: list[str] | None) -> list[Parsed]:
    """Parse rows.

    Args:
        rows: pairs ``(where, row)``, as from ``files.read_rows``.
        parse: ``(row, where) -> parsed``; raises KeyError or ValueError for a bad row.
        skipped: if given, bad rows are skipped and the reasons appended to it.

    Raises:
        ValueError: all rows are bad, or, without ``skipped``, one has a text with a lone surrogate.
        KeyError, ValueError: from ``parse``, without ``skipped``.
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
    """Check that all texts of a row can be encoded: JSON can contain lone surrogates, which UTF-8 cannot."""
    for name, value in row.items():
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"{where}, column {name!r}: character {error.start} is a lone surrogate "
                        f"({item[error.start]!a}), which no tokenizer can encode"
                    ) from error
            elif isinstance(item, dict):
                pending += item.values()
            elif isinstance(item, (list, tuple)):
                pending += item


def checked_prompt(prompt: Any, where: str) -> str | Messages:
    """Validate a prompt; messages are normalized by ``checked_messages``.

    Args:
        prompt: text or messages.
        where: source location, for the error.

    Raises:
        ValueError: the prompt is blank or malformed.
    """
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt):
        return checked_messages(prompt, where)
    raise ValueError(
        f"{where} must be text that is not blank, or messages with text as role and content; it is {prompt!r:.200}"
    )


def checked_text(text: Any, where: str) -> str:
    """Validate a text.

    Args:
        text: the value of a column.
        where: source location, for the error.

    Raises:
        ValueError: it is blank or not text.
    """
    if isinstance(text, str) and text.strip():
        return text
    raise ValueError(f"{where} must be text that is not blank; it is {text!r:.200}")
