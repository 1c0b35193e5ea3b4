"""Batch inference: completions of every problem, scored and written to a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.mixture import TaskConfig
from grpo_jax.data.encoded import EncodedProblems, decode_completions
from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.data.selection import ProblemSamples
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.run import Run
from grpo_jax.loop.setup import load_policy, make_sampler, start_model
from grpo_jax.loop.task_runtime import Asked, TaskRuntime
from grpo_jax.sharding import ROLLOUT_RULES, make_reshard, param_shardings
from grpo_jax.types import Rollout

SETS_OF_A_BLOCK = 4
"""A block is written as a whole; what a run that stopped had drawn of one is drawn again, and the same."""
PROVENANCE = "provenance.json"


def collect(
    config: BatchInferenceConfig,
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
            ``TaskRuntime``.
        Stopped: the run was asked to stop.
    """
    task = TaskRuntime(
        TaskConfig(None, config.data, config.rewards),
        run,
        seed=config.seed,
        max_completion_length=config.completion_length,
        mesh=mesh,
        dtype=config.compute_dtype,
        asked=asked,
        measured=("format",),
    )
    start = start_model(config, run, seed=config.seed)
    policy = load_policy(config, start, mesh)
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
    sampler = make_sampler(config, policy, mesh, group_size=config.num_samples)
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
            run.log_reward_errors(number, task.scorer.take_errors())
            # First what is taken back if the block is not whole: a kill between the two loses no figure.
            run.log({"step": number, "num_problems": len(collected), "step_time": time.monotonic() - started})
            run.completions_log.append(*(each.row(number) for each in collected))
            run.stop_if_requested()
    return len(places)


def read_samples(folder: Path) -> Iterator[ProblemSamples]:
    """What ``collect`` wrote into a run's folder, a problem after the other."""
    with (folder / "completions.jsonl").open("rb") as lines:
        for line in lines:
            yield ProblemSamples.from_row(json.loads(line))


def read_provenance(folder: Path) -> dict[str, Any]:
    """What the completions in a run's folder were drawn from."""
    return json.loads((folder / PROVENANCE).read_text())


def check_provenance(
    config: BatchInferenceConfig, run: Run, start: str, prompt_format: Mapping[str, Any], texts: Sequence[str]
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
    run.reward_errors_log.rewind(done)
    run.metrics_log.rewind(done)
    return done


def scored(
    problems: EncodedProblems, drawn: Mapping[int, Rollout], decode: Any, task: TaskRuntime
) -> list[ProblemSamples]:
    """The completions of some problems with their scores, in the order of ``drawn``."""
    group_size = next(iter(drawn.values())).completion_ids.shape[0]
    texts = [decode(rollout) for rollout in drawn.values()]
    lengths = [np.asarray(rollout.completion_mask).sum(1).tolist() for rollout in drawn.values()]
    truncated = [np.asarray(rollout.truncated).tolist() for rollout in drawn.values()]
    columns = reward_columns([problems.problems[place] for place in drawn], group_size=group_size)
    columns |= {"completion_length": [*chain(*lengths)], "truncated": [*chain(*truncated)]}
    prompts = [problems.texts[place] for place in drawn for _ in range(group_size)]
    scores = task.scorer.score(prompts, [*chain(*texts)], **columns)

    def of(values: np.ndarray, group: int) -> list[float | None]:
        return to_json(values.reshape(-1, group_size)[group])

    return [
        ProblemSamples(
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
