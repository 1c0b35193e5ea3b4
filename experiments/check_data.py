"""Report on a dataset before training: rows that cannot be read or graded, duplicates, leaks.

    python experiments/check_data.py problems.jsonl
    python experiments/check_data.py openai/gsm8k --tokenizer Qwen/Qwen2.5-0.5B --max-prompt-length 256
    python experiments/check_data.py pairs.parquet --kind preferences --json report.json --strict

It reads the same layouts with the same flags as the training scripts, and changes nothing. ``docs/data.md`` lists the
layouts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.files import read_rows
from grpo_jax.data.layouts import kind_of
from grpo_jax.data.preferences import load_preferences
from grpo_jax.data.statistics import prompt_key
from grpo_jax.jsonl import to_json
from grpo_jax.loop.command import run_command
from grpo_jax.loop.data_report import (
    Example,
    Finding,
    check_demonstrations,
    check_leaks,
    check_preferences,
    check_problems,
    check_prompt_lengths,
    finding,
)
from grpo_jax.tasks.dataset import load_placed_problems
from grpo_jax.tasks.splits import default_split

Kind = Literal["problems", "demonstrations", "preferences"]


@dataclass(frozen=True, kw_only=True)
class Config(PromptConfig):
    """Dataset and checks."""

    dataset: tyro.conf.Positional[str]
    """Hugging Face id, a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), or a folder of them."""
    kind: Literal["auto", "problems", "demonstrations", "preferences"] = "auto"
    """Problems for RL, demonstrations for SFT, or preferences for DPO and reward models. auto: by the columns."""
    split: str | None = None
    """Training split. Default: 'train' where there are splits."""
    subset: str | None = None
    """Configuration of a hub dataset or folder that has several."""
    eval_dataset: str | None = None
    """Source of held-out rows, for the check for leaks. Default: another split of the dataset."""
    eval_split: str | None = None
    """Held-out split. Default: 'test' or else 'validation' where there are splits."""
    prompt_column: str | None = None
    """Column with the prompt, or a path such as extra_info.question."""
    answer_column: str | None = None
    """Column with the gold answer, or a path such as reward_model.ground_truth."""
    completion_column: str | None = None
    """Column with the completion of a demonstration."""
    grader: Literal["auto", "exact", "math", "code", "none"] = "auto"
    """Grader of the completions. auto: code where there are tests, math otherwise."""
    tokenizer: str | None = None
    """Folder or Hugging Face id of a tokenizer or model, to find prompts that are too long. Prompts are rendered as in
    training: with the flags for the prompt format, else with the model's prompt_format.json."""
    max_prompt_length: int = 512
    """Longest prompt in tokens, as in training."""
    json: Path | None = None
    """File for the whole report."""
    strict: bool = False
    """Exit with status 1 if rows are useless or misleading."""
    examples: int = 3
    """Rows to show of each finding."""

    def __post_init__(self):
        if self.max_prompt_length < 1 or self.examples < 0:
            raise ValueError("max_prompt_length must be at least 1 and examples at least 0")
        PromptConfig.__post_init__(self)
        if self.tokenizer is None and any(getattr(self, field.name) for field in fields(PromptConfig)):
            raise ValueError(
                "rendering prompts needs a tokenizer; set tokenizer, or leave out the settings of the prompt format"
            )


def main(config: Config) -> int:
    """Check and report; returns exit status 1 if ``strict`` is set and a fault was found, else 0."""
    report = make_report(config)
    print_report(report, config.examples)
    if config.json is not None:
        config.json.write_text(json.dumps(to_json(report), indent=2, ensure_ascii=False) + "\n")
    has_faults = any(found["is_fault"] for found in report["findings"])
    return int(config.strict and has_faults)


def make_report(config: Config) -> dict[str, Any]:
    """The report: ``dataset``, ``kind``, ``grader``, ``rows`` and ``findings``."""
    kind = config.kind if config.kind != "auto" else detect_kind(config)
    bad: list[str] = []
    rows = load(config, kind, config.dataset, config.split, bad)
    findings = bad_rows(bad, len(rows))
    grader = None
    if kind == "problems":
        check_answer_column(config, rows)
        grader = config.grader
        if grader == "auto":
            grader = "code" if any("tests" in row.columns for _, row in rows) else "math"
        findings += check_problems(rows, grader)
    else:
        check: Callable[[Any], list[Finding]] = check_demonstrations if kind == "demonstrations" else check_preferences
        findings += check([row for _, row in rows])
    findings += leaks(config, kind, rows) + long_prompts(config, rows)
    return {
        "dataset": config.dataset,
        "kind": kind,
        "grader": grader,
        "rows": len(rows),
        "findings": [dataclasses.asdict(found) for found in findings],
    }


