"""The main job end to end, on tiny shapes: resumed bit for bit, the same on eight devices as on one."""

import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo
from grpo_jax import masked, models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.grpo import ADVANTAGES, PRESETS, GRPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import LOSSES, OptimizerConfig, PolicyLossConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import bad_updates, collector, scoring
from grpo_jax.loop.estimators import make_train_batch, old_and_ref_log_probs
from grpo_jax.loop.setup import as_policy
from grpo_jax.loss import grpo_loss
from grpo_jax.rewards.compose import Scores
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.toy_config import HF_CONFIG
from grpo_jax.types import Rollout, TrainState
from tests.runs import count_programs, metrics_of


@pytest.fixture
def config(base, tmp_path):
    return GRPOConfig(
        model=base,
        data=DataConfig(dataset="sums", template="{question}", eval_size=10),
        run_dir=tmp_path / "run",
        num_steps=4,
        num_prompts=8,
        group_size=4,
        max_prompt_length=12,
        max_completion_length=10,
        eval_samples=4,
        eval_every=2,
        save_every=2,
        samples_every=1,
        rewards=RewardConfig(format_weight=0.5),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )


@pytest.mark.slow
def test_s1_killed_and_resumed_is_bit_for_bit_the_unbroken_run(config, monkeypatch):
    """With a reference, two inner epochs of two minibatches, and Adam's moments: all of it has to come back."""
    config = replace(config, group_size=16, packing="shared", policy=PolicyLossConfig(kl_coef=0.05))
    config = replace(config, num_epochs=2, num_minibatches=2, num_micro_batches=2, ref_refresh_every=3)
    config = replace(config, offload=("optimizer", "reference"))
    grpo.main(config)

    broken = replace(config, run_dir=config.run_dir.with_name("broken"))
    check = grpo.check_updates
    calls = []

    def killed_in_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return check(*args)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "check_updates", killed_in_the_third_step)
        with pytest.raises(KeyboardInterrupt):
            grpo.main(broken)
    grpo.main(broken)

    assert metrics_of(broken) == metrics_of(config)
    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (broken.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes(), name
    steps = [row for row in metrics_of(config) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["kl"] > 0  # by the second inner update the policy has left the reference
    assert all(row["grad_norm"] > 0 for row in steps)
    assert max(row["reward_std"] for row in steps) > 0  # there was something to learn from
    assert max(row["clip_ratio/region_mean"] for row in steps) > 0  # and updates that met the clip


@pytest.mark.parametrize("moment", ["evaluation", "step"])
def test_a_run_that_is_asked_to_stop_says_so_and_goes_on_as_if_it_had_not_been(config, finished, monkeypatch, moment):
    """SIGTERM in the first evaluation and in a step: the status is not 0, and the end is that of the unbroken run."""
    config = replace(finished, run_dir=config.run_dir)
    asked = []

    def ask(function, count):
        def asking(*args, **kwargs):
            asked.append(1)
            if len(asked) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        return asking

    with monkeypatch.context() as patch:
        module, name = (collector, "decode_completions") if moment == "evaluation" else (grpo, "check_updates")
        patch.setattr(module, name, ask(getattr(module, name), 1))
        assert grpo.main(config) == 75
    assert not (config.run_dir / "summary.json").exists()
    assert grpo.main(config) == 0
    assert metrics_of(config) == metrics_of(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "mesh"),
    [
        ("none", MeshConfig(data=2, fsdp=2, tensor=2)),
        ("shared", MeshConfig(data=1, fsdp=2, context=2, tensor=2, rollout_tensor=4)),
    ],
)
def test_l2_eight_devices_give_the_losses_of_one(config, packing, mesh):
    config = replace(config, num_steps=5, group_size=16)
    grpo.main(config)
    eight = replace(config, run_dir=config.run_dir.with_name("eight"), mesh=mesh, packing=packing)
    grpo.main(eight)
    one, many = metrics_of(config), metrics_of(eight)
    assert max(row.get("reward_std", 0) for row in one) > 0  # losses that are not 0 for want of a signal
    assert len(one) == len(many) == 9
    for row, other in zip(one, many, strict=True):
        for name in ("loss", "entropy", "reward", "completions/mean_length", "eval/pass@1"):
            assert other.get(name) == pytest.approx(row.get(name), abs=1e-5), (row["step"], name)
    texts = [[row["completion"] for row in read_jsonl(c.run_dir / "completions.jsonl")] for c in (config, eight)]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    config = GRPOConfig(
        model=base,
        data=DataConfig(dataset="sums", template="{question}", eval_size=10),
        run_dir=tmp_path_factory.mktemp("finished") / "run",
        num_steps=2,
        num_prompts=8,
        group_size=4,
        max_prompt_length=12,
        max_completion_length=10,
        eval_samples=4,
        samples_every=1,
        mesh=MeshConfig(data=1),
        plain=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.loop.collector.count_compilations", count_programs)
        grpo.main(config)
    return config


def test_summary_has_what_is_promised(finished):
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    promised = "pass_at_1_before pass_at_1_after maj_at_4_after mean_length_before mean_length_after seconds"
    assert set(promised.split()) <= set(summary)
    assert 0 <= summary["max_sampler_trainer_gap"] <= 1e-5  # T15
    assert summary["seed"] == 0
    assert summary["config"]["group_size"] == 4
    assert {"jax", "flax", "transformers"} <= set(summary["versions"])
    assert (finished.run_dir / "curves.png").exists()


def test_metrics_have_trls_names(finished):
    row = metrics_of(finished)[1]
    expected = (
        "reward reward_std frac_reward_zero_std entropy clip_ratio/low_mean clip_ratio/high_mean "
        "clip_ratio/region_mean completions/mean_length completions/clipped_ratio rewards/accuracy/mean "
        "rewards/format/std num_tokens grad_norm "
        "sampling/sampling_logp_difference/max loss learning_rate"
    )
    assert set(expected.split()) <= set(row)
    assert "kl" not in row  # there is no reference
    assert row["completions/mean_length"] <= 10


def test_the_speed_of_updates_counts_prompts_and_completions(finished):
    row = next(row for row in read_jsonl(finished.run_dir / "metrics.jsonl") if "loss" in row)
    assert row["update_tokens_per_second"] == pytest.approx(row["num_tokens"] / row["update_time"])


def test_completions_are_logged_with_every_part_of_the_reward(finished):
    rows = read_jsonl(finished.run_dir / "completions.jsonl")
    assert len(rows) == 2 * 8 * 4
    assert {"step", "prompt", "completion", "reward", "rewards/accuracy", "rewards/format", "advantage"} <= set(rows[0])
    assert rows[0]["prompt"].endswith("=")
    assert all(int(row["answer"]) == sum(map(int, row["prompt"][:-1].split("+"))) for row in rows)


def test_the_trained_model_is_a_hugging_face_folder(finished):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(finished.run_dir / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished.run_dir / "model")
    assert model.config.vocab_size == HF_CONFIG["vocab_size"]
    assert tokenizer.decode(tokenizer("1+2=")["input_ids"]) == "1+2="


def test_a_finished_run_is_not_run_again(finished, capsys):
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    assert grpo.main(finished) == 0
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before
    assert "this run is finished" in capsys.readouterr().out


def test_a_model_of_ones_own_gets_small_micro_batches(config):
    sizes = {"num_prompts": 32, "group_size": 16, "max_prompt_length": None, "max_completion_length": None}
    large = replace(config, model="org/of-any-length", **sizes)
    assert large.micro_batches == 64  # of 8 completions with 512 + 1024 tokens: 12,288
    assert replace(large, num_minibatches=4).micro_batches == 16
    assert replace(large, mesh=MeshConfig(data=8)).micro_batches == 8
    assert replace(large, num_micro_batches=2).micro_batches == 2
    assert config.micro_batches == 1
    assert PRESETS["toy"].config().micro_batches == 1


def test_stop_tokens_end_completions_and_must_be_known(finished):
    policy = models.from_pretrained(finished.model)
    assert as_policy(finished, policy).eos_ids == policy.eos_ids
    stopped = as_policy(replace(finished, stop_tokens=("</answer>", "<eos>")), policy)
    assert stopped.eos_ids == (1, 5)
    with pytest.raises(ValueError, match=r"stop_tokens: \['<\|im_end\|>'\] are not tokens of"):
        as_policy(replace(finished, stop_tokens=("</answer>", "<|im_end|>")), policy)
    with pytest.raises(ValueError, match="is 140, and the model has 128 positions"):
        as_policy(replace(finished, max_completion_length=128), policy)


def test_s6_another_configuration_in_the_same_folder(finished):
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*group_size: 4 -> 8"):
        grpo.main(replace(finished, group_size=8))


def test_s7_varying_lengths_compile_nothing_new(finished):
    rows = [row for row in read_jsonl(finished.run_dir / "metrics.jsonl") if "compilations" in row]
    assert rows[0]["compilations"] > 0
    assert rows[1]["compilations"] - rows[0]["compilations"] <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        (
            {"num_minibatches": 3},
            "8 x 4 = 32 completions do not divide into num_minibatches x num_micro_batches = 3 x 1",
        ),
        ({"num_micro_batches": 5}, "do not divide"),
        (
            {"policy": PolicyLossConfig(kl_coef=0.1), "kl_reward_coef": 0.1},
            "the KL belongs in the loss or in the reward",
        ),  # L13
        ({"sampling": Sampling(temperature=0.0)}, "temperature is 0"),
        ({"ref_refresh_every": 5}, "there is no reference"),
        ({"ref_refresh_every": 0, "policy": PolicyLossConfig(kl_coef=0.1)}, "ref_refresh_every is 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"model": "toy"}, "without a template; with another dataset or a template, name a model"),
        ({"advantage": "nonsense"}, "advantage is 'nonsense'; it must be one of group_relative, dr_grpo"),
        ({"advantage": "group_relative(gamma=1)"}, "group_relative has no argument 'gamma'"),
        ({"advantage": "rloo(group_size=8)"}, "advantage: the run passes 'group_size' to rloo"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshConfig(data=8), "num_prompts": 4}, "num_prompts: 4 do not divide over mesh data x fsdp = 8"),
        ({"mesh": MeshConfig(data=8), "num_micro_batches": 8}, "completions of a micro-batch: 4 do not divide"),
        ({"mesh": MeshConfig(data=1, context=8), "group_size": 2, "num_prompts": 2}, "over mesh.context too: 4 do not"),
        ({"rewards": RewardConfig(accuracy_weight=0.0)}, "weights must be finite and not all 0"),
        ({"rewards": RewardConfig(reward=("no_such_module:f",))}, "no module 'no_such_module'"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"data": DataConfig(dataset="sums", chat_template=True)}, "chat template"),
        ({"max_prompt_length": 4}, "longer than max_prompt_length=4"),
        ({"offload": ("reference",)}, "offload is reference, but the run has no reference policy"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        grpo.main(replace(config, **change))
    log = config.run_dir / "metrics.jsonl"
    assert not log.exists() or not read_jsonl(log)


def test_a_reward_that_cannot_run_is_found_before_a_model_is_loaded(config, monkeypatch):
    def broken(prompts, completions, **columns):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(scoring, "format_reward", broken)
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="reward 'format' raised ZeroDivisionError"):
        grpo.main(config)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(config, monkeypatch):
    sum_up = bad_updates.over_updates
    monkeypatch.setattr(bad_updates, "over_updates", lambda updates: sum_up(updates) | {"loss": math.nan})
    with pytest.raises(FloatingPointError, match="step 1: loss is nan"):
        grpo.main(config)
    assert [row["step"] for row in metrics_of(config)] == [0]


# The batch that is learnt from --------------------------------------------------------------------------------------


def make_rollout():
    rows, T = 8, 4
    lengths = np.arange(rows) % T + 1
    mask = jnp.asarray(np.arange(T) < lengths[:, None])
    ids = jnp.ones((rows, T), jnp.int32)
    prompts = jnp.ones((rows, 3), jnp.int32)
    return Rollout(prompts, prompts > 0, ids, mask, jnp.zeros((rows, T)), truncated=jnp.asarray(lengths == T))


def learn(config, rewards, policy=0.0, reference=0.0):
    state = TrainState(step=jnp.int32(0), params=policy, opt_state=None, ref_params=reference)
    rollout = make_rollout()
    scorer = lambda params, rollout: jnp.full(rollout.completion_ids.shape, params)  # noqa: E731
    total = np.asarray(rewards, np.float32)
    scores = Scores(total, {}, {"accuracy": total}, [""] * len(total), total, [()] * len(total))
    old, ref = old_and_ref_log_probs(config, rollout, scorer, state)
    batch = make_train_batch(
        config,
        rollout,
        scores,
        reward_weights={"accuracy": 1.0},
        tokenizer=None,
        old_log_probs=old,
        ref_log_probs=ref,
    )
    return batch, rollout


def test_a5_an_absent_reward_drops_out_of_the_loss(config):
    batch, rollout = learn(config, [1, 0, 0, math.nan, 1, 0, 0, 0])
    assert batch.advantages[3] == 0
    assert not batch.loss_mask[3].any()
    kept = np.arange(8) != 3
    assert np.array_equal(np.asarray(batch.loss_mask)[kept], np.asarray(rollout.completion_mask)[kept])
    assert np.isfinite(np.asarray(batch.advantages)).all()
    assert batch.old_log_probs is None  # a single update
    assert batch.ref_log_probs is None  # no reference


def test_truncated_completions_are_left_out_by_choice(config):
    batch, rollout = learn(replace(config, mask_truncated=True), [1, 0] * 4)
    assert np.array_equal(np.asarray(batch.loss_mask).any(1), ~np.asarray(rollout.truncated))


def test_kl_in_the_reward(config):
    plain, _ = learn(config, [1, 0] * 4)
    config = replace(config, kl_reward_coef=0.5, advantage="rloo")
    same, _ = learn(config, [1, 0] * 4)
    np.testing.assert_allclose(same.advantages, [2 / 3, -2 / 3] * 4, atol=1e-6)
    away, _ = learn(config, [1, 0] * 4, policy=0.2)  # 0.1 off the reward for each token; lengths 1 2 3 4
    rewards = np.array([0.9, -0.2, 0.7, -0.4])
    np.testing.assert_allclose(away.advantages[:4], (rewards - rewards.mean()) * 4 / 3, atol=1e-6)
    assert away.old_log_probs is None
    assert plain.ref_log_probs is None
    assert away.ref_log_probs is not None


@pytest.mark.parametrize("name", [*sorted(set(ADVANTAGES) - {"process_supervised"}), "group_relative(scale='none')"])
def test_every_named_advantage(config, name):
    batch, _ = learn(replace(config, advantage=name), [1, 0, 0, 0, 0, 0, 1, 1])
    assert batch.advantages[0] > 0 > batch.advantages[1]


def build_loss(log_probs=lambda params, batch: (params, params * 0), sampler_alters_policy=False, **settings):
    loss = PolicyLossConfig(**settings)
    return loss.build(log_probs, max_completion_length=10, sampler_alters_policy=sampler_alters_policy)


@pytest.mark.parametrize("name", LOSSES)
def test_every_named_loss_has_a_gradient(config, name):
    loss_fn = build_loss(lambda params, batch: (params + batch.rollout_log_probs, params * 0), loss=name)
    batch, rollout = learn(config, [1, 0, 0, 0, 0, 0, 1, 1])
    params = jnp.full(rollout.completion_ids.shape, -0.7)
    gradient = jax.grad(lambda params: loss_fn(params, batch)[0].value)(params)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[np.asarray(batch.loss_mask)] != 0).all()
    assert float(gradient[0, 0]) < 0 < float(gradient[1, 0])  # up for what was rewarded, down for what was not


