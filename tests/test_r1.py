"""The chain: what each stage begins with, what is refused before anything is computed, and kills in every stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import r1
from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import read_tasks
from grpo_jax.config.r1 import R1Config as Config
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.jsonl import read_jsonl, to_json
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import draw_stages
from grpo_jax.loop.stages import Stage
from grpo_jax.tasks.errands import Errand
from tests.runs import parsed_commands, record_stages, write_rows

ROOT = Path(__file__).parent.parent
REAL = {"model": "org/model", "data": DataConfig(dataset="org/problems"), "general_reward_model": "org/judge"}
TOY = r1.PRESETS["toy"].config()


def toy(tmp_path, **changes):
    return replace(TOY, run_dir=tmp_path / "run", **changes)


@pytest.fixture
def stages(monkeypatch):
    """What the chain would run, instead of running it: the name of the script and its configuration."""
    return record_stages(monkeypatch)


def test_each_stage_begins_where_the_paper_has_it(stages, tmp_path):
    config = toy(tmp_path, seed=3)
    assert r1.main(config) == 0
    trained = [(name, each.run_dir.name, each.model) for name, each in stages if name != "evaluate"]
    base = str(tmp_path / "run/cold_start/toy_model")
    assert trained == [
        ("sft", "cold_start", "toy"),
        ("grpo", "r1_zero", base),
        ("grpo", "reasoning", str(tmp_path / "run/cold_start/model")),
        ("rejection_sampling", "rejection_sampling", str(tmp_path / "run/reasoning/model")),
        ("sft", "sft", base),
        ("reward_model", "reward_model", str(tmp_path / "run/sft/model")),
        ("grpo", "final", str(tmp_path / "run/sft/model")),
    ]
    assert {each.seed for _, each in stages} == {3}
    assert {each.toy for _, each in stages} == {config.toy}
    of = {each.run_dir.name: each for _, each in stages}
    assert of["sft"].data.dataset == str(tmp_path / "run/rejection_sampling/dataset.jsonl")
    assert of["rejection_sampling"].demonstrations == (tmp_path / "run/general.jsonl",)
    assert of["cold_start"].data.dataset == "sums-chinese"
    assert of["r1_zero"].rewards.language_weight == 0
    assert of["r1_zero"].rewards.target_language == of["reasoning"].rewards.target_language == "zh"
    measured = [each for name, each in stages if name == "evaluate"]
    assert [each.run_dir.name for each in measured] == [f"{m}_{t}" for m in r1.MODELS for t in ("reasoning", "general")]
    assert [each.against for each in measured[-2:]] == [
        tmp_path / "run/evaluation/r1_zero_reasoning",
        tmp_path / "run/evaluation/r1_zero_general",
    ]


def test_the_final_rl_pays_by_rules_for_reasoning_and_by_the_reward_model_for_the_rest(stages, tmp_path):
    config = toy(tmp_path)
    r1.main(config)
    final = next(each for _, each in stages if each.run_dir.name == "final")
    reasoning, general = read_tasks(final.tasks, final.data, final.rewards)
    assert (reasoning.name, reasoning.data) == ("reasoning", config.data)
    assert reasoning.rewards == replace(config.final.rewards, target_language="zh")
    assert general.data == DataConfig(dataset="errands")
    assert general.rewards == RewardConfig(accuracy_weight=0.0, reward_model=str(tmp_path / "run/reward_model/model"))


def test_general_demonstrations_are_of_no_held_out_errand(stages, tmp_path):
    r1.main(toy(tmp_path))
    rows = read_jsonl(tmp_path / "run/general.jsonl")
    assert len(rows) == r1.CARELESS_REPLIES
    errands = [Errand(row["prompt"][1:]) for row in rows]
    assert not any(errand.held_out for errand in errands)
    qualities = [errand.quality(row["completion"]) for errand, row in zip(errands, rows, strict=True)]
    assert 0.2 < sum(qualities) / len(qualities) < 0.7  # there is something left to learn


def test_a_stage_that_is_asked_to_stop_ends_the_command(tmp_path, monkeypatch):
    begun = record_stages(monkeypatch, {"rejection_sampling": 130})
    assert r1.main(toy(tmp_path)) == 130
    assert [each.run_dir.name for _, each in begun] == ["cold_start", "r1_zero", "reasoning"]


def real(tmp_path):
    numbers = range(20)
    thoughts = [{"prompt": f"{n}+1?", "completion": f"<think></think><answer>{n + 1}</answer>"} for n in numbers]
    write_rows(tmp_path / "thoughts.jsonl", thoughts)
    write_rows(tmp_path / "chats.jsonl", [{"prompt": f"Say {n}.", "completion": str(n)} for n in numbers])
    problems = write_rows(tmp_path / "problems.jsonl", [{"question": f"{n}+1?", "answer": str(n + 1)} for n in numbers])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in numbers])
    cold_start = Config().cold_start
    return Config(
        model="org/model",
        data=DataConfig(dataset=problems),
        general_reward_model="org/judge",
        run_dir=tmp_path / "run",
        general=str(tmp_path / "chats.jsonl"),
        general_data=DataConfig(dataset=prompts, grader="none"),
        cold_start=replace(cold_start, data=replace(cold_start.data, dataset=str(tmp_path / "thoughts.jsonl"))),
    )


def test_data_of_the_last_stage_are_read_before_the_first_begins(stages, tmp_path):
    config = real(tmp_path)
    with pytest.raises(KeyError, match="With a reward model instead of answers, set grader to none"):
        r1.main(replace(config, general_data=replace(config.general_data, grader="auto")))
    (tmp_path / "chats.jsonl").write_text('{"prompt": "and no completion"}\n')
    with pytest.raises((KeyError, ValueError), match=r"chats\.jsonl"):
        r1.main(config)
    assert stages == []


def test_figures_that_a_task_has_not_are_left_out_of_the_picture(tmp_path):
    figures = {"pass@1": 0.5, "format": 0.5, "language": None, "general quality": None}
    draw_stages([dict.fromkeys(r1.MODELS, figures)], tmp_path / "stages.png")
    drawn = plt.imread(tmp_path / "stages.png").shape
    draw_stages(2 * [{model: {**figures, "language": 0.5} for model in r1.MODELS}], tmp_path / "more.png")
    assert plt.imread(tmp_path / "more.png").shape[1] == 1.5 * drawn[1]


def test_a_real_model_goes_from_stage_to_stage_by_folder(stages, tmp_path, monkeypatch):
    config = real(tmp_path)
    asked = {"kind": "chat", "system_prompt": "Think."}
    monkeypatch.setattr(r1, "read_provenance", lambda folder: {"prompt_format": asked})
    record = Stage.run

    def with_provenance(stage):
        if stage.script.stem == "rejection_sampling":
            stage.config.run_dir.mkdir(parents=True)
            (stage.config.run_dir / r1.PROVENANCE).touch()
        return record(stage)

    monkeypatch.setattr(Stage, "run", with_provenance)
    assert r1.main(config) == 0
    assert [each.model for name, each in stages if name != "evaluate"] == [
        "org/model",
        "org/model",
        str(tmp_path / "run/cold_start/model"),
        str(tmp_path / "run/reasoning/model"),
        "org/model",
        str(tmp_path / "run/sft/model"),
    ]
    of = {each.run_dir.name: each for _, each in stages}
    assert of["rejection_sampling"].demonstrations == (tmp_path / "chats.jsonl",)
    assert (of["sft"].data.chat_template, of["sft"].data.system_prompt) == (True, "Think.")  # as it was drawn for
    assert of["reasoning"].rewards.target_language == "en"
    assert of["final_general"].rewards.reward_model == "org/judge"
    assert not (tmp_path / "run/general.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general": "no/such.jsonl"}, "general: the file no/such.jsonl does not exist"),
        ({"final": replace(TOY.final, model="org/other")}, "final names a model"),
        ({"target_language": "klingon"}, "klingon"),
        ({"seed": -1}, "seed is -1"),
        ({"data": DataConfig(dataset="org/problems")}, "the toy model knows the tasks sums and errands only"),
        ({"general_data": DataConfig(dataset="org/prompts")}, "the toy model knows the tasks sums and errands only"),
        (
            {"reasoning": replace(TOY.reasoning, model=None, max_completion_length=300)},
            "is 312, and the model has 128 positions",
        ),
        (
            {"second_sft": replace(TOY.second_sft, model=None, max_length=256)},
            "max_length is 256, and the model has 128 positions",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy(tmp_path, **change)


def test_a_named_model_needs_data_for_all_stages(tmp_path, capsys):
    missing = r"needs more data: cold_start.dataset \(long thoughts\), general \(demonstrations\), general_data.dataset"
    with pytest.raises(ValueError, match=missing):
        Config(run_dir=tmp_path / "run", **REAL)
    with pytest.raises(ValueError, match=r"preferences\.dataset, or general_reward_model"):
        replace(TOY, model="org/model", preferences=Config().preferences)
    # On the command line --model means that the toy preset is not used.
    args = ["--model", "org/model", "--dataset", "org/problems", "--run-dir", str(tmp_path / "run")]
    assert run_command(Config, r1.main, description="", presets=r1.PRESETS, args=args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the pipeline needs more data: --cold-start.dataset (long thoughts), general")
    assert "--general-data.dataset (prompts)" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_a_command_for_each_stage_and_runs_none(stages, tmp_path, capsys):
    args = ["--run-dir", str(tmp_path / "run"), "--plain", "--seed", "3", "--dry-run"]
    assert run_command(Config, r1.main, description="", presets=r1.PRESETS, args=args) == 0
    parsed = parsed_commands(capsys.readouterr().out)
    assert stages == []
    plan = r1.chain(toy(tmp_path, plain=True, seed=3))
    assert parsed == [(stage.script.stem, stage.config) for stage in plan]
    assert (len(parsed), parsed[0][0], parsed[0][1].run_dir) == (7 + 12, "sft", tmp_path / "run/cold_start")
    assert r1.main(toy(tmp_path, plain=True, seed=3)) == 0  # nothing stands against the real run
    assert [each.run_dir for _, each in stages] == [each.run_dir for _, each in parsed]


def test_help_is_short(capsys):
    assert run_command(Config, r1.main, description="", presets=r1.PRESETS, args=["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 100
    assert "--dry-run" in said
    assert "flags --evaluation.*" in said  # a number, not their names


def test_a_dry_run_finds_what_the_real_run_would(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        r1.main(replace(real(tmp_path), model="no/such/folder", general_reward_model="no/such/judge", dry_run=True))
    assert capsys.readouterr().out == ""


def test_no_model_is_the_default(tmp_path):
    with pytest.raises(ValueError, match="model: no model is named; pass --model"):
        r1.main(replace(real(tmp_path), model=None))


@pytest.mark.slow
def test_a_chain_goes_on_with_its_own_settings_alone(stages, tmp_path):
    config = toy(tmp_path)
    assert r1.main(config) == 0
    done = {each.run_dir.name: each for _, each in stages}
    for name in ("cold_start", "r1_zero", "reasoning", "rejection_sampling"):
        has_run(done[name])
    with pytest.raises(ValueError, match="seed: 0 -> 1") as error:
        r1.main(replace(config, seed=1))
    assert all(str(done[name].run_dir) in str(error.value) for name in ("cold_start", "rejection_sampling"))

    # Another setting of one stage concerns it and what was made from it, and of a stage to come, nothing that was run.
    with pytest.raises(ValueError, match="num_prompts: 32 -> 16") as error:
        r1.main(replace(config, reasoning=replace(config.reasoning, num_prompts=16)))
    removed = str(error.value).split("rm -r ")[1].splitlines()[0].split()
    assert removed == [str(done[name].run_dir) for name in ("reasoning", "rejection_sampling")]
    assert r1.main(replace(config, second_sft=replace(config.second_sft, num_epochs=2))) == 0

    # A stage that was removed is run again, and so is what was made from it.
    shutil.rmtree(done["reasoning"].run_dir)
    with pytest.raises(ValueError, match=r"was made from .*reasoning, which is to be run again") as error:
        r1.main(config)
    assert str(error.value).split("rm -r ")[1].splitlines()[0] == str(done["rejection_sampling"].run_dir)
    shutil.rmtree(done["rejection_sampling"].run_dir)
    assert r1.main(config) == 0


def has_run(config):
    """A folder as a finished run leaves it."""
    config.run_dir.mkdir(parents=True)
    settings = to_json(asdict(config))
    (config.run_dir / "config.json").write_text(json.dumps(settings))
    (config.run_dir / "summary.json").write_text(json.dumps({"config": settings}))


# Kills --------------------------------------------------------------------------------------------------------------

SMALL = {
    "": "--plain --save-every 1 --model {base} --eval-size 12 --general-data.eval-size 12",
    "cold-start": "num-generated=48 num-epochs=2 num-sequences=8 num-eval-prompts=0 save-every=1",
    "zero": "num-steps=3 num-prompts=4 group-size=4 eval-samples=2 save-every=1",
    "reasoning": "num-steps=3 num-prompts=4 group-size=4 eval-samples=2 save-every=1",
    "rejection": "max-problems=40 num-prompts=4 num-samples=8 threshold=0 require",
    "second-sft": "num-epochs=1 num-sequences=8 num-eval-prompts=0 save-every=1",
    "preferences": "num-generated=96 save-every=1",
    "final": "num-steps=3 num-prompts=4 group-size=4 eval-samples=2 save-every=1",
    "evaluation": "num-samples=2 num-prompts=2",
}
"""Settings of each stage."""
REACHED = {
    "cold_start": "cold_start/checkpoints/[1-9]*",
    "r1_zero": "r1_zero/checkpoints/[1-9]*",
    "reasoning": "reasoning/checkpoints/[1-9]*",
    "rejection_sampling": "rejection_sampling/completions.jsonl",
    "sft": "sft/checkpoints/[1-9]*",
    "reward_model": "reward_model/checkpoints/[1-9]*",
    "final": "final/checkpoints/[1-9]*",
    "evaluation": "evaluation/base_reasoning/completions.jsonl",
}
"""What tells that a stage has begun to keep what it did."""


def begin(folder, base):
    command = [
        sys.executable,
        "experiments/r1.py",
        "toy",
        "--run-dir",
        str(folder),
        *SMALL[""].format(base=base).split(),
    ]
    for stage, settings in SMALL.items():
        if stage:
            command += [part for each in settings.split() for part in f"--{stage}.{each}".split("=")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def has_reached(folder, stage):
    return any(path.is_dir() or path.stat().st_size for path in folder.glob(REACHED[stage]))


@pytest.mark.slow
def test_killed_in_every_stage_the_chain_ends_as_if_it_never_was(base, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = begin(whole, base)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out.decode()[-3000:]

    for stage in REACHED:
        process = begin(broken, base)
        deadline = time.monotonic() + 300
        while not has_reached(broken, stage):
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (broken / "summary.json").exists()
    process = begin(broken, base)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out.decode()[-3000:]

    for stage in ("cold_start", "r1_zero", "reasoning", "sft", "reward_model", "final"):
        weights = "model/model.safetensors"
        assert (broken / stage / weights).read_bytes() == (whole / stage / weights).read_bytes(), stage
    dataset = "rejection_sampling/dataset.jsonl"
    assert (broken / dataset).read_text().replace(str(broken), str(whole)) == (whole / dataset).read_text()
    outcome = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
    assert outcome[0]["stages"] == outcome[1]["stages"]
    assert [*outcome[0]["stages"]] == [*r1.MODELS]
