"""Problems from a local file, a folder or the Hugging Face hub: one row, one problem."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.data.messages import Messages, checked_messages, is_message
from grpo_jax.rewards.answer import GSM8K_MARK, worked_answer

PROMPT_COLUMNS = ("question", "prompt", "problem")
ANSWER_COLUMNS = ("answer", "solution")
PROMPT = "problem_prompt"
"""The column with which rewards get a problem's own prompt, before any template."""
REWARD_ARGUMENTS = ("prompts", "completions", PROMPT)
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")

Row = dict[str, Any]


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
) -> list[Problem]:
    r"""The problems of a JSONL or parquet file, of a folder of such files, or of a data set on the hub.

    GSM8K and MATH work as they are: where an answer is a worked solution with ``\boxed{...}`` or, without one, with
    ``#### ...`` at its end, the gold answer is what stands there (without its commas, if it is a number with
    thousands), and the whole text is kept as the column ``solution`` unless the row has one of its own.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file; a folder that holds ``{split}.jsonl`` or ``{split}.parquet``; or the
            id of a data set on the Hugging Face hub, such as ``openai/gsm8k``. What exists locally comes first.
        split: the split of a folder or of a data set on the hub, by default "train".
        subset: the configuration of a data set on the hub. By default the data set's own default, or else "main".
        prompt_column: the column with the question or the messages. By default the only one present of
            ``question``, ``prompt`` and ``problem``.
        answer_column: the column with the gold answer: text, or a number, which becomes text. By default ``answer``,
            or else ``solution``.
        require_answer: whether a source without an answer column is an error; if not, its answers are None.

    Returns:
        The problems in the order of the source. Columns named ``prompts``, ``completions`` or ``problem_prompt`` are
        left out of ``columns``: rewards get these from the rollout.

    Raises:
        FileNotFoundError: no such file, folder, split or data set.
        KeyError: a column is missing, or cannot be told; the error lists those present.
        ValueError: another kind of file; a split or subset of something that has none; a source without rows; an
            empty or malformed row. The error names file and line, or row counted from 1.
    """
    rows = list(read_rows(source, split, subset))
    if not rows:
        raise ValueError(f"{source} is empty: it has no problems")
    first_where, first_row = rows[0]
    prompt_column = prompt_column or _detect_prompt_column(first_row, first_where)
    answer_column = answer_column or _detect_answer_column(first_row, first_where, require_answer)
    return [_problem(row, where, prompt_column, answer_column) for where, row in rows]


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


def read_rows(source: str, split: str | None, subset: str | None) -> Iterator[tuple[str, Row]]:
    """Each row after the place where it stands, in words; arguments and errors as of ``load_problems``."""
    path = Path(source)
    if not path.exists() and path.suffix not in (".jsonl", ".json", ".parquet"):
        return _hub_rows(source, split or "train", subset)
    if subset is not None:
        raise ValueError(f"subset={subset!r} was asked for, but {source} is local and has no subsets")
    if path.is_dir():
        return _file_rows(_split_file(path, split or "train"))
    if split is not None:
        raise ValueError(
            f"split={split!r} was asked for, but {source} is a single file: name the file of that split and no split, "
            "or a folder that holds one file a split"
        )
    return _file_rows(path)


def _split_file(folder: Path, split: str) -> Path:
    files = [path for path in (folder / f"{split}.jsonl", folder / f"{split}.parquet") if path.is_file()]
    if not files:
        present = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} holds neither {split}.jsonl nor {split}.parquet, but {present}")
    return files[0]


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path} (looked for in {Path.cwd()})")
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}; what can be read ends in one of {list(readers)}")
    return readers[path.suffix](path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                raise ValueError(f"{where} is an empty line; each line must be one JSON object")
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} must be a JSON object, and is a {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path} row {number}", row


def _hub_rows(source: str, split: str, subset: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        subset = subset or datasets.get_dataset_default_config_name(source) or _main_subset(source)
        dataset = datasets.load_dataset(source, subset, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a file or folder in {Path.cwd()} nor a data set that the hub would give: {error}"
        ) from error
    for number, row in enumerate(dataset, 1):
        yield f"{source} ({subset}, {split}) row {number}", dict(row)


def _main_subset(source: str) -> str:
    import datasets

    names = datasets.get_dataset_config_names(source)
    if "main" not in names:
        raise ValueError(f"{source} has no default subset; choose one: subset= one of {names}")
    return "main"


def _detect_prompt_column(row: Row, where: str) -> str:
    candidates = [name for name in PROMPT_COLUMNS if name in row]
    if len(candidates) != 1:
        problem = (
            f"several columns could be the prompt: {candidates}" if candidates else "no column is known as a prompt"
        )
        raise KeyError(f"{where}: {problem}; name it with prompt_column= one of {list(row)}")
    return candidates[0]


def _detect_answer_column(row: Row, where: str, required: bool) -> str | None:
    candidates = [name for name in ANSWER_COLUMNS if name in row]
    if required and not candidates:
        raise KeyError(
            f"{where}: no column is known as an answer; name it with answer_column= one of {list(row)}, "
            "or pass require_answer=False for problems without one"
        )
    return candidates[0] if candidates else None


def _problem(row: Row, where: str, prompt_column: str, answer_column: str | None) -> Problem:
    for column in (prompt_column, answer_column):
        if column is not None and column not in row:
            raise KeyError(f"{where} has no column {column!r}; it has {list(row)}")
    prompt = checked_prompt(row[prompt_column], f"{where}, column {prompt_column!r}")
    rest = {name: value for name, value in row.items() if name not in (prompt_column, *REWARD_ARGUMENTS)}
    if answer_column is None:
        return Problem(prompt, None, rest)
    text = _checked_answer(rest.pop(answer_column), f"{where}, column {answer_column!r}")
    answer = worked_answer(text)
    if answer is None:
        return Problem(prompt, text, rest)
    if THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    if not answer:
        empty = "nothing is in the last box" if "boxed" in text else f"nothing follows the last {GSM8K_MARK}"
        raise ValueError(f"{where}, column {answer_column!r}: {empty}")
    return Problem(prompt, answer, {"solution": text, **rest})


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
    raise ValueError(f"{where} must be text that is not blank, or a number; it is {answer!r:.200}")
