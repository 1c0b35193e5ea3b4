import inspect
from functools import partial

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from jax.sharding import NamedSharding, PartitionSpec
from oracle import f32, f64

from grpo_jax.log_probs import ChunkedHead, chunked_log_probs, output_logits, token_entropy, token_log_probs
from grpo_jax.log_probs import scored as scored_by

B, T, D, V = 3, 5, 4, 7

scored = jax.jit(token_log_probs, static_argnames="temperature")
entropies = jax.jit(token_entropy, static_argnames="temperature")
multiplied = jax.jit(output_logits, static_argnames="logit_softcap")


def problem(shape=(B, T), dtype=np.float32):
    """Hidden states, head, token ids and two arrays of weights."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(*shape, D)), rng.normal(size=(V, D))
    w1, w2 = f32(rng.normal(size=(2, *shape)))
    return hidden.astype(dtype), head.astype(dtype), rng.integers(0, V, shape, dtype=np.int32), w1, w2


def plain_log_probs(hidden, head, ids, *, temperature=1.0, logit_softcap=None):
    """What ``chunked_log_probs`` says it is the same as."""
    logits = output_logits(hidden, head, logit_softcap=logit_softcap)
    return token_log_probs(logits, ids, temperature=temperature), token_entropy(logits, temperature=temperature)


def weighted(score, ids, w1, w2):
    """A scalar in which every log-probability and every entropy counts with a weight of its own."""

    def scalar(hidden, head):
        log_probs, entropy = score(hidden, head, jnp.asarray(ids))
        return (log_probs * w1 + entropy * w2).sum(), (log_probs, entropy)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))


def jaxprs_in(jaxpr):
    """A jaxpr and all that are nested in its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from jaxprs_in(inner)


def largest_array(f, *args):
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return max(v.aval.size for inner in jaxprs_in(jaxpr) for e in inner.eqns for v in [*e.invars, *e.outvars])


def equations(f, name, *args):
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return [e for inner in jaxprs_in(jaxpr) for e in inner.eqns if e.primitive.name == name]


# Logits --------------------------------------------------------------------------------------------------------------


def test_output_logits_agree_with_the_oracle():
    hidden, head, *_ = problem()
    expected = f64(hidden) @ f64(head).T
    np.testing.assert_allclose(multiplied(hidden, head), expected, rtol=1e-5, atol=1e-5)
    capped = np.asarray(multiplied(hidden, head, logit_softcap=2.0))
    np.testing.assert_allclose(capped, oracle.softcapped(expected, 2.0), rtol=1e-5, atol=1e-5)
    assert np.abs(capped).max() < 2.0 < np.abs(expected).max()


def test_output_logits_take_any_number_of_token_axes():
    hidden, head, *_ = problem()
    one_token = multiplied(hidden[0, 0], head)
    np.testing.assert_allclose(one_token, np.asarray(multiplied(hidden, head))[0, 0], rtol=1e-6)


def test_output_logits_of_bfloat16_are_accumulated_and_returned_in_float32():
    hidden, head = np.full((1, 1, 1000), 1 + 2**-7, jnp.bfloat16), np.ones((1, 1000), jnp.bfloat16)
    logits = multiplied(hidden, head)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, 1000 * (1 + 2**-7))


def test_the_head_is_cast_to_the_dtype_of_the_hidden_states():
    hidden, head = np.ones((1, 1, 1), jnp.bfloat16), np.full((1, 1), 1 + 2**-12, np.float32)
    np.testing.assert_array_equal(multiplied(hidden, head), 1)


# Log-probabilities and entropy ---------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, (2, V), elements=st.floats(-80, 80, width=32)), st.sampled_from([1.0, 0.5, 2.0]))
def test_log_probs_and_entropy_agree_with_the_oracle(logits, temperature):
    ids = np.array([0, V - 1])
    expected = oracle.token_log_probs(logits, ids, temperature)
    np.testing.assert_allclose(scored(logits, ids, temperature=temperature), expected, rtol=1e-5, atol=1e-5)
    expected = oracle.token_entropy(logits, temperature)
    np.testing.assert_allclose(entropies(logits, temperature=temperature), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, 40.0, -300.0, 1e4])
