"""Rejection sampling: sample many completions per problem, keep the good ones as demonstrations.

Without arguments it samples the toy model on 256 sums, in half a minute on one CPU. For real models:

    python experiments/rejection_sampling.py --require format=1
    python experiments/rejection_sampling.py --model runs/gsm8k/model --dataset openai/gsm8k --require format=1
    python experiments/rejection_sampling.py --model path/to/folder --dataset problems.jsonl --target-language en \
        --require format=1 language=0.9 --balance 4 --demonstrations general.jsonl --general-share 0.25

Selected completions go to dataset.jsonl in the run's folder, one row each, for sft.py --dataset. Prompts are written
without a template: train with the template that was sampled with. The last line of the output has the command.

To select again from the same completions, remove summary.json and give the same command with other filters.
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
from grpo_jax.config.rejection_sampling import DATASET, PAIRS, PRESETS, RejectionSamplingConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.files import read_rows
from grpo_jax.data.selection import (
    FILTERS,
    Selection,
    balance_difficulty,
    check_some_left,
    preference_pairs,
    select,
)
from grpo_jax.hosts import LONG_TIMEOUT, on_main
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.batch_inference import read_provenance, read_samples, run_batch_inference
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run, run_experiment

PASS_RATE_BINS = 4
"""Bins of the reported pass rates if ``selection.balance`` is not set."""


def main(config: RejectionSamplingConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, sample_and_select, title="rejection sampling")


def sample_and_select(config: RejectionSamplingConfig, run: Run) -> None:
    for path in config.demonstrations:  # fails on unreadable files before sampling
        load_demonstrations(str(path))
    mesh = config.mesh.build()
    num_problems = run_batch_inference(
        config, run, mesh, problem_set="training", skip=config.skip_problems, max_problems=config.max_problems
    )
    on_main(lambda: write_selected(config, run, num_problems), "selecting completions", timeout=LONG_TIMEOUT)


def write_selected(config: RejectionSamplingConfig, run: Run, num_problems: int) -> None:
    """Select completions and write the data set and the summary.

    Args:
        config: settings.
        run: its folder has the completions.
        num_problems: number of problems sampled for.
    """
    choices: list[Selection] = []
    counts: Counter[str] = Counter(dict.fromkeys(FILTERS, 0))
    for samples in read_samples(run.folder):
        choice, remaining = select(samples, config.selection)
        choices.append(choice)
        counts.update(remaining)
    selected = balance_difficulty(choices, buckets=config.selection.balance, seed=config.seed)
    counts["balanced"] = num_selected(selected)
    check_some_left(counts, config.selection)
    provenance = read_provenance(run.folder)
    general = [GeneralFile(path) for path in config.demonstrations]
    added = sample_rows(general, config.general_share, counts["balanced"], config.seed)
    lengths: list[int] = []

    def lines() -> Iterator[bytes]:
        for row, length in selected_rows(run.folder, selected, provenance):
            lengths.append(length)
            yield as_line(row)
        for file, numbers in zip(general, added, strict=True):
            yield from map(as_line, file.rows(numbers))

    write_atomically(run.folder / DATASET, lines())
    pairs = [*pair_rows(run.folder, config)] if config.pairs_per_problem else []
    if config.pairs_per_problem:
        if not pairs:
            raise ValueError(
                "pairs_per_problem is set, but no problem has both a completion that passes and one that does not: "
                "sample more problems or more completions per problem"
            )
        write_atomically(run.folder / PAIRS, map(as_line, pairs))
        run.say(f"{len(pairs)} pairs of a completion that passes and one that does not in {run.folder / PAIRS}")
    by_pass_rate = count_by_pass_rate(choices, selected, config.selection.balance or PASS_RATE_BINS)
    mean_length = float(np.mean(lengths))
    command = sft_command(run.folder / DATASET, provenance["prompt_format"], config.stop_tokens)
    print_report(run, counts, by_pass_rate, mean_length, sum(map(len, added)), command)
    run.write_summary(
        {
            "problems": num_problems,
            "problems_selected": len(selected),
            "counts": dict(counts),
            "by_pass_rate": by_pass_rate,
            "mean_length": mean_length,
            "general": [file.summary(len(numbers)) for file, numbers in zip(general, added, strict=True)],
            "rows": len(lengths) + sum(map(len, added)),
            "pairs": len(pairs),
            "teach_with": command,
            "provenance": provenance,
        }
    )


def selected_rows(
    folder: Path, selected: Sequence[Selection], provenance: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows of ``dataset.jsonl`` with the completions' lengths in tokens; by problem, best completion first.

    Args:
        folder: run folder with the samples.
        selected: selected completions of each problem.
        provenance: stored in every row.
    """
    by_place = {choice.place: choice for choice in selected}
    for samples in read_samples(folder):
        if (choice := by_place.get(samples.place)) is None:
            continue
        for n in choice.samples:
            row = {
                "prompt": samples.problem.prompt,
                "completion": samples.completions[n],
                "answer": samples.problem.answer,
                "source": "rejection_sampling",
                "place": samples.place,
                "sample": n,
                "total": samples.total[n],
                "scores": {name: scores[n] for name, scores in samples.rewards.items()},
                "pass_rate": choice.pass_rate,
                "provenance": dict(provenance),
            }
            yield row, samples.lengths[n]


