"""Sample completions: tables in the terminal, rows in the log, and the choice of which are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LINE_BREAKS = 20


@dataclass(frozen=True)
class Sample:
    """A completion and what it was worth.

    Attributes:
        prompt: the prompt's text.
        completion: the completion's text.
        rewards: each part of the reward by its name; None or NaN where a part is absent.
        reward: their weighted sum; None where nothing is rewarded.
        advantage: what it was learnt from with; None where it was not.
        answer: the gold answer, where there is one.
        note: what rewards had to say of it, such as an interpreter's message.
        why: why it was chosen to be read.
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
        """The sample as a line of ``completions.jsonl``; a part of the reward stands under ``rewards/<name>``."""
        parts = {f"rewards/{name}": value for name, value in self.rewards.items()}
        text = {"prompt": self.prompt, "completion": self.completion, "answer": self.answer}
        text |= {name: said for name, said in (("note", self.note), ("why", self.why)) if said}
        row = {"step": step, **text, "reward": self.reward, **parts, "advantage": self.advantage}
        return {name: value for name, value in row.items() if value is not None or name not in ("reward", "advantage")}


def can_show(character: str, encoding: str) -> bool:
    """Whether a character prints as itself: neither a control nor an invisible one, and part of the encoding."""
    return character.isprintable() and character.encode(encoding, "ignore") != b""


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""``text`` with every character that would not print as itself as an escape: ``\n``, ``\x1b``, ``\u202e``.

    Control characters, terminal sequences and marks that reorder text lose their effect, and an output with this
    encoding takes the result without an error.
    """
    return "".join(
        character if can_show(character, encoding) else character.encode("unicode_escape").decode()
        for character in text
    )


def shorten(text: str, limit: int) -> str:
    """``text`` where it has at most ``limit`` characters; else its beginning and end, and between them its length.

    Raises:
        ValueError: ``limit`` is below 60, where little but that note would be left.
    """
    if limit < 60:
        raise ValueError(f"a text is shortened to 60 characters or more, not to {limit}")
    if len(text) <= limit:
        return text
    note = f" ... [{len(text):,} characters] ... "
    start = (limit - len(note)) // 2
    end = limit - len(note) - start
    return text[:start] + note + text[len(text) - end :]


def print_samples(
    samples: Sequence[Sample], step: int, console: Console, *, plain: bool | None = None, limit: int = 600
) -> None:
    """Print completions with their rewards: a table on a terminal, a few plain lines for each without one.

    The texts are untrusted. Neither markup nor control sequences in them are interpreted; what would not print as
    itself is shown as an escape, except that a table breaks lines where the text does, at the first twenty places.

    Args:
        samples: what to print; nothing is printed for none.
        step: the step they were drawn at.
        console: where to print.
        plain: whether to print plain lines; by default, where ``console`` is no terminal.
        limit: how many characters of a text are shown, at least 60; of a longer one, beginning and end.
    """
    if not samples:
        return
    if console.is_terminal if plain is None else not plain:
        console.print(_table(samples, step, console.encoding, limit))
        return
    lines = [f"samples at step {step}"]
    for place, sample in enumerate(samples, 1):
        figures = "  ".join(f"{name} {value}" for name, value in _figures(sample, console.encoding))
        lines.append(f"  [{place}] {figures}".rstrip() + (f"  ({sample.why})" if sample.why else ""))
        lines.append(f"      prompt: {printable(shorten(sample.prompt, limit), console.encoding)}")
        lines.append(f"      completion: {printable(shorten(sample.completion, limit), console.encoding)}")
        if sample.answer is not None:
            lines.append(f"      answer: {printable(shorten(sample.answer, limit), console.encoding)}")
        if sample.note:
            lines.append(f"      note: {printable(shorten(sample.note, limit), console.encoding)}")
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _figures(sample: Sample, encoding: str) -> list[tuple[str, str]]:
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
    has_figures = any(_figures(sample, encoding) for sample in samples)
    if has_figures:
        table.add_column("reward")
    for sample in samples:
        figures = Table.grid(padding=(0, 1))
        figures.add_column(style="dim")
        figures.add_column(justify="right")
        for name, value in _figures(sample, encoding):
            figures.add_row(Text(name), Text(value, style=_colour(sample.advantage) if name == "advantage" else ""))
        asked = _text(sample.prompt, encoding, limit)
        if sample.answer is not None:
            asked.append("\nanswer ", style="dim").append_text(_text(sample.answer, encoding, limit))
        if sample.why:
            asked.append(f"\n{sample.why}", style="dim italic")
        said = _text(sample.completion, encoding, limit)
        if sample.note:
            said.append("\nnote ", style="dim").append_text(_text(sample.note, encoding, limit))
        table.add_row(asked, said, *([figures] if has_figures else []))
    return table


def _colour(advantage: float | None) -> str:
    return "green" if (advantage or 0) > 0 else "red" if (advantage or 0) < 0 else ""


def _text(text: str, encoding: str, limit: int) -> Text:
    result = Text()
    line_breaks = LINE_BREAKS
    for character in shorten(text, limit):
        if can_show(character, encoding):
            result.append(character)
        elif character == "\n" and line_breaks > 0:
            result.append(character)
            line_breaks -= 1
        else:
            result.append(printable(character, encoding), style="dim cyan")
    return result


def spot_checks(samples: Sequence[Sample], *, group_size: int, seed: int) -> list[Sample]:
    """Up to four samples of a step, each with why it was chosen: what is to be found is found at the edges.

    - the highest reward above the mean of its group: what paid where its siblings did not;
    - the largest disagreement between two parts of the reward, each against its own course over the step: what
      satisfies one and not the other;
    - the lowest reward below the mean of its group;
    - one at random, so that the rest is seen too.

    Samples without a reward are chosen only at random, and nothing is chosen twice.

    Args:
        samples: those of a group adjacent.
        group_size: samples for each prompt.
        seed: of the random one.
    """
    rewards = np.array([sample.reward for sample in samples], float)
    groups = rewards.reshape(-1, group_size)
    present = ~np.isnan(groups)
    means = np.where(present, groups, 0).sum(1) / np.maximum(present.sum(1), 1)
    jump = rewards - np.repeat(means, group_size)
    chosen: dict[int, str] = {}

    def choose(surprise: np.ndarray, why: str) -> None:
        surprise = np.where(np.isnan(surprise), -np.inf, surprise)
        surprise[list(chosen)] = -np.inf
        place = int(surprise.argmax())
        if surprise[place] > 0:
            chosen[place] = why

    choose(jump, "highest reward above its group")
    choose(np.where(np.isnan(rewards), np.nan, disagreement(samples)), "largest disagreement between parts")
    choose(-jump, "lowest reward below its group")
    rest = [place for place in range(len(samples)) if place not in chosen]
    if rest:
        chosen[rest[np.random.default_rng(seed).integers(len(rest))]] = "at random"
    return [replace(samples[place], why=why) for place, why in chosen.items()]


def disagreement(samples: Sequence[Sample]) -> np.ndarray:
    """For each sample the largest difference between two of its parts, each standardized over the samples."""
    names = [*dict.fromkeys(name for sample in samples for name in sample.rewards)]
    values = [[np.nan if (x := sample.rewards.get(name)) is None else x for name in names] for sample in samples]
    parts = np.array(values, float).reshape(len(samples), -1)
    standardized = []
    for part in parts.T:
        known = part[~np.isnan(part)]
        if known.size and known.std() > 0:
            standardized.append((part - known.mean()) / known.std())
    if len(standardized) < 2:
        return np.zeros(len(samples))
    stacked = np.array(standardized)
    return stacked.max(0) - stacked.min(0)
