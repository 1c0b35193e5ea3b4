"""Checkpoints: restoring the newest readable one, damaged ones, retention, and free space."""

import shutil
from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import pytest

from grpo_jax.checkpoint import Checkpoints
from grpo_jax.sharding import make_mesh, param_shardings
from grpo_jax.types import TrainState

Usage = namedtuple("Usage", "total used free")


def make_state(seed=0, reference=False):
    params = {"embed": {"embedding": jax.random.normal(jax.random.key(seed), (8, 4))}}
    return TrainState(jnp.int32(seed), params, {"mu": params}, params if reference else None)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


def test_nothing_to_restore(checkpoints):
    assert checkpoints.restore(make_state()) is None
    assert checkpoints.steps() == []


@pytest.mark.parametrize("reference", [False, True])
def test_a_saved_state_is_restored(checkpoints, reference):
    state = make_state(3, reference)
    checkpoints.save(7, state, {"batches": {"position": 12}})
    step, restored, position = checkpoints.restore(make_state(0, reference))
    assert (step, position) == (7, {"batches": {"position": 12}})
    assert isinstance(restored, TrainState)
    chex.assert_trees_all_equal(restored, state)


def test_the_newest_are_kept(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.restore(make_state())[0] == 3


def test_protected_ones_stay_beside_the_newest_until_others_are_protected(checkpoints):
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {}, protected={1})
    assert checkpoints.steps() == [1, 2, 3]
    chex.assert_trees_all_equal(checkpoints.read(1, make_state()), make_state(1))
    checkpoints.save(4, make_state(4), {}, protected={3})
    assert checkpoints.steps() == [3, 4]
    with pytest.raises(RuntimeError, match="checkpoints/1 cannot be read"):
        checkpoints.read(1, make_state())


def test_s2_restores_onto_another_number_of_devices(checkpoints):
    state = make_state(1)
    checkpoints.save(1, state, {})
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    like = jax.device_put(make_state(), jax.NamedSharding(mesh, jax.P()))
    params = jax.device_put(like.params, param_shardings(like.params, mesh))
    like = TrainState(like.step, params, like.opt_state)
    _, restored, _ = checkpoints.restore(like)
    assert restored.params["embed"]["embedding"].sharding.shard_shape((8, 4)) == (4, 2)
    chex.assert_trees_all_equal(restored, state)


def test_s3_a_damaged_one_is_named_and_set_aside(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"at": step})
    for path in (checkpoints.folder / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"damaged checkpoint, not used: .*checkpoints/2"):
        step, restored, position = checkpoints.restore(make_state())
    assert (step, position) == (1, {"at": 1})
    chex.assert_trees_all_equal(restored, make_state(1))
    assert (checkpoints.folder / "damaged-2").is_dir()
    checkpoints.save(2, make_state(2), {"at": 2})  # the run comes back to step 2
    assert checkpoints.restore(make_state())[0] == 2


def test_s3_one_that_is_being_written_does_not_count(tmp_path):
    first = Checkpoints(tmp_path / "checkpoints")
    first.save(1, make_state(1), {})
    first.close()
    complete = tmp_path / "checkpoints" / "1"
    shutil.copytree(complete, tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-123")
    second = Checkpoints(tmp_path / "checkpoints")
    assert second.restore(make_state())[0] == 1
    second.close()


def test_when_none_can_be_read_the_run_does_not_start_anew(checkpoints):
    checkpoints.save(1, make_state(1), {})
    shutil.rmtree(checkpoints.folder / "1" / "state")
    with (
        pytest.warns(UserWarning, match="damaged checkpoint"),
        pytest.raises(RuntimeError, match=r"no checkpoint can be read(.|\n)*checkpoints/1"),
    ):
        checkpoints.restore(make_state())


def test_a_full_disk_is_known_before_the_first_step(checkpoints, monkeypatch):
    size = sum(x.nbytes for x in jax.tree.leaves(make_state()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 4 * size))
    checkpoints.require_space(make_state())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 4 * size - 1))
    with pytest.raises(OSError, match=r"0\.00 GiB free; 2 checkpoints, the best one and the one being written"):
        checkpoints.require_space(make_state())


def test_a_disk_that_fills_up_loses_nothing(checkpoints, monkeypatch):
    checkpoints.save(1, make_state(1), {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(OSError, match=r"step 2 could not be written.*complete checkpoints: \[1\]"):
            checkpoints.save(2, make_state(2), {})
    assert checkpoints.restore(make_state())[0] == 1


def test_keeps_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
