"""How a run goes on after its last step, and which of its models it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax

from grpo_jax.monitor.figures import number
from grpo_jax.monitor.metrics import Row
from grpo_jax.monitor.summary import best_evaluation, ranking_figure
from grpo_jax.run import Run
from grpo_jax.types import Params

Export = Literal["last", "best"]
"""Which of a run's models is exported: that of its last step, or that of its best held-out evaluation."""
AnyState = TypeVar("AnyState")


def exported(
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
        run: its evaluations rank the steps, by the first figure of ``monitor.summary.RANKED_BY`` that it has.
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
        decay: of the learning rate, as ``OptimizerSettings`` has it.

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


def say_best(run: Run, evaluations: Sequence[Row], exported_step: int) -> None:
    """Say which step had the best held-out figure where it is not the last, and which one was exported."""
    best, name = best_evaluation(evaluations), ranking_figure(evaluations)
    if best is None or name is None or best["step"] == evaluations[-1]["step"]:
        return
    last = evaluations[-1].get(name)
    other = "" if exported_step == best["step"] else "; --export best exports the best one that has a checkpoint"
    run.say(
        f"held-out {name.removeprefix('eval/')} was best at step {best['step']} ({number(best[name])}), and is "
        f"{'absent' if last is None else number(last)} at the last one; model/ is that of step {exported_step}{other}"
    )
