"""The sampler returns the samples of ``generate``, whatever its batches, and computes little else."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.models import build_model, from_hf_config
from grpo_jax.rollout import Sampler, generate
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh, param_shardings, shard_rows
from grpo_jax.train import completion_log_probs
from grpo_jax.types import Prompts

EOS, PAD = (5,), 0
N, G, T, WIDTH = 32, 8, 100, 6
OPTIONS = {"group_size": G, "max_completion_length": T, "eos_ids": EOS, "pad_id": PAD}
EVERYTHING = Sampling(
    temperature=0.8,
    top_k=20,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    logit_bias=((3, -5.0), (7, -float("inf"))),
    min_length=4,
)
KEY = 0


def random_prompts(count=N, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 31, rng.integers(1, WIDTH + 1)).tolist() for _ in range(count)]
    return pad_prompts(ids, max_prompt_length=WIDTH, pad_id=PAD, index=range(count))


def some(prompts, index):
    return jax.tree.map(lambda x: x[index], prompts)


@pytest.fixture(scope="module")
def expected(tiny):
    """The rollouts of ``generate``, by sampling settings."""
    model, params = tiny
    rollouts = {}
    for sampling in (Sampling(), EVERYTHING):
        generate_all = jax.jit(partial(generate, model, sampling=sampling, **OPTIONS))
        rollouts[sampling] = generate_all(params, random_prompts(), jax.random.key(KEY))
    return rollouts


def assert_same(found, wanted):
    found, wanted = vars(found).copy(), vars(wanted).copy()
    chex.assert_trees_all_close(found.pop("rollout_log_probs"), wanted.pop("rollout_log_probs"), atol=1e-5)
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize(
    ("schedule", "batches"),
    [
        ({}, 1),
        pytest.param({"max_rows": 64}, 5, marks=pytest.mark.slow),  # four batches and their merge
        ({"ahead": 2, "max_rows": 64}, 5),
        ({"max_rows": 8}, 32),  # too small to be deferred
        ({"max_rows": 5}, 64),  # half a group at a time
        # Two layers of keys and values, 2 heads of 8, float32: 256 bytes a token. Three rows fit: parts of two.
        ({"cache_bytes": 256 * (3 * 128 + 6)}, 128),
    ],
    ids=["one", "sets", "ahead", "small", "halves", "quarters"],
)
def test_t14_no_schedule_changes_the_samples(tiny, expected, schedule, batches):
    model, params = tiny
    stats = []
    sampler = Sampler(model, Sampling(), **OPTIONS, **schedule, report=stats.append)
    assert_same(sampler(params, random_prompts(), jax.random.key(KEY)), expected[Sampling()])
    assert stats[0].batches == batches
    assert stats[0].tokens == int(expected[Sampling()].completion_mask.sum())


def test_every_filter_and_penalty_follows_its_rows(tiny, expected):
    model, params = tiny
    sampler = Sampler(model, EVERYTHING, **OPTIONS, max_rows=64)
    found = sampler(params, random_prompts(), jax.random.key(KEY))
    assert_same(found, expected[EVERYTHING])
    ids, lengths = np.asarray(found.completion_ids), np.asarray(found.completion_mask.sum(1))
    assert not (ids[np.asarray(found.completion_mask)] == 7).any()
    assert lengths.min() >= 5  # four others before the EOS token


@pytest.mark.parametrize("constrain", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_t14_devices_do_not_change_the_samples(tiny, expected, constrain):
    model, params = tiny
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = build_model(from_hf_config(TINY), mesh=mesh) if constrain else model
    sharded = jax.device_put(params, param_shardings(params, mesh))
    sampler = Sampler(model, Sampling(), **OPTIONS, mesh=mesh)
    found = sampler(sharded, shard_rows(random_prompts(), mesh), jax.random.key(KEY))
    assert_same(found, expected[Sampling()])
    assert len(found.completion_ids.sharding.device_set) == 8
    assert found.completion_ids.sharding.shard_shape(found.completion_ids.shape) == (N * G // 4, T)


@pytest.mark.slow
def test_t14_pools_on_devices_do_not_change_the_samples(tiny, expected):
    _, params = tiny
    mesh = make_mesh(data=2, tensor=2)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    stats = []
    model = build_model(from_hf_config(TINY), mesh=mesh)
    sampler = Sampler(model, Sampling(), **OPTIONS, mesh=mesh, max_rows=128, report=stats.append)
    assert_same(sampler(sharded, shard_rows(random_prompts(), mesh), jax.random.key(KEY)), expected[Sampling()])
    assert stats[0].batches == 3  # two batches and their merge


SIZES = [(1, 1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((64, 2, 3), (65, 1, 2))), (73, 8, 1)]


@pytest.mark.parametrize(("length", "group_size", "count"), SIZES)
def test_completions_and_groups_of_every_size(tiny, length, group_size, count):
    """No completion ends before the limit, so that every chunk is written to."""
    model, params = tiny
    options = OPTIONS | {"max_completion_length": length, "group_size": group_size}
    sampling = Sampling(logit_bias=((EOS[0], -float("inf")),))
    prompts = random_prompts(count)
    wanted = jax.jit(partial(generate, model, sampling=sampling, **options))(params, prompts, jax.random.key(3))
    assert_same(Sampler(model, sampling, **options)(params, prompts, jax.random.key(3)), wanted)
    assert bool(wanted.truncated.all())


def test_t15_sampler_and_trainer_agree(tiny):
    model, params = tiny
    rollout = Sampler(model, Sampling(temperature=0.7), **OPTIONS)(params, random_prompts(), jax.random.key(KEY))
    log_probs, _ = jax.jit(partial(completion_log_probs, model, temperature=0.7))(params, rollout)
    mask = np.asarray(rollout.completion_mask)
    gap = np.abs(np.asarray(rollout.rollout_log_probs) - np.asarray(log_probs))[mask]
    assert gap.max() <= 1e-5


def test_most_row_steps_are_useful(tiny):
    model, params = tiny
    stats = []
    sampler = Sampler(model, Sampling(), **OPTIONS, report=stats.append)
    lengths = np.asarray(sampler(params, random_prompts(), jax.random.key(KEY)).completion_mask.sum(1))
    static = lengths.max() * N * G
    assert stats[0].row_steps < 0.6 * static
    assert stats[0].useful == lengths.sum() / stats[0].row_steps > 0.6


def test_if_every_token_is_eos_one_dispatch_is_enough(tiny):
    model, params = tiny
    stats = []
    options = OPTIONS | {"eos_ids": tuple(range(32))}
    drawn = Sampler(model, Sampling(), **options, report=stats.append)(params, random_prompts(), jax.random.key(0))
    assert (np.asarray(drawn.completion_mask.sum(1)) == 1).all()
    assert stats[0].dispatches == 1


def test_calls_of_one_sampler_share_their_programs(tiny):
    """Prefill, decode steps for each bucket and number of chunks: traced once each, and never again."""
    model, params = tiny
    model = replace(model, apply=chex.assert_max_traces(model.apply, n=8))
    sampler = Sampler(model, Sampling(), **OPTIONS)
    for seed in range(3):
        sampler(params, random_prompts(seed=seed), jax.random.key(seed))


@pytest.mark.slow
def test_s7_programs_are_few_over_fifty_steps_of_all_lengths(tiny):
    """The EOS token's embedding is scaled up and down, so that lengths vary from 1 to the limit."""
    model, params = tiny
    compiled = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    sampler = Sampler(model, Sampling(), **OPTIONS)
    prompts = random_prompts()
    key, table = jax.random.key(0), np.asarray(params["embed"]["embedding"])
    keys = [jax.random.fold_in(key, step) for step in range(50)]
    scales = np.random.default_rng(0).uniform(0, 1, 50)
    tables = []
    for scale in scales:
        changed = table.copy()
        changed[EOS[0]] = scale * table[EOS[0]] + (1 - scale) * 3 * table[9]
        tables.append(jnp.asarray(changed))
    jax.monitoring.register_event_duration_secs_listener(listen)
    means = [
        np.asarray(sampler(params | {"embed": {"embedding": table}}, prompts, key).completion_mask).mean()
        for table, key in zip(tables, keys, strict=True)
    ]
    jax.monitoring.unregister_event_duration_listener(listen)
    assert max(means) > 2 * min(means)
    assert 0 < len(compiled) <= 12


