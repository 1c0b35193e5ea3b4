"""PPO end to end, on tiny shapes: four models, resumed bit for bit, the critic as a model and as a head."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.staleness import STALE_CAP
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.models import from_hf_config, init_params, save_pretrained
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.tasks.toy_config import HF_CONFIG
from tests.runs import metrics_of, steps_of


@pytest.fixture(scope="session")
def scorer(tmp_path_factory):
    """A reward model that nobody has trained: its scores differ, which is all that is wanted of them."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    hf_config = {**HF_CONFIG, "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
    params = init_params(from_hf_config(hf_config), jax.random.key(3))
    save_pretrained(folder, params, hf_config=hf_config, tokenizer=make_tokenizer())
    return str(folder)


@pytest.fixture
def config(base, scorer, tmp_path):
    return PPOConfig(
        model=base,
        data=DataConfig(dataset="sums", template="{question}", eval_size=10),
        run_dir=tmp_path / "run",
        num_steps=4,
        num_prompts=16,
        max_prompt_length=12,
        max_completion_length=10,
        eval_samples=2,
        eval_every=2,
        save_every=2,
        samples_every=2,
        critic_warmup_steps=1,
        kl_target=0.01,
        kl_horizon=100.0,
        rewards=RewardConfig(accuracy_weight=0.0, reward_model=scorer),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        critic_optimizer=OptimizerConfig(learning_rate=1e-2),
        mesh=MeshConfig(data=1),
        plain=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "staleness"), [("model", 0), ("head", 0), ("model", 1)])
def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(config, critic, staleness, monkeypatch):
    """Both optimizers, the reference, the adapted weight of the KL and the samples ahead have to come back."""
    config = replace(config, critic=critic, staleness=staleness)
    ppo.main(config)
    steps = steps_of(config)
    broken = replace(config, run_dir=config.run_dir.with_name("broken"))
    check = ppo.check_updates
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return check(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "check_updates", dies)
        with pytest.raises(KeyboardInterrupt):
            ppo.main(broken)
    ppo.main(broken)
    assert metrics_of(broken) == metrics_of(config)
    one, two = (each.run_dir / "model" / "model.safetensors" for each in (config, broken))
    assert one.read_bytes() == two.read_bytes()
    coefficients = [row["kl_reward_coef"] for row in steps]
    assert len(set(coefficients)) > 1  # it was adapted
    assert steps[0]["kl"] == 0
    assert steps[-1]["kl"] != 0  # the actor has left the reference
    assert all(math.isfinite(row["value/loss"]) for row in steps)
    if staleness:
        assert [row["staleness"] for row in steps] == [0, 1, 1, 1]
        # Step 2 is the first to update the actor, so that batch 3 is the first of an earlier policy.
        gaps = [row["sampling/sampling_logp_difference/max"] for row in steps[1:]]
        assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:])


def test_stale_samples_are_corrected_for(config):
    assert config.policy_loss == config.policy
    assert replace(config, staleness=1).policy_loss.importance_cap == STALE_CAP
    assert replace(config, staleness=1, old_log_probs="sampler").policy_loss.importance_cap is None
    with pytest.raises(ValueError, match="no_ratio has no argument importance_cap and no argument rollout_log_probs"):
        replace(config, staleness=1, policy=PolicyLossConfig(loss="tests.test_loop_queue:no_ratio"))


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "dr_grpo"])
def test_a_value_head_needs_a_policy_loss_over_tokens(config, name):
    run = replace(config, critic="head", policy=PolicyLossConfig(loss=name))
    with pytest.raises(ValueError, match=f"must be averaged over tokens too, and {name} is not; set loss to ppo, "):
        run.check()
    replace(run, critic="model").check()
    for other in ("ppo", "dapo", "cispo"):
        replace(run, policy=PolicyLossConfig(loss=other)).check()


