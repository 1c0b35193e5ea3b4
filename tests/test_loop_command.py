"""Command lines: errors are one message in the words of the flags, with an exit status that scripts can tell apart."""

import dataclasses
import importlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

import jax
import pytest
import tyro

from grpo_jax.config.data import DataConfig
from grpo_jax.config.functions import parse_call
from grpo_jax.config.grpo import PRESETS as GRPO_PRESETS
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.jsonl import to_json
from grpo_jax.loop.command import BUG, MISTAKE, run_command
from grpo_jax.loop.flags import flags_of, in_flags
from grpo_jax.loop.stop import INTERRUPTED
from grpo_jax.monitor.alarms import AlarmConfig

SCRIPTS = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "experiments").glob("*.py")
    if "run_command(" in path.read_text()
)


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 0.1

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True)
class Data:
    dataset: str | None = None
    prompt_column: str | None = None

    def __post_init__(self):
        if self.dataset == "":
            raise ValueError("dataset is empty")


@dataclass(frozen=True)
class Config:
    model: Annotated[str | None, tyro.conf.arg(name="teacher")] = None
    data: Annotated[Data, tyro.conf.arg(name="")] = Data()
    num_steps: int = 3
    packing: bool = True
    actor: Optimizer = Optimizer()
    critic: Optimizer = Optimizer()

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")


def run(*args, main=lambda config: 0):
    return run_command(Config, main, description="A test.", args=args)


def raising(error):
    def main(config):
        raise error

    return main


def test_the_exit_status_is_that_of_the_experiment():
    seen = []
    assert run("--num-steps", "7", "--teacher", "a", "--dataset", "b", main=lambda config: seen.append(config)) == 0
    assert seen == [Config(model="a", data=Data("b"), num_steps=7)]
    assert run(main=lambda config: 130) == 130


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-steps", "0"], "error: --num-steps is 0; it must be at least 1\n"),
        (["--critic.learning-rate", "-1"], "error: --critic.learning-rate is -1.0; it must be above 0\n"),
        (["--actor.learning_rate=-1"], "error: --actor.learning-rate is -1.0; it must be above 0\n"),
        (["--dataset", ""], "error: --dataset is empty\n"),
    ],
)
def test_settings_that_cannot_work_are_one_message_with_their_flag(capsys, args, message):
    assert run(*args, main=lambda config: pytest.fail("it ran")) == MISTAKE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == message + "(--debug shows the traceback)\n"


@pytest.mark.parametrize(
    ("args", "message"), [(["--num-step", "3"], "--num-steps"), (["--num-steps", "many"], "--num-steps")]
)
def test_flags_that_cannot_be_parsed_are_tyros_to_explain(capsys, args, message):
    with pytest.raises(SystemExit) as ended:
        run(*args)
    assert ended.value.code == MISTAKE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("num_steps asks for too much"), "--num-steps asks for too much"),
        (KeyError("x.jsonl:1: name it with prompt_column= one of ['num_steps']"), None),
        (FileNotFoundError(2, "No such file or directory", "a/num_steps.json"), "a/num_steps.json: No such file or d"),
        (PermissionError("run_dir: x cannot be written"), "run_dir: x cannot be written"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (FloatingPointError("step 3: loss is nan"), "step 3: loss is nan"),
        (RuntimeError("another process is running"), "another process is running"),
        (ImportError("no package"), "no package"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), "a device is out of memory: RESOURCE"),
    ],
)
def test_mistakes_are_told_without_a_traceback_unless_it_is_wanted(capsys, monkeypatch, error, message):
    message = message or "x.jsonl:1: name it with --prompt-column one of ['num_steps']"
    assert run(main=raising(error)) == MISTAKE
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert "Traceback" not in err
    assert run("--debug", main=raising(error)) == MISTAKE
    debugged = capsys.readouterr().err
    assert debugged.startswith("Traceback")
    assert f"error: {message}" in debugged
    monkeypatch.setenv("GRPO_JAX_DEBUG", "1")
    assert run(main=raising(error)) == MISTAKE
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("error", [TypeError("no"), KeyError("missing"), IndexError("3"), AssertionError()])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback_and_ends_in_one_line(capsys, error):
    assert run(main=raising(error)) == BUG
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith(f"error: {type(error).__name__}")


