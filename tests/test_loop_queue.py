"""Sampling ahead of training: from the policy that is said, whatever the timing, and resumed bit for bit."""

import random
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo
from experiments.hybrid import HybridConfig
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.staleness import STALE_CAP
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import losses
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.experience import Experience
from grpo_jax.loop.queue import RolloutQueue
from grpo_jax.loop.run import Run
from grpo_jax.sampling import Sampling
from grpo_jax.train import completion_log_probs
from grpo_jax.types import Batch, TrainState
from tests.runs import metrics_of, steps_of

DELAYS = random.Random(0)
DELAY = [0.0]


def brevity(completions, **columns):
    """Differs among completions; takes its time where a test says so."""
    time.sleep(DELAY[0] * DELAYS.random())
    return [-float(len(completion)) for completion in completions]


@pytest.fixture
def config(small, tmp_path):
    return GRPOConfig(
        model=small,
        data=DataConfig(dataset="sums", template="{question}", eval_size=4),
        run_dir=tmp_path / "run",
        num_steps=4,
        num_prompts=4,
        group_size=4,
        max_prompt_length=12,
        max_completion_length=6,
        eval_samples=1,
        eval_every=0,
        save_every=1,
        rewards=RewardConfig(reward=("tests.test_loop_queue:brevity",), reward_workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0),
        mesh=MeshConfig(data=1),
        staleness=1,
        plain=True,
    )


def dying_at(*steps):
    """In place of ``check_updates``, which is called before a step is saved: the run dies there, once in each step."""
    left, check_updates = [*steps], grpo.check_updates

    def check(updates, step, *args):
        if step in left:
            left.remove(step)
            raise KeyboardInterrupt
        return check_updates(updates, step, *args)

    return check


def test_each_batch_is_of_the_policy_that_staleness_says(config, monkeypatch):
    """The sampler's log-probabilities are those of the parameters after step n - 1 - K, and of no later ones."""
    config = replace(config, staleness=2, num_steps=5)
    policies, rollouts = {}, {}
    step, sample = grpo.RolloutQueue.next, Collector.sample

    def keep_policy(self, number, params):
        policies[number - 1] = jax.tree.map(np.array, params)
        return step(self, number, params)

    def keep_rollout(self, number, params):
        experience = sample(self, number, params)
        rollouts[number] = experience.rollout
        return experience

    monkeypatch.setattr(grpo.RolloutQueue, "next", keep_policy)
    monkeypatch.setattr(Collector, "sample", keep_rollout)
    assert grpo.main(config) == 0
    assert [*rollouts] == [1, 2, 3, 4, 5]  # none is sampled that would not be trained on
    log_probs = jax.jit(partial(completion_log_probs, models.from_pretrained(config.model).model, temperature=1.0))

    def gap(number, policy):
        rollout = jax.tree.map(jnp.asarray, rollouts[number])
        difference = np.asarray(log_probs(policies[policy], rollout)[0]) - np.asarray(rollout.rollout_log_probs)
        return np.abs(np.where(rollout.completion_mask, difference, 0)).max()

    for number in rollouts:
        policy = max(0, number - 3)
        assert gap(number, policy) < 1e-5
        assert all(gap(number, later) > 1e-3 for later in range(policy + 1, number))
    rows = steps_of(config)
    assert [row["staleness"] for row in rows] == [0, 1, 2, 2, 2]
    gaps = [row["sampling/sampling_logp_difference/max"] for row in rows]
    assert gaps[0] < 1e-5
    assert min(gaps[1:]) > 1e-3
    waits = {"rollout_wait", "scoring_wait"}
    assert all(waits <= set(row) for row in read_jsonl(config.run_dir / "metrics.jsonl") if "loss" in row)


