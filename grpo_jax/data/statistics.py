"""Facts about a data set that its user should know: rows that were skipped, duplicates, leaks, the held-out share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
MOST_REASONS = 5


@dataclass
class DataStatistics:
    """What loading a data set found; a loader fills it in.

    Attributes:
        skipped: the reason for each row that was left out.
        counts: numbers by name, such as ``rows``, ``held_out`` and ``duplicates``.
        remarks: sentences about them.
    """

    skipped: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The remarks, and how many rows were skipped with the first reasons."""
        if not self.skipped:
            return [*self.remarks]
        rest = len(self.skipped) - MOST_REASONS
        return [
            *self.remarks,
            f"{len(self.skipped)} rows skipped:",
            *(f"  {reason:.300}" for reason in self.skipped[:MOST_REASONS]),
            *([f"  and {rest} more"] if rest > 0 else []),
        ]

    def report(self, say: Callable[[str], None], path: Path) -> None:
        """Say the lines, and write everything to a JSON file.

        Args:
            say: takes a line.
            path: of the file; its folder exists.
        """
        for line in self.lines():
            say(line)
        found = {**self.counts, "skipped": len(self.skipped), "skipped_because": self.skipped[:100]}
        path.write_text(json.dumps({**found, "remarks": self.remarks}, indent=2, ensure_ascii=False) + "\n")

    def count_duplicates(self, keys: Sequence[str], answers: Sequence[Any] | None = None) -> None:
        """Count rows whose key an earlier row has, and those of them that have another answer than it.

        Args:
            keys: of the rows, such as ``prompt_key`` of their prompts, or of everything in them.
            answers: of the rows, where two answers to one question are a mistake; the keys are then of prompts alone.
        """
        first: dict[str, int] = {}
        repeated = [n for n, key in enumerate(keys) if first.setdefault(key, n) != n]
        if not repeated:
            return
        self.counts["duplicates"] = len(repeated)
        what = "an earlier row" if answers is None else "the prompt of an earlier one"
        remark = f"{len(repeated)} of {len(keys)} rows repeat {what} (case and blanks aside)"
        if answers is not None:
            other = sum(answers[n] != answers[first[keys[n]]] for n in repeated)
            if other:
                self.counts["contradicting_duplicates"] = other
                remark += f", {other} of them with another answer"
        self.remarks.append(remark)

    def drop_leaks(self, held_out: list[Item], keys: Iterable[str], trained_on: Iterable[str]) -> list[Item]:
        """The held-out rows that are not trained on, the others counted.

        Args:
            held_out: rows.
            keys: of each of them.
            trained_on: keys of the rows that are trained on.
        """
        known = set(trained_on)
        kept = [row for row, key in zip(held_out, keys, strict=True) if key not in known]
        leaks = len(held_out) - len(kept)
        if leaks:
            self.counts["leaks"] = leaks
            self.remarks.append(
                f"{leaks} of {len(held_out)} held-out rows left out: their prompts are trained on (case and blanks "
                "aside)"
            )
        return kept

    def count_held_out(self, rows: int, held_out: int, source: str) -> None:
        """Count the rows of a source and how many of them are held out."""
        self.counts |= {"rows": rows, "held_out": held_out}
        self.remarks.append(f"{held_out} of {rows} rows of {source} are held out for evaluation")


def prompt_key(prompt: str | Sequence[dict[str, Any]]) -> str:
    """A text that is the same for prompts that differ in case and blanks only.

    A conversation of one user message has the key of its text.
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
