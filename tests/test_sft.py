"""Supervised fine-tuning end to end, on tiny shapes: resumed bit for bit, packed or not, in parts or whole."""

import json
import math
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments import sft
from grpo_jax import loss as losses
from grpo_jax import models
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.problems import Problem
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import offline
from grpo_jax.loop.offline_data import encode_demonstration_set, load_demonstration_sets
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.demonstrations import worked_sums
from grpo_jax.tasks.sums import make_tokenizer
from tests.runs import kill_in_second_save, metrics_of, steps_of, write_rows

LEARNT, HELD_OUT = 36, 4


def rows_of_sums():
    sums = worked_sums(np.random.default_rng(0), LEARNT + HELD_OUT, held_out=False)
    return [{"prompt": each.prompt, "completion": each.completion, **each.columns} for each in sums]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    config = SFTConfig(
        model=small,
        data=DemonstrationConfig(dataset=write_rows(folder / "sums.jsonl", rows_of_sums()), template="{question}"),
        run_dir=folder / "run",
        num_epochs=2,
        num_sequences=8,
        max_length=64,
        max_prompt_length=12,
        max_completion_length=10,
        eval_every=2,
        num_eval_prompts=4,
        eval_samples=2,
        save_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )
    assert sft.main(config) == 0
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The same run in a folder of its own, with a file of its own."""
    dataset = shutil.copy(finished.data.dataset, tmp_path / "sums.jsonl")
    return replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, dataset=str(dataset)))


@pytest.fixture
def brief(config):
    """One update of all demonstrations, and nothing drawn."""
    return replace(config, num_epochs=1, num_sequences=LEARNT, num_eval_prompts=0, eval_every=0)


def test_s1_killed_and_resumed_is_bit_for_bit_the_unbroken_run(finished, config, monkeypatch):
    kill_in_second_save(sft.main, config, monkeypatch)
    assert [row["step"] for row in steps_of(config)] == [1, 2, 3, 4]  # of which the last two are to be taken back
    assert sft.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)
    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (config.run_dir / name).read_bytes() == (finished.run_dir / name).read_bytes(), name
    assert len(steps_of(finished)) > 4


def test_other_data_under_the_same_path_are_refused_until_the_old_ones_are_back(finished, config, monkeypatch):
    kill_in_second_save(sft.main, config, monkeypatch)
    rows = rows_of_sums()
    others = [{**row, "completion": row["completion"].replace("7", "8")} for row in rows]
    write_rows(config.run_dir.parent / "sums.jsonl", others)
    with pytest.raises(ValueError, match=r"the data differ from those that .* was started with"):
        sft.main(config)
    write_rows(config.run_dir.parent / "sums.jsonl", rows)
    assert sft.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert sft.main(finished) == 0
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before
    assert "this run is finished" in capsys.readouterr().out


def test_s6_another_configuration_in_the_same_folder_is_refused(finished):
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*num_sequences: 8 -> 4"):
        sft.main(replace(finished, num_sequences=4))


def test_an_update_in_parts_is_the_update_of_the_whole(finished, config):
    config = replace(config, num_micro_batches=4)
    assert sft.main(config) == 0
    whole, parts = metrics_of(finished), metrics_of(config)
    assert len(whole) == len(parts)
    for row, other in zip(whole, parts, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "num_tokens", "epoch", "learning_rate", "eval/loss", "eval/mean_length"):
            assert other.get(name) == pytest.approx(row.get(name), abs=1e-5), (row["step"], name)
    first, other = steps_of(finished)[0], steps_of(config)[0]
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)


def test_losses_fall_on_what_is_learnt_and_on_what_is_held_out(finished):
    steps = steps_of(finished)
    half = len(steps) // 2
    assert np.mean([row["loss"] for row in steps[half:]]) < np.mean([row["loss"] for row in steps[:half]]) - 0.1
    evaluations = [row for row in metrics_of(finished) if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == sorted({*range(0, len(steps) + 1, 2), len(steps)})
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 0.1
    for row in evaluations:
        assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert summary["loss_before"] == evaluations[0]["eval/loss"]
    assert summary["loss_after"] == evaluations[-1]["eval/loss"]
    assert (summary["seed"], summary["steps"]) == (0, len(steps))


def test_every_token_of_every_epoch_is_counted(finished):
    pretrained = models.from_pretrained(finished.model)
    demonstrations, held_out = load_demonstration_sets(finished.data, 0)
    assert (len(demonstrations), len(held_out)) == (LEARNT, HELD_OUT)
    examples, _ = encode_demonstration_set(
        finished.data, demonstrations, pretrained, max_length=64, rendering={"template": "{question}"}
    )
    steps = steps_of(finished)
    assert steps[-1]["num_tokens"] == 2 * sum(len(each.token_ids) for each in examples)
    assert steps[-1]["epoch"] == 2


def test_answers_let_completions_be_graded(finished):
    row = metrics_of(finished)[0]
    samples = [each for each in read_jsonl(finished.run_dir / "completions.jsonl") if each["step"] == 0]
    assert len(samples) == HELD_OUT * 2
    right = [f"<answer>{eval(each['prompt'][:-1])}</answer>" in each["completion"] for each in samples]
    assert row["eval/pass@1"] == pytest.approx(np.mean(right))
    demonstrated = {each["prompt"]: each["completion"] for each in rows_of_sums()}
    assert all(each["answer"] == demonstrated[each["prompt"]] for each in samples)
    assert "reward" not in samples[0]


def test_grades_are_the_share_of_those_that_have_an_answer():
    problems = [Problem("1+2=", "3", {}), Problem("2+2=", None, {}), Problem("3+3=", "6", {})]
    prompts = EncodedProblems(problems, make_tokenizer(), max_prompt_length=12, pad_id=0, template="{question}")
    completions = [f"<answer>{said}</answer>" for said in ("3", "4", "4", "4", "6", "6")]
    lengths = np.array([1, 2, 3, 4, 5, 6])
    assert sft.grade(prompts, completions, lengths, 2) == {"eval/mean_length": 3.5, "eval/pass@1": 0.75}
    prompts.problems = [replace(each, answer=None) for each in problems]
    assert sft.grade(prompts, completions, lengths, 2) == {"eval/mean_length": 3.5}


@pytest.mark.slow
def test_without_answers_nothing_is_graded_and_what_is_too_long_is_dropped_and_counted(config, capsys):
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows_of_sums()]
    write_rows(config.run_dir.parent / "sums.jsonl", rows)
    tokenizer = make_tokenizer()
    lengths = {row["prompt"]: len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows}
    learnt, _ = load_demonstration_sets(config.data, 0)
    kept = [lengths[each.prompt] for each in learnt if lengths[each.prompt] <= 42]
    assert 0 < len(kept) < LEARNT
    assert sft.main(replace(config, max_length=42, num_epochs=1)) == 0
    said = capsys.readouterr().out
    assert f"{LEARNT - len(kept)} of {LEARNT} demonstrations dropped: over 42 tokens" in said
    assert steps_of(config)[-1]["num_tokens"] == sum(kept)
    assert not any("eval/pass@1" in row for row in metrics_of(config))
    assert "eval/mean_length" in metrics_of(config)[0]


def test_packing_changes_nothing_about_a_batch_that_holds_the_same_examples(brief):
    """With rows for all of an epoch's examples; a batch of fewer rows holds more examples when they are packed."""
    assert sft.main(brief) == 0
    apart = replace(brief, run_dir=brief.run_dir.with_name("apart"), packing=False)
    assert sft.main(apart) == 0
    (packed,), (single,) = steps_of(brief), steps_of(apart)
    assert packed["num_tokens"] == single["num_tokens"]
    assert packed["loss"] == pytest.approx(single["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    after, other = metrics_of(brief)[-1], metrics_of(apart)[-1]
    assert after["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-4)
    assert "eval/mean_length" not in after  # nothing is drawn for no prompts


def test_texts_without_a_prompt_are_learnt_from_and_nothing_is_drawn_for_them(brief):
    texts = [{"text": row["prompt"] + row["completion"]} for row in rows_of_sums()]
    write_rows(brief.run_dir.parent / "sums.jsonl", texts)
    assert sft.main(replace(brief, num_eval_prompts=4)) == 0
    assert steps_of(brief)[0]["grad_norm"] > 0
    assert not read_jsonl(brief.run_dir / "completions.jsonl")


def test_the_trained_model_is_a_hugging_face_folder(finished):
    folder = finished.run_dir / "model"
    oracle, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("3+8+5+1=<think>3+8=11;")["input_ids"]
    loaded = models.from_pretrained(folder)
    with torch.no_grad():
        expected = oracle.eval()(torch.tensor([ids])).logits[0].numpy()
    row = jnp.asarray([ids], jnp.int32)
    hidden, _ = loaded.model.apply(loaded.params, row, jnp.arange(len(ids))[None], row >= 0)
    np.testing.assert_allclose(hidden[0] @ loaded.model.head(loaded.params).T, expected, atol=1e-4)
    base = models.from_pretrained(finished.model)
    moved = np.abs(np.asarray(loaded.params["embed"]["embedding"] - base.params["embed"]["embedding"])).max()
    assert moved > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0; it must be at least 1"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"num_micro_batches": 0}, "num_micro_batches is 0"),
        ({"num_micro_batches": 3}, "num_sequences = 8 do not divide into 3 micro-batches"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"num_eval_prompts": -1}, "num_eval_prompts is -1"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"save_every": 0}, "save_every is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"model": "toy", "data": DemonstrationConfig(chat_template=True)}, "the toy model has no chat template"),
        ({"max_length": 256}, "max_length is 256, and the model has 128 positions"),
        ({"max_completion_length": 128}, "is 140, and the model has 128 positions"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(finished, change, message):
    with pytest.raises(ValueError, match=message):
        replace(finished, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(data=8), "num_sequences": 4}, "sequences of a micro-batch: 4 do not divide over mesh"),
        ({"stop_tokens": ("<|im_end|>",)}, r"\['<\|im_end\|>'\] are not tokens of"),
        ({"max_length": 8}, "36 of 36 demonstrations do not fit into max_length = 8 tokens"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sft.main(replace(config, **change))
    log = config.run_dir / "metrics.jsonl"
    assert not log.exists() or not read_jsonl(log)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(brief, monkeypatch):
    loss = losses.supervised_loss

    def broken(*args, **settings):
        return jax.tree.map(lambda x: x * jnp.nan, loss(*args, **settings))

    monkeypatch.setattr(losses, "supervised_loss", broken)
    monkeypatch.setattr(offline, "check_finite", lambda *_: None)  # of the evaluation
    with pytest.raises(FloatingPointError, match=r"step 1: grad_norm is nan.* set bad_updates to skip"):
        sft.main(brief)
    assert [row["step"] for row in metrics_of(brief)] == [0]
    assert not (brief.run_dir / "model").exists()


def test_settings_have_one_default_and_the_toy_is_a_preset():
    assert (SFTConfig().row_length, SFTConfig(model="some/model").row_length) == (2048, 2048)
    assert SFTConfig(model="toy").row_length == 128  # its positions
    assert SFTConfig(max_length=7).row_length == 7
    assert SFTConfig(sampling=Sampling(temperature=0.5)).sampling.temperature == 0.5
    assert (SFTConfig().model, SFTConfig().data.dataset, SFTConfig().optimizer.learning_rate) == (None, None, 1e-5)
    toy = preset("sft")
    assert (toy.model, toy.data.dataset, toy.data.num_generated) == ("toy", "sums", 256)
    assert (toy.prompt_length, toy.completion_length, toy.row_length) == (12, 48, 128)
    assert (toy.optimizer.learning_rate, toy.remat, toy.compute_dtype) == (1e-3, "none", jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: no model is named; pass --model"),
        ({"data": DemonstrationConfig()}, "dataset: no dataset is named; pass --dataset"),
    ],
)
def test_a_model_and_a_dataset_must_be_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        sft.main(replace(config, **change))


@pytest.mark.parametrize("dataset", ["sums", "sums-chinese"])
def test_a_toy_data_set_and_an_optimizer_by_name(brief, dataset):
    data = DemonstrationConfig(dataset=dataset, num_generated=LEARNT, eval_size=HELD_OUT)
    optimizer = replace(brief.optimizer, optimizer="optax:sgd(momentum=0.5)")
    assert sft.main(replace(brief, data=data, optimizer=optimizer)) == 0
    assert [row["step"] for row in steps_of(brief)] == [1]
