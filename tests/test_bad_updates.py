"""Bad updates: never applied; refused with what to do, or skipped, reported and counted."""

import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop_run import open_run

from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.bad_updates import MOST_IN_A_ROW, check_updates
from grpo_jax.loop.run import settings_of
from grpo_jax.loop.run_folder import differences
from grpo_jax.sharding import make_mesh, replicated
from grpo_jax.train import init_state, make_train_step
from grpo_jax.types import Mean


def loss_fn(params, batch):
    """A gradient that is the batch's numbers; a row with an infinite second column makes the loss alone infinite."""
    values = (params["w"] * batch[:, :1]).sum() + jax.lax.stop_gradient(batch[:, 1]).sum()
    return Mean(values, jnp.float32(len(batch))), {}


def start(optimizer):
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    params = {"w": jax.device_put(jnp.arange(4.0)[None], replicated(mesh))}
    return init_state(params, optimizer, with_reference=True, replicated=replicated(mesh))


GOOD, LATER = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32), np.array([[3.0, 0.0], [-1.0, 0.0]], np.float32)
BAD = {
    "gradient": np.array([[math.nan, 0.0], [1.0, 0.0]], np.float32),
    "overflow": np.array([[3e38, 0.0], [3e38, 0.0]], np.float32),
    "loss": np.array([[1.0, math.inf], [1.0, 0.0]], np.float32),
    "norm": np.array([[50.0, 0.0], [50.0, 0.0]], np.float32),
}


@pytest.mark.parametrize("name", ["adamw(b1=0.5)", "adamw(moments='8bit')", "lion", "adafactor"])
def test_a_bad_update_leaves_the_state_as_it_was_to_the_bit(name):
    optimizer, _ = OptimizerConfig(optimizer=name, learning_rate=0.1).build(total_updates=8)
    step = make_train_step(loss_fn, optimizer, skip_grad_norm=10.0)
    state, metrics = step(start(optimizer), GOOD)
    assert float(metrics["skipped_updates"]) == 0
    before = jax.tree.map(np.array, state)
    for kind, batch in BAD.items():
        state, metrics = step(state, batch)
        assert float(metrics["skipped_updates"]) == 1, kind
        chex.assert_trees_all_equal(jax.tree.map(np.array, state), before)
    without, _ = step(start(optimizer), GOOD)
    state, without = step(state, LATER)[0], step(without, LATER)[0]
    chex.assert_trees_all_equal(state, without)  # the optimizer's counter and its schedule, too
    assert int(state.step) == 2
    assert not np.array_equal(state.params["w"], before.params["w"])


def test_without_a_bound_a_large_gradient_is_applied_and_the_state_is_updated_in_place():
    step = make_train_step(loss_fn, optax.adam(0.1))
    state = start(optax.adam(0.1))
    old, buffer = state, state.params["w"].unsafe_buffer_pointer()
    state, metrics = step(state, BAD["norm"])
    assert float(metrics["skipped_updates"]) == 0
    assert float(metrics["grad_norm"]) == pytest.approx(100)
    assert old.params["w"].is_deleted()
    assert state.params["w"].unsafe_buffer_pointer() == buffer


def good(loss=1.0, **metrics):
    return {"loss": loss, "grad_norm": 2.0, "skipped_updates": 0.0, **metrics}


def bad(**metrics):
    return good(**{"loss": math.nan, "skipped_updates": 1.0, **metrics})


REFUSE, SKIP = SimpleNamespace(bad_updates="refuse"), SimpleNamespace(bad_updates="skip")


def test_a_bad_update_is_refused_with_the_metric_the_checkpoints_and_the_way_past_it(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.save(4, {"w": jnp.zeros(2)}, {})
        assert check_updates([good(1.0), good(3.0)], 5, REFUSE, run) == {
            "loss": 2.0,
            "grad_norm": 2.0,
            "skipped_updates": 0.0,
        }
        said = r"step 5: loss is nan, in 1 of 2 updates\. .*complete checkpoints: \[4\]\. .* set bad_updates to skip"
        with pytest.raises(FloatingPointError, match=said):
            check_updates([good(), bad()], 5, REFUSE, run)
        with pytest.raises(FloatingPointError, match=r"grad_norm is 2, value/grad_norm is 70, above skip_grad_norm"):
            check_updates([good(**{"value/grad_norm": 70.0, "value/skipped_updates": 1.0})], 5, REFUSE, run)
        with pytest.raises(FloatingPointError, match=r"step 5: kl is inf\."):  # applied, and yet not finite
            check_updates([good(kl=math.inf)], 5, SKIP, run)


def test_skipped_updates_are_reported_left_out_of_the_means_and_end_the_run_after_some_in_a_row(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log({"step": 1, **check_updates([good()], 1, SKIP, run)})
        metrics = check_updates([bad(), good(5.0)], 2, SKIP, run)
        assert metrics == {"loss": 5.0, "grad_norm": 2.0, "skipped_updates": 1.0}
        run.log({"step": 2, **metrics})
        for step in range(3, MOST_IN_A_ROW + 2):
            run.log({"step": step, **check_updates([bad()], step, SKIP, run)})
        with pytest.raises(FloatingPointError, match=rf"skipped in {MOST_IN_A_ROW + 1} steps in a row"):
            check_updates([bad()], MOST_IN_A_ROW + 2, SKIP, run)
        run.log({"step": 20, **check_updates([good()], 20, SKIP, run)})
        run.log({"step": 21, **check_updates([bad()], 21, SKIP, run)})
        alarms = read_jsonl(run.alarms_log.path)
        assert read_jsonl(run.metrics_log.path)[-1]["loss"] is None
    assert [(alarm["step"], alarm["alarm"], alarm["level"]) for alarm in alarms] == [
        (2, "bad_updates", "warn"),
        (21, "bad_updates", "warn"),
    ]


def test_a_run_may_be_resumed_with_another_treatment_of_bad_updates(tmp_path):
    before = SFTConfig(run_dir=tmp_path, optimizer=OptimizerConfig(learning_rate=0.1))
    after = SFTConfig(
        run_dir=tmp_path, optimizer=OptimizerConfig(learning_rate=0.1, skip_grad_norm=5.0), bad_updates="skip"
    )
    assert not differences(settings_of(before), settings_of(after), before.resumable_fields)
    other = SFTConfig(run_dir=tmp_path, optimizer=OptimizerConfig(learning_rate=0.2, skip_grad_norm=5.0))
    assert differences(settings_of(before), settings_of(other), before.resumable_fields) == [
        "optimizer.learning_rate: 0.1 -> 0.2"
    ]
    with pytest.raises(ValueError, match="skip_grad_norm is 0"):
        OptimizerConfig(skip_grad_norm=0.0)