def test_epsilons_override_the_losss_own(config):
    batch, rollout = learn(replace(config, num_epochs=2), [1, 0, 0, 0, 0, 0, 1, 1])
    params = jnp.full(rollout.completion_ids.shape, 0.1)
    losses = build_loss(loss="dapo", epsilon_high=0.01), build_loss(loss="dapo")
    clipped = [float(loss_fn(params, batch)[1]["clip_ratio/high_mean"].value) for loss_fn in losses]
    assert clipped[0] > 0 == clipped[1]


def test_truncating_filters_leave_the_gap_out_unless_it_is_corrected_for(config):
    batch, rollout = learn(config, [1, 0] * 4)
    params = jnp.full(rollout.completion_ids.shape, -0.1)
    gap = "sampling/sampling_logp_difference/max"
    assert gap in build_loss()(params, batch)[1]
    assert gap not in build_loss(sampler_alters_policy=True)(params, batch)[1]
    assert gap in build_loss(sampler_alters_policy=True, importance_cap=2.0)(params, batch)[1]


@pytest.mark.slow
def test_a_coarser_cache_trains_with_a_gap_that_is_corrected_for(config):
    policy = PolicyLossConfig(importance_cap=2.0)
    grpo.main(replace(config, num_steps=1, group_size=16, cache_dtype="int8", policy=policy, eval_every=0))
    (step,) = (row for row in metrics_of(config) if "loss" in row)
    assert 1e-4 < step["sampling/sampling_logp_difference/max"] < 1
    assert step["grad_norm"] > 0


