"""A reward model end to end, on tiny shapes: resumed bit for bit, calibrated as computed by hand, read by others."""

import json
import math
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from experiments import reward_model
from experiments.reward_model import accuracy_and_calibration
from grpo_jax import models
from grpo_jax.config.offline import PreferenceConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.offline_data import load_preference_sets
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.rewards.scorer import load_reward_model
from grpo_jax.tasks.demonstrations import errand_preferences
from grpo_jax.train import pair_scores
from tests.runs import encode_preferences, kill_in_second_save, metrics_of, steps_of, write_rows

LEARNT, HELD_OUT = 36, 4


def rows_of_errands():
    pairs = errand_preferences(np.random.default_rng(0), LEARNT + HELD_OUT, held_out=False)
    return [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in pairs]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    dataset = write_rows(folder / "errands.jsonl", rows_of_errands())
    config = RewardModelConfig(
        model=small,
        data=PreferenceConfig(dataset=dataset, template="{question}"),
        run_dir=folder / "run",
        num_epochs=2,
        num_pairs=12,
        max_prompt_length=12,
        max_completion_length=8,
        eval_every=2,
        save_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )
    assert reward_model.main(config) == 0
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The same run in a folder of its own, with a file of its own."""
    dataset = shutil.copy(finished.data.dataset, tmp_path / "errands.jsonl")
    return replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, dataset=str(dataset)))


def test_s1_killed_and_resumed_is_the_unbroken_run_and_other_data_are_refused_meanwhile(finished, config, monkeypatch):
    kill_in_second_save(reward_model.main, config, monkeypatch)
    assert [row["step"] for row in steps_of(config)] == [1, 2, 3, 4]  # of which the last two are to be taken back
    rows = rows_of_errands()
    write_rows(config.run_dir.parent / "errands.jsonl", [{**row, "chosen": row["chosen"] + "!"} for row in rows])
    with pytest.raises(ValueError, match=r"the data differ from those that .* was started with"):
        reward_model.main(config)
    write_rows(config.run_dir.parent / "errands.jsonl", rows)
    assert reward_model.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)
    trained = [each.run_dir / "model" / "model.safetensors" for each in (config, finished)]
    assert trained[0].read_bytes() == trained[1].read_bytes()
    assert len(steps_of(finished)) == 6


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert reward_model.main(finished) == 0
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before
    assert "this run is finished" in capsys.readouterr().out


def test_s6_another_configuration_in_the_same_folder_is_refused(finished):
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*centring: 0\.01 -> 0\.5"):
        reward_model.main(replace(finished, centring=0.5))


@pytest.mark.slow
def test_an_update_in_parts_is_the_update_of_the_whole(finished, config):
    config = replace(config, num_micro_batches=3)
    assert reward_model.main(config) == 0
    whole, parts = metrics_of(finished), metrics_of(config)
    assert len(whole) == len(parts)
    for row, other in zip(whole, parts, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-5), (row["step"], name)


def test_a_new_head_prefers_nothing_and_preferences_are_learnt(finished):
    steps = steps_of(finished)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (steps[0]["accuracy"], steps[0]["score/mean"]) == (0.5, 0)
    assert np.mean([row["loss"] for row in steps[3:]]) < math.log(2) - 0.02
    before = metrics_of(finished)[0]
    assert (before["eval/accuracy"], before["eval/calibration_error"], before["eval/score_std"]) == (0.5, 0, 0)
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "calibration_error_after", "score_mean_after"} <= set(summary)


def test_what_is_saved_scores_as_transformers_does(finished):
    folder = finished.run_dir / "model"
    oracle, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert oracle.config.num_labels == 1

    def by_transformers(ids):
        with torch.no_grad():
            return float(oracle.eval()(torch.tensor([ids])).logits[0, 0])

    loaded = models.from_pretrained(folder)
    again = models.from_pretrained(folder, scalar_head=True)
    assert loaded.config.scalar_head
    assert again.config == loaded.config
    limits = {"max_prompt_length": 12, "max_completion_length": 8, "rendering": {"template": "{question}"}}
    pairs = encode_preferences(load_preference_sets(finished.data, 0)[1], loaded, **limits).padded(range(HELD_OUT))
    found = np.asarray(pair_scores(again.model, again.params, pairs))
    for n in range(HELD_OUT):
        prompt = np.asarray(pairs.prompt_ids)[n][np.asarray(pairs.prompt_mask)[n]].tolist()
        for side in (0, 1):
            mask = np.asarray(pairs.completion_mask)[n, side]
            completion = np.asarray(pairs.completion_ids)[n, side][mask].tolist()
            assert found[n, side] == pytest.approx(by_transformers(prompt + completion), abs=1e-4)
    assert found.std() > 1e-3
    assert metrics_of(finished)[-1]["eval/score_mean"] == pytest.approx(found.mean(), abs=1e-5)

    # Asked as the runs of others ask it, it gives the scores of its training.
    assert loaded.prompt_format == {"kind": "plain", "template": "{question}"}
    said = []
    asked = load_reward_model(str(folder), mesh=None, dtype=jnp.float32, say=said.append)
    assert said == ["reward model: reads the plain template '{question}', the format of its training"]
    held_out = load_preference_sets(finished.data, 0)[1]
    for side, name in enumerate(("chosen", "rejected")):
        completions = [getattr(each, name) for each in held_out]
        prompts = [each.prompt for each in held_out]
        scores = asked(["in the policy's words"] * HELD_OUT, completions, problem_prompt=prompts)
        np.testing.assert_allclose(scores, found[:, side], atol=1e-5)

    reward = LearnedReward(loaded.model, loaded.params, loaded.tokenizer, max_length=32, batch_size=2)
    texts = ["4127", "4127!", "~"]
    expected = [by_transformers(loaded.tokenizer("?4127" + each)["input_ids"]) for each in texts]
    np.testing.assert_allclose(reward(["?4127"] * 3, texts), expected, atol=1e-4)


@pytest.mark.slow
def test_margins_are_asked_for_where_every_pair_has_one(config):
    config = replace(config, num_epochs=1, num_pairs=LEARNT, eval_every=0)
    rows = [{**row, "margin": 1.0} for row in rows_of_errands()]
    write_rows(config.run_dir.parent / "errands.jsonl", rows)

    def first_loss(config, name):
        config = replace(config, run_dir=config.run_dir.with_name(name))
        assert reward_model.main(config) == 0
        return steps_of(config)[0]["loss"]

    asked = math.log(1 + math.e)
    assert first_loss(config, "every") == pytest.approx(asked, abs=1e-6)
    assert first_loss(replace(config, use_margins=False), "unused") == pytest.approx(math.log(2), abs=1e-6)
    learnt = {each.prompt for each in load_preference_sets(config.data, 0)[0]}
    lacking = next(row for row in rows if row["prompt"] in learnt)
    del lacking["margin"]
    write_rows(config.run_dir.parent / "errands.jsonl", rows)
    assert first_loss(config, "some") == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_centring_moves_scores_towards_zero_from_a_head_that_was_there(config, tmp_path):
    """A head whose scores all lie on one side is kept, and then pulled back; without centring it stays there."""
    start = models.from_pretrained(config.model, scalar_head=True)
    ids = jnp.asarray(start.tokenizer(["?4127412<eos>"])["input_ids"], jnp.int32)
    hidden, _ = start.model.apply(start.params, ids, jnp.arange(ids.shape[1])[None], ids >= 0)
    head = hidden[0, -1] / jnp.linalg.norm(hidden[0, -1])
    params = {**start.params, "score": {"kernel": head[:, None]}}
    models.save_pretrained(tmp_path / "away", params, hf_config=start.hf_config, tokenizer=start.tokenizer)
    config = replace(config, model=str(tmp_path / "away"), eval_every=0)

    def means(centring):
        each = replace(config, centring=centring, run_dir=config.run_dir.with_name(f"centring {centring}"))
        assert reward_model.main(each) == 0
        rows = [row["eval/score_mean"] for row in metrics_of(each) if "eval/score_mean" in row]
        return abs(rows[0]), abs(rows[-1])

    before, after = means(1.0)
    same, left = means(0.0)
    assert before == same > 0.1
    assert after < 0.7 * before
    assert after < left


LOG_3, LOG_19 = math.log(3), math.log(19)


@pytest.mark.parametrize(
    ("margins", "accuracy", "error", "loss"),
    [
        ([0, 0, 0], 0.5, 0, math.log(2)),  # ties: no confidence, and none was due
        (
            [0, 0, 5000, -5000],
            0.5,
            0.25,
            (2 * math.log(2) + 5000) / 4,
        ),  # the last two are sure, and right half the time
        ([LOG_3, LOG_3, LOG_3, -LOG_3], 0.75, 0, (3 * math.log(4 / 3) + math.log(4)) / 4),  # as sure as it is right
        ([LOG_19, -LOG_19], 0.5, 0.45, (math.log(20 / 19) + math.log(20)) / 2),  # 0.95 sure, right half the time
        ([math.log(1.5)], 1.0, 0.4, math.log(5 / 3)),  # 0.6 sure and always right
        ([-LOG_19, math.log(1.5)], 0.5, 0.675, (math.log(20) + math.log(5 / 3)) / 2),  # bins do not make up for another
    ],
)
def test_accuracy_and_calibration_are_those_computed_by_hand(margins, accuracy, error, loss):
    scores = np.stack([np.array(margins, np.float32), np.zeros(len(margins), np.float32)], axis=1)
    for shift in (0, 2):
        found = accuracy_and_calibration(scores + np.float32(shift))
        assert found["eval/accuracy"] == pytest.approx(accuracy)
        assert found["eval/calibration_error"] == pytest.approx(error, abs=1e-6)
        assert found["eval/loss"] == pytest.approx(loss, rel=1e-6)
        assert found["eval/score_mean"] == pytest.approx(np.mean(margins) / 2 + shift, abs=1e-6)
        assert found["eval/score_std"] == pytest.approx(np.std([*margins, *[0] * len(margins)]), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0; it must be at least 1"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_micro_batches": 0}, "num_micro_batches is 0"),
        ({"num_micro_batches": 5}, "num_pairs = 12 do not divide into 5 micro-batches"),
        ({"centring": -0.1}, "centring is -0.1"),
        ({"max_prompt_length": 0}, "max_prompt_length is 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"save_every": 0}, "save_every is 0"),
        ({"model": "toy"}, "the toy model knows the data set errands only"),
        ({"model": "toy", "data": PreferenceConfig(dataset="errands", template="{question}")}, "without a template"),
        ({"model": "toy", "data": PreferenceConfig(dataset="errands", chat_template=True)}, "has no chat template"),
        ({"max_completion_length": 128}, "is 140, and the model has 128 positions"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(finished, change, message):
    with pytest.raises(ValueError, match=message):
        replace(finished, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(data=8)}, "pairs of a micro-batch: 12 do not divide over mesh data x fsdp = 8"),
        ({"num_pairs": LEARNT + 1}, f"with {LEARNT} pairs num_pairs must be from 1"),
        ({"max_prompt_length": 2}, "none of 36 pairs fits"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"model": None}, "model: no model is named; pass --model"),
        ({"data": PreferenceConfig()}, "dataset: no dataset is named; pass --dataset"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        reward_model.main(replace(config, **change))
    log = config.run_dir / "metrics.jsonl"
    assert not log.exists() or not read_jsonl(log)


def test_settings_have_one_default_and_the_toy_is_a_preset():
    config = RewardModelConfig()
    assert config.lengths == RewardModelConfig(model="some/model").lengths == (512, 1024)
    assert RewardModelConfig(max_completion_length=7).lengths == (512, 7)
    assert (config.model, config.data.dataset, config.optimizer.learning_rate) == (None, None, 1e-5)
    toy = preset("reward_model")
    assert (toy.lengths, toy.model, toy.data.dataset, toy.toy.errand_share) == ((12, 48), "toy", "errands", 0.5)
    assert toy.optimizer.learning_rate == 1e-3
