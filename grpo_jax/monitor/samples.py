"""Sample completions: terminal tables, log rows, and the choice of which samples to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LINE_BREAKS = 20


@dataclass(frozen=True)
class Sample:
    """A completion with its scores.

    Attributes:
        prompt: text of the prompt.
        completion: text of the completion.
        rewards: scores by reward name; None or NaN where absent.
        reward: total reward (weighted sum); None where absent.
        advantage: advantage in the update; None if the sample was not in it.
        answer: gold answer; None if unknown.
        note: message of the rewards, such as an interpreter's error.
        why: reason for showing the sample.
    """

    prompt: str
    completion: str
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float | None = None
    answer: str | None = None
    note: str = ""
    why: str = ""

    def row(self, step: int) -> dict[str, Any]:
        """The sample as a row of ``completions.jsonl``, with scores as ``rewards/<name>``."""
        scores = {f"rewards/{name}": value for name, value in self.rewards.items()}
        text = {"prompt": self.prompt, "completion": self.completion, "answer": self.answer}
        text |= {name: value for name, value in (("note", self.note), ("why", self.why)) if value}
        row = {"step": step, **text, "reward": self.reward, **scores, "advantage": self.advantage}
        return {name: value for name, value in row.items() if value is not None or name not in ("reward", "advantage")}


def _can_show(character: str, encoding: str) -> bool:
    """Whether a character is printable (not a control or invisible character) and in the encoding."""
    return character.isprintable() and character.encode(encoding, "ignore") != b""


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""A text with unprintable characters escaped, such as ``\n``, ``\x1b`` and ``\u202e``.

    Disarms control characters, terminal sequences and bidirectional marks.

    Args:
        text: the text.
        encoding: the result can be encoded in it.
    """
    return "".join(
        character if _can_show(character, encoding) else character.encode("unicode_escape").decode()
        for character in text
    )


def shorten(text: str, limit: int) -> str:
    """A text, shortened in the middle with a note of its full length there.

    Args:
        text: the text.
        limit: maximum number of characters.

    Raises:
        ValueError: ``limit`` is below 60, which leaves little room next to the note.
    """
    if limit < 60:
        raise ValueError(f"limit is {limit}; it must be at least 60 characters")
    if len(text) <= limit:
        return text
    note = f" ... [{len(text):,} characters] ... "
    start = (limit - len(note)) // 2
    end = limit - len(note) - start
    return text[:start] + note + text[len(text) - end :]


def print_samples(
    samples: Sequence[Sample], step: int, console: Console, *, plain: bool | None = None, limit: int = 600
) -> None:
    """Print completions with their rewards: a table on a terminal, otherwise a few lines for each sample.

    The texts are untrusted: markup and control sequences are not interpreted, and unprintable characters are escaped.
    A table keeps the first twenty line breaks of a text.

    Args:
        samples: the samples; without any, nothing is printed.
        step: training step, for the title.
        console: output console.
        plain: whether to print plain lines; by default, if ``console`` is not a terminal.
        limit: maximum characters of a text, at least 60; longer texts are shortened in the middle.
    """
    if not samples:
        return
    if console.is_terminal if plain is None else not plain:
        console.print(_table(samples, step, console.encoding, limit))
        return
    lines = [f"samples at step {step}"]
    for place, sample in enumerate(samples, 1):
        scores = "  ".join(f"{name} {value}" for name, value in _scores(sample, console.encoding))
        lines.append(f"  [{place}] {scores}".rstrip() + (f"  ({sample.why})" if sample.why else ""))
        lines.append(f"      prompt: {printable(shorten(sample.prompt, limit), console.encoding)}")
        lines.append(f"      completion: {printable(shorten(sample.completion, limit), console.encoding)}")
        if sample.answer is not None:
            lines.append(f"      answer: {printable(shorten(sample.answer, limit), console.encoding)}")
        if sample.note:
            lines.append(f"      note: {printable(shorten(sample.note, limit), console.encoding)}")
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _scores(sample: Sample, encoding: str) -> list[tuple[str, str]]:
    parts = [(printable(name, encoding), _value(value)) for name, value in sample.rewards.items()]
    reward = [] if sample.reward is None else [("reward", _value(sample.reward))]
    advantage = [] if sample.advantage is None else [("advantage", f"{sample.advantage:+.2f}")]
    return [*reward, *parts, *advantage]