def test_an_interruption_is_no_error(capsys):
    assert run(main=raising(KeyboardInterrupt())) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_long_messages_are_cut(capsys):
    run(main=raising(ValueError("x" * 10_000)))
    assert len(capsys.readouterr().err) < 4200


def test_names_become_flags_where_they_are_names():
    flags = flags_of(Config)
    assert [each.flag for each in flags] == [
        *("--teacher", "--dataset", "--prompt-column", "--num-steps", "--packing"),
        *("--actor.learning-rate", "--critic.learning-rate"),
    ]
    assert in_flags("data.prompt_column and actor.learning_rate", flags) == "--prompt-column and --actor.learning-rate"
    assert in_flags("learning_rate is 0", flags) == "--actor.learning-rate or --critic.learning-rate is 0"
    assert in_flags("model: no such folder", flags) == "--teacher: no such folder"
    for text in (
        "the model is large",
        "see runs/num_steps/x",
        "columns ['num_steps', 'a']",
        "num_steps_of",
        "x.num_steps",
    ):
        assert in_flags(text, flags) == text
    assert in_flags("num_steps = 3 (and num_steps)", flags) == "--num-steps = 3 (and --num-steps)"


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("grpo", "--kl-coef"),
        ("grpo", "--sampling.temperature"),
        ("grpo", "--accuracy-weight"),
        ("dpo", "--sft-coef"),
        ("reward_model", "--centring"),
        ("sft", "--weight-decay"),
    ],
)
def test_a_setting_that_is_nan_is_named_before_anything_runs(name, flag, capsys, tmp_path):
    script = importlib.import_module(f"experiments.{name}")
    given = [flag, "nan", "--run-dir", str(tmp_path / "run")]
    assert run_script(script, given) == MISTAKE
    said = capsys.readouterr().err
    assert flag in said
    assert "nan" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_its_flags_and_refuses_others(name, capsys):
    script = importlib.import_module(f"experiments.{name}")
    flags = [flag.flag for flag in flags_of(config_type(script))]
    needed = ["data.jsonl"] if name == "check_data" else []
    with pytest.raises(SystemExit) as ended:
        run_script(script, [*needed, "--no-such-flag"])
    assert ended.value.code == MISTAKE
    assert "--no-such-flag" in capsys.readouterr().err
    required = [
        field
        for field in dataclasses.fields(config_type(script))
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    needed = [part for field in required for part in (f"--{field.name}", "x")]
    for flag, value in (("--num-prompts", "0"), ("--seed", "-1"), ("--save-every", "0"), ("--num-pairs", "0")):
        if flag in flags and name not in ("sample", "reward_hacking"):
            assert run_script(script, [*needed, flag, value]) == MISTAKE
            assert f"error: {flag} is {value}; it must be at least" in capsys.readouterr().err


# Presets, files and help ---------------------------------------------------------------------------------------------


def config_type(script):
    return get_type_hints(script.main)["config"]


def run_script(script, args, main=None):
    presets = getattr(script, "PRESETS", {})
    kind = config_type(script)
    return run_command(kind, main or script.main, description=script.__doc__, presets=presets, args=args)


def parsed(name, *args):
    """The configuration that a script's command line stands for."""
    seen = []
    script = importlib.import_module(f"experiments.{name}")
    assert run_script(script, list(args), main=lambda config: seen.append(config)) == 0
    return seen[0]


def test_a_preset_is_overridden_by_flags_and_toy_is_the_one_without_a_model():
    toy = parsed("grpo")
    assert toy == parsed("grpo", "toy") == GRPO_PRESETS["toy"].config()
    assert parsed("grpo", "--num-steps", "3") == replace(toy, num_steps=3)
    named = parsed("grpo", "--model", "some/folder", "--dataset", "x.jsonl")
    assert named == GRPOConfig(model="some/folder", data=DataConfig(dataset="x.jsonl"))
    assert parsed("grpo", "toy", "--model=some/folder").max_completion_length == 48


def test_an_unknown_preset_is_refused_with_those_that_there_are(capsys):
    script = importlib.import_module("experiments.grpo")
    assert run_script(script, ["dapo", "--num-steps", "3"]) == MISTAKE
    assert "there is no preset 'dapo'; the presets are toy, r1-zero-gsm8k" in capsys.readouterr().err


def test_a_file_holds_what_config_json_holds_and_flags_win(tmp_path):
    toy = GRPO_PRESETS["toy"].config()
    whole = tmp_path / "config.json"
    whole.write_text(json.dumps(to_json(dataclasses.asdict(toy))))
    assert parsed("grpo", "--config", str(whole)) == toy
    part = tmp_path / "part.yaml"
    part.write_text("preset: toy\noptimizer:\n  learning_rate: 1e-3\ndata: {eval_size: 7}\nmesh: {data: 1}\n")
    found = parsed("grpo", f"--config={part}", "--eval-size", "8")
    assert (found.optimizer.learning_rate, found.data.eval_size, found.mesh.data) == (1e-3, 8, 1)
    assert replace(found, optimizer=toy.optimizer, data=toy.data, mesh=toy.mesh) == toy
    part.write_text("preset: toy\nnum_steps: 3\n")
    assert parsed("grpo", "r1-zero-gsm8k", "--config", str(part)).model == "Qwen/Qwen2.5-0.5B"  # the command line wins
    for empty in (["--config"], ["--config="], ["--config=", "--num-steps", "3"]):
        assert run_script(importlib.import_module("experiments.grpo"), empty) == MISTAKE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_stepz: 3", "'num_stepz' is not a setting"),
        ("num_steps: many", "num_steps is 'many'; it must be int"),
        ("num_steps: true", "num_steps is True; it must be int"),
        ("data: {eval_size: 0}", "--eval-size is 0; it must be at least 1"),
        ("num_steps: 3\nnum_steps: 4", "['num_steps'] occur twice"),
        ("preset: none", "there is no preset 'none'"),
        ("COMMON_FLAGS: x", "'COMMON_FLAGS' is not a setting"),
        ("learning_rate: 0.1", "'learning_rate' is not a setting; it is nested, as 'toy.learning_rate' or 'optimizer."),
        ("num-steps: 0", "--num-steps is 0; it must be at least 1"),
        ("num_steps: 1e5runs", "num_steps is '1e5runs'; it must be int"),
        ("- 3", "must be a mapping of settings"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_the_setting(tmp_path, capsys, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert run_script(importlib.import_module("experiments.grpo"), ["--config", str(path)]) == MISTAKE
    said = capsys.readouterr().err
    assert message.replace("num_steps is", "--num-steps is") in said or message in said
    assert "settings.yaml" in said or "preset" in said


def test_help_is_two_screens_and_names_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    script = importlib.import_module("experiments.grpo")
    assert run_script(script, ["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 110
    assert max(map(len, text.splitlines())) <= 120
    for flag in flags_of(GRPOConfig):
        assert flag.is_rare or re.search(rf"{flag.flag}(\s|$)", text), flag.flag
    rare = "--toy.* (14) --mesh.* (3) --save-minutes --distributed.* (7)"
    assert f"rarely changed (--help-rare explains them): {rare}" in text
    for name, preset in GRPO_PRESETS.items():
        assert name in text
        assert preset.summary in text
    assert run_script(script, ["toy", "--help"]) == 0
    toy = capsys.readouterr().out
    assert "2 to 3 minutes" in toy
    assert "[0.00025]" in toy
    with pytest.raises(SystemExit) as ended:
        run_script(script, ["--help-all"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--sampling.top-p" in said
    assert "--toy.worked-share" not in said
    assert run_script(script, ["toy", "--alarms.truncation", "0.25", "--help-rare"]) == 0
    said = capsys.readouterr().out
    rare = [flag for flag in flags_of(GRPOConfig) if flag.is_rare]
    assert len(flags_of(GRPOConfig)) - len(rare) <= 90
    for flag in rare:
        assert flag.help
        assert f"  {flag.flag}\n" in said
    assert "Fraction of completions that are truncated. [0.25]" in said


@dataclass(frozen=True)
class WithRare:
    names: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()


@dataclass(frozen=True)
class Inherits(WithRare):
    size: int = 1


def test_rare_flags_of_a_base_class_take_several_values():
    kept = []
    assert run_command(Inherits, kept.append, description="", args=["--names", "a", "b", "--size", "2"]) == 0
    assert run_command(Inherits, kept.append, description="", args=["--names", "a"]) == 0
    assert kept == [Inherits(names=("a", "b"), size=2), Inherits(names=("a",))]


def test_rare_flags_are_set_like_the_others(tmp_path):
    args = ["--toy.worked-share", "0.25", "--num-steps", "3", "--alarms.stop-at", "hacking", "truncation"]
    config = parsed("grpo", "toy", *args, "--alarms.kl_drift=none", "--reward-memory", "1000000")
    assert (config.toy.worked_share, config.num_steps, config.rewards.reward_memory) == (0.25, 3, 1_000_000)
    assert config.alarms == AlarmConfig(stop_at=("hacking", "truncation"), kl_drift=None)
    assert config.toy.skill_steps == GRPO_PRESETS["toy"].config().toy.skill_steps
    (tmp_path / "settings.yaml").write_text("toy: {worked_share: 0.5, chinese_share: 0.5}")
    config = parsed("grpo", "toy", "--config", str(tmp_path / "settings.yaml"), "--toy.worked-share", "0.25")
    assert (config.toy.worked_share, config.toy.chinese_share) == (0.25, 0.5)
    assert parsed("r1", "--zero.toy.hidden-size", "64").zero.toy.hidden_size == 64
    assert parsed("distill", "--student-toy.num-layers", "1").student_toy.num_layers == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--toy.worked-share"], "--toy.worked-share needs a value"),
        (["--toy.worked-share", "--plain"], "--toy.worked-share needs a value"),
        (["--toy.worked-share", "much"], "--toy.worked-share is 'much'; it must be float"),
        (["--toy.hidden-size", "8", "16"], "--toy.hidden-size is [8, 16]; it must be int"),
        (["--toy.hidden-size", "0"], "--toy.hidden-size is 0; it must be at least 1"),
        (["--reward-deadline=-1"], "--reward-deadline is -1.0; it must be above 0"),
        (["--alarms.stop-at", "nonsense"], "--alarms.stop-at has unknown alarms ['nonsense']"),
    ],
)
def test_mistakes_in_rare_flags_are_said(args, message, capsys):
    assert run_script(importlib.import_module("experiments.grpo"), ["toy", *args]) == MISTAKE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_common_flags_exist(name, capsys):
    script = importlib.import_module(f"experiments.{name}")
    kind = config_type(script)
    common = getattr(kind, "COMMON_FLAGS", "").split()
    assert set(common) <= {flag.flag for flag in flags_of(kind)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grpo", ("grpo", {})),
        ("grpo()", ("grpo", {})),
        ("sapo(a=1.5, b='x, y')", ("sapo", {"a": 1.5, "b": "x, y"})),
        ("my.module:f(scale=-2e-3, on=True)", ("my.module:f", {"scale": -2e-3, "on": True})),
    ],
)
def test_calls_in_settings(text, expected):
    assert parse_call(text, "loss") == expected


@pytest.mark.parametrize("text", ["", "f(1)", "f(a=g())", "f(a=1", "f(**{})", "a b", "f(a=x)", "__import__('os')"])
def test_what_is_no_call_is_refused(text):
    with pytest.raises(ValueError, match=r"^loss is .*; (it must be a name|its arguments are keywords)"):
        parse_call(text, "loss")
