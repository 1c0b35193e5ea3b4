"""Distillation end to end: every stage in its folder, resumed where it was stopped, from texts and not from tokens."""

import json
import shutil
from dataclasses import asdict, replace

import jax
import pytest

from experiments import distill
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.distill import BEFORE, STAGES
from grpo_jax.config.distill import DistillConfig as Config
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.jsonl import read_jsonl, to_json
from grpo_jax.loop.batch_inference import read_samples
from grpo_jax.loop.command import run_command
from grpo_jax.loop.stages import Stage, check_stages
from grpo_jax.models import from_hf_config, from_pretrained, init_params, save_pretrained
from grpo_jax.tasks import sums
from grpo_jax.tasks.toy_config import ToyConfig
from tests.runs import kill_in_second_save, parsed_commands, record_stages


@pytest.fixture(scope="module")
def other_tongue(tmp_path_factory):
    """A student of one small layer whose tokenizer has other numbers for the same characters."""
    folder = tmp_path_factory.mktemp("student") / "model"
    vocabulary = sums.VOCABULARY[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "VOCABULARY", vocabulary)
        tokenizer = sums.make_tokenizer()
    ends = {"pad_token_id": vocabulary.index("<pad>"), "eos_token_id": vocabulary.index("<eos>")}
    hf_config = {**ToyConfig(hidden_size=32, num_layers=1).hf_config, **ends, "initializer_range": 0.3}
    params = init_params(from_hf_config(hf_config), jax.random.key(0))
    save_pretrained(folder, params, hf_config=hf_config, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def finished(base, other_tongue, tmp_path_factory):
    """Killed once while the student learns, and gone on with."""
    config = Config(
        model=base,
        student=other_tongue,
        run_dir=tmp_path_factory.mktemp("distill") / "run",
        data=DataConfig(dataset="sums", template="{question}", eval_size=12),
        rewards=RewardConfig(reward_workers=0),
        max_problems=64,
        num_samples=8,
        num_prompts=16,
        eval_samples=8,
        max_prompt_length=12,
        max_completion_length=10,
        num_epochs=8,
        num_sequences=4,
        max_length=32,
        save_every=6,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )
    drawn = config.folder("samples") / "summary.json"
    with pytest.MonkeyPatch.context() as patch:
        kill_in_second_save(distill.main, config, patch)
        written = drawn.stat().st_mtime_ns
        assert not (config.run_dir / "summary.json").exists()
        assert distill.main(config) == 0
    assert drawn.stat().st_mtime_ns == written  # a finished stage is not begun again
    return config


def toy(folder, **changes):
    return replace(distill.PRESETS["toy"].config(), run_dir=folder / "run", **changes)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_the_outcome_is_what_the_stages_say(finished):
    outcome = summary_of(finished.run_dir)
    for stage in STAGES:
        found = summary_of(finished.folder(stage))
        samples = [*read_samples(finished.folder(stage))]
        right = [
            f"<answer>{eval(each.prompt[:-1])}</answer>" in text and not cut
            for each in samples
            for text, cut in zip(each.completions, each.truncated, strict=True)
        ]
        assert outcome[stage]["figures"] == found["figures"]
        assert found["figures"]["pass@1"]["mean"] == pytest.approx(sum(right) / len(right)), stage
        assert found["num_problems"] == len(samples) == 12
    change = outcome["comparison"]["figures"]["pass@1"]
    assert change["after"] == outcome["student_after"]["figures"]["pass@1"]["mean"]
    assert change["before"] == outcome["student_before"]["figures"]["pass@1"]["mean"]
    rows = read_jsonl(finished.folder("samples") / "dataset.jsonl")
    assert outcome["demonstrations"] == len(rows) == outcome["counts"]["balanced"]
    assert {row["provenance"]["weights"] for row in rows} == {models.weights_digest(finished.model)}


@pytest.mark.slow
def test_all_are_asked_the_same_held_out_problems_in_the_same_form(finished):
    asked = [[each.prompt for each in read_samples(finished.folder(stage))] for stage in STAGES]
    assert asked[0] == asked[1] == asked[2]
    trained_on = {each.prompt for each in read_samples(finished.folder("samples"))}
    assert not trained_on & set(asked[0])


@pytest.mark.slow
def test_the_student_with_a_tokenizer_of_its_own_learns_the_teachers_form(finished):
    before, after = ([*read_samples(finished.folder(stage))] for stage in ("student_before", "student_after"))

    def in_form(collected):
        texts = [text for each in collected for text in each.completions]
        return sum(text.startswith("<answer>") for text in texts) / len(texts)

    assert in_form(after) > in_form(before) + 0.3
    taught = models.from_pretrained(finished.folder("student") / "model")
    assert taught.tokenizer.get_vocab() == models.from_pretrained(finished.student).tokenizer.get_vocab()
    assert taught.tokenizer.get_vocab() != models.from_pretrained(finished.model).tokenizer.get_vocab()


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert distill.main(finished) == 0
    out = capsys.readouterr().out
    assert out.count("this run is finished") == 3
    assert out.count("everything is in") == 3 + 3  # evaluations tell what they found again


@pytest.mark.slow
def test_a_stage_that_is_asked_to_stop_ends_the_command(finished, monkeypatch, tmp_path):
    begun = record_stages(monkeypatch, {"rejection_sampling": 130})
    assert distill.main(replace(finished, run_dir=tmp_path / "run")) == 130
    assert [config.run_dir.name for _, config in begun] == ["teacher_eval", "student_before"]


def test_the_student_is_asked_as_the_teacher_was(tmp_path):
    config = Config(model="t", student="s", run_dir=tmp_path)
    (tmp_path / "teacher_eval").mkdir()
    asked = {"kind": "chat", "system_prompt": "Think.", "template_kwargs": {"enable_thinking": True}}
    (tmp_path / "teacher_eval/provenance.json").write_text(json.dumps({"prompt_format": asked}))
    alike = distill.with_teacher_format(config)
    for data in (alike.student_sft.data, alike.measured("student_before", "s").data):
        assert (data.chat_template, data.system_prompt) == (True, "Think.")
        assert data.template_variables == {"enable_thinking": True}
    own = replace(config, data=replace(config.data, template="{question}"))
    assert distill.with_teacher_format(own) == own


def test_stages_of_toy_models_begin_where_others_end(tmp_path):
    config = toy(tmp_path, toy=ToyConfig(skill_steps=7), student_toy=ToyConfig(hidden_size=32))
    assert (config.teacher_sft.model, config.teacher_sft.toy) == ("toy", config.toy)
    assert str(config.teacher_sft.run_dir / "model") == config.sampled.model == config.teacher
    before = distill.stages(config)[2].config
    assert (before.run_dir, before.model, before.toy) == (config.folder(BEFORE), "toy", config.student_toy)
    assert config.student_sft.model == config.student_start == str(config.folder(BEFORE) / "toy_model")
    assert config.student_sft.data.dataset == str(config.sampled.run_dir / "dataset.jsonl")
    assert not config.student_sft.data.says_template  # the model says how it was trained
    made_before = replace(config, model="mine", student="other")
    assert (made_before.sampled.model, made_before.student_sft.model) == ("mine", "other")
    assert [stage.config.run_dir.name for stage in distill.stages(config)] == ["teacher", *stages_of(made_before)]


def stages_of(config):
    return [stage.config.run_dir.name for stage in distill.stages(config)]


def test_a_dry_run_prints_a_command_for_each_stage_and_runs_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stage, "run", lambda stage: pytest.fail("a stage was run"))
    args = ["--run-dir", str(tmp_path / "run"), "--plain", "--mesh.data", "1", "--dry-run"]
    assert run_command(Config, distill.main, description="", presets=distill.PRESETS, args=args) == 0
    parsed = parsed_commands(capsys.readouterr().out)
    plan = distill.stages(toy(tmp_path, plain=True, mesh=MeshConfig(data=1)))
    assert parsed == [(stage.script.stem, stage.config) for stage in plan]
    assert [name for name, _ in parsed] == ["sft", "evaluate", "evaluate", "rejection_sampling", "sft", "evaluate"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_help_is_short(capsys):
    assert run_command(Config, distill.main, description="", presets=distill.PRESETS, args=["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 100
    assert "--dry-run" in said


def test_a_named_teacher_means_no_toy_preset(tmp_path):
    for args in (["--teacher", "t", "--student", "s"], ["--teacher=t", "--student=s"]):
        parsed = []
        assert run_command(Config, parsed.append, description="", presets=distill.PRESETS, args=args) == 0
        assert parsed == [Config(model="t", student="s")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": None}, "only one of teacher and student is set; set both"),
        ({"model": None}, "only one of teacher and student is set; set both"),
        ({"student": "org/student"}, "teacher and student must both be toy models or neither"),
        ({"data": DataConfig(dataset="org/problems")}, "the toy model knows the tasks sums and errands only"),
        ({"data": DataConfig(dataset="sums", template="{question}")}, "without a template"),
    ],
)
def test_teacher_and_student_are_both_named_and_both_toys_or_neither(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        toy(tmp_path, **change)


def test_no_model_is_the_default(tmp_path):
    with pytest.raises(ValueError, match="no model is named"):
        distill.main(Config(run_dir=tmp_path / "run", data=DataConfig(dataset="sums"), mesh=MeshConfig(data=1)))
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": None}, "only one of teacher and student is set; set both"),
        ({"model": None, "data": DataConfig()}, "only one of teacher and student is set; set both"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"max_problems": -1}, "max_problems is -1"),
        ({"max_problems": 0}, "max_problems is 0"),
        ({"selection": SelectionConfig(require=("language=1",))}, r"no rewards named \['language'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(finished, change, message):
    with pytest.raises(ValueError, match=message):
        replace(finished, **change)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "there is no folder .*student"),
        ("cut off", "model.safetensors is damaged"),
        ("no tokenizer", "student has no tokenizer"),
        ("reward model", "student is a reward model: its head gives a score and no tokens"),
        ("stop token", r"\['<stop>'\] are not tokens"),
    ],
)
def test_models_of_later_stages_are_looked_at_before_the_first_is_run(other_tongue, tmp_path, fault, message):
    student = tmp_path / "student"
    if fault != "missing":
        shutil.copytree(other_tongue, student)
    if fault == "cut off":
        weights = (student / "model.safetensors").read_bytes()
        (student / "model.safetensors").write_bytes(weights[:-10])
    if fault == "no tokenizer":
        for path in student.glob("tokenizer*"):
            path.unlink()
    if fault == "reward model":
        critic = from_pretrained(student, scalar_head=True)
        shutil.rmtree(student)
        save_pretrained(student, critic.params, hf_config=critic.hf_config, tokenizer=critic.tokenizer)
    config = Config(
        model=other_tongue,
        student=str(student),
        run_dir=tmp_path / "run",
        student_stop_tokens=("<stop>",) if fault == "stop token" else (),
        data=DataConfig(dataset="sums", template="{question}"),
        mesh=MeshConfig(data=1),
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_stages(distill.stages(config))


def test_what_a_later_stage_cannot_do_is_refused_when_the_settings_are_made(tmp_path):
    with pytest.raises(ValueError, match="max_length is 256, and the model has 128 positions; lower it"):
        toy(tmp_path, max_length=256)
    with pytest.raises(ValueError, match=r"the sequences of a micro-batch: 3 do not divide over mesh"):
        distill.main(toy(tmp_path, num_sequences=3, mesh=MeshConfig(data=2), plain=True))
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
    # Nothing was run, and so nothing stands against the corrected command.
    plan = distill.stages(toy(tmp_path, num_sequences=4, mesh=MeshConfig(data=2)))
    check_stages(plan)


def test_a_correction_of_a_stage_to_come_leaves_those_that_were_run(tmp_path):
    def has_run(stage):
        folder = stage.config.run_dir
        folder.mkdir(parents=True)
        settings = to_json(asdict(stage.config))
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "summary.json").write_text(json.dumps({"config": settings}))

    config = toy(tmp_path, mesh=MeshConfig(data=1))
    plan = distill.stages(config)
    for stage in plan[:4]:  # up to the samples
        has_run(stage)
    check_stages(plan)
    check_stages(distill.stages(replace(config, max_length=64, num_epochs=1)))
    with pytest.raises(ValueError, match="num_samples: 2 -> 3") as error:
        check_stages(distill.stages(replace(config, num_samples=3)))
    assert f"rm -r {config.folder('samples')}\n" in str(error.value)
    has_run(plan[4])
    with pytest.raises(ValueError, match="num_samples: 2 -> 3") as error:
        check_stages(distill.stages(replace(config, num_samples=3)))
    assert f"rm -r {config.folder('samples')} {config.folder('student')}\n" in str(error.value)
    check_stages(distill.stages(replace(config, num_epochs=8)))  # the student goes on
