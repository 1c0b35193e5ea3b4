"""What tests of whole runs share: rows on disk, figures without clocks, a process that dies, printed commands."""

import json
import shlex
from pathlib import Path

import jax

from grpo_jax.config.presets import SCRIPTS, preset
from grpo_jax.data.preferences import EncodedPreferences
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.command import run_command
from grpo_jax.loop.run import Run
from grpo_jax.loop.stages import Stage
from grpo_jax.loop.stop import INTERRUPTED

TIMING = ("tokens_per_second", "step_time", "rollout_tokens_per_second", "rollout_time", "compilations")
TIMING += ("scoring_time", "update_time", "update_tokens_per_second", "reshard_time", "reshard_bytes")
TIMING += ("mfu", "peak_memory_bytes")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics_of(config):
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def steps_of(config):
    return [row for row in metrics_of(config) if "loss" in row]


def count_programs():
    """In place of ``count_compilations``: programs found in the persistent cache count too."""
    programs = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(programs)


def kill_in_second_save(main, config, monkeypatch):
    """A run that dies while it saves for the second time: the steps since the first are lost."""
    save, calls = Run.save, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", killed)
        try:
            assert main(config) == INTERRUPTED  # a pipeline, whose stage is a command
        except KeyboardInterrupt:
            return


def record_stages(monkeypatch, statuses=None):
    """In place of running them, a list of the stages of a pipeline: the script's name and the settings of each.

    ``statuses`` are exit statuses by script; a stage that ends with another than 0 is not in the list.
    """
    begun = []

    def record(stage):
        status = (statuses or {}).get(stage.script.stem, 0)
        begun.extend([] if status else [(stage.script.stem, stage.config)])
        return status

    monkeypatch.setattr(Stage, "run", record)
    monkeypatch.setattr("grpo_jax.loop.stages.run_experiment", lambda *args, **settings: 0)
    monkeypatch.setattr("grpo_jax.loop.stages.check_models", lambda stages: None)
    return begun


def encode_preferences(preferences, model, *, max_prompt_length, max_completion_length, rendering):
    """Preferences as the tokens of a model."""
    return EncodedPreferences(
        preferences,
        model.tokenizer,
        eos_ids=model.eos_ids,
        pad_id=model.pad_id,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        **rendering,
    )


def parsed_commands(text):
    """The scripts and configurations of commands, one a line, each parsed as the script itself does."""
    parsed = []
    for line in text.splitlines():
        python, script, *args = shlex.split(line)
        name = Path(script).stem
        assert (python, args[0], len(args)) == ("python", "--config", 2)
        assert Path(script).is_file()

        def keep(config, name=name):
            parsed.append((name, config))

        assert run_command(type(preset(name)), keep, description="", presets=SCRIPTS[name], args=args) == 0, line
    return parsed
