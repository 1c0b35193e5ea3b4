"""Completions of every problem, scored and kept: what evaluation, rejection sampling and distillation are made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.data.encoded import EncodedProblems, decode_completions
from grpo_jax.data.sources import Problem, reward_columns
from grpo_jax.experiment import PolicySettings, RunSettings, at_least
from grpo_jax.monitor.metrics import to_json, write_atomically
from grpo_jax.reward_settings import RewardSettings
from grpo_jax.run import Run
from grpo_jax.settings import DataSettings
from grpo_jax.sharding import ROLLOUT_RULES, make_reshard, param_shardings
from grpo_jax.tasks import Asked, OpenTask, Task, check_known
from grpo_jax.types import Rollout

SETS_OF_A_BLOCK = 4
"""A block is written as a whole; what a run that stopped had drawn of one is drawn again, and the same."""
PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class CollectSettings(RunSettings, PolicySettings):
    """What is asked, drawn and scored."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")] = DataSettings()
    """What is asked."""
    rewards: Annotated[RewardSettings, tyro.conf.arg(name="")] = RewardSettings()
    """How completions are scored."""
    num_samples: int = 16
    """Completions of each problem."""
    num_prompts: int = 64
    """Problems drawn for at once."""

    def __post_init__(self):
        RunSettings.__post_init__(self)
        PolicySettings.__post_init__(self)
        at_least(self, num_samples=1, num_prompts=1)
        check_known(self.model, [self.data])
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"sampling.temperature is 0, so that {self.num_samples} samples of a problem are all the same; set "
                "num_samples to 1"
            )


@dataclass(frozen=True)
class Collected:
    """The completions of a problem, and what they are worth; G of them.

    Attributes:
        place: of the problem among those that were asked.
        problem: what was asked.
        prompt: the text that it became.
        completions: texts.
        lengths: in tokens.
        truncated: whether each was cut off.
        total: the weighted sum of rewards; None where absent.
        rewards: each part by name; None where absent.
    """

    place: int
    problem: Problem
    prompt: str
    completions: list[str]
    lengths: list[int]
    truncated: list[bool]
    total: list[float | None]
    rewards: dict[str, list[float | None]]

    def row(self, step: int) -> dict[str, Any]:
        """As JSON."""
        return to_json({"step": step, **dataclasses.asdict(self)})

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Collected:
        """From what ``row`` gave."""
        fields = {name: value for name, value in row.items() if name != "step"}
        return cls(**{**fields, "problem": Problem(**fields["problem"])})


def collect(
    config: CollectSettings,
    run: Run,
    mesh: Mesh,
    *,
    asked: Asked,
    skip: int = 0,
    most: int | None = None,
    check: Callable[[Sequence[Problem]], None] = lambda problems: None,
) -> int:
    """Draw for all problems and write what came to ``completions.jsonl``, a line a problem, in their order.

    A run that was stopped or killed goes on after the last whole block, and its file is that of an unbroken one.

    Args:
        config: what is asked, of whom, and how it is scored.
        run: whose folder it goes to; ``provenance.json`` beside it says what it was drawn from.
        mesh: how devices are used.
        asked: the problems: those to train on, those that training would hold out, or all that an evaluation is of.
        skip: problems that are passed over, the first ones.
        most: how many problems are asked of those that follow; None for all.
        check: called with what will be asked, before anything is drawn; it may raise.

    Returns:
        How many were asked. ``metrics.jsonl`` has the seconds of each block, ``step_time``.

    Raises:
        ValueError: what is there was drawn from another model or for other problems, or none is left to ask; and as
            ``OpenTask``.
        Stopped: the run was asked to stop.
    """
    task = OpenTask(
        Task(None, config.data, config.rewards),
        run,
        seed=config.seed,
        max_completion_length=config.completion_length,
        mesh=mesh,
        dtype=config.compute_dtype,
        asked=asked,
    )
    start = config.start(run, config.seed)
    policy = config.as_sampled(config.load(start, mesh))
    task.encode(policy, max_prompt_length=config.prompt_length)
    problems = task.problems if asked == "training" else task.held_out
    places = range(len(problems))[skip:][:most]
    if not places:
        raise ValueError(f"there are {len(problems)} problems, and {skip} are passed over; nothing is left to ask")
    check([problems.problems[place] for place in places])
    check_provenance(config, run, start, task.prompt_format, [problems.texts[place] for place in places])

    size = SETS_OF_A_BLOCK * config.num_prompts
    blocks = [places[first : first + size] for first in range(0, len(places), size)]
    done = whole_blocks(run, blocks)
    sampler = config.sampler(policy, mesh, config.num_samples)
    params = make_reshard(param_shardings(policy.params, mesh, ROLLOUT_RULES), config.compute_dtype)(policy.params)
    decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
    with run.progress.phase("completions", len(places), start=sum(map(len, blocks[:done]))) as phase:
        for number, block in enumerate(blocks[done:], done + 1):
            started = time.monotonic()
            drawn: dict[int, Rollout] = {}
            noise = jax.random.key(config.seed)
            stream = sampler.stream(params, [problems.padded(block)], noise, num_prompts=config.num_prompts)
            for place, rollout in stream:
                drawn[block[place]] = rollout
                phase.update(places.index(block[0]) + len(drawn))
                run.stop_if_requested()
            collected = scored(problems, {place: drawn[place] for place in block}, decode, task)
            run.log_faults(number, task.scoring.take_faults())
            # First what is taken back if the block is not whole: a kill between the two loses no figure.
            run.log({"step": number, "num_problems": len(collected), "step_time": time.monotonic() - started})
            run.completions_log.append(*(each.row(number) for each in collected))
            run.stop_if_requested()
    return len(places)