@pytest.mark.slow
def test_the_prompts_memory_does_not_grow_with_the_group(tiny):
    model, params = tiny
    prompts = pad_prompts([[3] * 60], max_prompt_length=60, pad_id=PAD, index=[0])
    used = {}
    for size in (256, 1024):
        stats = []
        options = OPTIONS | {"group_size": size, "max_completion_length": 8}
        drawn = Sampler(model, Sampling(), **options, report=stats.append)(params, prompts, jax.random.key(0))
        assert len({tuple(row) for row in np.asarray(drawn.completion_ids).tolist()}) > size / 2
        used[size] = stats[0].cache_bytes
    row = (used[1024] - used[256]) / 768
    entry = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(1, 64)))
    assert row == entry
    assert used[256] - 256 * row == sum(x.nbytes for x in jax.tree.leaves(model.init_cache(1, 60)))


def test_a_stop_function_ends_completions_and_leaves_their_tokens(tiny, expected):
    model, params = tiny
    wanted = expected[Sampling()]
    ids, mask = np.asarray(wanted.completion_ids), np.asarray(wanted.completion_mask)

    def stop(sequence, seen):
        assert len(sequence) > seen
        return next((i + 1 for i in range(seen, len(sequence)) if sequence[i] == 9), None)

    found = Sampler(model, Sampling(), **OPTIONS, stop=stop)(params, random_prompts(), jax.random.key(KEY))
    found = jax.device_get(found)  # rows of JAX arrays are a program for each length
    stopped = 0
    for row in range(N * G):
        length = int(mask[row].sum())
        nines = np.flatnonzero(ids[row, :length] == 9)
        kept = int(nines[0]) + 1 if len(nines) else length
        stopped += kept < length
        assert int(found.completion_mask[row].sum()) == kept
        assert found.completion_ids[row, :kept].tolist() == ids[row, :kept].tolist()
        assert (found.completion_ids[row, kept:] == PAD).all()
        assert bool(found.truncated[row]) == (bool(wanted.truncated[row]) and not len(nines))
    assert stopped > 20


