"""Statistics of a loaded data set: skipped rows, duplicates, leaks between splits, held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from grpo_jax.hosts import is_main

Item = TypeVar("Item")
MAX_REASONS = 5


@dataclass
class DataStatistics:
    """Statistics that a loader collects.

    Attributes:
        skipped: the reason for each skipped row.
        counts: row counts by name, such as ``rows``, ``held_out`` and ``duplicates``.
        remarks: the counts as sentences.
    """

    skipped: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The remarks, then the number of skipped rows with the first reasons."""
        if not self.skipped:
            return [*self.remarks]
        rest = len(self.skipped) - MAX_REASONS
        return [
            *self.remarks,
            f"{len(self.skipped)} rows skipped:",
            *(f"  {reason:.300}" for reason in self.skipped[:MAX_REASONS]),
            *([f"  and {rest} more"] if rest > 0 else []),
        ]

    def report(self, say: Callable[[str], None], path: Path) -> None:
        """Print the lines and write all statistics to a JSON file; of several processes, the first one does.

        Args:
            say: prints a line.
            path: path of the JSON file; its folder must exist.
        """
        if not is_main():
            return
        for line in self.lines():
            say(line)
        skipped = {"skipped": len(self.skipped), "skipped_because": self.skipped[:100]}
        row = {**self.counts, **skipped, "remarks": self.remarks}
        path.write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n")

    def count_duplicates(self, keys: Sequence[str], answers: Sequence[Any] | None = None) -> None:
        """Count rows with the key of an earlier row, and those among them with a different answer.

        Args:
            keys: a key for each row: with ``answers`` the ``prompt_key`` of its prompt, otherwise of the whole row.
            answers: the answer of each row; None does not compare answers.
        """
        first: dict[str, int] = {}
        repeated = [n for n, key in enumerate(keys) if first.setdefault(key, n) != n]
        if not repeated:
            return
        self.counts["duplicates"] = len(repeated)
        original = "an earlier row" if answers is None else "the prompt of an earlier one"
        remark = f"{len(repeated)} of {len(keys)} rows repeat {original} (ignoring case and white space)"
        if answers is not None:
            other = sum(answers[n] != answers[first[keys[n]]] for n in repeated)
            if other:
                self.counts["contradicting_duplicates"] = other
                remark += f", {other} of them with a different answer"
        self.remarks.append(remark)

    def drop_leaks(self, held_out: list[Item], keys: Iterable[str], trained_on: Iterable[str]) -> list[Item]:
        """The held-out rows whose key is not among the training rows; counts the others.

        Args:
            held_out: held-out rows.
            keys: the key of each held-out row.
            trained_on: the keys of the training rows.
        """
        known = set(trained_on)
        kept = [row for row, key in zip(held_out, keys, strict=True) if key not in known]
        leaks = len(held_out) - len(kept)
        if leaks:
            self.counts["leaks"] = leaks
            self.remarks.append(
                f"{leaks} of {len(held_out)} held-out rows dropped: their prompts are in the training rows (ignoring "
                "case and white space)"
            )
        return kept

    def count_held_out(self, rows: int, held_out: int, source: str) -> None:
        """Record the held-out split.

        Args:
            rows: number of all rows.
            held_out: number of held-out rows.
            source: name of the data source.
        """
        self.counts |= {"rows": rows, "held_out": held_out}
        self.remarks.append(f"{held_out} of {rows} rows of {source} are held out for evaluation")


def prompt_key(prompt: str | Sequence[dict[str, Any]]) -> str:
    """A key that is equal for prompts that differ only in case and white space.

    A conversation of one user message has the key of that message's text.
    """
    if isinstance(prompt, str):
        return " ".join(prompt.casefold().split())
    if len(prompt) == 1 and prompt[0].get("role") == "user" and isinstance(prompt[0].get("content"), str):
        return prompt_key(prompt[0]["content"])
    turns = ((each.get("role"), each.get("content"), each.get("tool_calls")) for each in prompt)
    return "\n".join(
        f"{role}: {prompt_key(content) if isinstance(content, str) else content!r}{calls or ''}"
        for role, content, calls in turns
    )