def read_collected(folder: Path) -> Iterator[Collected]:
    """What ``collect`` wrote into a run's folder, a problem after the other."""
    with (folder / "completions.jsonl").open("rb") as lines:
        for line in lines:
            yield Collected.of_row(json.loads(line))


def read_provenance(folder: Path) -> dict[str, Any]:
    """What the completions in a run's folder were drawn from."""
    return json.loads((folder / PROVENANCE).read_text())


def check_provenance(
    config: CollectSettings, run: Run, start: str, prompt_format: Mapping[str, Any], texts: Sequence[str]
) -> None:
    """Write down what completions are drawn from, or see that it is what was written down before.

    Raises:
        ValueError: it is something else.
    """
    now = to_json(
        {
            "model": start,
            "weights": models.weights_digest(start),
            "seed": config.seed,
            "sampling": dataclasses.asdict(config.sampling),
            "dataset": config.data.dataset,
            "prompt_format": prompt_format,
            "prompts": hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()[:16],
        }
    )
    path = run.folder / PROVENANCE
    if path.exists():
        before = read_provenance(run.folder)
        different = [name for name in now if before.get(name) != now[name]]
        if different:
            raise ValueError(
                f"{run.folder} holds completions that were drawn otherwise; what differs: "
                f"{', '.join(f'{name} ({before.get(name)!r} -> {now[name]!r})' for name in different)}. Use another "
                "run_dir, or restore what it was begun with"
            )
    write_atomically(path, json.dumps(now, indent=2).encode() + b"\n")


def whole_blocks(run: Run, blocks: Sequence[Sequence[int]]) -> int:
    """How many blocks stand in the run's file as a whole; what follows them is taken out."""
    counts = [0] * (len(blocks) + 1)
    with run.completions_log.path.open("rb") as lines:
        for line in lines:
            counts[json.loads(line)["step"]] += 1
    done = 0
    while done < len(blocks) and counts[done + 1] == len(blocks[done]):
        done += 1
    run.completions_log.rewind(done)
    run.faults_log.rewind(done)
    run.metrics_log.rewind(done)
    return done


def scored(problems: EncodedProblems, drawn: Mapping[int, Rollout], decode: Any, task: OpenTask) -> list[Collected]:
    """The completions of some problems with their scores, in the order of ``drawn``."""
    group_size = next(iter(drawn.values())).completion_ids.shape[0]
    texts = [decode(rollout) for rollout in drawn.values()]
    lengths = [np.asarray(rollout.completion_mask).sum(1).tolist() for rollout in drawn.values()]
    truncated = [np.asarray(rollout.truncated).tolist() for rollout in drawn.values()]
    columns = reward_columns([problems.problems[place] for place in drawn], group_size=group_size)
    columns |= {"completion_length": [*chain(*lengths)], "truncated": [*chain(*truncated)]}
    prompts = [problems.texts[place] for place in drawn for _ in range(group_size)]
    scores = task.scoring.score(prompts, [*chain(*texts)], **columns)

    def of(values: np.ndarray, group: int) -> list[float | None]:
        return to_json(values.reshape(-1, group_size)[group])

    return [
        Collected(
            place=place,
            problem=problems.problems[place],
            prompt=problems.texts[place],
            completions=texts[group],
            lengths=lengths[group],
            truncated=truncated[group],
            total=of(scores.total, group),
            rewards={name: of(part, group) for name, part in scores.parts.items()},
        )
        for group, place in enumerate(drawn)
    ]
