"""Commands of several stages, each a run of its own in a folder of the command's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from grpo_jax import models
from grpo_jax.config.run import LAYOUT_FIELDS
from grpo_jax.jsonl import to_json
from grpo_jax.loop.run import AnyConfig, Run, run_experiment
from grpo_jax.loop.run_folder import claim_folder, differences, has_results, read_settings
from grpo_jax.loop.setup import checked_model, with_stop_tokens
from grpo_jax.rewards.scorer import check_reward_model

SHARED_FIELDS = ("seed", "plain", "mesh", "dtype", "remat", "attention", "save_every", "keep_checkpoints", "trackers")
"""Settings that a command of several stages has for all of them."""


@dataclass(frozen=True)
class Stage:
    """A run of a command of several.

    Attributes:
        script: the module of its experiment, with ``main``, ``check``, ``RESUMABLE_FIELDS`` and ``EXTENDABLE_FIELDS``.
        config: its settings.
        needs: run folders of the stages whose results it starts from.
        before: called before it runs, for files that it reads.
    """

    script: Any
    config: Any
    needs: Sequence[Path] = ()
    before: Callable[[], None] = lambda: None

    def run(self) -> int:
        """Run it, or go on; the exit status of its script."""
        self.before()
        return self.script.main(self.config)

    @property
    def has_results(self) -> bool:
        """Whether anything was computed in its folder."""
        return (self.config.run_dir / "config.json").is_file() and has_results(self.config.run_dir)

    def changes(self) -> list[str]:
        """The settings that are not those of the results in its folder, as ``differences`` has them."""
        if not self.has_results:
            return []
        now = to_json(asdict(self.config))
        before = read_settings(self.config.run_dir / "config.json")
        own = (
            self.script.resumable_fields(self.config)
            if hasattr(self.script, "resumable_fields")
            else self.script.RESUMABLE_FIELDS
        )
        return differences(before, now, (*LAYOUT_FIELDS, *own, *self.script.EXTENDABLE_FIELDS))

    @property
    def is_finished(self) -> bool:
        """Whether it was finished with the settings that it has now."""
        path = self.config.run_dir / "summary.json"
        if not path.is_file():
            return False
        before, now = json.loads(path.read_text()).get("config", {}), to_json(asdict(self.config))
        return all(before.get(name, now.get(name)) == now.get(name) for name in self.script.EXTENDABLE_FIELDS)


def check_stages(stages: Sequence[Stage]) -> None:
    """Check all stages before the first is run.

    Stages that have run stay where their settings are the same; those that come after may have any.

    Args:
        stages: in the order in which they run.

    Raises:
        FileNotFoundError: a model is not there.
        ValueError: a model cannot be loaded, or lacks one of its stop tokens; a stage was run with other settings, or
            was made from one that is to be run (again); the message lists the folders to remove. And whatever the
            check of a stage's script raises.
    """
    for stage in stages:
        stage.script.check(stage.config)
    check_models(stages)
    redone: set[Path] = set()
    told, remove = [], []
    for stage in stages:
        folder = stage.config.run_dir
        changes = stage.changes()
        sources = [each for each in stage.needs if each in redone]
        if changes:
            told += [f"{folder} holds a run with another configuration:", *(f"  {each}" for each in changes)]
        elif stage.has_results and sources:
            told.append(f"{folder} was made from {sources[0]}, which is to be run again")
        if changes or (stage.has_results and sources):
            remove.append(str(folder))
        if changes or sources or not stage.is_finished:
            redone.add(folder)
    if remove:
        raise ValueError(
            "\n  ".join(
                [
                    "stages that have run would be others with these settings. Restore the settings, choose another "
                    "run_dir, or remove what is to be made again:",
                    f"rm -r {' '.join(remove)}",
                    *told,
                ]
            )
        )


def check_models(stages: Sequence[Stage]) -> None:
    """Check the models that stages load and no stage makes, by all of their files but the values of weights.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: one cannot be loaded, or lacks a stop token.
    """
    made = [stage.config.run_dir.resolve() for stage in stages]

    def is_made(name: str | Path) -> bool:
        return any(Path(name).resolve().is_relative_to(folder) for folder in made)

    policies: dict[tuple[str, tuple[str, ...], int | None], None] = {}
    judges: dict[str, None] = {}
    for config in (stage.config for stage in stages):
        base_dir = getattr(config, "base_dir", None)  # where it is not there, it is made
        name = getattr(config, "model", None) or (base_dir if base_dir and base_dir.is_dir() else None)
        if name is not None and not is_made(name):
            policies[str(name), tuple(getattr(config, "stop_tokens", ())), getattr(config, "rope_length", None)] = None
        judge = getattr(getattr(config, "rewards", None), "reward_model", None)
        if judge is not None and not is_made(judge):
            judges[judge] = None
    for name, stop_tokens, rope_length in policies:
        described = checked_model(models.describe_pretrained(name, rope_length=rope_length), name)
        with_stop_tokens(described, stop_tokens)
    for name in judges:
        check_reward_model(models.describe_pretrained(name), name)


def run_stages(
    config: AnyConfig,
    stages: Callable[[AnyConfig], Sequence[Stage]],
    conclude: Callable[[AnyConfig, Run], None],
    *,
    title: str,
    check: Callable[[AnyConfig], None] | None = None,
    again: bool = False,
) -> int:
    """Check all stages, run them, or go on, and then what puts them together.

    The command may be given again with other settings: stages that these do not touch stay, and one that has run with
    others is refused by ``check_stages``.

    Args:
        config: as ``run_experiment`` takes it.
        stages: the stages of a configuration, in order; it may write files that they read to the run's folder.
        conclude: the loop of this run itself.
        title: what the live view is called.
        check: called before anything else, once the folder is claimed; it may raise.
        again: whether ``conclude`` is called for a run that is finished too.
    """
    own = [field.name for field in fields(config) if field.name not in LAYOUT_FIELDS]
    with claim_folder(config.run_dir, to_json(asdict(config)), (*LAYOUT_FIELDS, *own)):
        if check is not None:
            check(config)
        plan = stages(config)
        check_stages(plan)
        # Planned anew before each: what one found out, such as the prompts' format, may be a setting of a later one.
        status = next((status for number in range(len(plan)) if (status := stages(config)[number].run())), 0)
    return status or run_experiment(config, conclude, title=title, extendable_fields=own, again=again)


def stage_config(stage: AnyConfig, whole: Any, folder: Path, start: Path | str | None, **changes: Any) -> AnyConfig:
    """The settings of a stage of several, in a folder of its own, with what the whole says for all of them.

    That is seed, precision, devices, checkpoints and trackers.

    Args:
        stage: a dataclass with the fields of ``RunConfig`` and ``ModelConfig``.
        whole: another one.
        folder: the stage's own.
        start: the model that it starts from; None for what the whole starts from.
        changes: what else is set.

    Raises:
        ValueError: the settings do not go together.
    """
    common = {each: getattr(whole, each) for each in SHARED_FIELDS}
    begins = {"model": whole.model, "base": whole.base, "base_dir": whole.base_dir}
    if start is not None:
        begins = {"model": str(start)} if whole.model else {"base_dir": Path(start)}
    return replace(stage, **{"run_dir": folder, **common, **begins, **changes})


def check_no_models(whole: Any, names: Sequence[str]) -> None:
    """Check that stages name no model of their own where the whole says it for each.

    Raises:
        ValueError: one does; it says which.
    """
    for name in names:
        stage = getattr(whole, name)
        if stage.model is not None or stage.base_dir is not None:
            raise ValueError(f"{name} names a model; the command does that for each stage")
