"""Fuzzing: atheris on whatever reads a completion, and a pool under random faults."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_jax.rewards.workers.pool import RewardPool
from tests.faulty_rewards import faulty

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def test_fuzzing_with_atheris(tmp_path):
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, line in enumerate((HERE / "data" / "math_pairs.jsonl").read_text().splitlines()):
        pair = json.loads(line)
        (corpus / str(number)).write_text(pair.get("completion") or pair["answer"])
    # What this process has taken so far counts as taken by those that it starts.
    limit = 2048 + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = ["-max_total_time=25", "-max_len=400", f"-rss_limit_mb={limit}"]
    command = [sys.executable, str(HERE / "fuzz_parsers.py"), *options, str(corpus)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr


def test_a_minute_of_random_faults():
    """Whatever is mixed with whatever, each sample gets its own score, and the pool goes on."""
    kinds = ["hang", "exit", "kill", "raise", "nan", "text", "absent", *(["ok"] * 12)]
    with RewardPool({"faulty": faulty}, workers=3, deadline=0.15) as pool:

        @given(st.lists(st.sampled_from(kinds), max_size=40))
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        def scores_are_right(completions):
            found = pool.rewards["faulty"]([""] * len(completions), completions)
            assert [each.score for each in found] == [2.0 if each == "ok" else None for each in completions]
            faults = [fault.completion for fault in pool.take_errors()]
            assert sorted(faults) == sorted(each for each in completions if each not in ("ok", "absent"))

        scores_are_right()
