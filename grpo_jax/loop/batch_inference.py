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
from grpo_jax.hosts import on_main
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.run import Run
from grpo_jax.loop.setup import load_policy, make_sampler, rollout_layout, start_model
from grpo_jax.loop.task_runtime import ProblemSet, TaskRuntime
from grpo_jax.types import Rollout

BATCHES_PER_BLOCK = 4
"""Blocks are written whole: on resume an incomplete block is sampled again, with the same result."""
PROVENANCE = "provenance.json"


def run_batch_inference(
    config: BatchInferenceConfig,
    run: Run,
    mesh: Mesh,
    *,
    problem_set: ProblemSet,
    skip: int = 0,
    max_problems: int | None = None,
    check: Callable[[Sequence[Problem]], None] = lambda problems: None,
) -> int:
    """Sample and score completions of every problem; write ``completions.jsonl``, one line per problem, in order.

    A resumed run continues after the last complete block and writes the same file as an uninterrupted run.

    Args:
        config: model, sampling, problems and rewards.
        run: its folder receives ``completions.jsonl`` and ``provenance.json`` (model, weights, seed, prompts).
        mesh: device mesh.
        problem_set: training problems, the problems that training would hold out, or those of an evaluation.
        skip: number of problems to skip at the start.
        max_problems: number of problems to sample for after those; None for all.
        check: called with the selected problems before sampling; may raise.

    Returns:
        Number of problems. ``metrics.jsonl`` has the seconds of each block, ``step_time``.

    Raises:
        ValueError: the folder has completions of another model or other problems, or no problem is left; and as
            ``TaskRuntime``.
        Stopped: a stop was requested.
    """
    task = TaskRuntime(
        TaskConfig(None, config.data, config.rewards),
        run,
        seed=config.seed,
        max_completion_length=config.completion_length,
        mesh=mesh,
        dtype=config.compute_dtype,
        problem_set=problem_set,
        measures_format=True,
    )
    start = start_model(config, run, seed=config.seed)
    policy = load_policy(config, start, mesh)
    task.encode(policy, max_prompt_length=config.prompt_length)
    problems = task.problems if problem_set == "training" else task.held_out
    places = range(len(problems))[skip:][:max_problems]
    if not places:
        raise ValueError(f"skip_problems is {skip}; it must be below the number of problems, {len(problems)}")
    check([problems.problems[place] for place in places])
    check_provenance(config, run, start, task.prompt_format, [problems.texts[place] for place in places])

    size = BATCHES_PER_BLOCK * config.num_prompts
    blocks = [places[first : first + size] for first in range(0, len(places), size)]
    done = on_main(lambda: _count_complete_blocks(run, blocks), "counting completions")
    layout = rollout_layout(config, policy, mesh)
    sampler = make_sampler(config, policy, layout, group_size=config.num_samples)
    params = layout.reshard(policy.params)
    decode = partial(decode_completions, policy.tokenizer, eos_ids=policy.eos_ids)
    with run.progress.phase("completions", len(places), start=sum(map(len, blocks[:done]))) as phase:
        for number, block in enumerate(blocks[done:], done + 1):
            started = time.monotonic()
            rollouts: dict[int, Rollout] = {}
            noise = jax.random.key(config.seed)
            stream = sampler.stream(params, [problems.padded(block)], noise, num_prompts=config.num_prompts)
            for place, rollout in stream:
                rollouts[block[place]] = rollout
                phase.update(places.index(block[0]) + len(rollouts))
                run.stop_if_requested()
            samples = score_rollouts(problems, {place: rollouts[place] for place in block}, decode, task)
            run.log_reward_errors(number, task.scorer.take_errors())
            # The metrics first: they are rewound if the block turns out incomplete, so a kill in between loses no row.
            run.log({"step": number, "num_problems": len(samples), "step_time": time.monotonic() - started})
            run.completions_log.append(*(sample.row(number) for sample in samples))
            run.stop_if_requested()
    return len(places)


def read_samples(folder: Path) -> Iterator[ProblemSamples]:
    """Iterator over the samples that ``run_batch_inference`` wrote to a run's folder."""
    with (folder / "completions.jsonl").open("rb") as lines:
        for line in lines:
            yield ProblemSamples.from_row(json.loads(line))


def read_provenance(folder: Path) -> dict[str, Any]:
    """``provenance.json``: model, weights digest, seed, sampling, dataset, prompt format, digest of the prompts."""
    return json.loads((folder / PROVENANCE).read_text())


def check_provenance(
    config: BatchInferenceConfig, run: Run, start: str, prompt_format: Mapping[str, Any], texts: Sequence[str]
) -> None:
    """Write ``provenance.json``, or check it where the folder has one.

    Args:
        config: seed, sampling and dataset.
        run: its folder.
        start: folder or Hugging Face id of the model.
        prompt_format: format of the prompts.
        texts: rendered prompts, of which a digest is kept.

    Raises:
        ValueError: the folder's provenance differs.
    """
    provenance = to_json(
        {
            "model": start,
            "weights": on_main(lambda: models.weights_digest(start), "the digest of the weights", is_long=True),
            "seed": config.seed,
            "sampling": dataclasses.asdict(config.sampling),
            "dataset": config.data.dataset,
            "prompt_format": prompt_format,
            "prompts": hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()[:16],
        }
    )
    path = run.folder / PROVENANCE

    def check() -> None:
        before = read_provenance(run.folder) if path.exists() else provenance
        different = [name for name in provenance if before.get(name) != provenance[name]]
        if different:
            raise ValueError(
                f"{run.folder} holds completions with another provenance: "
                f"{', '.join(f'{name} ({before.get(name)!r} -> {provenance[name]!r})' for name in different)}. Choose "
                "another run_dir, or restore the settings and model that it was started with"
            )
        write_atomically(path, json.dumps(provenance, indent=2).encode() + b"\n")

    on_main(check, "checking the provenance of completions")


def _count_complete_blocks(run: Run, blocks: Sequence[Sequence[int]]) -> int:
    """Number of complete blocks in the run's logs; rewinds the logs to the end of the last one."""
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


def score_rollouts(
    problems: EncodedProblems, rollouts: Mapping[int, Rollout], decode: Any, task: TaskRuntime
) -> list[ProblemSamples]:
    """Completions and scores of each problem, in the order of ``rollouts``.

    Args:
        problems: the encoded problems.
        rollouts: rollout by index of the problem.
        decode: rollout -> texts.
        task: its scorer scores the completions.
    """
    group_size = next(iter(rollouts.values())).completion_ids.shape[0]
    texts = [decode(rollout) for rollout in rollouts.values()]
    lengths = [np.asarray(rollout.completion_mask).sum(1).tolist() for rollout in rollouts.values()]
    truncated = [np.asarray(rollout.truncated).tolist() for rollout in rollouts.values()]
    columns = reward_columns([problems.problems[place] for place in rollouts], group_size=group_size)
    columns |= {"completion_length": [*chain(*lengths)], "truncated": [*chain(*truncated)]}
    prompts = [problems.texts[place] for place in rollouts for _ in range(group_size)]
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
        for group, place in enumerate(rollouts)
    ]
