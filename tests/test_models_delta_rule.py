"""The gated delta rule and its convolution: against transformers, a loop in float64, and themselves in parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as reference

from grpo_jax.models.delta_rule import (
    causal_conv,
    chunked_delta_rule,
    recurrent_delta_rule_step,
    unit_lower_inverse,
    unit_vectors,
)
from grpo_jax.types import Segments

B, S, K, H, E, F, C, W = 2, 75, 2, 4, 8, 6, 5, 4
chunked = jax.jit(partial(chunked_delta_rule, chunk_size=16))
chunked_in = jax.jit(chunked_delta_rule, static_argnames="chunk_size")
conv = jax.jit(causal_conv)
step = jax.jit(recurrent_delta_rule_step)

# Rows of (tokens, number of the segment that it continues): prefixes that end before a chunk of 16 tokens, at its end,
# and within it; segments that span chunks; a prefix without tokens (a prompt of one token), and one shorter than W.
SHARED = [
    [(20, 0), (10, 1), (7, 1), (1, 0), (3, 4), (9, 4), (4, 99), (3, 0), (10, 8)],
    [(16, 0), (16, 1), (2, 1), (5, 0), (2, 4), (20, 4)],
]


def layout(rows, tokens):
    """Segment ids, prefix ids, and the column of the token before each token: -1 for none, -2 for padding."""
    ids, prefixes, parents = np.zeros((3, len(rows), tokens), np.int32)
    parents -= 2
    for r, row in enumerate(rows):
        column, ends = 0, {}
        for number, (length, prefix) in enumerate(row, 1):
            own = slice(column, column + length)
            ids[r, own], prefixes[r, own] = number, prefix
            parents[r, own] = [ends.get(prefix, -1), *range(column, column + length - 1)]
            column += length
            ends[number] = column - 1
    return ids, prefixes, parents


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    queries, keys = unit(rng.normal(size=(B, S, K, E))) * E**-0.5, unit(rng.normal(size=(B, S, K, E)))
    log_decays = -np.exp(2 * rng.normal(size=(B, S, H)) - 1)
    arrays = queries, keys, rng.normal(size=(B, S, H, F)), log_decays, rng.uniform(size=(B, S, H))
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def loop(arrays, parents, initial=None):
    """Outputs, and the states after every token, by the definition."""
    queries, keys, values, log_decays, betas = (np.asarray(x, np.float64) for x in arrays)
    states = np.zeros((B, S + 1, H, E, F))  # the last is the state before the first token, where parents are -1
    states[:, -1] = 0 if initial is None else initial
    outputs = np.zeros((B, S, H, F))
    for r, t, h in np.ndindex(B, S, H):
        if parents[r, t] >= -1:
            key, state = keys[r, t, h // (H // K)], states[r, parents[r, t], h] * np.exp(log_decays[r, t, h])
            state = state + betas[r, t, h] * np.outer(key, values[r, t, h] - state.T @ key)
            outputs[r, t, h], states[r, t, h] = state.T @ queries[r, t, h // (H // K)], state
    return outputs, states


def in_order(mask):
    """Parents of the real tokens of whole sequences."""
    parents = np.full(mask.shape, -2)
    for r, row in enumerate(mask):
        columns = np.flatnonzero(row)
        parents[r, columns] = [-1, *columns[:-1]]
    return parents


def test_the_recurrence_is_that_of_the_loop_to_float32(arrays):
    outputs, states = chunked(*arrays)
    expected, expected_states = loop(arrays, in_order(np.ones((B, S))))
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_allclose(states, expected_states[:, S - 1], atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 64, 128])
def test_chunk_sizes_give_the_same_outputs(arrays, chunk_size):
    outputs, states = chunked_in(*arrays, chunk_size=chunk_size)
    np.testing.assert_allclose(outputs, chunked(*arrays)[0], atol=1e-6)
    np.testing.assert_allclose(states, chunked(*arrays)[1], atol=1e-6)


def test_a_chunk_size_that_cannot_be_halved_is_refused(arrays):
    with pytest.raises(ValueError, match="chunk_size is 48; it must be a power of two"):
        chunked_delta_rule(*arrays, chunk_size=48)


def test_transformers_gives_the_same():
    rng = np.random.default_rng(1)
    queries, keys, values = (
        torch.from_numpy(rng.normal(size=(B, S, n, w)).astype("f")) for n, w in [(K, E)] * 2 + [(H, F)]
    )
    log_decays, betas = torch.from_numpy(-rng.exponential(size=(B, S, H)).astype("f")), torch.rand(B, S, H)
    initial = torch.from_numpy(rng.normal(size=(B, H, E, F)).astype("f"))
    outputs, states = reference.torch_chunk_gated_delta_rule(
        queries, keys, values, log_decays, betas, 16, initial, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ours = [jnp.asarray(x.numpy()) for x in (queries, keys, values, log_decays, betas)]
    ours[:2] = unit_vectors(ours[0]) * E**-0.5, unit_vectors(ours[1])
    result = chunked(*ours, initial_state=jnp.asarray(initial.numpy()))
    np.testing.assert_allclose(result[0], outputs, atol=3e-6)
    np.testing.assert_allclose(result[1], states, atol=3e-6)


@pytest.mark.parametrize("tokens", [40, 64])
def test_a_sequence_continues_in_a_second_call_or_token_by_token(arrays, tokens):
    expected, final = chunked(*arrays)
    outputs, state = chunked(*(x[:, :tokens] for x in arrays))
    np.testing.assert_allclose(outputs, expected[:, :tokens], atol=1e-6)
    rest, last = chunked(*(x[:, tokens:] for x in arrays), initial_state=state)
    np.testing.assert_allclose(rest, expected[:, tokens:], atol=1e-6)
    np.testing.assert_allclose(last, final, atol=1e-6)
    for t in range(tokens, S):
        output, state = step(*(x[:, t] for x in arrays), state)
        np.testing.assert_allclose(output, expected[:, t], atol=1e-6)
    np.testing.assert_allclose(state, final, atol=1e-6)


def test_padding_on_either_side_leaves_states_unchanged(arrays):
    columns = np.arange(S)
    mask = jnp.asarray([(columns >= 21) & (columns < 70), columns < 40])
    initial = jnp.asarray(np.random.default_rng(2).normal(size=(B, H, E, F)), jnp.float32)
    outputs, states = chunked(*arrays, mask, initial_state=initial)
    expected, expected_states = loop(arrays, in_order(np.asarray(mask)), initial)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_allclose(states, expected_states[[0, 1], [69, 39]], atol=1e-6)
    np.testing.assert_array_equal(chunked(*arrays, jnp.zeros((B, S), bool), initial_state=initial)[1], initial)


def test_each_segment_starts_from_zeros(arrays):
    ids, _, parents = layout([[(20, 0), (12, 0), (1, 0), (30, 0)], [(16, 0), (50, 0)]], S)
    outputs, states = chunked(*arrays, jnp.asarray(ids))
    expected, expected_states = loop(arrays, parents)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_allclose(states, expected_states[[0, 1], [62, 65]], atol=1e-6)


def test_segments_continue_their_prefix(arrays):
    ids, prefixes, parents = layout(SHARED, S)
    mask = Segments(jnp.asarray(ids), jnp.asarray(prefixes), jnp.zeros_like(ids))
    expected, expected_states = loop(arrays, parents)
    last = (ids > 0).sum(1) - 1
    for chunk_size in (8, 64):
        outputs, states = chunked_in(*arrays, mask, chunk_size=chunk_size)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
        np.testing.assert_allclose(states, expected_states[[0, 1], last], atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_the_recurrence(arrays, packed):
    ids, prefixes, parents = layout(SHARED, S) if packed else (None, None, in_order(np.ones((B, S))))
    mask = Segments(jnp.asarray(ids), jnp.asarray(prefixes), jnp.zeros_like(ids)) if packed else None
    cotangents = jnp.asarray(np.random.default_rng(3).normal(size=(B, S, H, F)), jnp.float32)
    cotangents = jnp.where((parents >= -1)[:, :, None, None], cotangents, 0)

    def recurrent(*arrays):
        def token(states, inputs):
            t, parent, *own = inputs
            before = states[jnp.arange(B), jnp.where(parent < 0, S, parent)]
            outputs, state = recurrent_delta_rule_step(*own, before)
            return states.at[:, t].set(state), outputs

        columns = (jnp.arange(S), jnp.asarray(parents.T), *(x.swapaxes(0, 1) for x in arrays))
        return jax.lax.scan(token, jnp.zeros((B, S + 1, H, E, F)), columns)[1].swapaxes(0, 1)

    def gradients(function):
        return jax.jit(jax.grad(lambda *xs: jnp.sum(function(*xs) * cotangents), argnums=range(5)))(*arrays)

    ours = gradients(lambda *xs: chunked_delta_rule(*xs, mask, chunk_size=16)[0])
    for x, expected in zip(ours, gradients(recurrent), strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-5)


def test_equal_keys_do_not_lose_accuracy(arrays):
    # A degenerate completion repeats a token: all entries of the triangular matrix are then 1.
    keys, betas = jnp.broadcast_to(arrays[1][:, :1], arrays[1].shape), jnp.ones((B, S, H))
    inputs = [arrays[0], keys, arrays[2], jnp.zeros((B, S, H)), betas]
    outputs, _ = chunked_in(*inputs, chunk_size=64)
    np.testing.assert_allclose(outputs, loop(inputs, in_order(np.ones((B, S))))[0], atol=1e-5)


def test_inverse_of_triangular_matrices():
    lower = np.tril(np.random.default_rng(4).normal(size=(3, 16, 16)), -1) / 2
    inverse = unit_lower_inverse(jnp.asarray(lower, jnp.float32))
    np.testing.assert_allclose(
        inverse @ jnp.asarray(np.eye(16) + lower, jnp.float32), np.eye(16)[None].repeat(3, 0), atol=1e-5
    )


@pytest.fixture(scope="module")
def signal():
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(B, S, C), (C, W), (C,), (B, W - 1, C)]]


def convolve(x, weights, bias, parents, state):
    """Outputs by the definition: the tokens before one are its chain of parents, then the state."""
    out = np.zeros(x.shape)
    for r, t in np.ndindex(*x.shape[:2]):
        column, inputs = t, []
        while column >= 0:
            inputs.append(x[r, column])
            column = parents[r, column]
        inputs += [*state[r, ::-1], *np.zeros((W, x.shape[2]))]
        out[r, t] = bias + sum(weights[:, W - 1 - d] * inputs[d] for d in range(W))
    return out


def test_convolution_is_that_of_transformers(signal):
    x, weights, bias, _ = signal
    torched = [torch.from_numpy(np.array(each)) for each in (x.swapaxes(1, 2), weights, bias)]
    expected = reference.causal_conv1d_fn(*torched).transpose(1, 2)
    outputs, state = conv(x, weights, bias)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_array_equal(state, x[:, -3:])


@pytest.mark.parametrize("sizes", [(40, 35), (2, 1, 1, 71)])
def test_convolution_continues_in_later_calls(signal, sizes):
    x, weights, bias, state = signal
    expected, last = conv(x, weights, bias, state=state)
    np.testing.assert_allclose(
        expected, convolve(*map(np.asarray, signal[:3]), in_order(np.ones((B, S))), state), atol=1e-6
    )
    start = 0
    for size in sizes:
        outputs, state = causal_conv(x[:, start : start + size], weights, bias, state=state)
        np.testing.assert_allclose(outputs, expected[:, start : start + size], atol=1e-6)
        start += size
    np.testing.assert_array_equal(state, last)


def test_convolution_of_padded_sequences(signal):
    x, weights, bias, _ = signal
    columns = np.arange(S)
    mask = np.asarray([(columns >= 21) & (columns < 70), columns < 2])
    outputs, state = conv(x, weights, bias, jnp.asarray(mask))
    expected = convolve(*map(np.asarray, signal[:3]), in_order(mask), np.zeros((B, 0, C)))
    np.testing.assert_allclose(outputs[mask], expected[mask], atol=1e-6)
    np.testing.assert_array_equal(state[0], x[0, 67:70])
    np.testing.assert_array_equal(state[1], [np.zeros(C), *x[1, :2]])
    before = signal[3]
    np.testing.assert_array_equal(conv(x, weights, bias, jnp.zeros((B, S), bool), state=before)[1], before)
    assert conv(x.astype(jnp.bfloat16), weights)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("shared", [False, True])
def test_convolution_of_segments(signal, shared):
    x, weights, bias, _ = signal
    ids, prefixes, parents = layout(SHARED, S)
    mask = jnp.asarray(ids)
    if shared:
        mask = Segments(mask, jnp.asarray(prefixes), jnp.zeros_like(ids))
    else:
        parents = np.where(prefixes > 0, layout([[(n, 0) for n, _ in row] for row in SHARED], S)[2], parents)
    outputs, _ = conv(x, weights, bias, mask)
    expected = convolve(*map(np.asarray, signal[:3]), parents, np.zeros((B, 0, C)))
    np.testing.assert_allclose(outputs[ids > 0], expected[ids > 0], atol=1e-6)
