"""Problems and their columns, as tasks and rewards exchange them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grpo_jax.data.formats import Row, Rows
from grpo_jax.data.messages import Messages, checked_messages, is_message

OTHER_ANSWERS = "other_answers"
"""The column with the right answers after the first, where a row has several."""
PROMPT = "problem_prompt"
"""The column with which rewards get a problem's own prompt, before any template."""
REWARD_ARGUMENTS = ("prompts", "completions", PROMPT)
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
