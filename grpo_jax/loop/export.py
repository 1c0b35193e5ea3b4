"""The end of a run: choice and export of the trained model, summary."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax

from grpo_jax import models
from grpo_jax.hosts import fetch, on_main
from grpo_jax.jsonl import Row
from grpo_jax.loop.run import Run
from grpo_jax.monitor.display import best_evaluation, number, ranking_metric
from grpo_jax.train.trainable import trainable_part, with_frozen, without_frozen
from grpo_jax.types import Params

ADAPTER_FOLDER = "adapter"
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
    """The parameters that ``config.export`` selects, and their step.

    Args:
        config: has ``export``, ``last`` or ``best``.
        run: its evaluations rank the steps, by the first metric of ``monitor.display.RANKED_BY`` that was logged.
        state: state of the last step; deleted if an earlier checkpoint is read instead.
        steps: number of the last step.
        params_of: state -> parameters to export.
        start: loads the initial parameters, which have no checkpoint.
    """
    available = {0, steps, *run.checkpoints.steps()}
    best = best_evaluation([row for row in run.rows() if row["step"] in available])
    if config.export == "last" or best is None or best["step"] == steps:
        return params_of(state), steps
    saved = without_frozen(state)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved)
    jax.tree.map(lambda x: x.delete(), saved if best["step"] else state)
    if not best["step"]:
        return start(), 0
    return params_of(with_frozen(run.checkpoints.read(best["step"], shapes), state)), best["step"]


def check_steps(run: Run, first: int, total: int, *, setting: str, decay: str) -> None:
    """Check that a resumed run has not passed the requested number of steps; print the effect of a changed number.

    Args:
        run: the run.
        first: number of steps already taken.
        total: total number of steps requested.
        setting: the setting that gives ``total``, such as ``num_steps``.
        decay: the learning rate's decay, ``OptimizerConfig.decay``.

    Raises:
        ValueError: ``first`` is greater than ``total``.
    """
    change = run.changed(setting)
    if first > total:
        raise ValueError(
            f"{setting} gives {total} steps, but {run.folder} has already taken {first}; raise it, or choose another "
            "run_dir"
        )
    if first and change is not None:
        is_stale = run.settings.get("staleness", 0) > 0
        equals = "" if is_stale else ", so the result equals an uninterrupted run of this length"
        rate = (
            f"the learning rate is constant{equals}"
            if decay == "constant"
            else f"from step {first + 1} on the learning rate follows a {decay} decay over {total} steps; earlier "
            "steps followed the previous schedule"
        )
        run.say(f"{setting} was {change[0]} and is {change[1]}: continues from step {first} to {total}; {rate}")


def report_best(run: Run, evaluations: Sequence[Row], exported_step: int) -> None:
    """Print which step had the best held-out metric and which was exported, unless the last step was the best.

    Args:
        run: prints the line.
        evaluations: rows of metrics, in order of steps.
        exported_step: step of the exported parameters.
    """
    best, name = best_evaluation(evaluations), ranking_metric(evaluations)
    if best is None or name is None or best["step"] == evaluations[-1]["step"]:
        return
    last = evaluations[-1].get(name)
    hint = "" if exported_step == best["step"] else "; --export best exports the best step that has a checkpoint"
    run.say(
        f"held-out {name.removeprefix('eval/')} was best at step {best['step']} ({number(best[name])}), and is "
        f"{'absent' if last is None else number(last)} at the last step; model/ is from step {exported_step}{hint}"
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
    """Save the trained model as a Hugging Face folder, ``model/``, and finish the run.

    Its ``eos_token_id`` lists every token that ended a sequence in training. LoRA adapters are merged in it, and are
    saved for PEFT in ``adapter/``, too.

    Args:
        run: the run; its summary has the metrics of the evaluations before training and at the exported step.
        params: trained parameters.
        like: the initial model, for configuration, tokenizer and stop tokens.
        steps: number of steps taken.
        summary: further entries of the summary.
        prompt_format: format of the training prompts, saved as ``prompt_format.json``.
        exported_step: step of ``params``. Default: the last.
    """
    folder = run.folder / "model"

    def remove() -> None:
        for left in (folder, run.folder / ADAPTER_FOLDER):  # by a process that was killed before the summary
            shutil.rmtree(left, ignore_errors=True)

    on_main(remove, "removing an unfinished export")
    if like.lora is not None:
        adapters = fetch(trainable_part(params))
        on_main(lambda: models.save_adapters(run.folder / ADAPTER_FOLDER, adapters, like), "writing the adapters")
        params = models.merge_adapters(params, like.config, like.lora)
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
    metrics = {
        f"{name.removeprefix('eval/').replace('@', '_at_')}_{when}": row[name]
        for name in before
        if name.startswith("eval/") and name in after
        for when, row in (("before", before), ("after", after))
    }
    best = best_evaluation(rows)
    exported = {"exported_step": exported_step, "best_step": None if best is None else best["step"]}
    run.finish(before, after, steps=steps, summary={**metrics, **exported, **summary})
    report_best(run, rows, exported_step)
