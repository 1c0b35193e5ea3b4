"""Ring caches of sliding windows: the samples of caches of full length, in memory that does not grow with length."""

from dataclasses import replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import quick_jit
from conftest import TINY

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.models.config import with_layers
from grpo_jax.models.kv_cache import (
    init_entry,
    join_rings,
    last_columns,
    ring_columns,
    ring_slots,
    write,
)
from grpo_jax.rollout import Sampler, generate
from grpo_jax.rollout.buckets import MemoryLimits, chunk_lengths
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh, param_shardings, shard_rows
from grpo_jax.train import completion_log_probs

EOS, PAD = (15,), 0
N, G, T, WIDTH = 8, 4, 300, 100
OPTIONS = {"group_size": G, "max_completion_length": T, "eos_ids": EOS, "pad_id": PAD}
WINDOWS = {
    # Shorter than every chunk; full attention; longer than the prompts and the first chunk.
    "mixed": (7, None, 130),
    "same": (60, 60),  # as in Mistral, but with attention sinks
}


@cache
def windowed(name):
    """A config, its model and parameters, with sliding windows."""
    config, windows = from_hf_config(TINY | {"max_position_embeddings": 4096}), WINDOWS[name]
    config = with_layers(config, [config.kinds[0]._replace(window=window) for window in windows])
    config = replace(config, attention_sinks=name == "same")
    return config, build_model(config), init_params(config, jax.random.key(1))


def linear(name):
    """The model with caches that have a column for every token."""
    config, model, _ = windowed(name)
    full = build_model(with_layers(config, [kind._replace(window=None) for kind in config.kinds]))
    names = ("init_cache", "first_columns", "join_columns")
    return replace(model, **{name: getattr(full, name) for name in names})


def random_prompts(count=N):
    """Prompts of two tokens to ``WIDTH``."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32, 2 + i * (WIDTH - 2) // (count - 1)).tolist() for i in range(count)]
    return pad_prompts(ids, max_prompt_length=WIDTH, pad_id=PAD, index=range(count))


def draw(model, params, prompts=None, **changes):
    sampler = Sampler(model, Sampling(), **OPTIONS | changes)
    return sampler(params, random_prompts() if prompts is None else prompts, jax.random.key(0))


@cache
def sampled(name):
    """The sampler's rollout, and its statistics."""
    _, model, params = windowed(name)
    stats = []
    return draw(model, params, report=stats.append), stats[0]


@cache
def expected(name, count=N, group_size=G):
    """The rollout of ``generate`` with caches of full length."""
    params = windowed(name)[2]
    options = OPTIONS | {"group_size": group_size}
    whole = jax.jit(partial(generate, linear(name), sampling=Sampling(), **options))
    return whole(params, random_prompts(count), jax.random.key(0))


def assert_same(found, wanted, most=1e-5):
    found, wanted = vars(found).copy(), vars(wanted).copy()
    chex.assert_trees_all_close(found.pop("rollout_log_probs"), wanted.pop("rollout_log_probs"), atol=most)
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize("name", WINDOWS)
def test_samples_are_those_of_caches_of_full_length(name):
    """Over prompts and chunks longer than the windows, and chunks joined in the middle of a ring."""
    found, stats = sampled(name)
    assert_same(found, expected(name))
    lengths = np.sort(np.asarray(found.completion_mask.sum(1)))
    first, _ = chunk_lengths(T)
    # When eight rows are left, their chunks are joined: of one model both are rings, of the other the second is empty.
    assert (lengths[-9] > first) == (name == "mixed")
    assert lengths[-1] > 290
    assert stats.row_steps < 0.6 * len(lengths) * T


@pytest.mark.parametrize("name", WINDOWS)
def test_sampler_and_trainer_agree(name):
    (_, model, params), (rollout, _) = windowed(name), sampled(name)
    log_probs, _ = jax.jit(partial(completion_log_probs, model))(params, rollout)
    gap = np.abs(np.asarray(rollout.rollout_log_probs) - np.asarray(log_probs))
    assert gap[np.asarray(rollout.completion_mask)].max() <= 1e-5


@pytest.mark.parametrize("name", ["same", pytest.param("mixed", marks=pytest.mark.slow)])
def test_generate_has_rings_of_its_own(name):
    _, model, params = windowed(name)
    whole = jax.jit(partial(generate, model, sampling=Sampling(), **OPTIONS))
    assert_same(whole(params, random_prompts(), jax.random.key(0)), sampled(name)[0])


@pytest.mark.slow
def test_rings_of_deferred_batches_are_merged():
    _, model, params = windowed("mixed")
    stats = []
    found = draw(model, params, random_prompts(24), group_size=8, max_rows=64, report=stats.append)
    assert stats[0].batches == 4  # three, and their merge
    # Full caches too differ by as much in this schedule from those of ``generate``, in one of 57,600 tokens.
    assert_same(found, expected("mixed", 24, 8), most=3e-5)


@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_devices_do_not_change_the_samples(mesh):
    """Also if two devices share a KV head, as the sampler's may."""
    config, _, params = windowed("mixed")
    data, fsdp, tensor = mesh
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    found = draw(build_model(config, mesh=mesh), sharded, shard_rows(random_prompts(), mesh), mesh=mesh)
    assert_same(found, expected("mixed"))


@pytest.mark.slow
def test_int8_is_rounded_as_in_a_cache_of_full_length():
    _, model, params = windowed("mixed")
    ring, whole = (draw(each, params, cache_dtype="int8", group_size=1) for each in (model, linear("mixed")))
    alike = (np.asarray(ring.completion_ids) == np.asarray(whole.completion_ids)).all(1)
    assert alike.mean() > 0.8  # in the last bit, one may round to the next int8 step
    gap = np.abs(np.asarray(ring.rollout_log_probs) - np.asarray(whole.rollout_log_probs))[alike]
    assert (gap > 1e-5).mean() < 0.05