def test_a_common_offset_of_the_logits_costs_no_digits(offset):
    logits = f32(np.random.default_rng(0).normal(size=(200, V)) * 3 + offset)
    ids = np.arange(200) % V
    np.testing.assert_allclose(scored(logits, ids), oracle.token_log_probs(logits, ids), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(entropies(logits), oracle.token_entropy(logits), rtol=1e-6, atol=1e-5)


@jax.jit
def gradient_of_both(logits, ids):
    return jax.grad(lambda z: token_log_probs(z, ids).sum() + token_entropy(z).sum())(logits)


def test_extreme_logits_stay_finite():
    logits, ids = f32([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]), np.array([1, 2])
    np.testing.assert_allclose(scored(logits, ids), [-2e4, -np.log(3)], rtol=1e-5)
    np.testing.assert_allclose(entropies(logits), [0, np.log(3)], rtol=1e-5, atol=1e-5)
    assert np.isfinite(gradient_of_both(logits, ids)).all()


def test_a_removed_token_has_log_probability_minus_infinity_and_adds_nothing_to_the_entropy():
    logits = f32([[0.0, 0.0, -np.inf], [-np.inf, 1.0, 1.0]])
    np.testing.assert_array_equal(scored(logits, np.array([2, 0])), -np.inf)
    np.testing.assert_allclose(scored(logits, np.array([0, 1])), np.log(0.5), rtol=1e-6)
    np.testing.assert_allclose(entropies(logits), np.log(2), rtol=1e-6)
    expected = [[0.5, -0.5, 0], [0, 0.5, -0.5]]  # of the log-probability; that of the entropy is 0 here
    np.testing.assert_allclose(gradient_of_both(logits, np.array([0, 1])), expected, atol=1e-6)


def test_a_vocabulary_of_one_token_has_log_probability_and_entropy_0():
    logits = f32([[3.0], [-1e4]])
    np.testing.assert_array_equal(scored(logits, np.array([0, 0])), 0)
    np.testing.assert_array_equal(entropies(logits), 0)


def test_t7_temperature_half_on_logits_0_and_ln_3_gives_log_9_tenths():
    logits = f32([[0.0, np.log(3)]])
    np.testing.assert_allclose(scored(logits, np.array([1]), temperature=0.5), np.log(0.9), rtol=1e-6)
    hidden, head, ids = np.ones((1, 1, 1), np.float32), f32([[0.0], [np.log(3)]]), np.array([[1]])
    log_probs, entropy = jax.jit(partial(chunked_log_probs, temperature=0.5))(hidden, head, ids)
    np.testing.assert_allclose(log_probs, [[np.log(0.9)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[-0.9 * np.log(0.9) - 0.1 * np.log(0.1)]], rtol=1e-6)


def test_t8_log_probs_at_t_score_token_t_with_the_state_at_t():
    hidden, head, ids, *_ = problem()
    expected = oracle.token_log_probs(f64(hidden) @ f64(head).T, ids)
    ours, _ = jax.jit(partial(chunked_log_probs, chunk_size=2 * B))(hidden, head, ids)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected[:, 1:] - expected[:, :-1]).min() > 1e-3  # so that a shift by one would be seen


def test_t9_bfloat16_logits_are_normalized_in_float32():
    logits = np.broadcast_to(np.linspace(-3, 3, 300).astype(jnp.bfloat16), (300, 300))
    log_probs, entropy = scored(logits, np.arange(300), temperature=0.7), entropies(logits, temperature=0.7)
    assert log_probs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, oracle.log_softmax(f64(logits), 0.7)[0], atol=1e-5)
    np.testing.assert_allclose(entropy, oracle.token_entropy(f64(logits), 0.7), atol=1e-5)


def test_gradients_agree_with_finite_differences_of_the_oracle():
    temperature = 0.7
    hidden, head, ids, w1, w2 = problem()

    h64, head64, w1_64, w2_64 = (np.asarray(x, np.float64) for x in (hidden, head, w1, w2))

    def scalar(hidden, head):
        logits = oracle.softcapped(hidden @ head.T, 3.0)
        log_probs, entropy = oracle.token_log_probs(logits, ids, temperature), oracle.token_entropy(logits, temperature)
        return (log_probs * w1_64 + entropy * w2_64).sum()

    score = partial(chunked_log_probs, temperature=temperature, logit_softcap=3.0, chunk_size=2 * B)
    _, (grad_hidden, grad_head) = weighted(score, ids, w1, w2)(hidden, head)
    np.testing.assert_allclose(grad_hidden, oracle.numeric_grad(lambda h: scalar(h, head64), h64), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_head, oracle.numeric_grad(lambda w: scalar(h64, w), head64), rtol=1e-4, atol=1e-5)


# Chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_size", "knobs"),
    [
        (1, {}),
        (2 * B, {"temperature": 0.6}),  # 2 of 5 tokens at a time: the last chunk is padded
        (3 * B + 1, {"temperature": 1.7, "logit_softcap": 0.8}),
        (1024, {"logit_softcap": 1.5}),
    ],
)
def test_chunked_equals_unchunked_in_values_and_gradients(chunk_size, knobs):
    hidden, head, ids, w1, w2 = problem()
    chunked = weighted(partial(chunked_log_probs, chunk_size=chunk_size, **knobs), ids, w1, w2)
    plain = weighted(partial(plain_log_probs, **knobs), ids, w1, w2)
    ((_, values), grads), ((_, plain_values), plain_grads) = chunked(hidden, head), plain(hidden, head)
    chex.assert_type([*values, *grads], jnp.float32)
    chex.assert_trees_all_close((values, grads), (plain_values, plain_grads), rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_a_head_the_hidden_states_are_the_logits(dtype):
    hidden, head, ids, w1, w2 = problem()
    logits = jnp.asarray(hidden @ head.T, dtype).at[:, :, 0].set(-jnp.inf)
    ids = jnp.maximum(ids, 1)
    found = multiplied(logits, None, logit_softcap=2.0)
    np.testing.assert_allclose(found, oracle.softcapped(f64(logits.astype(jnp.float32)), 2.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(multiplied(logits, None), logits.astype(jnp.float32))

    def scalar(score, logits):
        log_probs, entropy = score(logits)
        return (w1 * log_probs + w2 * entropy).sum(), (log_probs, entropy)

    def plain(logits):
        logits = logits.astype(jnp.float32)  # once, so that the gradient is rounded once
        return token_log_probs(logits, ids), token_entropy(logits)

    chunked = partial(chunked_log_probs, head=None, token_ids=ids, chunk_size=2 * B)
    found, wanted = (
        jax.jit(jax.value_and_grad(partial(scalar, score), has_aux=True))(logits) for score in (chunked, plain)
    )
    assert jnp.isfinite(found[1].astype(jnp.float32)).all()
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_chunked_equals_unchunked_in_bfloat16():
    hidden, head, ids, w1, w2 = problem(dtype=jnp.bfloat16)
    chunked = weighted(partial(chunked_log_probs, chunk_size=2 * B), ids, w1, w2)
    plain = weighted(plain_log_probs, ids, w1, w2)
    ((_, values), grads), ((_, plain_values), plain_grads) = chunked(hidden, head), plain(hidden, head)
    chex.assert_type([*values, *grads], [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16])
    chex.assert_trees_all_close(values, plain_values, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_dtypes(grads, plain_grads)
    chex.assert_trees_all_close(*jax.tree.map(f32, (grads, plain_grads)), rtol=2e-2, atol=2e-2)


def test_the_gradient_of_the_head_is_accumulated_in_float32():
    # 1024 chunks add 0.5 each; a sum in bfloat16 would stand still at 128.
    hidden, head = np.ones((1, 1024, 1), jnp.bfloat16), np.zeros((2, 1), jnp.bfloat16)
    ids = np.zeros((1, 1024), np.int32)
    grad = jax.jit(
        jax.grad(lambda w: chunked_log_probs(jnp.asarray(hidden), w, jnp.asarray(ids), chunk_size=1)[0].sum())
    )(head)
    np.testing.assert_array_equal(f32(grad), [[512], [-512]])


@pytest.mark.parametrize(
    ("chunk_size", "num_chunks", "width"),
    [(1, 6, 1), (2, 6, 1), (3, 6, 1), (4, 3, 2), (5, 3, 2), (6, 2, 3), (8, 2, 4), (12, 1, 6), (1024, 1, 6)],
)
def test_chunks_are_cut_along_T_and_hold_at_least_one_token_of_each_sequence(chunk_size, num_chunks, width):
    hidden, head, ids = np.ones((2, 6, D), np.float32), np.ones((V, D), np.float32), np.zeros((2, 6), np.int32)
    (scan,) = equations(partial(chunked_log_probs, chunk_size=chunk_size), "scan", hidden, head, ids)
    assert scan.params["length"] == num_chunks
    assert (num_chunks, 2, width, D) in [v.aval.shape for v in scan.invars]


def test_the_logits_of_the_batch_never_exist_at_once_forward_or_backward():
    b, t, d, v = 4, 64, 8, 96
    hidden, head, ids = np.ones((b, t, d), np.float32), np.ones((v, d), np.float32), np.zeros((b, t), np.int32)
    weights = np.ones((b, t), np.float32)

    def largest(score):
        def scalar(hidden, head):
            log_probs, entropy = score(hidden, head, jnp.asarray(ids))
            return (log_probs * weights + entropy * weights).sum()

        return largest_array(jax.value_and_grad(scalar, argnums=(0, 1)), hidden, head)

    assert largest(plain_log_probs) == b * t * v
    chunked = largest(partial(chunked_log_probs, chunk_size=32))
    assert chunked < b * t * v / 4
    assert chunked == max(32 * v, b * t * d)  # the logits of one chunk, or the hidden states themselves
    without_checkpoint = largest(partial(keep_residuals, chunk_size=32))
    assert without_checkpoint >= b * t * v  # the walk sees what a scan keeps for its backward pass


def keep_residuals(hidden, head, ids, *, chunk_size):
    """The chunked scan without recomputation: what the structural test has to be able to tell apart."""
    b, t, d = hidden.shape
    width = chunk_size // b
    states = jnp.moveaxis(hidden.reshape(b, t // width, width, d), 1, 0)
    tokens = jnp.moveaxis(ids.reshape(b, t // width, width), 1, 0)
    _, (log_probs, entropy) = jax.lax.scan(
        lambda _, x: (None, plain_log_probs(x[0], head, x[1])), None, (states, tokens)
    )
    return tuple(jnp.moveaxis(x, 0, 1).reshape(b, t) for x in (log_probs, entropy))


def test_compiled_chunks_take_less_memory_than_the_logits():
    b, t, d, v = 4, 64, 8, 512
    hidden, head, ids = np.ones((b, t, d), np.float32), np.ones((v, d), np.float32), jnp.zeros((b, t), jnp.int32)

    def temporary_bytes(score):
        f = jax.jit(jax.grad(lambda h, w: sum(x.sum() for x in score(h, w, ids)), argnums=(0, 1)))
        analysis = f.lower(hidden, head).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes(partial(chunked_log_probs, chunk_size=16)) < 4 * b * t * v / 2
    assert temporary_bytes(plain_log_probs) >= 4 * b * t * v


def test_a_batch_sharded_over_eight_devices_stays_where_it_is_and_scores_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    hidden, head, ids, w1, w2 = problem(shape=(8, T))
    score = partial(chunked_log_probs, chunk_size=16)
    (_, values), grads = weighted(score, ids, w1, w2)(hidden, head)

    def put(x):
        return jax.device_put(x, rows)

    sharded_hidden, sharded_head = put(hidden), jax.device_put(head, everywhere)
    (_, sharded_values), sharded_grads = weighted(score, put(ids), put(w1), put(w2))(sharded_hidden, sharded_head)
    chex.assert_trees_all_close((sharded_values, sharded_grads), (values, grads), rtol=1e-5, atol=1e-6)
    assert sharded_grads[0].sharding.is_equivalent_to(rows, 3)

    program = str(jax.jit(score).lower(sharded_hidden, sharded_head, put(ids)).compile().as_text())
    assert "f32[1," in program  # one sequence on each device
    for movement in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert movement not in program


# Errors and traced settings ------------------------------------------------------------------------------------------


def test_a_traced_temperature_gives_the_static_result_in_one_trace():
    chex.clear_trace_counter()
    hidden, head, ids, *_ = problem()

    def every(hidden, head, ids, temperature):
        logits = output_logits(hidden, head)
        plain = token_log_probs(logits, ids, temperature=temperature), token_entropy(logits, temperature=temperature)
        return plain, chunked_log_probs(hidden, head, ids, temperature=temperature, chunk_size=2 * B)

    traced = jax.jit(chex.assert_max_traces(every, n=1))
    for temperature in (0.7, 1.0, 2.0):
        static = jax.jit(partial(every, temperature=temperature))(hidden, head, ids)
        chex.assert_trees_all_close(traced(hidden, head, ids, f32(temperature)), static, rtol=1e-5, atol=1e-6)


def test_shapes_and_types_that_do_not_fit_are_refused_at_trace_time_and_named():
    hidden, head, ids, *_ = problem()
    logits = np.zeros((B, T, V), np.float32)

    def trace(f, *arrays, **options):
        jax.eval_shape(lambda *x: inspect.unwrap(f)(*x, **options), *arrays)  # without the tests' check of annotations

    for f, arrays, name in [
        (token_log_probs, (logits, ids[0]), "token_ids: one per row of logits"),
        (token_log_probs, (logits, f32(ids)), "token_ids"),
        (output_logits, (hidden, head.T), "head: .*"),
        (chunked_log_probs, (hidden, head, ids[:, 1:]), "token_ids: one per hidden state"),
        (chunked_log_probs, (hidden[0], head, ids), "hidden"),
    ]:
        with pytest.raises(AssertionError, match=rf"\[{name}"):
            trace(f, *arrays)
    with pytest.raises(AssertionError, match=r"\[temperature\]"):
        trace(token_entropy, logits, temperature=jnp.ones(V))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_not_above_0_is_refused_by_name_and_value(temperature):
    hidden, head, ids, *_ = problem()
    logits = np.zeros((B, T, V), np.float32)
    for f, arrays in [
        (token_log_probs, (logits, ids)),
        (token_entropy, (logits,)),
        (chunked_log_probs, (hidden, head, ids)),
    ]:
        with pytest.raises(ValueError, match=f"temperature is {temperature}.*above 0"):
            jax.eval_shape(partial(f, temperature=temperature), *arrays)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_a_chunk_size_below_1_is_refused_by_name_and_value(chunk_size):
    hidden, head, ids, *_ = problem()
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size}.*at least 1"):
        jax.eval_shape(partial(chunked_log_probs, chunk_size=chunk_size), hidden, head, ids)


# Tokens that are not scored; inputs and outputs without a gradient ----------------------------------------------------


def test_chunks_without_a_wanted_token_are_skipped_forward_and_backward():
    hidden, head, ids, w1, w2 = problem()
    hidden[:, 2:4] = np.nan  # would reach every gradient of the head
    mask = np.zeros((B, T), bool)
    mask[0, 0] = mask[2, 4] = True
    score = partial(chunked_log_probs, chunk_size=2 * B, mask=jnp.asarray(mask))  # columns 0-1, 2-3, 4
    weights = jnp.where(mask, w1, 0), jnp.where(mask, w2, 0)
    (_, values), grads = weighted(score, ids, *weights)(hidden, head)
    clean = np.nan_to_num(hidden)
    (_, wanted), wanted_grads = weighted(plain_log_probs, ids, *weights)(clean, head)
    for ours, theirs in zip(values, wanted, strict=True):
        np.testing.assert_allclose(ours[mask], theirs[mask], rtol=1e-5)
        np.testing.assert_array_equal(ours[:, 2:4], 0)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk_size", "min_chunks", "length"), [(1024, 8, 7), (4, 8, 10), (1024, 1, 1)])
def test_chunks_are_no_wider_than_a_share_of_the_columns(chunk_size, min_chunks, length):
    """Of 20 columns an eighth, rounded up, are 3; a chunk of 4 tokens of 2 sequences has 2."""
    arrays = jnp.ones((2, 20, D)), jnp.ones((V, D)), jnp.zeros((2, 20), jnp.int32), None
    method = ChunkedHead(chunk_size, min_chunks=min_chunks)
    (scan,) = equations(lambda *args: scored_by(method, *args, 1.0), "scan", *arrays)
    assert scan.params["length"] == length


def test_a_mask_of_false_scores_nothing():
    hidden, head, ids, w1, w2 = problem()
    score = partial(chunked_log_probs, mask=jnp.zeros((B, T), bool))
    for x in jax.tree.leaves(weighted(score, ids, w1, w2)(hidden, head)):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_gradient_of_a_traced_temperature(softcap):
    hidden, head, ids, w1, w2 = problem()

    def scalar(score, temperature):
        arrays = (jnp.asarray(x) for x in (hidden, head, ids))
        log_probs, entropy = score(*arrays, temperature=temperature, logit_softcap=softcap)
        return (log_probs * w1 + entropy * w2).sum()

    temperature = jnp.float32(0.7)
    found, wanted = (
        jax.jit(jax.value_and_grad(partial(scalar, score)))(temperature)
        for score in (partial(chunked_log_probs, chunk_size=2 * B), plain_log_probs)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)


def test_the_entropy_costs_nothing_in_the_backward_pass_if_it_has_no_gradient():
    hidden, head, ids, w1, w2 = problem()

    def elementwise(of_entropy):
        def scalar(hidden):
            log_probs, entropy = chunked_log_probs(hidden, jnp.asarray(head), jnp.asarray(ids))
            return (log_probs * w1).sum() + of_entropy(entropy * w2).sum(), entropy

        return len(equations(jax.grad(scalar, has_aux=True), "mul", jnp.asarray(hidden)))

    assert elementwise(jax.lax.stop_gradient) < elementwise(lambda x: x)


def test_logits_are_computed_once_forward_and_once_backward():
    hidden, head, ids, *_ = problem()

    def scalar(hidden, head):
        return chunked_log_probs(hidden, head, jnp.asarray(ids))[0].sum()

    gradient = jax.value_and_grad(scalar, argnums=(0, 1))
    products = equations(gradient, "dot_general", jnp.asarray(hidden), jnp.asarray(head))
    assert len(products) == 4  # the logits twice, and a gradient each of hidden states and head
