"""Rejection sampling: many completions of each problem are drawn, and the good ones become demonstrations.

Without arguments the embedded base answers 256 of its sums, in half a minute on one CPU. With arguments it is the real
thing:

    python experiments/rejection_sampling.py --require format=1
    python experiments/rejection_sampling.py --model runs/gsm8k/model --dataset openai/gsm8k --require format=1
    python experiments/rejection_sampling.py --model path/to/folder --dataset problems.jsonl --target-language en \
        --require format=1 language=0.9 --balance 4 --demonstrations general.jsonl --general-share 0.25

What is kept goes to dataset.jsonl in the run's folder, a row a completion, for sft.py --dataset. A row has the
problem's own prompt and no template: give sft.py the template that completions were drawn with, so that the student is
asked as the teacher was. The last line says how.

A run that was stopped or killed goes on where it was. Selecting is cheap, drawing is not: to select otherwise from the
same completions, remove summary.json and give the same command with other filters.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config.prompts import prompt_flags
from grpo_jax.config.rejection_sampling import PRESETS, RejectionSamplingConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.files import read_rows
from grpo_jax.data.selection import FILTERS, Selection, balance_difficulty, check_some_left, select
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.batch_inference import read_provenance, read_samples, run_batch_inference
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run, run_experiment

DATASET = "dataset.jsonl"
PASS_RATE_BINS = 4
"""Parts of equal width that pass rates are told in where none are balanced."""


def main(config: RejectionSamplingConfig) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop."""
    return run_experiment(config, sample_and_select, title="rejection sampling")


def check(config: RejectionSamplingConfig) -> None:
    """Find a mesh that cannot be built, before anything is computed."""
    config.mesh.build()


def sample_and_select(config: RejectionSamplingConfig, run: Run) -> None:
    for path in config.demonstrations:  # what cannot be read is found before anything is drawn
        load_demonstrations(str(path))
    mesh = config.mesh.build()
    num_problems = run_batch_inference(
        config, run, mesh, problem_set="training", skip=config.skip_problems, max_problems=config.max_problems
    )
    choices: list[Selection] = []
    counts: Counter[str] = Counter(dict.fromkeys(FILTERS, 0))
    for collected in read_samples(run.folder):
        choice, left = select(collected, config.selection)
        choices.append(choice)
        counts.update(left)
    selected = balance_difficulty(choices, buckets=config.selection.balance, seed=config.seed)
    counts["balanced"] = num_selected(selected)
    check_some_left(counts, config.selection)
    provenance = read_provenance(run.folder)
    general = [GeneralFile(path) for path in config.demonstrations]
    added = take(general, config.general_share, counts["balanced"], config.seed)
    lengths: list[int] = []

    def lines() -> Iterator[bytes]:
        for row, length in selected_rows(run.folder, selected, provenance):
            lengths.append(length)
            yield as_line(row)
        for file, numbers in zip(general, added, strict=True):
            yield from map(as_line, file.rows(numbers))

    write_atomically(run.folder / DATASET, lines())
    by_pass_rate = count_by_pass_rate(choices, selected, config.selection.balance or PASS_RATE_BINS)
    mean_length = float(np.mean(lengths))
    how = teaching(run.folder / DATASET, provenance["prompt_format"], config.stop_tokens)
    account(run, counts, by_pass_rate, mean_length, sum(map(len, added)), how)
    run.write_summary(
        {
            "problems": num_problems,
            "problems_selected": len(selected),
            "counts": dict(counts),
            "by_pass_rate": by_pass_rate,
            "mean_length": mean_length,
            "general": [file.told(len(numbers)) for file, numbers in zip(general, added, strict=True)],
            "rows": len(lengths) + sum(map(len, added)),
            "teach_with": how,
            "provenance": provenance,
        }
    )


