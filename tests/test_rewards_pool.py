"""Rewards in processes of their own: what hangs, dies or eats memory costs its own score alone."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import pytest

from grpo_jax.rewards.compose import RewardOutput, weighted
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.rewards.workers.pool import RewardPool
from tests.faulty_rewards import column, faulty, slow_length

MARK = f"REWARD_POOL_OF=process {os.getpid()}"
FAULTS = {
    "hang": "deadline",
    "spin": "deadline",
    "leave": "deadline",
    "exit": "died",
    "kill": "died",
    "raise": "raised",
    "text": "raised",
    "nan": "nan",
    "eat": "memory",
}


OWNER_TO_BE_KILLED = r"""
import threading, time
from functools import partial
from grpo_jax.rewards.code.reward import code_reward
from grpo_jax.rewards.workers.pool import RewardPool
from grpo_jax.rewards.code.sandbox import SandboxLimits
from tests.faulty_rewards import faulty
code = partial(code_reward, limits=SandboxLimits(seconds=600.0, wall_seconds=600.0), total_seconds=600.0)
pool = RewardPool({"faulty": faulty, "code": code}, workers=3, deadline=600.0)
for name, completion in (("faulty", "hang"), ("faulty", "leave"), ("code", "```python\nwhile True: pass\n```")):
    columns = {"tests": [["assert f() == 1"]]}
    threading.Thread(target=pool.rewards[name], args=([""], [completion]), kwargs=columns).start()
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def pool():
    with RewardPool({"faulty": faulty, "length": slow_length}, workers=2, deadline=0.5) as pool:
        yield pool


def scores(pool, completions, name="faulty"):
    return [each.score for each in pool.rewards[name]([""] * len(completions), completions)]


