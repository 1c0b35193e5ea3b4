"""The end of a run: which of its models is exported, and its summary."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax

from grpo_jax import models
from grpo_jax.jsonl import Row
from grpo_jax.loop.run import Run
from grpo_jax.monitor.display import best_evaluation, number, ranking_metric
from grpo_jax.types import Params

AnyState = TypeVar("AnyState")


def exported_params(
    config: Any,
    run: Run,
    state: AnyState,
    *,
    steps: int,
    params_of: Callable[[AnyState], Params],
    start: Callable[[], Params],
) -> tuple[Params, int]:
    """The parameters that ``config.export`` chooses, and the step they are of.

    Args:
        config: with ``export``, last or best.
        run: its evaluations rank the steps, by the first figure of ``monitor.display.RANKED_BY`` that it has.
        state: of the last step; given up where another one is read from its checkpoint.
        steps: the number of the last step.
        params_of: from a state to the parameters that are exported.
        start: loads the parameters the run started from, which have no checkpoint.
    """
    kept = {0, steps, *run.checkpoints.steps()}
    best = best_evaluation([row for row in run.rows() if row["step"] in kept])
    if config.export == "last" or best is None or best["step"] == steps:
        return params_of(state), steps
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)
    return (params_of(run.checkpoints.read(best["step"], shapes)) if best["step"] else start()), best["step"]


def check_steps(run: Run, first: int, total: int, *, setting: str, decay: str) -> None:
    """Check that a run that goes on is not asked for fewer steps than it has taken; say what a new number changes.

    Args:
        run: it goes on.
        first: the steps that it has taken.
        total: the steps that it is to take in all.
        setting: the setting that says how many those are, such as ``num_steps``.
        decay: of the learning rate, as ``OptimizerConfig`` has it.

    Raises:
        ValueError: it has taken more.
    """
    change = run.changed(setting)
    if first > total:
        raise ValueError(
            f"{setting} asks for {total} steps, and {run.folder} has taken {first}: ask for as many or more, or choose "
            "another run_dir"
        )
    if first and change is not None:
        rate = (
            "the learning rate stays constant, so that it becomes the run that it would have been with these steps"
            if decay == "constant"
            else f"from step {first + 1} on the learning rate is that of a {decay} decay over {total} steps; the steps "
            "before had that of the number before"
        )
        run.say(f"{setting} was {change[0]} and is {change[1]}: goes on from step {first} to {total}; {rate}")


def report_best(run: Run, evaluations: Sequence[Row], exported_step: int) -> None:
    """Say which step had the best held-out figure where it is not the last, and which one was exported."""
    best, name = best_evaluation(evaluations), ranking_metric(evaluations)
    if best is None or name is None or best["step"] == evaluations[-1]["step"]:
        return
    last = evaluations[-1].get(name)
    other = "" if exported_step == best["step"] else "; --export best exports the best one that has a checkpoint"
    run.say(
        f"held-out {name.removeprefix('eval/')} was best at step {best['step']} ({number(best[name])}), and is "
        f"{'absent' if last is None else number(last)} at the last one; model/ is that of step {exported_step}{other}"
    )


def save_trained(
    run: Run,
    params: Params,
    like: models.Pretrained,
    *,
    steps: int,
    summary: Mapping[str, Any] = MappingProxyType({}),
    prompt_format: Mapping[str, Any] | None = None,
    exported_step: int | None = None,
) -> None:
    """Save what was trained as a Hugging Face folder, ``model``, and sum the run up.

    Its ``eos_token_id`` names every token that ended a sequence in training.

    Args:
        run: the figures of its evaluation before the first step, and of that of the exported step, are those before
            and after.
        params: what was trained.
        like: the model they came from, for its configuration, tokenizer and ending tokens.
        steps: how many were taken.
        summary: what is to be told besides.
        prompt_format: how the prompts it was trained on were made; becomes the folder's ``prompt_format.json``.
        exported_step: the step that ``params`` are of; by default the last.
    """
    folder = run.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed before the summary
    models.save_pretrained(
        folder,
        params,
        hf_config=like.hf_config,
        tokenizer=like.tokenizer,
        generation_config=like.generation_config,
        prompt_format=prompt_format,
        eos_ids=like.eos_ids,
    )
    exported_step = steps if exported_step is None else exported_step
    rows = [row for row in run.rows() if any(name.startswith("eval/") for name in row)]
    before, after = rows[0], [row for row in rows if row["step"] <= exported_step][-1]
    figures = {
        f"{name.removeprefix('eval/').replace('@', '_at_')}_{when}": row[name]
        for name in before
        if name.startswith("eval/") and name in after
        for when, row in (("before", before), ("after", after))
    }
    best = best_evaluation(rows)
    chosen = {"exported_step": exported_step, "best_step": None if best is None else best["step"]}
    run.finish(before, after, steps=steps, summary={**figures, **chosen, **summary})
    report_best(run, rows, exported_step)