def _value(value: float | None) -> str:
    return "absent" if value is None or math.isnan(value) else f"{value:.2f}"


def _table(samples: Sequence[Sample], step: int, encoding: str, limit: int) -> Table:
    table = Table(title=f"samples at step {step}", box=box.ROUNDED, expand=True, show_lines=True, border_style="dim")
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=5, overflow="fold")
    has_scores = any(_scores(sample, encoding) for sample in samples)
    if has_scores:
        table.add_column("reward")
    for sample in samples:
        scores = Table.grid(padding=(0, 1))
        scores.add_column(style="dim")
        scores.add_column(justify="right")
        for name, value in _scores(sample, encoding):
            scores.add_row(Text(name), Text(value, style=_colour(sample.advantage) if name == "advantage" else ""))
        prompt = _text(sample.prompt, encoding, limit)
        if sample.answer is not None:
            prompt.append("\nanswer ", style="dim").append_text(_text(sample.answer, encoding, limit))
        if sample.why:
            prompt.append(f"\n{sample.why}", style="dim italic")
        completion = _text(sample.completion, encoding, limit)
        if sample.note:
            completion.append("\nnote ", style="dim").append_text(_text(sample.note, encoding, limit))
        table.add_row(prompt, completion, *([scores] if has_scores else []))
    return table


def _colour(advantage: float | None) -> str:
    return "green" if (advantage or 0) > 0 else "red" if (advantage or 0) < 0 else ""


def _text(text: str, encoding: str, limit: int) -> Text:
    result = Text()
    line_breaks = LINE_BREAKS
    for character in shorten(text, limit):
        if _can_show(character, encoding):
            result.append(character)
        elif character == "\n" and line_breaks > 0:
            result.append(character)
            line_breaks -= 1
        else:
            result.append(printable(character, encoding), style="dim cyan")
    return result


def spot_checks(total: np.ndarray, parts: Mapping[str, np.ndarray], *, group_size: int, seed: int) -> dict[int, str]:
    """Up to four completions of a step to read, mostly outliers, where errors of a reward show, with the reasons.

    - the highest reward above the mean of its group;
    - the largest disagreement between two rewards, each standardized over the step;
    - the lowest reward below the mean of its group;
    - one at random.

    Completions without a reward are chosen only at random, and none is chosen twice.

    Args:
        total: ``[B]`` rewards, NaN where absent; those of a group are adjacent.
        parts: ``[B]`` scores by name of the reward, NaN where absent.
        group_size: completions per prompt.
        seed: seed of the random choice.

    Returns:
        Row -> reason, in the order of the list.
    """
    rewards = np.asarray(total, float)
    groups = rewards.reshape(-1, group_size)
    present = ~np.isnan(groups)
    means = np.where(present, groups, 0).sum(1) / np.maximum(present.sum(1), 1)
    centred = rewards - np.repeat(means, group_size)
    chosen: dict[int, str] = {}

    def choose(score: np.ndarray, why: str) -> None:
        score = np.where(np.isnan(score), -np.inf, score)
        score[list(chosen)] = -np.inf
        place = int(score.argmax())
        if score[place] > 0:
            chosen[place] = why

    choose(centred, "highest reward above its group")
    choose(np.where(np.isnan(rewards), np.nan, disagreement(parts)), "largest disagreement between parts")
    choose(-centred, "lowest reward below its group")
    rest = [place for place in range(len(rewards)) if place not in chosen]
    if rest:
        chosen[rest[np.random.default_rng(seed).integers(len(rest))]] = "at random"
    return chosen


def disagreement(parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
    """``[B]`` largest difference between two rewards of a completion, each standardized over all; 0 without two.

    Args:
        parts: ``[B]`` scores by name of the reward, NaN where absent.
    """
    standardized = []
    for part in parts.values():
        part = np.asarray(part, float)
        known = part[~np.isnan(part)]
        if known.size and known.std() > 0:
            standardized.append((part - known.mean()) / known.std())
    if len(standardized) < 2:
        return 0.0
    stacked = np.array(standardized)
    return stacked.max(0) - stacked.min(0)