def descendants_of_pool(mark=MARK):
    """What runs with the mark of this process in its environment, as pools and what they start do."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def wait_until(holds, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


@pytest.fixture(scope="module", autouse=True)
def mark():
    os.environ["REWARD_POOL_OF"] = MARK.partition("=")[2]
    yield
    del os.environ["REWARD_POOL_OF"]


@pytest.mark.parametrize("fault", FAULTS)
def test_r5_a_fault_costs_its_own_score_alone_and_is_logged(pool, fault):
    started = time.monotonic()
    assert scores(pool, ["a", fault, "ccc"]) == [1.0, None, 3.0]
    assert time.monotonic() - started < 10
    (logged,) = pool.take_errors()
    assert (logged.reward, logged.kind, logged.completion) == ("faulty", FAULTS[fault], fault)
    assert logged.detail
    if fault in ("raise", "text"):
        assert "Traceback" in logged.detail
    assert pool.take_errors() == []


def test_what_is_no_fault(pool):
    graded = pool.rewards["faulty"](["", ""], ["absent", "graded"], level=[1, 2])
    assert graded == [RewardOutput(None), RewardOutput(0.5, {"detail": 2.0}, "a note")]
    assert pool.take_errors() == []
    assert scores(pool, []) == []


def test_what_a_reward_left_running_is_gone(pool):
    assert scores(pool, ["leave"]) == [None]
    pool.take_errors()
    wait_until(lambda: len(descendants_of_pool()) <= 1 + pool.workers)


def test_samples_that_hang_hold_up_nobody(pool):
    """Ten of them, two workers: one deadline for all, not five."""
    completions = ["hang" if i % 20 == 0 else "abc" for i in range(200)]
    scores(pool, ["abc"] * 50)
    started = time.monotonic()
    found = scores(pool, completions)
    assert time.monotonic() - started < 5 * pool.deadline + 5
    assert found == [None if i % 20 == 0 else 3.0 for i in range(200)]
    assert len(pool.take_errors()) == 10


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell who waits")
def test_a_deadline_leaves_out_what_others_ran(pool):
    """0.2 seconds of work under a deadline of 0.5, on a processor with three that never rest: about 0.8 seconds."""
    started = time.monotonic()
    assert scores(pool, ["busy"]) == [4.0]
    assert time.monotonic() - started > pool.deadline


def test_r4_scores_are_those_without_a_pool_and_from_any_thread():
    completions = [rf"\boxed{{{each}}}" for each in (r"\frac12", "0.5", "x+1", "1+x", "5")]
    columns = {"answer": ["0.5", "1/2", "1+x", "x+1", "4"]}
    with RewardPool({"math": math_reward, "format": format_reward, "own": lambda p, c, **_: [0.25] * len(c)}) as pool:
        found = {}

        def score(name):
            found[name] = [each.score for each in pool.rewards[name]([""] * 5, completions, **columns)]

        threads = [threading.Thread(target=score, args=(name,)) for name in pool.rewards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found["math"] == math_reward([""] * 5, completions, **columns) == [1.0, 1.0, 1.0, 1.0, 0.0]
        assert found["format"] == [0.0] * 5
        assert found["own"] == [0.25] * 5
        total = weighted(pool.rewards, {"math": 1.0, "format": 0.5, "own": 2.0})([""] * 5, completions, **columns).total
        assert total.tolist() == [1.5, 1.5, 1.5, 1.5, 0.5]


def test_what_was_begun_ahead_is_taken_and_not_scored_again(pool):
    with RewardPool({"answer": column}, workers=1) as small:
        small.score_ahead("p", "c", {"answer": "7"})
        small.score_ahead("p", "other", {"answer": "8"})
        assert len(small._ahead) == 2
        assert [each.score for each in small.rewards["answer"](["p", "p"], ["c", "c"], answer=["7", "7"])] == [7.0, 7.0]
        assert sum(map(len, small._ahead.values())) == 1
        small.drop_ahead()
        assert small._ahead == {}


def test_a_first_example_that_cannot_be_scored_is_an_error(pool):
    with RewardPool({"answer": column}, workers=1) as small:
        small.probe("", "", {"answer": "5"})
        with pytest.raises(ValueError, match=r"'answer' needs the column 'answer'; the columns are \['level'\]"):
            small.probe("", "", {"level": 5})


class CannotBeTaken:
    def __call__(self, prompts, completions, **columns): ...

    def __reduce__(self):
        raise TypeError("stays here")


class FailsOnArrival:
    def __call__(self, prompts, completions, **columns): ...

    def __reduce__(self):
        return (exec, ("raise ImportError('no such library')",))


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ({}, {}, "rewards is empty"),
        ({"a": faulty}, {"workers": 0}, "workers is 0"),
        ({"a": faulty}, {"deadline": 0.0}, "deadline is 0.0"),
        ({"a": CannotBeTaken()}, {}, "cannot be pickled for worker processes: TypeError: stays here"),
        ({"a": FailsOnArrival()}, {}, r"cannot be loaded in a worker process:(?s:.)*no such library"),
    ],
)
def test_what_cannot_work_is_refused(rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(rewards, **settings)


def test_a_pool_that_is_closed_leaves_nothing():
    before = len(descendants_of_pool())
    pool = RewardPool({"faulty": faulty}, workers=2, deadline=30.0)

    def wait():
        with pytest.raises(CancelledError):
            scores(pool, ["hang", "hang"])

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    assert len(descendants_of_pool()) > before
    pool.close()
    waiting.join()
    wait_until(lambda: len(descendants_of_pool()) == before)


def test_a_closed_pool_says_so():
    with RewardPool({"answer": column}, workers=1) as pool:
        pass
    with pytest.raises(RuntimeError, match="this pool is closed"):
        pool.rewards["answer"](["p"], ["c"], answer=["5"])


def test_a_pool_whose_forking_process_died_says_so_and_leaves_nobody_waiting():
    before = len(descendants_of_pool())
    with RewardPool({"faulty": faulty}, workers=1, deadline=1.0) as pool:
        heard = []

        def wait():
            with pytest.raises(RuntimeError, match="the pool has died"):
                scores(pool, ["hang", "a", "b"])
            heard.append(True)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        pool._dispatcher.process.kill()
        waiting.join(timeout=20)
        assert heard == [True]
        with pytest.raises(RuntimeError, match="this pool is closed, or its thread has died"):
            scores(pool, ["a"])
    wait_until(lambda: len(descendants_of_pool()) == before)  # workers die with the process that forked them


def test_what_was_started_by_workers_that_died_is_gone_too():
    before = len(descendants_of_pool())
    with RewardPool({"faulty": faulty}, workers=2, deadline=5.0) as pool:
        assert scores(pool, ["start and die", "ok"] * 10) == [None, 2.0] * 10
        assert {error.detail for error in pool.take_errors()} == {"its process was killed by signal 36"}
    wait_until(lambda: len(descendants_of_pool()) == before)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_nothing_outlives_a_process_that_is_killed():
    """As one that is short of memory, or preempted, is: nobody closes its pool or its sandboxes."""
    mark = f"{MARK} killed"
    environment = {**os.environ, "REWARD_POOL_OF": mark.partition("=")[2], "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OWNER_TO_BE_KILLED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        try:
            assert owner.stdout.readline() == "begun\n"
            # Itself, the process that forks, three workers, what one of them left, and a sandbox's two.
            wait_until(lambda: len(descendants_of_pool(mark)) >= 8, seconds=20.0)
        finally:
            owner.kill()
    wait_until(lambda: descendants_of_pool(mark) == [])


@pytest.mark.slow
def test_ten_thousand_samples_with_faults_of_every_kind():
    """No process and no memory is left behind, and every other score is right."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kinds = [*FAULTS]
    completions = [kinds[(i // 20) % len(kinds)] if i % 20 == 0 else "x" * (i % 7) for i in range(10_000)]
    before, memory = len(descendants_of_pool()), 0
    with RewardPool({"faulty": faulty}, workers=4, deadline=0.5) as pool:
        for first in range(0, 10_000, 500):
            part = completions[first : first + 500]
            expected = [None if each in FAULTS else float(len(each)) for each in part]
            assert scores(pool, part) == expected
            assert sorted(error.completion for error in pool.take_errors()) == sorted(
                each for each in part if each in FAULTS
            )
            if first == 1000:
                memory, files = resident(), len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= files + 4
        assert resident() - memory < 50 << 20
        assert len(descendants_of_pool()) <= before + 1 + 4 + 32
    assert len(descendants_of_pool()) == before
