"""Checkpoints: restoring the newest readable one, damaged ones, retention, and free space."""

import shutil
import threading
from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import checkpoint
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
    checkpoints.wait()
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
    with pytest.warns(UserWarning, match=r"half-written checkpoint, removed: .*/2\.orbax-checkpoint-tmp-123"):
        second = Checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in second.folder.iterdir()] == ["1"]
    assert second.restore(make_state())[0] == 1
    second.close()


def test_when_none_can_be_read_the_run_does_not_start_anew(checkpoints):
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
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


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_the_state_at_the_time_of_save_is_written_though_it_is_donated_at_once(tmp_path, memory):
    """Later updates, which reuse the buffers of a donated state, do not change the checkpoint."""
    sharding = jax.NamedSharding(make_mesh(data=2, fsdp=4), jax.P("fsdp"))
    update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0, out_shardings=sharding)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(1, 11):
        x = jax.device_put(np.arange(step, step + 2**20, dtype=np.int32), sharding)
        state = {"x": jax.device_put(x, sharding.with_memory_kind(memory)), "n": jnp.int32(step)}
        assert memory != "device" or state["x"] is x
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        checkpoints.save(step, state, {})
        jax.tree.map(lambda x: x.delete(), {**state, "x": None} if memory == "device" else state)
        for _ in range(3):
            x = update(x)
        others = [jax.device_put(np.full(2**20, -1, np.int32), sharding) for _ in range(3)]
        jax.block_until_ready((x, others))
        _, restored, _ = checkpoints.restore(like)
        np.testing.assert_array_equal(restored["x"], np.arange(step, step + 2**20))
        assert restored["x"].sharding == like["x"].sharding
    checkpoints.close()


def test_what_lies_in_the_hosts_memory_is_copied():
    def buffer(x):
        return x.addressable_data(0).unsafe_buffer_pointer()

    for memory in ("device", "pinned_host"):
        x = jax.device_put(np.zeros(64, np.float32), jax.devices()[0])
        x = jax.device_put(x, x.sharding.with_memory_kind(memory))
        copied = checkpoint._copied(x)
        assert buffer(copied) != buffer(x)
        assert copied.sharding == x.sharding


def test_save_returns_while_the_checkpoint_is_written_and_deletes_older_ones_once_it_is_complete(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    handler, may_go_on = checkpoints._manager._checkpointer.handler, threading.Event()
    finalize = handler.finalize
    monkeypatch.setattr(handler, "finalize", lambda *args: (may_go_on.wait(60), finalize(*args)))
    checkpoints.save(2, make_state(2), {})
    assert not checkpoints.is_written
    assert (tmp_path / "1").is_dir()
    assert not (tmp_path / "2").exists()
    may_go_on.set()
    assert checkpoints.steps() == [2]
    assert not (tmp_path / "1").exists()
    checkpoints.close()


@pytest.fixture
def small_disk(mounted):
    """A file system of two megabytes."""
    return mounted("2m")


@pytest.mark.parametrize("asks", ["wait", "steps", "save", "read", "restore", "close"])
def test_an_error_of_the_writing_in_the_background_is_raised_at_the_next_opportunity(small_disk, asks):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(1, make_state(1), {})
    large = {"x": jax.random.normal(jax.random.key(0), (2**20,))}
    checkpoints.save(2, large, {})
    arguments = {"save": (3, make_state(3), {}), "read": (1, make_state()), "restore": (make_state(),)}.get(asks, ())
    with pytest.raises(
        OSError,
        match=r"step 2 could not be written to .*checkpoints \([0-2] MiB free there\): No space left on device.*; "
        r"complete checkpoints: \[1\]",
    ):
        getattr(checkpoints, asks)(*arguments)
    if asks == "close":
        with pytest.warns(UserWarning, match="half-written checkpoint, removed"):
            checkpoints = Checkpoints(small_disk / "checkpoints")
    assert checkpoints.steps() == [1]  # raised once
    checkpoints.save(2, make_state(2), {})
    assert checkpoints.restore(make_state())[0] == 2
    checkpoints.close()


def test_damaged_again_at_the_same_step_both_are_set_aside(checkpoints):
    for _ in range(2):
        for step in (1, 2):
            if step not in checkpoints.steps():
                checkpoints.save(step, make_state(step), {})
        checkpoints.wait()
        for path in (checkpoints.folder / "2").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.warns(UserWarning, match="damaged checkpoint, not used"):
            assert checkpoints.restore(make_state())[0] == 1
    assert {path.name for path in checkpoints.folder.glob("damaged-*")} == {"damaged-2", "damaged-2-2"}


def test_a_process_that_cannot_write_its_part_does_not_wait_for_the_others_to_say_so(checkpoints, monkeypatch):
    """They wait for its part, and so would not come to an exchange."""
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    checkpoints.save(2, make_state(2), {})

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "gather", lambda *args, **options: pytest.fail("it waits for the others"))
    with monkeypatch.context() as patch:
        checkpoints._manager.wait_until_finished()
        patch.setattr(checkpoints._manager, "wait_until_finished", fail)
        assert checkpoints.has_failed
    with pytest.raises(OSError, match=r"step 2 could not be written.*No space left on device; complete .* \[1\]"):
        checkpoints.wait()
    assert not checkpoints.has_failed


def test_orbax_waits_for_the_parts_of_others_as_long_as_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_jax.hosts._timeout", 20.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints._manager._checkpointer._async_manager._timeout_secs == 120
    checkpoints.close()


def test_keeps_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