@pytest.mark.slow
def test_the_critic_learns_alone_at_first_and_the_actor_stays(config):
    decaying = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)  # which changes what has no gradient, too
    config = replace(config, critic_warmup_steps=2, num_steps=2, kl_target=None, optimizer=decaying)
    for critic in ("model", "head"):
        run = replace(config, critic=critic, run_dir=config.run_dir.with_name(critic))
        ppo.main(run)
        steps = steps_of(run)
        assert [row["kl"] for row in steps] == [0, 0]
        assert all(row["grad_norm"] > 0 for row in steps)
        rows = [row for row in read_jsonl(run.run_dir / "metrics.jsonl") if "loss" in row]
        assert all((row["update_tokens_per_second"] > 0) == (critic == "model") for row in rows)  # the trunk is fixed
        trained, start = (models.from_pretrained(each).params for each in (run.run_dir / "model", config.model))
        jax.tree.map(np.testing.assert_array_equal, trained, start)


@pytest.mark.slow
def test_the_critic_starts_as_the_reward_model_or_else_with_values_of_0(config, monkeypatch):
    found = []
    before = ppo.OwnCritic.before

    def seen(self, states, rollout):
        result = before(self, states, rollout)
        found.append((np.asarray(states["critic"].params["score"]["kernel"]), np.asarray(result[2])))
        return result

    monkeypatch.setattr(ppo.OwnCritic, "before", seen)
    ppo.main(replace(config, num_steps=1))
    rules = RewardConfig(accuracy_weight=1.0)
    ppo.main(replace(config, num_steps=1, rewards=rules, run_dir=config.run_dir.with_name("rules")))
    (of_scorer, _), (fresh, values) = found
    assert np.abs(of_scorer).max() > 0
    assert not fresh.any()
    assert not values.any()


def test_rewards_of_tokens_are_the_score_at_the_end_and_the_kl_before():
    rewards, mask = jnp.array([2.0, jnp.nan]), jnp.array([[True, True, False], [True, False, False]])
    old, ref = jnp.full((2, 3), -1.0), jnp.full((2, 3), -3.0)  # 2 nats a token
    values = jnp.zeros((2, 3))
    mask = mask & ~jnp.isnan(rewards)[:, None]
    take = {"gamma": 1.0, "lam": 1.0, "scale": False}
    advantages, returns, kl, token_kl = ppo.token_advantages(rewards, old, ref, values, mask, jnp.float32(0.1), **take)
    np.testing.assert_allclose(advantages, [[2 - 0.4, 2 - 0.2, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(returns, advantages, atol=1e-6)
    assert (kl, token_kl) == (pytest.approx(4), pytest.approx(2))
    free, _, kl, _ = ppo.token_advantages(rewards, old, None, values, mask, jnp.float32(0.1), **take)
    np.testing.assert_allclose(free, [[2, 2, 0], [0, 0, 0]])
    assert kl == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompts": 15}, "15 x 1 = 15 completions do not divide into num_minibatches x num_micro_batches = 2 x 1"),
        ({"value_epsilon": 0.0}, "value_epsilon is 0.0; it must be above 0"),
        ({"gamma": 1.5}, "gamma is 1.5; it must be from 0 to 1"),
        ({"lam": -0.1}, "lam is -0.1; it must be from 0 to 1"),
        ({"policy": PolicyLossConfig(loss="ppo", kl_coef=0.1)}, "kl_coef is set, but PPO has the KL in the reward"),
        ({"kl_reward_coef": 0.0}, "kl_target is set, but kl_reward_coef"),
        ({"rewards": RewardConfig(accuracy_weight=0.0)}, "no reward has a weight; name a reward_model"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_reward_model_with_other_tokens_is_refused_as_a_critic(config, monkeypatch):
    load = ppo.load_model

    def other_tokens(config, name_or_folder, mesh, *, scalar_head=False):
        loaded = load(config, name_or_folder, mesh, scalar_head=scalar_head)
        if scalar_head:
            loaded.tokenizer.add_tokens(["%"])
        return loaded

    monkeypatch.setattr(ppo, "load_model", other_tokens)
    with pytest.raises(ValueError, match="the tokenizers of reward_model and model differ"):
        ppo.main(config)
