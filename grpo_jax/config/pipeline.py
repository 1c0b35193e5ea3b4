"""Settings of pipelines: several runs of scripts, with what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from grpo_jax.config.run import LAYOUT_FIELDS, AnyConfig, RunConfig
from grpo_jax.tasks.toy_config import TOY

SHARED_FIELDS = (
    *("seed", "plain", "mesh", "dtype", "remat", "attention", "trackers"),
    *("save_every", "save_minutes", "keep_checkpoints"),
)
"""Fields that a pipeline sets for all of its stages."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(RunConfig):
    """A pipeline of several runs."""

    dry_run: bool = False
    """Check all stages and print their commands, without running them."""

    @property
    def extendable_fields(self) -> tuple[str, ...]:
        """All fields: stages that a change does not affect stay."""
        return tuple(field.name for field in fields(self) if field.name not in LAYOUT_FIELDS)


def stage_config(stage: AnyConfig, whole: Any, folder: Path, start: Path | str | None, **changes: Any) -> AnyConfig:
    """``stage`` with its own run folder and the pipeline's ``SHARED_FIELDS``.

    Args:
        stage: a dataclass with the fields of ``RunConfig`` and ``ModelConfig``.
        whole: the settings of the pipeline.
        folder: the stage's run folder.
        start: the model that it starts from; None for the pipeline's own.
        changes: further fields.

    Raises:
        ValueError: the settings are inconsistent.
    """
    shared = {name: getattr(whole, name) for name in SHARED_FIELDS}
    model = whole.model if start is None else str(start)
    return replace(stage, **{"run_dir": folder, **shared, "model": model, "toy": whole.toy, **changes})


def check_no_models(whole: Any, names: Sequence[str]) -> None:
    """Check that stages do not name a model: the pipeline does.

    Args:
        whole: the settings of the pipeline.
        names: fields with the settings of a stage.

    Raises:
        ValueError: one does.
    """
    for name in names:
        if getattr(whole, name).model not in (None, TOY):
            raise ValueError(f"{name} names a model; the pipeline sets it for each stage")