def selected_rows(
    folder: Path, selected: Sequence[Selection], provenance: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], int]]:
    """What is written of each completion that was selected, by place, the best first; and its length in tokens."""
    of_place = {choice.place: choice for choice in selected}
    for collected in read_samples(folder):
        if (choice := of_place.get(collected.place)) is None:
            continue
        for sample in choice.samples:
            row = {
                "prompt": collected.problem.prompt,
                "completion": collected.completions[sample],
                "answer": collected.problem.answer,
                "source": "rejection_sampling",
                "place": collected.place,
                "sample": sample,
                "total": collected.total[sample],
                "scores": {name: part[sample] for name, part in collected.rewards.items()},
                "pass_rate": choice.pass_rate,
                "provenance": dict(provenance),
            }
            yield row, collected.lengths[sample]


class GeneralFile:
    """A file of other demonstrations: how many rows it has, and its digest."""

    def __init__(self, path: Path):
        self.path = path
        self.num_rows = sum(1 for _ in read_rows(str(path), None, None))
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def rows(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows by their numbers, which rise, each with its file as ``source`` unless it names one itself."""
        wanted = set(numbers)
        for number, (_, row) in enumerate(read_rows(str(self.path), None, None)):
            if number in wanted:
                yield {"source": str(self.path), **row}

    def told(self, num_taken: int) -> dict[str, Any]:
        """For the summary."""
        return {"path": str(self.path), "sha256": self.sha256, "rows": self.num_rows, "taken": num_taken}


def take(files: Sequence[GeneralFile], share: float | None, num_selected: int, seed: int) -> list[list[int]]:
    """Which rows of each file are added, so that they are that share of all rows; all of them where they are too few.

    Args:
        files: that rows are drawn from, from all together and each alike.
        share: above 0 and below 1; None takes all rows.
        num_selected: rows that they are added to.
        seed: of the draw.
    """
    places = [(number, row) for number, file in enumerate(files) for row in range(file.num_rows)]
    if share is not None:
        wanted = round(num_selected * share / (1 - share))
        drawn = np.random.default_rng(seed).permutation(len(places))[:wanted].tolist()
        places = [places[n] for n in sorted(drawn)]
    taken: dict[int, list[int]] = defaultdict(list)
    for number, row in places:
        taken[number].append(row)
    return [taken[number] for number in range(len(files))]


def count_by_pass_rate(choices: Sequence[Selection], selected: Sequence[Selection], parts: int) -> list[dict[str, Any]]:
    """Of each part of pass rates its problems, the completions that they have after the cap, and those selected."""
    return [
        {
            "pass_rate": "0" if part < 0 else f"{part / parts:.2f} to {(part + 1) / parts:.2f}",
            "problems": sum(each.bucket(parts) == part for each in choices),
            "capped": num_selected([each for each in choices if each.bucket(parts) == part]),
            "selected": num_selected([each for each in selected if each.bucket(parts) == part]),
        }
        for part in range(-1, parts)
    ]


def num_selected(choices: Sequence[Selection]) -> int:
    return sum(len(choice.samples) for choice in choices)


def teaching(dataset: Path, prompt_format: Mapping[str, Any], stop_tokens: Sequence[str]) -> str:
    """The command that teaches a student, with the prompts as they were drawn for."""
    command = ["python", "experiments/sft.py", "--dataset", str(dataset)]
    command += ["--stop-tokens", *stop_tokens] if stop_tokens else []
    return shlex.join(command + prompt_flags(prompt_format))


def account(
    run: Run,
    counts: Mapping[str, int],
    by_pass_rate: Sequence[Mapping[str, Any]],
    mean_length: float,
    num_general: int,
    how: str,
) -> None:
    """Say what became of the completions."""
    run.say("completions that each filter left: " + ", ".join(f"{name} {counts[name]}" for name in FILTERS))
    for part in by_pass_rate:
        run.say(
            f"  pass rate {part['pass_rate']}: {part['problems']} problems, {part['capped']} completions after the "
            f"cap, {part['selected']} selected"
        )
    general = f" and {num_general} other rows" if num_general else ""
    run.say(f"{counts['balanced']} completions of {mean_length:.1f} tokens on average{general} are in {DATASET}")
    run.say(f"to teach them: {how} --model STUDENT")


def as_line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate has no UTF-8; its backslash form is JSON's own way to write it.
    return json.dumps(to_json(row), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


if __name__ == "__main__":
    sys.exit(run_command(RejectionSamplingConfig, main, presets=PRESETS, description=__doc__))
