"""Batch sizes and cache lengths."""

from types import SimpleNamespace

import pytest

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.rollout.buckets import STEPS, Bucket, MemoryLimits, chunk_lengths, default_cache_bytes, make_buckets
from grpo_jax.types import cache_columns


def test_buckets_halve_the_rows_and_keeps_at_least_eight():
    assert make_buckets(32, 256, 8) == [
        Bucket(256, 32, 8),
        Bucket(128, 32, 8),
        Bucket(64, 32, 8),
        Bucket(32, 32, 8),
        Bucket(16, 16, 8),
    ]
    assert [bucket.rows for bucket in make_buckets(4, 36, 9)] == [36, 18, 9, 8]
    assert make_buckets(1, 3, 3) == [Bucket(3, 1, 3)]


def test_places_of_a_prompt_never_exceed_the_rows():
    assert make_buckets(1, 1024, 1024)[-1] == Bucket(64, 1, 64)


@pytest.mark.parametrize(
    ("length", "chunks"),
    [(1, (64,)), (48, (64,)), (100, (64, 64)), (256, (64, 192)), (300, (128, 192)), (1000, (256, 768))],
)
def test_a_completion_fits_its_chunks(length, chunks):
    assert chunk_lengths(length) == chunks
    assert sum(chunks) == cache_columns(length)
    assert all(columns % STEPS == 0 for columns in chunks)


def test_a_batch_has_as_many_prompts_as_fit(tiny):
    prompts = pad_prompts([[3]] * 32, max_prompt_length=6, pad_id=0, index=range(32))
    group = 8 * 64 * 256 + 6 * 256  # two layers of keys and values, 2 heads of 8, float32: 256 bytes a token

    def per_batch(**limits):
        defaults = {"group_size": 8, "max_completion_length": 48, "devices": 1, "max_rows": None, "cache_bytes": None}
        return MemoryLimits(tiny[0], **defaults | limits).prompts_per_batch(*prompts.ids.shape)

    assert per_batch() == 32
    assert per_batch(cache_bytes=group) == 1
    assert per_batch(cache_bytes=5 * group + 1) == 5
    assert per_batch(max_rows=39) == 4
    assert per_batch(cache_bytes=12 * group, devices=4) == 12
    assert per_batch(cache_bytes=15 * group, devices=4) == 12
    assert per_batch(max_rows=100, devices=4) == 12


def test_a_group_that_does_not_fit_is_divided_into_the_fewest_equal_parts(tiny):
    row, prompt = 64 * 256, 6 * 256

    def parts(**limits):
        defaults = {"group_size": 12, "max_completion_length": 48, "devices": 1, "max_rows": None, "cache_bytes": None}
        return MemoryLimits(tiny[0], **defaults | limits).num_group_parts(6)

    assert parts() == 1
    assert [parts(cache_bytes=n * row + prompt) for n in (12, 11, 6, 5, 4, 3, 2, 1)] == [1, 2, 2, 3, 3, 4, 6, 12]
    assert parts(cache_bytes=2 * (6 * row + prompt), devices=2) == 2
    assert parts(cache_bytes=2 * (6 * row + prompt) - 1, devices=2) == 3
    assert [parts(max_rows=n, devices=4) for n in (48, 47, 4)] == [1, 2, 12]
    with pytest.raises(ValueError, match=r"a sample of 6 \+ 48 tokens takes .* increase cache_bytes"):
        parts(cache_bytes=row + prompt - 1)
    with pytest.raises(ValueError, match="max_rows is 3; it must be at least 1 for each of 4 devices"):
        parts(max_rows=3, devices=4)


def test_the_cache_takes_a_fifth_of_the_memory_of_devices_that_report_it():
    def devices(*all_stats):
        return [SimpleNamespace(process_index=0, memory_stats=lambda stats=stats: stats) for stats in all_stats]

    assert default_cache_bytes(devices({"bytes_limit": 1000}, {"bytes_limit": 500})) == 300
    assert default_cache_bytes(devices({"bytes_limit": 1000}, None)) is None
    assert default_cache_bytes(devices({})) is None


def test_a_coarser_cache_takes_less(tiny):
    def row_bytes(dtype):
        cache = tiny[0].init_cache(1, 64, dtype)
        return sum(x.nbytes for layer in cache for x in layer.values())

    assert row_bytes("float32") == row_bytes(None) == 2 * row_bytes("bfloat16")
    assert row_bytes("int8") == row_bytes("float32") / 4 + 2 * 2 * 2 * 64 * 4  # two scales a head and token
    with pytest.raises(ValueError, match="cache_dtype must be one of float32, bfloat16, int8, not float16"):
        tiny[0].init_cache(1, 64, "float16")
