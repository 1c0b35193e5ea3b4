"""Checkpoints of two processes, of which one cannot write or read its part."""

import pytest

from tests import processes

SCRIPT = """
import resource, sys, time, warnings
from dataclasses import dataclass
import jax
import numpy as np
from grpo_jax import heartbeat, hosts
from grpo_jax.loop.command import run_command
from grpo_jax.sharding import make_mesh

heartbeat.BEAT, heartbeat.GRACE = 0.2, 2.0
mode, folder = sys.argv.pop(1), sys.argv.pop(1)
number = int(sys.argv[sys.argv.index("--distributed.process-id") + 1])
address = sys.argv[sys.argv.index("--distributed.coordinator") + 1]
heartbeat.connect(address, 2, number)
from grpo_jax.checkpoint import Checkpoints

mesh = make_mesh(fsdp=2)

def make(step):
    values = {"x": np.random.default_rng(step).integers(2**30, size=2**16, dtype=np.int32), "n": np.int32(step)}
    specs = {"x": jax.P("fsdp"), "n": jax.P()}
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    return {
        name: jax.make_array_from_callback(value.shape, shardings[name], lambda i, value=value: value[i])
        for name, value in values.items()
    }

def check(state, step):
    for name, expected in make(step).items():
        assert state[name].sharding == expected.sharding
        np.testing.assert_array_equal(state[name].addressable_data(0), expected.addressable_data(0))

@dataclass
class Config:
    pass

def save(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, make(step), {"at": step})
        checkpoints.wait()
    if number == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))  # a file of its part is larger
    checkpoints.save(3, make(3), {})
    while not any(hosts.gather(checkpoints.has_failed, "whether one has failed")):
        time.sleep(0.05)
    print("known", flush=True)
    checkpoints.wait()

def restore(checkpoints):
    like = make(0)
    try:
        checkpoints.read(2, like)
    except RuntimeError as error:
        print("read:", error)
    step, state, position = checkpoints.restore(like)
    assert (step, position) == (1, {"at": 1})
    check(state, 1)
    checkpoints.save(2, make(2), {"at": 2})
    step, state, position = checkpoints.restore(like)
    assert (step, position) == (2, {"at": 2})
    check(state, 2)
    check(checkpoints.read(1, like), 1)
    print("restored", flush=True)

def main(config):
    checkpoints = Checkpoints(folder)
    try:
        {"save": save, "restore": restore}[mode](checkpoints)
    finally:
        checkpoints.close()

sys.exit(run_command(Config, main, description="", args=[]))
"""


@pytest.mark.slow
def test_what_one_process_cannot_write_or_read_is_said_by_all(tmp_path):
    """The first start ends with the error of the process that cannot write; the second one goes on from step 1."""
    script, folder = tmp_path / "script.py", tmp_path / "checkpoints"
    script.write_text(SCRIPT)
    (_, first), (_, second) = ended = processes.finish(
        processes.start([script, "save", folder], processes=2, devices=1), timeout=60
    )
    assert [status for status, _ in ended] == [2, 2], ended
    for output in (first, second):
        assert "known" in output
        assert "the checkpoint of step 3 could not be written to" in output
        assert "File too large; complete checkpoints: [1, 2]" in output
    assert "error: process 1 of 2 on" in first

    parts = [path for path in (folder / "2" / "state" / "ocdbt.process_1").rglob("*") if path.stat().st_size > 2**16]
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[:100])
    (_, first), (_, second) = ended = processes.finish(
        processes.start([script, "restore", folder], processes=2, devices=1), timeout=60
    )
    assert [status for status, _ in ended] == [0, 0], ended
    for output in (first, second):
        assert f"read: the checkpoint {folder}/2 cannot be read: process 1 of 2: " in output
        assert f"damaged checkpoint, not used: {folder}/2: process 1 of 2: " in output
        assert "restored" in output
    assert f"process 1 cannot read its part of {folder}/2: " not in first
    assert f"process 1 cannot read its part of {folder}/2: " in second
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "damaged-2"]
