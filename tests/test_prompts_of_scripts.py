"""What scripts ask a model: as it was trained, the same on another day, and nothing it cannot end."""

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import evaluate, ppo, r1_zero, rejection_sampling, reward_model, sample, sft
from grpo_jax import run as run_module
from grpo_jax.collect import read_collected, read_provenance
from grpo_jax.models import from_pretrained
from grpo_jax.reward_settings import RewardSettings
from grpo_jax.run import Run
from grpo_jax.settings import DataSettings, MeshSettings, OptimizerSettings
from grpo_jax.text_settings import DemonstrationSettings, PreferenceSettings
from tests.families import write_family
from tests.runs import write_rows

MESH = MeshSettings(data=1)
DATED = (
    "{{ strftime_now('%Y-%m-%d') + '\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {"max_prompt_length": 128, "max_completion_length": 4, "plain": True, "mesh": MESH}


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return datetime.date(2031, 1, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model that stops at its end of text, with a chat template that ends turns in another token."""
    folder = tmp_path_factory.mktemp("family") / "model"
    write_family(folder, "chatml_llama2", sizes={"max_position_embeddings": 256})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(DATED)
    generation = json.loads((folder / "generation_config.json").read_text())
    config_json = json.loads((folder / "config.json").read_text())
    end_of_text = from_pretrained(folder).tokenizer.convert_tokens_to_ids("</s>")
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": end_of_text}))
    (folder / "config.json").write_text(json.dumps(config_json | {"eos_token_id": end_of_text}))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    problems = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(20)]
    replies = [{"prompt": each["question"], "completion": each["answer"]} for each in problems]
    pairs = [{"prompt": each["question"], "chosen": each["answer"], "rejected": "x"} for each in problems]
    rows = {"problems": problems, "replies": replies, "pairs": pairs}
    return {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}


@pytest.fixture(scope="module")
def taught(base, files, tmp_path_factory):
    config = sft.Config(
        model=base,
        data=DemonstrationSettings(
            dataset=files["replies"], chat_template=True, system_prompt="Be brief.", template_date="2026-11-27"
        ),
        run_dir=tmp_path_factory.mktemp("taught") / "run",
        stop_tokens=("<|im_end|>",),
        num_epochs=1,
        num_sequences=8,
        max_length=128,
        eval_prompts=0,
        eval_every=0,
        optimizer=OptimizerSettings(learning_rate=1e-3),
        **SHAPES,
    )
    assert sft.main(config) == 0
    return config


CHAT = {"kind": "chat", "system_prompt": "Be brief.", "date": "2026-11-27"}
ASKED = "2026-11-27\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def measured(model, files, folder, **changes):
    data = {"data": DataSettings(dataset=files["problems"], **changes.pop("data", {}))}
    return evaluate.Config(model=str(model), run_dir=folder, num_samples=1, num_prompts=2, **data, **SHAPES, **changes)


# What it was trained with -------------------------------------------------------------------------------------------


def test_the_format_of_the_prompts_is_exported_and_the_default_of_the_next_run(taught, files, tmp_path, capsys):
    model = taught.run_dir / "model"
    assert from_pretrained(model).prompt_format == CHAT
    config = measured(model, files, tmp_path / "run")
    assert evaluate.main(config) == 0
    assert read_provenance(config.run_dir)["prompt_format"] == CHAT
    assert all(each.prompt.startswith(ASKED) for each in read_collected(config.run_dir))
    said = capsys.readouterr().out
    assert "prompts: the tokenizer's chat template, system_prompt 'Be brief.', date '2026-11-27', as the model" in said
    plain = measured(model, files, tmp_path / "plain", data={"template": "Q: {question}"})
    assert evaluate.main(plain) == 0
    assert all(each.prompt.startswith("Q: ") for each in read_collected(plain.run_dir))
    assert "prompts: the plain template 'Q: {question}'; the model was trained with the tokenizer's" in (
        capsys.readouterr().out
    )


def test_what_is_drawn_of_it_says_how_to_teach_it(taught, files, tmp_path):
    config = rejection_sampling.Config(
        model=str(taught.run_dir / "model"),
        data=DataSettings(dataset=files["problems"]),
        run_dir=tmp_path / "run",
        num_samples=1,
        num_prompts=2,
        max_problems=2,
        selection=replace(rejection_sampling.Config().selection, require=("accuracy=0",)),
        **SHAPES,
    )
    assert rejection_sampling.main(config) == 0
    how = json.loads((config.run_dir / "summary.json").read_text())["teach_with"]
    assert "--chat-template --system-prompt 'Be brief.' --template-date 2026-11-27" in how


def test_a_reward_model_keeps_its_own_format(base, files, tmp_path):
    config = reward_model.Config(
        model=base,
        data=PreferenceSettings(dataset=files["pairs"], template="Q: {question} A: "),
        run_dir=tmp_path / "reward_model",
        num_pairs=6,
        max_prompt_length=32,
        max_completion_length=8,
        eval_every=0,
        plain=True,
        mesh=MESH,
    )
    assert reward_model.main(config) == 0
    folder = config.run_dir / "model"
    assert from_pretrained(folder).prompt_format == {"kind": "plain", "template": "Q: {question} A: "}


def test_it_is_chatted_with_as_it_was_trained(taught, base, monkeypatch):
    asked = []
    encode_prompts = sample.encode_prompts
    monkeypatch.setattr(sample, "encode_prompts", lambda *a, **k: asked.append((a[0], k)) or encode_prompts(*a, **k))
    for settings in ({}, {"template": "{question}"}, {"system_prompt": "Shout."}):
        config = sample.Config(model=str(taught.run_dir / "model"), prompt="Hi", max_completion_length=2, **settings)
        sample.main(config, write=lambda text: None)
    sample.main(sample.Config(model=base, prompt="Hi", max_completion_length=2), write=lambda text: None)
    chat, typed, louder, of_base = asked
    assert chat[0] == [[{"role": "user", "content": "Hi"}]]
    assert chat[1]["system_prompt"] == "Be brief."
    assert (typed[0], typed[1]) == (["Hi"], {"template": "{question}"})
    assert louder[1]["system_prompt"] == "Shout."
    assert (of_base[0], of_base[1]) == (["Hi"], {"template": "{question}"})
    with pytest.raises(ValueError, match=r"--stop-tokens '<\|im_end\|>'"):
        sample.main(sample.Config(model=base, prompt="Hi", chat=True), write=lambda text: None)


# Where turns end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["r1_zero", "ppo", "evaluate", "rejection_sampling"])
def test_a_template_whose_turns_the_model_does_not_end_is_refused(script, base, files, tmp_path):
    common = {"model": base, "data": DataSettings(dataset=files["problems"], chat_template=True), **SHAPES}
    configs = {
        "r1_zero": lambda: r1_zero.Config(run_dir=tmp_path / "run", num_prompts=2, group_size=2, **common),
        "ppo": lambda: ppo.Config(
            run_dir=tmp_path / "run", num_prompts=2, rewards=RewardSettings(), num_minibatches=1, **common
        ),
        "evaluate": lambda: evaluate.Config(run_dir=tmp_path / "run", num_samples=1, **common),
        "rejection_sampling": lambda: rejection_sampling.Config(run_dir=tmp_path / "run", num_samples=1, **common),
    }
    main = {"r1_zero": r1_zero, "ppo": ppo, "evaluate": evaluate, "rejection_sampling": rejection_sampling}[script].main
    with pytest.raises(ValueError, match=r"after the assistant's turn.*give --stop-tokens '<\|im_end\|>'"):
        main(configs[script]())


# The date -----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_date_of_its_beginning(tmp_path, monkeypatch):
    def begun():
        with Run(tmp_path / "run", MESH, title="run", plain=True) as run:
            return run.begun

    today = begun()
    assert today == datetime.date.today().isoformat()
    monkeypatch.setattr(run_module, "date", Tomorrow)
    assert begun() == "2031-01-01"  # nothing was computed before
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    monkeypatch.undo()
    assert begun() == "2031-01-01"


def test_a_run_goes_on_with_the_same_prompts_on_another_day(base, files, tmp_path, monkeypatch):
    """Without --template-date, the template is given the day on which the run began."""
    config = measured(base, files, tmp_path / "run", data={"chat_template": True}, stop_tokens=("<|im_end|>",))
    assert evaluate.main(config) == 0
    before = [each.prompt for each in read_collected(config.run_dir)]
    assert before[0].startswith(datetime.date.today().isoformat())
    for name in ("summary.json", "completions.jsonl"):  # as if it had been killed before its first block
        (config.run_dir / name).unlink()
    monkeypatch.setattr(run_module, "date", Tomorrow)
    assert evaluate.main(config) == 0
    assert [each.prompt for each in read_collected(config.run_dir)] == before
    fresh = replace(config, run_dir=tmp_path / "fresh")
    assert evaluate.main(fresh) == 0
    assert next(read_collected(fresh.run_dir)).prompt.startswith("2031-01-01")


def test_sft_goes_on_on_another_day(taught, tmp_path, monkeypatch):
    config = replace(taught, run_dir=tmp_path / "run", data=replace(taught.data, template_date=None))
    assert sft.main(config) == 0
    shutil.rmtree(config.run_dir / "model")
    (config.run_dir / "summary.json").unlink()
    monkeypatch.setattr(run_module, "date", Tomorrow)
    assert sft.main(config) == 0
    found = json.loads(Path(config.run_dir / "model" / "prompt_format.json").read_text())
    assert found["date"] == datetime.date.today().isoformat()
