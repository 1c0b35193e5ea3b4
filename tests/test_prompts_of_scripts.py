"""What scripts ask a model: as it was trained, the same on another day, and nothing it cannot end."""

import datetime
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tyro

from experiments import evaluate, grpo, ppo, rejection_sampling, sample, sft
from grpo_jax.config.data import DataConfig
from grpo_jax.config.distill import DistillConfig
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.loop import run_folder
from grpo_jax.loop.batch_inference import read_provenance, read_samples
from grpo_jax.loop.run import Run
from grpo_jax.models import from_pretrained
from tests.families import write_family
from tests.runs import write_rows

TODAY = "2026-11-27"
MESH = MeshConfig(data=1)
HERE = RewardConfig(reward_workers=0)
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
    rows = {"problems": problems, "replies": replies}
    return {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}


@pytest.fixture(scope="module")
def taught(base, files, tmp_path_factory):
    config = SFTConfig(
        model=base,
        data=DemonstrationConfig(
            dataset=files["replies"], chat_template=True, system_prompt="Be brief.", template_date="2026-11-27"
        ),
        run_dir=tmp_path_factory.mktemp("taught") / "run",
        stop_tokens=("<|im_end|>",),
        num_epochs=1,
        num_sequences=8,
        max_length=128,
        num_eval_prompts=0,
        eval_every=0,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        **SHAPES,
    )
    assert sft.main(config) == 0
    return config


CHAT = {"kind": "chat", "system_prompt": "Be brief.", "date": "2026-11-27"}
ASKED = "2026-11-27\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def measured(model, files, folder, **changes):
    data = {"data": DataConfig(dataset=files["problems"], **changes.pop("data", {}))}
    sizes = {"num_samples": 1, "num_prompts": 2, "rewards": HERE, **SHAPES}
    return EvaluationConfig(model=str(model), run_dir=folder, **data, **sizes, **changes)


# What it was trained with -------------------------------------------------------------------------------------------


def test_the_format_of_the_prompts_is_exported_and_the_default_of_the_next_run(taught, files, tmp_path, capsys):
    model = taught.run_dir / "model"
    assert from_pretrained(model).prompt_format == CHAT
    config = measured(model, files, tmp_path / "run")
    assert evaluate.main(config) == 0
    assert read_provenance(config.run_dir)["prompt_format"] == CHAT
    assert all(each.prompt.startswith(ASKED) for each in read_samples(config.run_dir))
    said = capsys.readouterr().out
    assert "prompts: the tokenizer's chat template, system_prompt 'Be brief.', date '2026-11-27', as the model" in said


def test_it_is_chatted_with_as_it_was_trained(taught, base):
    policy = from_pretrained(taught.run_dir / "model")

    def asked(policy, **settings):
        return sample.rendering_in_effect(sample.Config(model="x", **settings), policy)

    variables = {"template": None, "template_kwargs": {}, "date": "2026-11-27"}
    assert asked(policy) == {**variables, "system_prompt": "Be brief."}
    assert asked(policy, system_prompt="Shout.") == {**variables, "system_prompt": "Shout."}
    assert asked(policy, template="{question}") == {"template": "{question}"}
    silent = replace(policy, prompt_format=None)
    assert asked(silent) == {"template": "{question}"}  # what is typed
    today = datetime.date.today().isoformat()
    assert asked(silent, chat=True) == {**variables, "system_prompt": None, "date": today}
    with pytest.raises(ValueError, match=r"--stop-tokens '<\|im_end\|>'"):
        sample.main(sample.Config(model=base, prompt="Hi", chat=True), write=lambda text: None)


@pytest.mark.parametrize(
    "config",
    [
        SFTConfig,
        GRPOConfig,
        PPOConfig,
        EvaluationConfig,
        RejectionSamplingConfig,
        DPOConfig,
        RewardModelConfig,
        DistillConfig,
    ],
)
def test_every_script_takes_arguments_of_the_template(config):
    flags = ["--chat-template", "--template-kwargs", '{"enable_thinking": false}', "tone=dry", "--template-date", TODAY]
    models = {DistillConfig: ["--teacher", "t", "--student", "s"], PPOConfig: ["--model", "m", "--reward-model", "r"]}
    data = tyro.cli(config, args=[*models.get(config, ["--model", "m"]), *flags]).data
    assert data.template_variables == {"enable_thinking": False, "tone": "dry"}
    assert data.template_date == TODAY


# Where turns end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["grpo", "ppo", "evaluate", "rejection_sampling"])
def test_a_template_whose_turns_the_model_does_not_end_is_refused(script, base, files, tmp_path):
    common = {"model": base, "data": DataConfig(dataset=files["problems"], chat_template=True), "rewards": HERE}
    common |= {"run_dir": tmp_path / "run", "num_prompts": 2, **SHAPES}
    config, main = {
        "grpo": (partial(GRPOConfig, group_size=2), grpo.main),
        "ppo": (partial(PPOConfig, num_minibatches=1), ppo.main),
        "evaluate": (partial(EvaluationConfig, num_samples=1), evaluate.main),
        "rejection_sampling": (partial(RejectionSamplingConfig, num_samples=1), rejection_sampling.main),
    }[script]
    with pytest.raises(ValueError, match=r"after the assistant's turn.*pass --stop-tokens '<\|im_end\|>'"):
        main(config(**common))


# The date -----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_date_of_its_beginning(tmp_path, monkeypatch):
    def start_date():
        with Run(tmp_path / "run", MESH, title="run", plain=True) as run:
            return run.start_date

    today = start_date()
    assert today == datetime.date.today().isoformat()
    monkeypatch.setattr(run_folder, "date", Tomorrow)
    assert start_date() == "2031-01-01"  # nothing was computed before
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    monkeypatch.undo()
    assert start_date() == "2031-01-01"


def test_a_run_goes_on_with_the_same_prompts_on_another_day(base, files, tmp_path, monkeypatch):
    """Without --template-date, the template is given the day on which the run began."""
    config = measured(base, files, tmp_path / "run", data={"chat_template": True}, stop_tokens=("<|im_end|>",))
    assert evaluate.main(config) == 0
    before = [each.prompt for each in read_samples(config.run_dir)]
    assert before[0].startswith(datetime.date.today().isoformat())
    for name in ("summary.json", "completions.jsonl"):  # as if it had been killed before its first block
        (config.run_dir / name).unlink()
    monkeypatch.setattr(run_folder, "date", Tomorrow)
    assert evaluate.main(config) == 0
    assert [each.prompt for each in read_samples(config.run_dir)] == before


@pytest.mark.slow
def test_sft_goes_on_on_another_day(taught, tmp_path, monkeypatch):
    config = replace(taught, run_dir=tmp_path / "run", data=replace(taught.data, template_date=None))
    assert sft.main(config) == 0
    shutil.rmtree(config.run_dir / "model")
    (config.run_dir / "summary.json").unlink()
    monkeypatch.setattr(run_folder, "date", Tomorrow)
    assert sft.main(config) == 0
    found = json.loads(Path(config.run_dir / "model" / "prompt_format.json").read_text())
    assert found["date"] == datetime.date.today().isoformat()
