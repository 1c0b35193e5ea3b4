"""Head and embedding on a mesh: the numbers of one device, and what travels between devices."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.log_probs import chunked_log_probs
from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.models.lookup import lookup, sharded_lookup
from grpo_jax.models.output_head import make_token_scores
from grpo_jax.sharding import BATCH, make_mesh, param_shardings, shard_rows

B, T, D, V = 8, 6, 8, 24
MESHES = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4)]


def problem(dtype=jnp.float32, vocab=V):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, D), (vocab, D)))
    ids = jnp.asarray(rng.integers(0, vocab, (B, T)), jnp.int32)
    mask = np.zeros((B, T), bool)
    mask[:3, :2], mask[7, 5] = True, True
    weights = [jnp.asarray(np.where(mask, rng.normal(size=(B, T)), 0), jnp.float32) for _ in range(2)]
    return hidden, head, ids, jnp.asarray(mask), *weights


def weighted(score, w1, w2):
    def scalar(hidden, head, temperature):
        log_probs, entropy = score(hidden, head, temperature)
        return (log_probs * w1 + entropy * w2).sum(), (log_probs, entropy)

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(("vocab", "softcap", "chunk_size", "is_masked"), [(V, None, 2, True), (20, 1.5, 100, False)])
def test_a_head_over_devices_scores_as_on_one(sizes, vocab, softcap, chunk_size, is_masked):
    """A vocabulary of 20 does not divide over 8 devices; with a chunk of 2 tokens a device, some chunks are skipped."""
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    hidden, head, ids, mask, w1, w2 = problem(vocab=vocab)
    mask = mask if is_masked else None

    def plain(hidden, head, temperature):
        return chunked_log_probs(hidden, head, ids, temperature=temperature, logit_softcap=softcap)

    scores = make_token_scores(lambda head: head, logit_softcap=softcap, mesh=mesh)

    def sharded(hidden, head, temperature):
        return scores(head, hidden, shard_rows(ids, mesh), temperature=temperature, chunk_size=chunk_size, mask=mask)

    (_, wanted), wanted_grads = weighted(plain, w1, w2)(hidden, head, jnp.float32(0.7))
    placed = jax.device_put(head, NamedSharding(mesh, P("tensor", "fsdp")))
    (_, found), grads = weighted(sharded, w1, w2)(shard_rows(hidden, mesh), placed, jnp.float32(0.7))
    chex.assert_trees_all_close(grads, wanted_grads, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        wanted_tokens = slice(None) if mask is None else np.asarray(mask)
        np.testing.assert_allclose(np.asarray(ours)[wanted_tokens], np.asarray(theirs)[wanted_tokens], rtol=1e-5)


def test_rows_that_do_not_divide_are_scored_with_a_warning():
    mesh = make_mesh(data=2, fsdp=4)
    hidden, head, ids, *_ = problem()
    scores = make_token_scores(lambda head: head, logit_softcap=None, mesh=mesh)
    with pytest.warns(UserWarning, match="6 rows do not divide over data x fsdp = 8 devices"):
        found, _ = scores(head, hidden[:6], ids[:6])
    np.testing.assert_allclose(found, chunked_log_probs(hidden[:6], head, ids[:6])[0], rtol=1e-6)


def test_the_heads_gradient_is_summed_over_devices_in_float32():
    """The gradients of 8 devices, 1 and then 2**-9 seven times: in bfloat16 the sum of the two largest would be 1."""
    mesh = make_mesh(data=8)
    hidden = jnp.asarray([[[1.0]]] + [[[2.0**-9]]] * 7, jnp.bfloat16)
    ids = jnp.zeros((8, 1), jnp.int32)
    scores = make_token_scores(lambda head: head, logit_softcap=None, mesh=mesh)

    def scalar(head):
        return scores(head, shard_rows(hidden, mesh), shard_rows(ids, mesh))[0].sum()

    grad = jax.jit(jax.grad(scalar))(jnp.zeros((2, 1), jnp.float32))
    np.testing.assert_allclose(grad, np.array([[0.5], [-0.5]]) * (1 + 7 * 2**-9), rtol=1e-6)


def test_neither_head_nor_its_gradient_travels_in_a_chunk():
    mesh = make_mesh(fsdp=8)
    hidden, _, ids, *_ = problem()
    head = jax.device_put(jnp.ones((512, D)), NamedSharding(mesh, P("tensor", "fsdp")))
    scores = make_token_scores(lambda head: head, logit_softcap=None, mesh=mesh)

    def scalar(hidden, head):
        return scores(head, hidden, shard_rows(ids, mesh), chunk_size=2)[0].sum()

    program = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(shard_rows(hidden, mesh), head).compile()
    moved = re.findall(r"= (?:\()?(\w+\[[\d,]*\])[^=]* (?:all-gather|all-reduce|reduce-scatter)\(", program.as_text())
    sizes = sorted(np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])] or [1]) for shape in moved)
    assert sizes[-2] <= B * 2 * D  # a chunk's hidden states; the head has 512 * D entries
    assert sizes[-1] <= 512 * D // 8  # once a call, the sum over "data" of a device's part of the gradient


@pytest.mark.parametrize("sizes", MESHES)
def test_a_lookup_over_devices_is_that_on_one(sizes):
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    _, table, ids, _, w1, _ = problem()
    ids = ids.at[0, 0].set(-5).at[1, 1].set(V + 9)

    def scalar(look_up, table):
        found = look_up(table, ids)
        return (found * w1[:, :, None]).sum(), found

    wanted = jax.jit(jax.value_and_grad(partial(scalar, lambda t, i: t[jnp.clip(i, 0, V - 1)]), has_aux=True))(table)
    placed = jax.device_put(table, NamedSharding(mesh, P("tensor", "fsdp")))
    for look_up in (partial(sharded_lookup, mesh=mesh, dtype=jnp.float32), lookup):
        found = jax.jit(jax.value_and_grad(partial(scalar, look_up), has_aux=True))(placed)
        chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_lookup_is_accumulated_in_float32():
    ids = jnp.zeros((1, 1024), jnp.int32)  # each adds 0.5; a sum in bfloat16 would stand still at 128
    grad = jax.jit(jax.grad(lambda table: (lookup(table, ids) * jnp.bfloat16(0.5)).sum().astype(jnp.float32)))
    np.testing.assert_array_equal(grad(jnp.ones((2, 1), jnp.bfloat16)).astype(jnp.float32), [[512], [0]])


def test_the_table_is_not_gathered_for_a_model_on_a_mesh():
    config = from_hf_config({**TINY, "vocab_size": 4096})
    mesh = make_mesh(fsdp=8)
    params = init_params(config, jax.random.key(0))
    model, plain = build_model(config, mesh=mesh), build_model(config)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (8, 4)), jnp.int32)
    positions = jnp.tile(jnp.arange(4), (8, 1))
    placed = jax.device_put(params, param_shardings(params, mesh))
    program = jax.jit(lambda params, ids: model.apply(params, ids, positions)[0]).lower(placed, shard_rows(ids, mesh))
    compiled = program.compile()
    assert "4096" not in "".join(re.findall(r"= (\S+) all-(?:gather|reduce)\(", compiled.as_text()))
    found = compiled(placed, shard_rows(ids, mesh))
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, BATCH), 3)
    np.testing.assert_allclose(found, plain.apply(params, ids, positions)[0], atol=1e-5)