def test_defaults_are_those_of_real_models_and_presets_are_complete():
    real = GRPOConfig(model="Qwen/Qwen2.5-0.5B")
    assert (real.prompt_length, real.completion_length) == (512, 1024)
    assert real.compute_dtype == jnp.float32  # on a CPU
    toy = PRESETS["toy"].config()
    assert (toy.model, toy.data.dataset, toy.dtype, toy.remat) == ("toy", "sums", "float32", "none")
    assert (toy.prompt_length, toy.completion_length, toy.micro_batches, toy.eval_samples) == (12, 48, 1, 16)
    assert replace(toy, max_completion_length=7).completion_length == 7
    assert replace(toy, dtype="bfloat16").compute_dtype == jnp.bfloat16


@pytest.mark.parametrize("change", [{"model": None}, {"data": DataConfig()}])
def test_a_run_needs_a_model_and_a_dataset(config, change):
    with pytest.raises(ValueError, match=r"no (model|dataset) is named; pass --"):
        grpo.main(replace(config, **change))


def dual_clip(log_probs, advantages, mask, *, old_log_probs, c: float = 3.0):
    """A policy loss of a user's own: no KL, no entropy, one parameter."""
    ratio = jnp.exp(log_probs - (jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs))
    weighted = ratio * advantages[:, None]
    return masked.mean_pair(
        -jnp.where(advantages[:, None] < 0, jnp.maximum(weighted, c * advantages[:, None]), weighted), mask
    ), {}