@pytest.mark.slow
def test_samples_of_twenty_times_the_window():
    _, model, params = windowed("same")
    options = {"max_completion_length": 1300, "eos_ids": (31,), "group_size": 1}
    sampling = Sampling(logit_bias=((31, -float("inf")),))
    results = []
    for each in (model, linear("same")):
        stats = []
        sampler = Sampler(each, sampling, **OPTIONS | options, report=stats.append)
        results.append((sampler(params, random_prompts(), jax.random.key(0)), stats[0].cache_bytes))
    (found, ring_bytes), (wanted, linear_bytes) = results
    assert_same(found, wanted)
    assert bool(found.truncated.all())
    assert ring_bytes == 3 * 64 * linear_bytes / (WIDTH + 1344)


def cache_bytes(model, length, **options):
    """Bytes of each layer of the cache of a row, with its two chunks, and of its prompt."""
    limits = jax.eval_shape(lambda: [model.init_cache(1, each, ring=True, **options) for each in chunk_lengths(length)])
    return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer)) for layer in zip(*limits, strict=True)]


def test_memory_of_window_layers_does_not_grow_with_length():
    _, model, _ = windowed("mixed")
    column = 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32
    assert cache_bytes(model, 300) == [128 * column, 320 * column, 320 * column]
    assert cache_bytes(model, 32_768) == [128 * column, 32_768 * column, 2 * 192 * column]
    assert cache_bytes(model, 10**6) == [128 * column, 10**6 * column, 2 * 192 * column]
    limits = MemoryLimits(model, G, 32_768, 1, None, None)
    of_row, of_prompt, _ = limits._sizes(1024)
    assert of_row == (128 + 32_768 + 2 * 192) * column
    assert of_prompt == (64 + 1024 + 192) * column


def entry_of(slots):
    """A cache whose numbers tell the slot of a column's token, from 1; 0 where it is empty."""
    numbers = jnp.where(slots >= 0, slots + 1, 0).astype(jnp.float32)
    scales = numbers[None, None]
    return {
        "keys": scales[:, :, None],
        "values": scales[..., None],
        "key_scales": scales,
        "value_scales": scales,
    }


def test_tokens_replace_those_a_ring_before_them():
    entry = init_entry(windowed("same")[0], 1, 5, jnp.float32)
    for slot in range(12):
        assert ring_slots(5, slot).tolist() == [max((s for s in range(c, slot, 5)), default=c - 5) for c in range(5)]
        new = {"keys": jnp.full((1, 2, 8, 1), float(slot)), "values": jnp.full((1, 2, 1, 8), float(slot))}
        entry = write(entry, new, jnp.int32(slot))
        held = ring_slots(5, slot + 1)
        assert entry["keys"][0, 0, 0].tolist() == entry["values"][0, 1, :, 3].tolist() == jnp.maximum(held, 0).tolist()


@pytest.mark.parametrize(("window", "columns"), [(None, 200), (200, 200), (192, 192), (130, 192), (64, 64), (5, 64)])
def test_a_prompts_ring_has_its_last_tokens(window, columns):
    assert ring_columns(window, 200) == columns
    whole = entry_of(jnp.arange(264))
    chex.assert_trees_all_equal(last_columns(whole, 200, columns), entry_of(ring_slots(columns, 200)))


@pytest.mark.parametrize("window", [None, 5, 64, 70, 129])
@pytest.mark.parametrize("lengths", [(192,), (64, 192), (128, 192), (64, 64, 128)])
def test_rings_are_joined_into_the_one_that_all_tokens_would_have_made(window, lengths):
    starts, total = np.cumsum([0, *lengths[:-1]]), sum(lengths)

    @quick_jit
    def joined(starts, count):
        entries = []
        for i, length in enumerate(lengths):
            columns = ring_columns(window, length)
            if i < len(starts):
                ends = [*starts[1:], count]
                held = ring_slots(columns, ends[i] - starts[i])
                entries.append(entry_of(jnp.where(held >= 0, held + starts[i], -1)))
            else:
                entries.append(entry_of(jnp.full(columns, -1)))
        return join_rings(entries, window, starts, count)

    columns = ring_columns(window, total)
    for count in range(1, total + 1, 7):
        found = joined(jnp.asarray(starts[starts < count], jnp.int32), jnp.int32(count))
        held = ring_slots(columns, count)
        wanted = entry_of(held)
        for name, x in found.items():
            x, y = x.reshape(-1), wanted[name].reshape(-1)
            np.testing.assert_array_equal(np.asarray(x)[held >= 0], np.asarray(y)[held >= 0])
            assert len(x) == columns


def test_calls_that_a_ring_cannot_hold_are_refused():
    _, model, params = windowed("mixed")
    ids, many = jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 65), jnp.int32)
    ring = model.init_cache(2, 300, ring=True)

    def call(ids, start, mask=None):
        jax.eval_shape(lambda ids: model.apply(params, ids, ids, mask, ring, start), ids)

    with pytest.raises(ValueError, match="a ring cache takes no mask"):
        call(ids[:, :1], 0, jnp.ones((2, 300), bool))
    with pytest.raises(ValueError, match="2 tokens at a traced slot of a ring cache, which takes one token at a time"):
        call(ids, jnp.int32(0))
    with pytest.raises(ValueError, match="65 tokens do not fit into a cache of 64 columns"):
        call(many, 0)
