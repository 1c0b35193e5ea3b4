"""The benchmark of training steps: its result, its sequences, and the process of a peer."""

import json
import sys
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import train as bench
from grpo_jax.config.training import PolicyLossConfig
from grpo_jax.loop import trl_process, trl_worker
from grpo_jax.loop.trl_process import TrlProcess
from grpo_jax.models import from_hf_config, init_params, training_flops
from grpo_jax.types import Prompts
from tests.conftest import TINY

TINY_STEP = bench.Config(num_prompts=2, group_size=2, max_prompt_length=4, max_completion_length=6, repeats=1)
WORKER = """
import json, sys
settings = json.loads(sys.argv[1])
assert settings["prompts"] == [[1, 2], [3]] and settings["use_cpu"]
for line in sys.stdin:
    lengths = json.loads(line)
    if lengths == [9]:
        break
    answer = {"phases": {"update": [2.0, 1.0]}, "peak": 7, "lengths": [min(n, 5) for n in lengths]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def result_of(monkeypatch, capsys):
    """Runs the benchmark on a tiny model and returns its JSON line."""
    cache = jax.config.jax_enable_compilation_cache
    monkeypatch.setitem(bench.SHAPES, "small", TINY)
    monkeypatch.setattr(bench, "machine_limits", lambda dtype: (1e9, 1e9))

    def run(config):
        bench.main(config)
        return json.loads(capsys.readouterr().out)

    yield run
    jax.config.update("jax_enable_compilation_cache", cache)


def test_a_whole_step_has_three_phases_and_no_more_programs_than_parts(result_of):
    result = result_of(replace(TINY_STEP, whole_step=True, policy=PolicyLossConfig(kl_coef=0.04)))
    assert list(result["cpu_seconds"]) == list(result["wall_seconds"]) == ["sampling", "reference", "update"]
    assert result["mean_length"] == 6
    assert result["tokens_per_second"] > 0
    assert 0 < result["compile_count"] < 20
    assert result["peak_memory_mib"] > 0


@pytest.mark.slow
def test_updates_of_the_same_sequences_are_compared(result_of):
    config = replace(
        TINY_STEP,
        actual_prompt_length=3,
        actual_completion_length=2,
        against="maxima",
        other_max_prompt_length=3,
        other_max_completion_length=4,
    )
    result = result_of(config)
    assert result["mean_length"] == 2
    assert list(result["maxima_cpu_seconds"]) == ["update"]
    assert result["mfu"] > 0
    assert result["ratio_to_maxima"] == pytest.approx(
        result["tokens_per_second"] / result["maxima_tokens_per_second"], rel=0.02
    )


def test_other_maxima_change_padding_only():
    config = replace(TINY_STEP, actual_prompt_length=3, actual_completion_length=2, against="maxima")
    found = []
    for each in (config, bench.counterpart(config)):
        batch = bench.given_batch(each, bench.padded_prompts(each, 32), 32)
        assert batch.prompt_ids.shape[1] == each.max_prompt_length
        assert batch.completion_ids.shape[1] == each.max_completion_length
        found.append((batch.prompt_ids[batch.prompt_mask], batch.completion_ids[batch.completion_mask]))
    chex.assert_trees_all_equal(*found)
    assert found[0][0].size == 4 * 3
    assert found[0][1].size == 4 * 2


def test_rows_that_are_not_packed_are_cut_except_those_of_the_comparison(result_of, monkeypatch):
    columns = []

    def make_update(config, model):
        def update(state, batch):
            columns.append((batch.prompt_ids.shape[1], batch.completion_ids.shape[1]))
            return state, {}

        return update

    monkeypatch.setattr(bench, "make_update", make_update)
    lengths = {"max_prompt_length": 128, "max_completion_length": 256, "actual_prompt_length": 3}
    result_of(replace(TINY_STEP, **lengths, packing="none", actual_completion_length=2, against="padded"))
    assert set(columns) == {(64, 64), (128, 256)}


def test_a_shared_prompt_counts_once():
    decoder = from_hf_config(TINY)
    prompts, lengths = np.array([5, 3]), np.array([2, 7, 4, 1])

    def flops(is_shared):
        return training_flops(decoder, np.repeat(prompts, 2), lengths, group_size=2 if is_shared else 1)

    assert flops(False) == training_flops(decoder, np.array([5, 5, 3, 3]), lengths)
    # By hand: two groups of two, so that the first 4 and 2 tokens of the prompts are saved once each.
    body = training_flops(decoder, np.array([1]), np.array([0])) - 12 * decoder.num_heads * decoder.head_dim * (
        decoder.num_layers
    )
    pairs = 4 * 5 / 2 + 2 * 3 / 2
    saved = 6 * body + 12 * decoder.num_heads * decoder.head_dim * decoder.num_layers * pairs
    assert flops(False) - flops(True) == pytest.approx(saved)


def test_long_tailed_lengths_have_the_mean_and_the_limit():
    config = bench.Config(num_prompts=500, lengths="long-tailed", max_completion_length=256)
    assert config.completion_lengths.mean() == pytest.approx(48, rel=0.1)
    assert config.completion_lengths.max() == 256
    assert config.completion_lengths.min() == 1
    uneven = replace(config, min_prompt_length=10)
    assert (uneven.prompt_lengths.min(), uneven.prompt_lengths.max()) == (10, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_micro_batches": 3}, "num_micro_batches is 3; it must divide"),
        ({"actual_prompt_length": 5}, "max_prompt_length is 4; sequences of 5 tokens do not fit"),
        ({"actual_completion_length": 7}, "max_completion_length is 6; sequences of 7 tokens do not fit"),
        ({"actual_prompt_length": 2, "min_prompt_length": 2}, "are both set"),
        ({"actual_completion_length": 2, "whole_step": True}, "with whole_step completions are sampled"),
        ({"against": "maxima"}, "actual_prompt_length and actual_completion_length must be set"),
        ({"against": "trl"}, "has no trl; name one that has it with trl_python"),
        ({"trl_python": bench.Path("no/such/python")}, "trl_python is no/such/python, which does not exist"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        replace(TINY_STEP, **changes).check()


def test_the_process_of_a_peer_takes_a_step_for_each_request(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(trl_process.trl_worker, "__file__", str(tmp_path / "worker.py"))
    prompts = Prompts(jnp.array([[1, 2], [0, 3]]), jnp.array([[True, True], [False, True]]), jnp.arange(2))
    params = init_params(from_hf_config(TINY), jax.random.key(0))
    with TrlProcess(bench.Path(sys.executable), params, prompts, hf_config=TINY) as step:
        measured = step(np.array([3, 1]))
        assert (measured.total.cpu, measured.total.wall, step.peak_bytes) == (2, 1, 7)
        with pytest.raises(RuntimeError, match=r"lengths \[5, 1\] instead of \[6, 1\]"):
            step(np.array([6, 1]))
        with pytest.raises(RuntimeError, match="ended with status 0"):
            step(np.array([9]))
    assert step.process.poll() is not None


def test_phases_within_one_another_add_up():
    clock = trl_worker.Clock()
    with clock.phase("update"), clock.phase("reference", within="update"):
        sum(range(200_000))
    update, reference = clock.phases["update"], clock.phases["reference"]
    assert 0 <= update[1] < reference[1]
    assert trl_worker.peak_resident() > 2**20