def detect_kind(config: Config) -> Kind:
    first = next(read_rows(config.dataset, config.split, config.subset, skipped=[]), None)
    if first is None:
        raise ValueError(f"{config.dataset} has no readable row")
    return "problems" if config.answer_column else kind_of(first[1])


def load(config: Config, kind: Kind, source: str, split: str | None, bad: list[str]) -> list[tuple[str, Any]]:
    """``(where, row)`` for each row of a source.

    Args:
        config: subset and columns.
        kind: kind of rows.
        source: Hugging Face id, file or folder.
        split: split of the source; None for the default.
        bad: receives a message for each row that cannot be read.
    """
    options = {"split": split, "subset": config.subset, "skipped": bad}
    if kind == "problems":
        return load_placed_problems(
            source,
            prompt_column=config.prompt_column,
            answer_column=config.answer_column,
            require_answer=False,
            **options,
        )
    if kind == "preferences":
        return [(row.where, row) for row in load_preferences(source, **options)]
    columns = {"prompt_column": config.prompt_column, "completion_column": config.completion_column}
    return [(row.where, row) for row in load_demonstrations(source, **columns, **options)]


def check_answer_column(config: Config, rows: Sequence[tuple[str, Any]]) -> None:
    """Check that ``answer_column`` exists, if it is set.

    Args:
        config: settings.
        rows: ``(where, problem)`` for each row.

    Raises:
        ValueError: no row has an answer in it.
    """
    if config.answer_column is None or not rows or any(row.answer is not None for _, row in rows):
        return
    first = next(read_rows(config.dataset, config.split, config.subset, skipped=[]), None)
    raise ValueError(
        f"answer_column: no row of {config.dataset} has an answer in {config.answer_column!r}; "
        f"the first has the columns {sorted(first[1]) if first else []}"
    )


def bad_rows(bad: Sequence[str], rows: int) -> list[Finding]:
    places = (reason.partition(", ") if ", column" in reason else reason.partition(" ") for reason in bad)
    examples = [Example(where, rest) for where, _, rest in places]
    return finding(
        "unreadable rows",
        "cannot be read; training stops at the first, or skips them with --skip-bad-rows",
        examples,
        rows + len(bad),
    )


def leaks(config: Config, kind: Kind, rows: Sequence[tuple[str, Any]]) -> list[Finding]:
    source = config.eval_dataset or config.dataset
    but = (config.split or "train") if source == config.dataset else None
    split = config.eval_split or default_split(source, config.subset, but=but)
    if source == config.dataset and split is None:
        return []
    held_out = load(config, kind, source, split, [])
    return check_leaks(keys_of(rows), keys_of(held_out))


def keys_of(rows: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(where, prompt_key(row.prompt) or prompt_key(row.completion)) for where, row in rows]


def long_prompts(config: Config, rows: Sequence[tuple[str, Any]]) -> list[Finding]:
    if config.tokenizer is None:
        return []
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    from grpo_jax.models.hf_files import read_json
    from grpo_jax.models.tokenizers import read_tokenizer

    folder = Path(config.tokenizer).expanduser()
    tokenizer = read_tokenizer(folder) if folder.is_dir() else AutoTokenizer.from_pretrained(config.tokenizer)
    if tokenizer is None:
        raise ValueError(f"tokenizer: {folder} has no tokenizer.json")
    format_file = cached_file(config.tokenizer, "prompt_format.json", _raise_exceptions_for_missing_entries=False)
    prompt_format = read_json(Path(format_file)) if format_file else None
    return check_prompt_lengths(
        [(where, row.prompt, row.columns) for where, row in rows if row.prompt],
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        **config.rendering(prompt_format, tokenizer, today=date.today().isoformat()),
    )


def print_report(report: dict[str, Any], examples: int) -> None:
    """Print a summary, a table of findings, and the first ``examples`` rows of each."""
    console = Console()
    grader = f", graded by {report['grader']}" if report["grader"] else ""
    console.print(Text(f"{report['dataset']}: {report['rows']} rows, read as {report['kind']}{grader}"), soft_wrap=True)
    if not report["findings"]:
        console.print(Text("nothing found"))
        return
    table = Table("", "rows", "share", "they ...")
    for found in report["findings"]:
        share = f"{found['count'] / found['rows']:.1%}"
        table.add_row(*map(Text, (found["name"], str(found["count"]), share, found["explanation"])))
    console.print(table)
    for found in report["findings"]:
        for example in islice(found["examples"], examples):
            console.print(Text(f"{found['name']}: {example['where']}: {example['text']:.300}"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