def test_a_stream_yields_prompts_as_they_finish_in_one_order(tiny, expected):
    model, params = tiny
    prompts, wanted = random_prompts(), expected[Sampling()]
    stats = []
    sampler = Sampler(model, Sampling(), **OPTIONS, report=stats.append)
    parts = [some(prompts, slice(0, 3)), some(prompts, slice(3, 20)), some(prompts, slice(20, 30))]

    def places():
        order = []
        for place, rollout in sampler.stream(params, iter(parts), jax.random.key(KEY), num_prompts=8):
            assert_same(rollout, some(wanted, slice(place * G, place * G + G)))
            order.append(place)
        return order

    order = places()
    assert sorted(order) == list(range(30))
    assert order != sorted(order)
    assert order == places()
    assert stats[0].batches == 5


def test_a_stream_puts_the_parts_of_a_group_together(tiny, expected):
    model, params = tiny
    sampler = Sampler(model, Sampling(), **OPTIONS, max_rows=4)
    parts = [some(random_prompts(), slice(0, 2)), some(random_prompts(), slice(2, 3))]
    drawn = dict(sampler.stream(params, parts, jax.random.key(KEY), num_prompts=8))
    assert sorted(drawn) == [0, 1, 2]
    for place, rollout in drawn.items():
        assert_same(rollout, some(expected[Sampling()], slice(place * G, place * G + G)))


@pytest.mark.slow
def test_streams_of_one_sampler_do_not_disturb_one_another(tiny, expected):
    model, params = tiny
    stats = []
    sampler = Sampler(model, Sampling(), **OPTIONS, report=stats.append)
    streams = [sampler.stream(params, [random_prompts()], jax.random.key(KEY), num_prompts=size) for size in (8, 16)]
    for both in zip(*streams, strict=True):
        for place, rollout in both:
            assert_same(rollout, some(expected[Sampling()], slice(place * G, place * G + G)))
    kept = int(expected[Sampling()].completion_mask.sum())
    assert [s.tokens for s in stats] == [kept, kept]
    assert [s.batches for s in stats] == [5, 3]


def test_a_stream_refuses_prompts_of_another_length_and_sets_of_none(tiny):
    model, params = tiny
    sampler = Sampler(model, Sampling(), **OPTIONS | {"max_completion_length": 8})
    wide = pad_prompts([[3]] * 8, max_prompt_length=WIDTH + 1, pad_id=PAD, index=range(8))
    with pytest.raises(ValueError, match="have one length; after 6 came 7"):
        list(sampler.stream(params, [random_prompts(8), wide], jax.random.key(0), num_prompts=8))
    with pytest.raises(ValueError, match="num_prompts is 0"):
        list(sampler.stream(params, [random_prompts(8)], jax.random.key(0), num_prompts=0))
    assert list(sampler.stream(params, [], jax.random.key(0), num_prompts=8)) == []


