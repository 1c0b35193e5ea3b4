"""Pipelines of several stages, each a run of a script in a folder of its own."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax import models
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.run import AnyConfig, Run, run_experiment
from grpo_jax.loop.run_folder import claim_folder, differences, has_results, read_settings
from grpo_jax.loop.setup import checked_model, named_model, with_stop_tokens
from grpo_jax.rewards.scorer import check_reward_model
from grpo_jax.tasks.toy_config import TOY

SHARED_FIELDS = ("seed", "plain", "mesh", "dtype", "remat", "attention", "save_every", "keep_checkpoints", "trackers")
"""Fields that a pipeline sets for all of its stages."""


def load_scripts(folder: Path, *names: str) -> list[ModuleType]:
    """The modules of scripts in a folder, by file name without suffix.

    Args:
        folder: of the scripts.
        names: of the scripts.
    """
    parts = folder.resolve().parts
    start = len(parts) - 1 - parts[::-1].index("experiments") if "experiments" in parts else -1
    package = ".".join(parts[start:])  # as an import from the root of the project would name it
    found = []
    for name in names:
        full_name = f"{package}.{name}"
        if full_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(full_name, folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[full_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[full_name])
        found.append(sys.modules[full_name])
    return found


@dataclass(frozen=True)
class Stage:
    """One run of a pipeline.

    Attributes:
        script: the module of the script, with ``main`` and ``check``.
        config: its settings.
        needs: run folders of the stages whose results it starts from.
        before: called before it runs, to write files that it reads.
    """

    script: Any
    config: Any
    needs: Sequence[Path] = ()
    before: Callable[[], None] = lambda: None

    def run(self) -> int:
        """Run or resume the stage; the exit status of its script."""
        self.before()
        return self.script.main(self.config)

    def command(self, folder: Path) -> str:
        """The command that runs the stage alone; writes its settings to a file for ``--config``.

        Args:
            folder: of the pipeline, which holds the stage's run folder.
        """
        name = "_".join(self.config.run_dir.relative_to(folder).parts)
        path = folder / "stages" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(to_json(asdict(self.config)), indent=2).encode() + b"\n")
        return shlex.join(["python", self.script.__file__, "--config", str(path)])

    @property
    def has_results(self) -> bool:
        """Whether its folder has results."""
        return (self.config.run_dir / "config.json").is_file() and has_results(self.config.run_dir)

    def changes(self) -> list[str]:
        """Settings that differ from those of the results in its folder, as ``differences`` gives them."""
        if not self.has_results:
            return []
        now = to_json(asdict(self.config))
        before = read_settings(self.config.run_dir / "config.json")
        return differences(before, now, self.config.resumable_fields)

    @property
    def is_finished(self) -> bool:
        """Whether it was finished with its present settings."""
        path = self.config.run_dir / "summary.json"
        if not path.is_file():
            return False
        before, now = json.loads(path.read_text()).get("config", {}), to_json(asdict(self.config))
        return all(before.get(name, now.get(name)) == now.get(name) for name in self.config.extendable_fields)


def check_stages(stages: Sequence[Stage]) -> None:
    """Check all stages before the first one runs.

    Stages with results must have the settings that they were run with. Stages after a stage that will run must have no
    results.

    Args:
        stages: in the order in which they run.

    Raises:
        FileNotFoundError: a model does not exist.
        ValueError: a model cannot be loaded or lacks a stop token; or a stage with results has other settings, or
            depends on a stage that will run again. The message lists the folders to remove. Also whatever the check of
            a stage's script raises.
    """
    for stage in stages:
        stage.script.check(stage.config)
    check_models(stages)
    redone: set[Path] = set()
    reasons, remove = [], []
    for stage in stages:
        folder = stage.config.run_dir
        changes = stage.changes()
        sources = [path for path in stage.needs if path in redone]
        if changes:
            reasons += [f"{folder} holds a run with another configuration:", *(f"  {change}" for change in changes)]
        elif stage.has_results and sources:
            reasons.append(f"{folder} was made from {sources[0]}, which is to be run again")
        if changes or (stage.has_results and sources):
            remove.append(str(folder))
        if changes or sources or not stage.is_finished:
            redone.add(folder)
    if remove:
        raise ValueError(
            "\n  ".join(
                [
                    "stages that have run would differ with these settings. Restore the settings, choose another "
                    "run_dir, or remove what is to be made again:",
                    f"rm -r {' '.join(remove)}",
                    *reasons,
                ]
            )
        )


def check_models(stages: Sequence[Stage]) -> None:
    """Check the models that stages load and that no stage makes, without reading the values of their weights.

    Args:
        stages: of the pipeline.

    Raises:
        FileNotFoundError: a model does not exist.
        ValueError: no model is named, or one cannot be loaded or lacks a stop token.
    """
    made = [stage.config.run_dir.resolve() for stage in stages]

    def is_made(name: str | Path) -> bool:
        return name == TOY or any(Path(name).resolve().is_relative_to(folder) for folder in made)

    policies: dict[tuple[str, tuple[str, ...], int | None], None] = {}
    reward_models: dict[str, None] = {}
    for config in (stage.config for stage in stages):
        name = named_model(config)
        if not is_made(name):
            policies[name, tuple(getattr(config, "stop_tokens", ())), getattr(config, "rope_length", None)] = None
        reward_model = getattr(getattr(config, "rewards", None), "reward_model", None)
        if reward_model is not None and not is_made(reward_model):
            reward_models[reward_model] = None
    for name, stop_tokens, rope_length in policies:
        described = checked_model(models.describe_pretrained(name, rope_length=rope_length), name)
        with_stop_tokens(described, stop_tokens)
    for name in reward_models:
        check_reward_model(models.describe_pretrained(name), name)


def run_stages(
    config: AnyConfig,
    stages: Callable[[AnyConfig], Sequence[Stage]],
    write_summary: Callable[[AnyConfig, Run], None],
    *,
    title: str,
    check: Callable[[AnyConfig], None] | None = None,
    again: bool = False,
) -> int:
    """Check all stages, run or resume them, then write the summary.

    The pipeline may be run again with other settings: stages that they do not affect stay, and a stage that has run
    with others is refused by ``check_stages``.

    Args:
        config: as for ``run_experiment``; with ``dry_run``, the commands of the stages are printed instead.
        stages: the stages of a configuration, in order; it may write files that they read to the run's folder.
        write_summary: called with the run of the pipeline itself once all stages are finished.
        title: of the live view.
        check: called before anything else, once the folder is claimed; it may raise.
        again: whether ``write_summary`` is called for a finished pipeline too.
    """
    with claim_folder(config.run_dir, to_json(asdict(config)), config.resumable_fields):
        if check is not None:
            check(config)
        plan = stages(config)
        check_stages(plan)
        if config.dry_run:
            print("\n".join(stage.command(config.run_dir) for stage in plan))
            return 0
        # Planned again before each stage: settings of a stage may depend on results of earlier ones (prompt format).
        status = next((status for number in range(len(plan)) if (status := stages(config)[number].run())), 0)
    return status or run_experiment(config, write_summary, title=title, again=again)


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
