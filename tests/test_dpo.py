"""DPO end to end, on tiny shapes: resumed bit for bit, a reference computed once, every objective takes a step."""

import json
import math
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from experiments import dpo
from grpo_jax import loss as losses
from grpo_jax import models
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.offline import PreferenceConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.data.preferences import PairBatches
from grpo_jax.data.problems import Problem
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import offline
from grpo_jax.loop.offline import pair_lengths
from grpo_jax.loop.offline_data import load_preference_sets
from grpo_jax.masked import masked_sum
from grpo_jax.monitor.devices import PEAK_FLOPS
from grpo_jax.tasks.demonstrations import errand_preferences
from grpo_jax.tasks.errands import Errand, errand_reward
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.train import pair_log_probs
from tests.runs import encode_preferences, kill_in_second_save, metrics_of, steps_of, write_rows

LEARNT, HELD_OUT = 36, 4
JUDGE = "grpo_jax.tasks.errands:errand_reward"


def rows_of_errands():
    pairs = errand_preferences(np.random.default_rng(0), LEARNT + HELD_OUT, held_out=False)
    return [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in pairs]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    dataset = write_rows(folder / "errands.jsonl", rows_of_errands())
    config = DPOConfig(
        model=small,
        data=PreferenceConfig(dataset=dataset, template="{question}"),
        run_dir=folder / "run",
        num_epochs=2,
        num_pairs=12,
        max_prompt_length=12,
        max_completion_length=8,
        eval_every=2,
        num_eval_prompts=3,
        eval_samples=2,
        save_every=2,
        judge=JUDGE,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEAK_FLOPS, "cpu", 1e9)
        assert dpo.main(config) == 0
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The same run in a folder of its own, with a file of its own."""
    dataset = shutil.copy(finished.data.dataset, tmp_path / "errands.jsonl")
    return replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, dataset=str(dataset)))


@pytest.fixture(scope="module")
def of_base(finished):
    """What the base makes of the pairs that are learnt: log-probabilities and lengths of both completions."""
    base = models.from_pretrained(finished.model)
    limits = {"max_prompt_length": 12, "max_completion_length": 8, "rendering": {"template": "{question}"}}
    learnt, held_out = (encode_preferences(each, base, **limits) for each in load_preference_sets(finished.data, 0))

    @jax.jit
    def sums(pairs):
        return masked_sum(pair_log_probs(base.model, base.params, pairs), pairs.completion_mask, 2)

    pairs = learnt.padded(range(LEARNT))
    return {
        "reference": np.asarray(sums(pairs)),
        "held_out_reference": np.asarray(sums(held_out.padded(range(HELD_OUT)))),
        "lengths": np.asarray(pairs.completion_mask.sum(2)),
    }


def test_tokens_and_flops_of_a_step_are_those_of_its_pairs(finished):
    base = models.from_pretrained(finished.model)
    limits = {"max_prompt_length": 12, "max_completion_length": 8, "rendering": {"template": "{question}"}}
    preferences, _ = load_preference_sets(finished.data, 0)
    learnt = encode_preferences(preferences, base, **limits)
    prompts, completions = pair_lengths(PairBatches(learnt, num_pairs=12, num_epochs=2)[0])
    row = next(row for row in read_jsonl(finished.run_dir / "metrics.jsonl") if "loss" in row)
    assert row["num_tokens"] == 2 * prompts.sum() + completions.sum()
    assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["step_time"])
    flops = models.training_flops(base.config, prompts, completions)
    assert row["mfu"] == pytest.approx(flops / 1e9 / row["step_time"])


def test_s1_killed_and_resumed_is_bit_for_bit_the_unbroken_run(finished, config, monkeypatch):
    kill_in_second_save(dpo.main, config, monkeypatch)
    assert [row["step"] for row in steps_of(config)] == [1, 2, 3, 4]  # of which the last two are to be taken back
    monkeypatch.setattr(dpo, "write_atomically", lambda *args: pytest.fail("the reference was computed again"))
    assert dpo.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)
    for name in ("completions.jsonl", "model/model.safetensors", "reference.npy", "held_out_reference.npy"):
        assert (config.run_dir / name).read_bytes() == (finished.run_dir / name).read_bytes(), name
    assert len(steps_of(finished)) == 6


def test_other_data_under_the_same_path_are_refused_until_the_old_ones_are_back(finished, config, monkeypatch):
    kill_in_second_save(dpo.main, config, monkeypatch)
    rows = rows_of_errands()
    write_rows(config.run_dir.parent / "errands.jsonl", [{**row, "chosen": row["chosen"] + "!"} for row in rows])
    with pytest.raises(ValueError, match=r"the data differ from those that .* was started with"):
        dpo.main(config)
    write_rows(config.run_dir.parent / "errands.jsonl", rows)
    assert dpo.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)


def test_a_finished_run_is_not_run_again(finished, capsys, monkeypatch):
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert dpo.main(finished) == 0
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before
    assert "this run is finished" in capsys.readouterr().out


def test_s6_another_configuration_in_the_same_folder_is_refused(finished):
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*beta: 0\.1 -> 0\.2"):
        dpo.main(replace(finished, beta=0.2))


def test_the_first_update_starts_from_the_reference(finished):
    first = steps_of(finished)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    before = metrics_of(finished)[0]
    assert (before["eval/accuracy"], before["eval/margin"]) == (0.5, 0)


def test_the_references_log_probabilities_are_those_of_the_model_it_started_from(finished, of_base):
    for name in ("reference", "held_out_reference"):
        kept = np.load(finished.run_dir / f"{name}.npy")
        np.testing.assert_allclose(kept, of_base[name], atol=1e-5)
    assert len(np.unique(of_base["reference"])) > LEARNT  # so that no two pairs can be taken for one another


def test_preferences_are_learnt(finished):
    steps = steps_of(finished)
    epochs = steps[:3], steps[3:]
    losses, margins = (
        [np.mean([row[name] for row in each]) for each in epochs] for name in ("loss", "rewards/margins")
    )
    assert losses[1] < losses[0] - 0.01
    assert margins[1] > margins[0] + 0.01
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "margin_after", "judge_before", "judge_after"} <= set(summary)
    assert summary["accuracy_before"] == 0.5
    assert summary["steps"] == 6


@pytest.mark.slow
def test_an_update_in_parts_is_the_update_of_the_whole(finished, config):
    config = replace(config, num_micro_batches=3)
    assert dpo.main(config) == 0
    whole, parts = metrics_of(finished), metrics_of(config)
    assert len(whole) == len(parts)
    for row, other in zip(whole, parts, strict=True):
        assert row.keys() == other.keys()
        assert other["step"] == row["step"]
        for name in ("loss", "nll_loss", "rewards/margins", "rewards/chosen", "eval/margin", "eval/mean_length"):
            assert other.get(name) == pytest.approx(row.get(name), abs=1e-5), (row["step"], name)


def test_completions_are_judged(finished):
    for row in metrics_of(finished):
        if "eval/judge" not in row:
            continue
        samples = [each for each in read_jsonl(finished.run_dir / "completions.jsonl") if each["step"] == row["step"]]
        assert len(samples) == 3 * 2
        assert row["eval/judge"] == pytest.approx(np.mean([each["reward"] for each in samples]))
        for each in samples:
            assert each["reward"] == Errand(each["prompt"][1:]).quality(each["completion"])
    chosen = {each["prompt"]: each["chosen"] for each in rows_of_errands()}
    assert all(each["answer"] == chosen[each["prompt"]] for each in samples)


def test_grades_are_there_where_somebody_judges():
    problems = [Problem("?123", None, {"chosen": "123!"}), Problem("?40", None, {"chosen": "~"})]
    prompts = EncodedProblems(problems, make_tokenizer(), max_prompt_length=12, pad_id=0, template="{question}")
    completions = ["123!", "12", "~", "40"]
    samples, scores = dpo.judge_samples(prompts, completions, errand_reward, 2)
    assert scores == [1.0, 0.5, 1.0, 0.0]
    assert [(each.prompt, each.reward, each.answer) for each in samples[1:3]] == [
        ("?123", 0.5, "123!"),
        ("?40", 1, "~"),
    ]
    samples, scores = dpo.judge_samples(prompts, completions, lambda *_, **columns: [None, 1.0, None, 0.0], 2)
    assert scores == [1.0, 0.0]
    assert [each.reward for each in samples] == [None, 1.0, None, 0.0]
    samples, scores = dpo.judge_samples(prompts, completions, None, 2)
    assert scores == []
    assert all("reward" not in each.row(0) for each in samples)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (
            {
                "loss": "ipo",
                "sft_coef": 0.5,
                "judge": None,
            },  # (0 - 1 / (2 beta))^2, and the likelihood of what is chosen
            lambda sums, lengths: 25 - 0.5 * (sums / lengths)[:, 0].mean(),
        ),
        (
            {"reference_free": True, "per_token": True, "beta": 2.0, "target_margin": 1.0},
            lambda sums, lengths: -log_sigmoid(2 * (sums / lengths) @ [1, -1] - 1).mean(),
        ),
    ],
    ids=["ipo", "simpo"],
)
def test_every_objective_takes_a_step(config, of_base, change, loss):
    config = replace(config, **change, num_epochs=1, num_pairs=LEARNT, num_eval_prompts=0, eval_every=0)
    assert dpo.main(config) == 0
    (step,) = steps_of(config)
    assert step["loss"] == pytest.approx(loss(of_base["reference"], of_base["lengths"]), abs=1e-4)
    assert step["grad_norm"] > 0
    assert (config.run_dir / "reference.npy").exists() == (not config.reference_free)
    assert (config.run_dir / "held_out_reference.npy").exists() == (not config.reference_free)
    assert not any("eval/judge" in row or "eval/mean_length" in row for row in metrics_of(config))


def test_the_trained_model_is_a_hugging_face_folder(finished):
    oracle, info = transformers.AutoModelForCausalLM.from_pretrained(
        finished.run_dir / "model", output_loading_info=True
    )
    assert not info["missing_keys"], info
    trained, base = (models.from_pretrained(each) for each in (finished.run_dir / "model", finished.model))
    embedding = trained.params["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, oracle.get_input_embeddings().weight.detach().numpy())
    assert np.abs(np.asarray(embedding - base.params["embed"]["embedding"])).max() > 1e-3
    assert trained.tokenizer.decode(trained.tokenizer("?4127")["input_ids"]) == "?4127"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0}, "num_epochs is 0; it must be at least 1"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_micro_batches": 0}, "num_micro_batches is 0"),
        ({"num_micro_batches": 5}, "num_pairs = 12 do not divide into 5 micro-batches"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"num_eval_prompts": -1}, "num_eval_prompts is -1"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"sft_coef": -0.5}, "sft_coef is -0.5"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it is a share of wrong labels"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "belong to the loss sigmoid, not to ipo"),
        ({"loss": "hinge", "target_margin": 1.0}, "belong to the loss sigmoid, not to hinge"),
        ({"seed": -1}, "seed is -1"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"model": "toy", "data": PreferenceConfig(chat_template=True)}, "the toy model has no chat template"),
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
        ({"judge": "no_such_module:f"}, "no module 'no_such_module'"),
        ({"judge": "errand_reward"}, "must be module:function"),
        ({"model": None}, "model: no model is named; pass --model"),
        ({"data": PreferenceConfig()}, "dataset: no dataset is named; pass --dataset"),
        ({"num_pairs": LEARNT + 1}, f"with {LEARNT} pairs num_pairs must be from 1"),
        ({"max_prompt_length": 2}, "none of 36 pairs fits"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dpo.main(replace(config, **change))
    log = config.run_dir / "metrics.jsonl"
    assert not log.exists() or not read_jsonl(log)
    assert not (config.run_dir / "reference.npy").exists()


@pytest.mark.slow
def test_pairs_that_are_too_long_are_left_out_and_counted(config, capsys):
    """The reference is then that of those that are left, pair by pair; and SLiC's loss of no margin is 1."""
    config = replace(
        config, loss="hinge", max_completion_length=5, num_epochs=1, num_pairs=8, num_eval_prompts=0, eval_every=0
    )
    learnt, _ = load_preference_sets(config.data, 0)
    fitting = [each for each in learnt if max(len(each.chosen), len(each.rejected)) + 1 <= 5]
    assert 8 <= len(fitting) < LEARNT
    assert dpo.main(config) == 0
    assert f"{LEARNT - len(fitting)} of {LEARNT} pairs dropped: too long" in capsys.readouterr().out
    assert np.load(config.run_dir / "reference.npy").shape == (len(fitting), 2)
    first = steps_of(config)[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["loss"] == pytest.approx(1, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(config, monkeypatch):
    loss = losses.dpo_loss
    monkeypatch.setattr(
        losses, "dpo_loss", lambda *args, **settings: jax.tree.map(lambda x: x * jnp.nan, loss(*args, **settings))
    )
    monkeypatch.setattr(offline, "check_finite", lambda *_: None)  # of the evaluation
    with pytest.raises(FloatingPointError, match=r"step 1: grad_norm is nan.* set bad_updates to skip"):
        dpo.main(replace(config, num_eval_prompts=0))
    assert [row["step"] for row in metrics_of(config)] == [0]
    assert not (config.run_dir / "model").exists()


def test_settings_have_one_default_and_the_toy_is_a_preset():
    config = DPOConfig()
    assert (config.prompt_length, config.completion_length) == (512, 1024)
    assert (config.model, config.data.dataset, config.judge, config.optimizer.learning_rate) == (None, None, None, 5e-7)
    toy = preset("dpo")
    assert (toy.prompt_length, toy.completion_length) == (12, 48)
    assert (toy.model, toy.data.dataset, toy.judge, toy.optimizer.learning_rate) == ("toy", "errands", JUDGE, 3e-4)
    assert toy.toy.errand_share == 0.5


@pytest.mark.slow
def test_errands_can_be_learnt_from_a_folder_in_its_own_format_without_a_judge(config):
    data = PreferenceConfig(dataset="errands", num_generated=LEARNT, eval_size=HELD_OUT)  # the bare question
    again = replace(config, data=data, judge=None, num_epochs=1, eval_every=0)
    assert dpo.main(again) == 0
    rows = read_jsonl(again.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert not any("eval/judge" in row for row in rows)