@pytest.mark.parametrize(("staleness", "weights"), [(0, [1.0, 1.0]), (1, [2.0, 0.5])])
def test_the_loss_of_a_run_and_of_its_plan_weighs_stale_samples(config, staleness, weights):
    """By the probability over that of the policy that sampled, at most ``STALE_CAP``: of 4 and of 1/2."""
    rollout_log_probs = jnp.log(jnp.array([[0.1], [0.4]]))
    log_probs = jnp.log(jnp.array([[0.4], [0.2]]))
    ones = jnp.ones((2, 1), bool)
    batch = Batch(
        prompt_ids=jnp.zeros((2, 1), jnp.int32),
        prompt_mask=ones,
        completion_ids=jnp.zeros((2, 1), jnp.int32),
        completion_mask=ones,
        loss_mask=ones,
        advantages=jnp.array([1.0, 3.0]),
        rollout_log_probs=rollout_log_probs,
    )
    loss_fn = losses.policy_loss(
        replace(config, staleness=staleness),
        models.from_pretrained(config.model).model,
        log_probs=lambda params, batch: (log_probs, jnp.zeros((2, 1))),
    )
    loss, _ = loss_fn({}, batch)
    assert float(loss.value) == pytest.approx(-(weights[0] * 1 + weights[1] * 3) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("deaths", "changes"),
    [
        ((2,), {}),
        pytest.param(
            (2, 3),
            {
                "staleness": 2,
                "old_log_probs": "sampler",
                "num_epochs": 2,
                "policy": PolicyLossConfig(kl_coef=0.05),
                "ref_refresh_every": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_neither_delays_nor_stops_change_a_run(config, monkeypatch, deaths, changes):
    """The rewards take their time, the run dies in some steps and goes on: all of it is that of the unbroken one."""
    config = replace(config, num_steps=3, **changes)
    grpo.main(config)
    broken = replace(config, run_dir=config.run_dir.with_name("broken"))
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "check_updates", dying_at(*deaths))
        patch.setattr("tests.test_loop_queue.DELAY", [0.05])
        for _ in deaths:
            with pytest.raises(KeyboardInterrupt):
                grpo.main(broken)
        assert grpo.main(broken) == 0
    assert metrics_of(broken) == metrics_of(config)
    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (broken.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes(), name
    rows = steps_of(config)
    assert [row["staleness"] for row in rows] == [min(n, config.staleness) for n in range(3)]
    assert min(row["grad_norm"] for row in rows) > 0
    if config.old_log_probs == "sampler":  # the first update has ratios to the policy that sampled, as the later ones
        assert all("sampling/sampling_logp_difference/max" not in row for row in rows)


def test_on_policy_there_is_no_queue(config):
    asked, drawn = [], object.__new__(Experience)
    collector = object.__new__(Collector)
    collector.mesh, collector.sample = config.mesh.build(), lambda *args: asked.append(args) or drawn
    queue = RolloutQueue(replace(config, staleness=0), collector, object.__new__(Run))
    state = TrainState(step=jnp.int32(0), params={}, opt_state=())
    assert queue.with_state(state) is state
    assert queue.restore(state, {}) is state
    assert queue.state_dict() == queue.facts == {}
    assert queue.next(3, "params") is drawn
    assert asked == [(3, "params")]


def test_an_error_of_the_thread_is_raised_where_its_batch_is_waited_for(config):
    """With what was sampled before, the step before it is still trained on; the thread then ends with the run."""

    def sample(step, params):
        assert threading.current_thread() is not threading.main_thread()
        if step == 2:
            raise MemoryError("no cache")
        experience = object.__new__(Experience)
        experience.step, experience.times = step, {}
        return experience

    collector = object.__new__(Collector)
    collector.mesh, collector.sample = config.mesh.build(), sample
    collector.reshard, collector.start_scoring = lambda params: params, lambda experience: None
    run = object.__new__(Run)
    with ExitStack() as stack:
        run.enter = stack.enter_context
        queue = RolloutQueue(replace(config, rollout_mesh=2), collector, run)
        assert queue.next(1, {}).step == 1
        with pytest.raises(MemoryError, match="no cache"):
            queue.next(2, {})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sampler")]


def only_ratio(log_probs, advantages, mask, *, old_log_probs):
    raise NotImplementedError


def no_ratio(log_probs, advantages, mask):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"staleness": -1}, "staleness is -1; it must be at least 0"),
        ({"max_draws": 2}, "staleness is 1 and max_draws is 2: whether to sample again is known"),
        (
            {"policy": PolicyLossConfig(loss="tests.test_loop_queue:no_ratio")},
            "no_ratio has no argument importance_cap and no argument rollout_log_probs, so that it would not correct",
        ),
        (
            {"policy": PolicyLossConfig(loss="tests.test_loop_queue:no_ratio"), "old_log_probs": "sampler"},
            "no_ratio has no argument old_log_probs, so that it would not correct",
        ),
        ({"old_log_probs": "sampler", "sampling": Sampling(top_p=0.9)}, "draws from a modified distribution"),
        ({"rollout_mesh": 0}, "rollout_mesh is 0; it must be at least 1"),
        ({"rollout_mesh": 1, "staleness": 0}, "rollout_mesh is 1 and staleness is 0: on policy, sampling and training"),
    ],
)
def test_what_would_not_be_corrected_for_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_stale_samples_are_corrected_for_unless_ratios_do_it(config):
    assert config.policy_loss.importance_cap == STALE_CAP
    assert replace(config, staleness=0).policy_loss == config.policy
    assert replace(config, policy=PolicyLossConfig(importance_cap=5.0)).policy_loss.importance_cap == 5
    assert not config.has_old_log_probs
    by_ratio = replace(config, old_log_probs="sampler")
    assert by_ratio.policy_loss.importance_cap is None
    assert by_ratio.has_old_log_probs
    assert replace(by_ratio, policy=PolicyLossConfig(loss="tests.test_loop_queue:only_ratio")).staleness == 1
    with pytest.raises(ValueError, match="staleness is 1; with a critic it must be 0"):
        HybridConfig(staleness=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_mesh": 8}, r"rollout_mesh is 8, .* is 1 .*; there are 8 devices: lower it"),
        ({"rollout_mesh": 2, "mesh": MeshConfig(fsdp=2)}, "is 8 .*; there are 8 devices: set mesh.data to 3"),
        ({"rollout_mesh": 3, "mesh": MeshConfig(data=1, tensor=2)}, "must be a multiple of the 2 devices"),
        ({"rollout_mesh": 3}, "num_prompts: 4 do not divide over mesh data x fsdp = 3"),
    ],
)
def test_devices_that_sample_are_found_before_a_model_is_loaded(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes).check()