def test_tokens_are_streamed_to_a_callback(tiny, expected):
    model, params = tiny
    seen = [[] for _ in range(N * G)]
    sampler = Sampler(model, Sampling(), **OPTIONS, max_rows=64)
    sampler(params, random_prompts(), jax.random.key(KEY), on_tokens=lambda row, ids: seen[row].append(list(ids)))
    wanted = jax.device_get(expected[Sampling()])
    for row, pieces in enumerate(seen):
        length = int(wanted.completion_mask[row].sum())
        assert [i for piece in pieces for i in piece] == wanted.completion_ids[row, :length].tolist()
        assert len(pieces) == -(-length // 8)


@pytest.mark.parametrize(
    ("cache_dtype", "most"), [("bfloat16", 0.1), pytest.param("int8", 0.2, marks=pytest.mark.slow)]
)
def test_a_coarser_cache_is_off_by_little(tiny, cache_dtype, most):
    model, params = tiny
    options = OPTIONS | {"max_completion_length": 64, "group_size": 2, "cache_dtype": cache_dtype}
    rollout = Sampler(model, Sampling(), **options)(params, random_prompts(), jax.random.key(KEY))
    log_probs, _ = jax.jit(partial(completion_log_probs, model))(params, rollout)
    gap = np.abs(np.asarray(rollout.rollout_log_probs) - np.asarray(log_probs))
    assert 1e-4 < gap[np.asarray(rollout.completion_mask)].max() < most


@pytest.mark.slow
def test_a_coarser_cache_rounds_alike_in_every_schedule(tiny):
    """If float32 differs in the last bit, another schedule may round to the next int8 step; rarely."""
    model, params = tiny
    options = OPTIONS | {"cache_dtype": "int8"}
    whole = Sampler(model, Sampling(), **options)(params, random_prompts(), jax.random.key(KEY))
    mesh = make_mesh(data=2, tensor=2)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    parts = Sampler(model, Sampling(), **options, max_rows=128, mesh=mesh)
    found = parts(sharded, shard_rows(random_prompts(), mesh), jax.random.key(KEY))
    alike = (np.asarray(found.completion_ids) == np.asarray(whole.completion_ids)).all(1)
    assert alike.mean() > 0.98
    difference = np.abs(np.asarray(found.rollout_log_probs) - np.asarray(whole.rollout_log_probs))[alike]
    assert difference.max() < 0.1
    assert (difference > 1e-5).mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"eos_ids": ()}, "eos_ids is empty"),
        ({"cache_dtype": "float16"}, "cache_dtype must be one of float32, bfloat16, int8, not float16"),
        ({"cache_dtype": "float8"}, "cache_dtype must be one of float32, bfloat16, int8, not float8"),
    ],
)
def test_invalid_settings_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(tiny[0], Sampling(), **OPTIONS | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_completion_length": 125}, r"prompt \d+ has 6 tokens.*the model's 128 positions.*at most 122"),
        ({"max_rows": 0}, "max_rows is 0; it must be at least 1 for each of 1 devices"),
        # Two layers of keys and values, 2 heads of 8, float32: 256 bytes a token.
        ({"cache_bytes": 34_000}, r"a sample of 6 \+ 100 tokens takes 0.0 MiB .* 0.0 MiB are allowed"),
    ],
)
def test_samples_that_do_not_fit_are_refused_before_compilation(tiny, options, message):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        Sampler(model, Sampling(), **OPTIONS | options)(params, random_prompts(), jax.random.key(0))


def test_completions_that_do_not_divide_over_the_mesh_are_refused(tiny):
    model, params = tiny
    sampler = Sampler(model, Sampling(), **OPTIONS | {"group_size": 2}, mesh=make_mesh(data=4, fsdp=2))
    with pytest.raises(ValueError, match=r"3 prompts x 2 samples do not divide over data x fsdp = 8 .* 5 prompts more"):
        sampler(params, some(random_prompts(), slice(0, 3)), jax.random.key(0))


def test_prompts_keep_their_shape_and_order(tiny):
    model, params = tiny
    prompts = random_prompts(5)  # the last batch is filled up
    sampler = Sampler(model, Sampling(), **OPTIONS | {"group_size": 2, "max_completion_length": 8}, max_rows=4)
    drawn = sampler(params, prompts, jax.random.key(0))
    assert isinstance(prompts, Prompts)
    np.testing.assert_array_equal(drawn.prompt_ids, np.repeat(np.asarray(prompts.ids), 2, axis=0))