def pair_rows(folder: Path, config: RejectionSamplingConfig) -> Iterator[dict[str, Any]]:
    """Rows of ``preferences.jsonl``, by problem.

    Args:
        folder: run folder with the samples.
        config: what a completion must pass, and the number of pairs per problem.
    """
    for samples in read_samples(folder):
        for chosen, rejected in preference_pairs(samples, config.selection, max_pairs=config.pairs_per_problem):
            yield {
                "prompt": samples.problem.prompt,
                "chosen": samples.completions[chosen],
                "rejected": samples.completions[rejected],
            }


class GeneralFile:
    """A file of further demonstrations, with its number of rows and digest."""

    def __init__(self, path: Path):
        self.path = path
        self.num_rows = sum(1 for _ in read_rows(str(path), None, None))
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def rows(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows with these numbers, in the file's order; ``source`` is the file unless a row has one."""
        wanted = set(numbers)
        for number, (_, row) in enumerate(read_rows(str(self.path), None, None)):
            if number in wanted:
                yield {"source": str(self.path), **row}

    def summary(self, num_taken: int) -> dict[str, Any]:
        """The file's entry in ``summary.json``."""
        return {"path": str(self.path), "sha256": self.sha256, "rows": self.num_rows, "taken": num_taken}


def sample_rows(files: Sequence[GeneralFile], share: float | None, num_selected: int, seed: int) -> list[list[int]]:
    """Numbers of the rows to add from each file, uniformly sampled; all rows if there are too few.

    Args:
        files: files to sample from, all rows with the same probability.
        share: fraction of the resulting dataset, above 0 and below 1; None takes all rows.
        num_selected: number of rows that they are added to.
        seed: seed of the sampling.
    """
    places = [(number, row) for number, file in enumerate(files) for row in range(file.num_rows)]
    if share is not None:
        wanted = round(num_selected * share / (1 - share))
        sampled = np.random.default_rng(seed).permutation(len(places))[:wanted].tolist()
        places = [places[n] for n in sorted(sampled)]
    taken: dict[int, list[int]] = defaultdict(list)
    for number, row in places:
        taken[number].append(row)
    return [taken[number] for number in range(len(files))]


def count_by_pass_rate(choices: Sequence[Selection], selected: Sequence[Selection], parts: int) -> list[dict[str, Any]]:
    """Problems, completions after the cap and selected completions for each bin of pass rates; first the bin 0.

    Args:
        choices: completions of all problems after the filters.
        selected: completions after balancing.
        parts: number of bins above 0.
    """
    return [
        {
            "pass_rate": "0" if part < 0 else f"{part / parts:.2f} to {(part + 1) / parts:.2f}",
            "problems": sum(choice.bucket(parts) == part for choice in choices),
            "capped": num_selected([choice for choice in choices if choice.bucket(parts) == part]),
            "selected": num_selected([choice for choice in selected if choice.bucket(parts) == part]),
        }
        for part in range(-1, parts)
    ]


def num_selected(choices: Sequence[Selection]) -> int:
    return sum(len(choice.samples) for choice in choices)


def sft_command(dataset: Path, prompt_format: Mapping[str, Any], stop_tokens: Sequence[str]) -> str:
    """The command that trains a student on the dataset, with the prompt format that was sampled with.

    Args:
        dataset: path of the dataset.
        prompt_format: the prompt format.
        stop_tokens: further stop tokens.
    """
    command = ["python", "experiments/sft.py", "--dataset", str(dataset)]
    command += ["--stop-tokens", *stop_tokens] if stop_tokens else []
    return shlex.join(command + prompt_flags(prompt_format))


def print_report(
    run: Run,
    counts: Mapping[str, int],
    by_pass_rate: Sequence[Mapping[str, Any]],
    mean_length: float,
    num_general: int,
    command: str,
) -> None:
    run.say("completions left after each filter: " + ", ".join(f"{name} {counts[name]}" for name in FILTERS))
    for part in by_pass_rate:
        run.say(
            f"  pass rate {part['pass_rate']}: {part['problems']} problems, {part['capped']} completions after the "
            f"cap, {part['selected']} selected"
        )
    general = f" and {num_general} other rows" if num_general else ""
    run.say(f"{counts['balanced']} completions of {mean_length:.1f} tokens on average{general} are in {DATASET}")
    run.say(f"to train on them: {command} --model STUDENT")


def as_line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate cannot be encoded in UTF-8; JSON has a backslash escape for it.
    return json.dumps(to_json(row), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


if __name__ == "__main__":
    sys.exit(run_command(RejectionSamplingConfig, main, presets=PRESETS, description=__doc__))