def test_devices_that_sample_are_refused_to_several_processes(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"rollout_mesh is 2, and the run has 2 processes; .* leave rollout_mesh out"):
        replace(config, rollout_mesh=2).check()


@pytest.mark.slow
def test_devices_of_their_own_sample_the_same(config, monkeypatch):
    """Training goes on while they sample; the run dies while both are at work, and goes on."""
    config = replace(config, staleness=2)
    grpo.main(config)
    mesh = MeshConfig(data=2, fsdp=1)
    beside = replace(config, run_dir=config.run_dir.with_name("beside"), rollout_mesh=2, mesh=mesh)
    sample, used = Collector.sample, set()

    def spied(self, number, params):
        used.update(device.id for device in jax.tree.leaves(params)[0].devices())
        assert threading.current_thread() is not threading.main_thread()
        return sample(self, number, params)

    monkeypatch.setattr(Collector, "sample", spied)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "check_updates", dying_at(2))
        with pytest.raises(KeyboardInterrupt):
            grpo.main(beside)
    assert grpo.main(beside) == 0
    assert used == {6, 7}
    for row, other in zip(metrics_of(config), metrics_of(beside), strict=True):
        assert other == pytest.approx(row, abs=1e-5, rel=1e-5)
    texts = [[row["completion"] for row in read_jsonl(c.run_dir / "completions.jsonl")] for c in (config, beside)]
    assert texts[0] == texts[1]
