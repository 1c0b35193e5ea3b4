"""Layers against NumPy in float64, and against transformers where that is the definition."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import quick_jit

from grpo_jax.models.attention import KVSegment, attend, attention_mask
from grpo_jax.models.config import Rope
from grpo_jax.models.kv_cache import quantize, write
from grpo_jax.models.layers import Embedding, Norm
from grpo_jax.models.rope import rope_frequencies, rotate, rotation

LLAMA3 = Rope(5e5, "llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192.0)


@pytest.mark.parametrize("rope", [Rope(1e4), Rope(1e6, "linear", factor=8.0), LLAMA3])
def test_frequencies_are_those_of_transformers(rope):
    import transformers

    config = transformers.LlamaConfig(
        head_dim=128,
        rope_parameters={
            "rope_type": rope.kind,
            "rope_theta": rope.theta,
            **({"factor": rope.factor} if rope.kind != "default" else {}),
            **({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope.kind == "llama3" else {}),
            **({"original_max_position_embeddings": 8192} if rope.kind == "llama3" else {}),
        },
    )
    oracle = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    frequencies = rope_frequencies(rope, 128)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, oracle, rtol=5e-7)


def test_llama3_scaling_leaves_high_frequencies_divides_low_ones_and_blends_between():
    plain, scaled = rope_frequencies(Rope(5e5), 128), rope_frequencies(LLAMA3, 128)
    waves = 2 * np.pi / plain.astype(np.float64)
    high, low = waves < 8192 / 4.0, waves > 8192 / 1.0
    np.testing.assert_array_equal(scaled[high], plain[high])
    np.testing.assert_allclose(scaled[low], plain[low] / 32, rtol=1e-6)
    between = ~high & ~low
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 32).all()


def test_rotation_turns_pairs_half_a_head_apart():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    found = rotate(x, rotation(Rope(1e4), 4, jnp.array([[3]])))
    angles = 3 * np.array([1.0, 0.01])
    wanted = [np.cos(angles[0]), -2 * np.sin(angles[1]), np.sin(angles[0]), 2 * np.cos(angles[1])]
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-6)


def test_scores_of_rotated_vectors_depend_on_their_distance_alone():
    query, keyed = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    @quick_jit
    def rope(x, at):
        return rotate(x, rotation(Rope(1e4), 16, at[None, None]))

    def score(query_at, key_at):
        return np.sum(rope(query, jnp.int32(query_at)) * rope(keyed, jnp.int32(key_at)))

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-3)
    assert abs(score(7, 3) - score(8, 3)) > 1e-2


def test_slots_that_may_be_attended_to():
    mask = jnp.array([[False, True, True, True, True]])
    found = attention_mask(mask, jnp.array([2, 3]), 0, 5, None)[0]
    np.testing.assert_array_equal(found, [[False, True, True, False, False], [False, True, True, True, False]])
    found = attention_mask(mask, jnp.array([3, 4]), 0, 5, 2)[0]
    np.testing.assert_array_equal(found, [[False, False, True, True, False], [False, False, False, True, True]])


def test_slots_before_the_calls_own_and_after_it():
    now = jnp.array([1])
    assert attention_mask(None, now, -3, 3, None).tolist() == [[[True, True, True]]]
    assert attention_mask(None, now, -3, 3, 3).tolist() == [[[False, False, True]]]  # slot -1 is two before slot 1
    assert attention_mask(None, now, jnp.int32(2**30), 3, None).tolist() == [[[False, False, False]]]


def part(keys, values, allowed, *sharing):
    """A segment of keys with their columns before their components."""
    return KVSegment({"keys": jnp.swapaxes(keys, 2, 3), "values": values}, allowed, *sharing)


def attend_to_one(queries, keys, values, allowed, softcap):
    """Attention to one segment."""
    return attend(queries, [part(keys, values, allowed)], softcap)


def attend_in_numpy(queries, keys, values, allowed, softcap):
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    scores = np.einsum("bkgse,bkce->bkgsc", queries, keys)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(allowed[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bkgsc,bkce->bkgse", weights / weights.sum(-1, keepdims=True), values)


def attention_inputs(num_queries, num_slots=7):
    """Queries [2, 2, 3, num_queries, 8], keys and values, and a random mask in which slot 0 is always allowed."""
    rng = np.random.default_rng(0)
    shapes = (2, 2, 3, num_queries, 8), (2, 2, num_slots, 8), (2, 2, num_slots, 8)
    allowed = rng.random((2, num_queries, num_slots)) < 0.6
    allowed[:, :, 0] = True
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], jnp.asarray(allowed)


@pytest.mark.parametrize("num_queries", [1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_against_numpy(num_queries, softcap):
    inputs, allowed = attention_inputs(num_queries)
    found = quick_jit(partial(attend_to_one, softcap=softcap))(*inputs, allowed)
    np.testing.assert_allclose(found, attend_in_numpy(*inputs, allowed, softcap), atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_a_fully_masked_row_is_finite_forward_and_backward(num_queries):
    inputs, allowed = attention_inputs(num_queries)
    allowed = jnp.asarray(np.asarray(allowed) & (np.arange(2) == 1)[:, None, None])

    def total(queries, keys, values):
        out = attend_to_one(queries, keys, values, allowed, None)
        return (out**2).sum(), out

    grads, found = quick_jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    mean = np.asarray(inputs[2])[0].mean(1)[:, None, None, :]
    np.testing.assert_allclose(found[0], np.broadcast_to(mean, found[0].shape), atol=1e-6)
    chex.assert_tree_all_finite(grads)
    assert np.abs(grads[0][1]).max() > 0


def test_softmax_is_in_float32_for_bfloat16_inputs():
    inputs, allowed = attention_inputs(4, num_slots=64)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    found = quick_jit(partial(attend_to_one, softcap=None))(*inputs, allowed)
    np.testing.assert_allclose(found, attend_in_numpy(*inputs, allowed, None), atol=1.5e-2)
    steps = str(jax.make_jaxpr(partial(attend_to_one, softcap=None))(*inputs, allowed))
    exponentials = [line for line in steps.splitlines() if "= exp " in line]
    assert exponentials
    assert all("f32[" in line for line in exponentials)


def test_attention_in_parts_is_attention_to_all_of_them():
    (queries, keys, values), allowed = attention_inputs(4, num_slots=9)
    allowed = allowed.at[0, 1, :4].set(False)  # one query attends to no column of a segment
    parts = [slice(0, 4), slice(4, 7), slice(7, 9)]

    def in_parts(queries, keys, values):
        cut = [part(keys[:, :, p], values[:, :, p], allowed[:, :, p]) for p in parts]
        return attend(queries, cut, 1.5)

    found = quick_jit(in_parts)(queries, keys, values)
    np.testing.assert_allclose(found, attend_in_numpy(queries, keys, values, allowed, 1.5), atol=1e-6)
    whole = jax.grad(lambda *x: (attend_to_one(*x, allowed, 1.5) ** 2).sum(), argnums=(0, 1, 2))(queries, keys, values)
    split = jax.grad(lambda *x: (in_parts(*x) ** 2).sum(), argnums=(0, 1, 2))(queries, keys, values)
    chex.assert_trees_all_close(whole, split, atol=1e-5)


def test_keys_are_shared_by_adjacent_rows_or_by_those_named():
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(6, 2, 3, 1, 8)), jnp.float32)
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 5, 8)), jnp.float32) for _ in range(2))
    allowed = jnp.asarray(rng.random((2, 1, 5)) < 0.7).at[:, :, 0].set(True)

    def shared(queries, gather_index=None, scatter_index=None):
        return attend(queries, [part(keys, values, allowed, gather_index, scatter_index)], None)

    adjacent = quick_jit(shared)(queries)
    each = [np.repeat(np.asarray(x), 3, axis=0) for x in (keys, values, allowed)]
    np.testing.assert_allclose(adjacent, attend_in_numpy(queries, *each, None), atol=1e-6)
    order = np.array([5, 0, 3])  # two of the second entry's rows and one of the first's, in places of their own
    gather, place = jnp.array([[1, 0, 0, 2, 0, 0]]), jnp.array([[3, 0, 5]])
    gather = gather.at[0, 5].set(2).at[0, 3].set(0)
    some = quick_jit(shared)(queries[order], gather, place)
    np.testing.assert_allclose(some, np.asarray(adjacent)[order], atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(offset):
    x = jnp.asarray(np.random.default_rng(0).normal(0, 5, (2, 3, 8)), jnp.float32)
    scale = jnp.arange(8.0)
    found = Norm(1e-2, offset, jnp.float32).apply({"params": {"scale": scale}}, x)
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * (offset + np.arange(8.0))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert (
        Norm(1e-2, offset, jnp.float32).apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16)).dtype
        == jnp.bfloat16
    )


def test_an_id_outside_the_vocabulary_gets_the_nearest_row():
    table = jnp.arange(6.0).reshape(3, 2)
    found = Embedding(3, 2, jnp.float32).apply({"params": {"embedding": table}}, jnp.array([[-5, 1, 99]]), jnp.float32)
    np.testing.assert_array_equal(found, table[jnp.array([[0, 1, 2]])])


# Keys and values in int8 -------------------------------------------------------------------------------------------


def test_int8_is_off_by_at_most_half_a_step():
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(2, 3, 16, 64)) * 10.0 ** np.linspace(-6, 6, 64)[None, None, None]
    )
    x = x.astype(jnp.float32).at[0, 0, :, 0].set(0)
    whole, scales = quantize(x, axis=2)
    assert whole.dtype == jnp.int8
    assert scales.shape == (2, 3, 64)
    error = np.abs(np.asarray(whole, np.float64) * np.asarray(scales)[:, :, None] - np.asarray(x))
    # With the rounding of a division and of a product in float32.
    assert (error <= np.asarray(scales)[:, :, None] * (0.5 + 1e-4)).all()
    assert (np.abs(np.asarray(whole)).max(2) == 127).sum() == 2 * 3 * 64 - 1  # all but the zeros
    assert not np.asarray(whole)[0, 0, :, 0].any()


def test_attention_to_int8_is_attention_to_what_it_stands_for():
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(2, 3, 2, 4, 16)), jnp.float32)
    own = {
        "keys": jnp.asarray(rng.normal(size=(2, 3, 16, 64)), jnp.float32),
        "values": jnp.asarray(rng.normal(size=(2, 3, 64, 16)), jnp.float32),
    }
    (keys, key_scales), (values, value_scales) = quantize(own["keys"], axis=2), quantize(own["values"], axis=3)
    empty = {name: jnp.zeros_like(x) for name, x in own.items()} | {"keys": jnp.zeros_like(keys)}
    empty |= {"values": jnp.zeros_like(values)}
    empty |= {"key_scales": jnp.zeros_like(key_scales), "value_scales": jnp.zeros_like(value_scales)}
    entry = write(empty, own, 0)
    stands_for = {
        "keys": keys.astype(jnp.float32) * key_scales[:, :, None, :],
        "values": values.astype(jnp.float32) * value_scales[:, :, :, None],
    }
    allowed = jnp.asarray(rng.random((2, 4, 64)) < 0.7)
    found = attend(queries, [KVSegment(entry, allowed)], None)
    np.testing.assert_allclose(found, attend(queries, [KVSegment(stands_for, allowed)], None), atol=1e-5)
    exact = attend(queries, [KVSegment(own, allowed)], None)
    assert 1e-4 < np.abs(np.asarray(found - exact)).max() < 5e-2