def first_of_group(rewards, *, group_size: int, scale: float = 1.0):
    """An advantage of a user's own."""
    return scale * (rewards - jnp.repeat(rewards[::group_size], group_size))


def test_losses_advantages_and_optimizers_of_ones_own(config):
    own = replace(
        config,
        policy=PolicyLossConfig(loss="tests.test_grpo:dual_clip(c=2.0)"),
        advantage="tests.test_grpo:first_of_group(scale=0.5)",
        optimizer=OptimizerConfig(optimizer="optax:adafactor", learning_rate=1e-3),
        num_steps=1,
        eval_every=0,
    )
    batch, rollout = learn(own, [1, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(batch.advantages, [0, -0.5, -0.5, -0.5, 0, 0, 0.5, 0.5])
    loss_fn = own.policy.build(lambda p, b: (p, p * 0), max_completion_length=10, sampler_alters_policy=False)
    loss, metrics = loss_fn(jnp.full(rollout.completion_ids.shape, -0.7), batch)
    assert np.isfinite(loss.value)
    assert metrics == {}
    assert grpo.main(own) == 0
    with pytest.raises(ValueError, match=r"kl_coef is set, but the loss tests\.test_grpo:dual_clip has no argument"):
        PolicyLossConfig(loss="tests.test_grpo:dual_clip", kl_coef=0.1)
    with pytest.raises(ValueError, match=r"loss: tests\.test_grpo:dual_clip has no argument 'b'"):
        PolicyLossConfig(loss="tests.test_grpo:dual_clip(b=1)")
    with pytest.raises(ValueError, match="loss is 'nonsense'; it must be one of grpo, ppo"):
        PolicyLossConfig(loss="nonsense")
    with pytest.raises(ValueError, match="weight_decay is set, but optax:sgd has no weight_decay"):
        OptimizerConfig(optimizer="optax:sgd", weight_decay=0.1)


def a_number(log_probs, advantages, mask):
    return 3.0


def wants_more(log_probs, advantages, mask, *, old_logps):
    return log_probs.mean(), {}


def wants_old(log_probs, advantages, mask, *, old_log_probs):
    return masked.mean_pair(log_probs - old_log_probs, mask), {}


def broken_kl(log_probs, ref_log_probs):
    raise LookupError("nothing")


def broken_advantage(rewards):
    raise LookupError("nothing")


def one_for_all(rewards):
    return rewards.mean(keepdims=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": PolicyLossConfig(loss="tests.test_grpo:a_number")}, "a_number failed: Type"),
        ({"policy": PolicyLossConfig(loss="tests.test_grpo:wants_more")}, "missing 1 required keyword-only argument"),
        ({"policy": PolicyLossConfig(loss="tests.test_grpo:wants_old")}, "old_log_probs and ref_log_probs are None"),
        ({"advantage": "tests.test_grpo:one_for_all"}, r"returned an array of shape \[1\] for 8 completions"),
        ({"advantage": "tests.test_grpo:broken_advantage"}, "broken_advantage failed: LookupError: nothing"),
        ({"policy": PolicyLossConfig(kl="tests.test_grpo:broken_kl", kl_coef=0.1)}, "failed: LookupError: nothing"),
        ({"rewards": RewardConfig(reward=("tests.test_grpo:no_such_reward",))}, "has no function 'no_such_reward'"),
        ({"rewards": RewardConfig(judge="no_such_module:f")}, "there is no module 'no_such_module'"),
    ],
)
def test_mistakes_in_functions_of_ones_own_are_found_before_the_folder_is_made(config, change, message):
    with pytest.raises(ValueError, match=message):
        grpo.main(replace(config, **change))
    assert not config.run_dir.exists()
    assert replace(config, policy=PolicyLossConfig(loss="tests.test_grpo:wants_old"), num_epochs=2).check() is None


def forwards_options(log_probs, advantages, mask, **options):
    """A loss of a user's own on top of ``grpo_loss``."""
    return grpo_loss(log_probs, advantages, mask, **options)


def test_a_loss_that_forwards_its_options_gets_those_of_grpo_loss(config):
    batch, rollout = learn(config, [1, 0] * 4)
    params = jnp.full(rollout.completion_ids.shape, -0.1)
    own = build_loss(loss="tests.test_grpo:forwards_options", epsilon_high=0.01)(params, batch)[0]
    assert own.value == build_loss(loss="grpo", epsilon_high=0.01)(params, batch)[0].value


def test_no_weight_decay_means_none_in_every_optimizer():
    params = {"kernel": jnp.ones((2, 2))}
    for optimizer in ("adamw", "optax:adamw", "optax:lion"):
        decay = {}
        for weight_decay in (0.0, 0.5):
            config = OptimizerConfig(
                optimizer=optimizer, learning_rate=0.1, warmup_updates=0, weight_decay=weight_decay
            )
            transform, _ = config.build(total_updates=1)
            with jax.numpy_dtype_promotion("standard"):  # optax's own functions are not written for strict promotion
                updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
            decay[weight_decay] = float(jnp.abs(updates["kernel"]).max())
        assert decay[0.0] == 0 < decay[0.5], optimizer


def test_the_minimal_loop_runs_as_it_stands(base, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "experiments" / "minimal_grpo.py").read_text()
    assert len(text.splitlines()) <= 150
    assert "Config" not in text
    small = "NUM_STEPS, NUM_PROMPTS, GROUP_SIZE = 2, 4, 4"
    text = text.replace("NUM_STEPS, NUM_PROMPTS, GROUP_SIZE = 60, 32, 16", small)
    assert small in text
    monkeypatch.setattr(sys, "argv", ["minimal_grpo.py"])
    monkeypatch.setattr("grpo_jax.tasks.toy_model.make_toy_model", lambda folder: shutil.copytree(base, folder))
    exec(compile(text, "minimal_grpo.py", "exec"), {"__name__": "minimal_grpo"})
    out = capsys.readouterr().out
    assert "held-out pass@1 before" in out
    assert "step   1 reward" in out
    assert "held-out pass@1 after" in out


def test_the_samplers_log_probs_stand_in_for_the_policys(config, monkeypatch):
    """Two updates of the whole batch: the run is the one that computes them again, but for the gap of the sampler."""
    config = replace(config, num_steps=2, eval_every=0, num_epochs=2)
    runs = {}
    for choice in ("recompute", "sampler"):
        runs[choice] = replace(config, run_dir=config.run_dir.with_name(choice), old_log_probs=choice)
        grpo.main(runs[choice])
    recomputed, sampled = (
        [row for row in metrics_of(runs[choice]) if "loss" in row] for choice in ("recompute", "sampler")
    )
    for row, other in zip(recomputed, sampled, strict=True):
        assert other == pytest.approx(row, abs=1e-4)
        assert 0 < row["sampling/sampling_logp_difference/max"] < 1e-4
        assert other["sampling/sampling_logp_difference/max"] == row["sampling/sampling_logp_difference/max"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a step has one update, which needs none"),
        ({"num_epochs": 2, "sampling": Sampling(top_p=0.9)}, "draws from a modified distribution"),
        ({"num_epochs": 2, "policy": PolicyLossConfig(importance_cap=2.0)}, "importance_cap is 2.0, which corrects"),
    ],
)
def test_the_samplers_log_probs_are_refused_where_they_do_not_serve(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, old_log_probs="sampler", **changes)
