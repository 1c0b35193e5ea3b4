"""Pipelines of several stages, each a run of a script in a folder of its own."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

from grpo_jax import models
from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.model import PolicyConfig
from grpo_jax.config.offline import OfflineConfig
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.command import DEBUG
from grpo_jax.loop.run import AnyConfig, Run, run_experiment
from grpo_jax.loop.run_folder import claim_folder, differences, has_results, read_settings
from grpo_jax.loop.setup import checked_model, named_model, with_stop_tokens
from grpo_jax.loop.stop import INTERRUPTED, PREEMPTED
from grpo_jax.rewards.scorer import check_reward_model
from grpo_jax.tasks.toy_config import TOY

StageConfig = OnlineConfig | OfflineConfig | BatchInferenceConfig


@dataclass(frozen=True)
class Stage:
    """One run of a script.

    Attributes:
        script: the file of the script.
        config: its settings.
        needs: run folders of the stages whose results it starts from.
    """

    script: Path
    config: StageConfig
    needs: Sequence[Path] = ()

    @property
    def args(self) -> list[str]:
        """The arguments of the script: its settings are in a file beside its run folder."""
        return ["--config", f"{self.config.run_dir}.json"]

    @property
    def command(self) -> str:
        """The command that runs the stage alone, once ``write_settings`` was called."""
        return shlex.join(["python", str(self.script), *self.args])

    def write_settings(self) -> None:
        """Write the file of settings that ``command`` reads."""
        path = Path(self.args[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(to_json(asdict(self.config)), indent=2).encode() + b"\n")

    def run(self) -> int:
        """Run or resume the stage by its command, in this process; the exit status of the script.

        Raises:
            NotImplementedError: there are several processes.
        """
        if jax.process_count() > 1:
            raise NotImplementedError(
                "a pipeline on several hosts is not supported yet; run the commands that --dry-run prints"
            )
        self.write_settings()
        status = run_script(self.script, self.args)
        if status not in (0, INTERRUPTED, PREEMPTED):
            print(f"the stage in {self.config.run_dir} failed: {self.command}", file=sys.stderr)
        return status

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


def run_script(script: Path, args: Sequence[str]) -> int:
    """Run a script as a command, in this process; its exit status.

    One process for all stages keeps the devices and, on several hosts, the connections between them.

    Args:
        script: the file.
        args: of the command.
    """
    argv = sys.argv
    sys.argv = [str(script), *args, *([DEBUG] if DEBUG in argv else [])]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = argv
    return 0


def check_stages(stages: Sequence[Stage]) -> None:
    """Check all stages before the first one runs.

    Stages with results must have the settings that they were run with. Stages after a stage that will run must have no
    results.

    Args:
        stages: in the order in which they run.

    Raises:
        FileNotFoundError: a model does not exist.
        ValueError: a model cannot be loaded or lacks a stop token; or a stage with results has other settings, or
            depends on a stage that will run again. The message lists the folders to remove. Also as
            ``check`` of a stage's settings.
    """
    for stage in stages:
        stage.config.check()
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
            stop_tokens = config.stop_tokens if isinstance(config, PolicyConfig | RewardModelConfig) else ()
            policies[name, stop_tokens, config.rope_length] = None
        if isinstance(config, OnlineConfig | BatchInferenceConfig):
            reward_model = config.rewards.reward_model
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
            for stage in plan:
                stage.write_settings()
                print(stage.command)
            return 0
        # Planned again before each stage: settings of a stage may depend on results of earlier ones (prompt format).
        status = next((status for number in range(len(plan)) if (status := stages(config)[number].run())), 0)
    return status or run_experiment(config, write_summary, title=title, again=again)
