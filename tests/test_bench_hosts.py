"""The bench of the work on the host: time by phase and exchanges by name."""

import sys
import time
from types import SimpleNamespace

import pytest

from experiments.bench.hosts import WARM_UP, Meter, thread_seconds
from grpo_jax.loop.local_processes import distributed_flags, run_together


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_phase_has_its_time_without_that_of_the_phases_in_it():
    meter = Meter()

    def gather(value, name):
        hosts._begin(name, False)
        hosts._send("key", value)
        return hosts._receive("key")

    hosts = SimpleNamespace(
        _begin=lambda name, is_long: None, _send=lambda *message: work(0.01), _receive=lambda key: work(0.01)
    )
    meter.exchanges(hosts)
    score = meter.wrap("scoring", lambda: (work(0.04), gather(b"x" * 1000, "the reward accuracy")))
    for _ in range(WARM_UP + 1):
        meter.begin_step()
        score()
        score()
    meter.begin_step()
    assert len(meter.steps) == WARM_UP + 1
    for step in meter.steps:
        assert 0.04 <= step["exchanges"] < 0.06
        assert 0.08 <= step["scoring"] < 0.11
        assert step["scoring"] + step["exchanges"] <= step["main"] <= step["process"] + 0.001
        assert (step["count"], step["exchange: the reward accuracy"]) == (2, 2)
        assert 2000 < step["bytes"] < 2200
    assert set(meter.threads()) == set(thread_seconds())


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_processes_that_run_together_end_together():
    say = "import os; print(os.environ['XLA_FLAGS'])"
    assert run_together([python(say)] * 2, devices=3) == ["--xla_force_host_platform_device_count=3\n"] * 2
    fail, started = "import sys; print('no space'); sys.exit(5)", time.monotonic()
    with pytest.raises(RuntimeError, match="a process ended with status 5:\nno space"):
        run_together([python("import time; time.sleep(60)"), python(fail)], devices=1)
    assert time.monotonic() - started < 30
    assert distributed_flags(0, 1, "localhost:1") == []
    assert distributed_flags(1, 2, "h:1")[:2] == ["--distributed.coordinator", "h:1"]
