"""Train steps: exact under accumulation and sharding, and doing what their docstrings say."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import quick_jit, random_params
from conftest import TINY
from policy_losses import loss_of

from grpo_jax.data.conversations import Example
from grpo_jax.data.packing import PackedBatches, packed_rows
from grpo_jax.loss import supervised_loss, token_mean
from grpo_jax.masked import mean_pair, positions
from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.models.hf_config import with_scalar_head
from grpo_jax.sharding import make_mesh, param_shardings, replicated, shard_rows
from grpo_jax.train import (
    compiler_options,
    completion_log_probs,
    completion_values,
    init_state,
    make_log_prob_fn,
    make_optimizer,
    make_schedule,
    make_train_step,
    packed_log_probs,
    pair_log_probs,
    pair_scores,
    reward_model_scores,
    shuffled_minibatches,
    split_rows,
    with_fresh_reference,
)
from grpo_jax.train.critic import CriticBatch, MLPCritic, init_mlp, micro_batched_states, mlp_values
from grpo_jax.train.forward import Rows, as_rows, completion_states
from grpo_jax.types import Batch, Pairs, Rollout

B, P, T = 16, 5, 7


def make_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    prompt_lengths, lengths = rng.integers(1, P + 1, rows), rng.integers(1, T + 1, rows)
    mask = np.arange(T) < lengths[:, None]
    return Batch(
        prompt_ids=jnp.asarray(rng.integers(0, 32, (rows, P)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(P) >= P - prompt_lengths[:, None]),
        completion_ids=jnp.asarray(rng.integers(0, 32, (rows, T)), jnp.int32),
        completion_mask=jnp.asarray(mask),
        loss_mask=jnp.asarray(mask),
        advantages=jnp.asarray(rng.normal(size=rows), jnp.float32),
        rollout_log_probs=jnp.asarray(-rng.random((rows, T)), jnp.float32),
    )


def start(params, optimizer, mesh=None, **options):
    mesh = mesh or make_mesh(data=1)
    copied = jax.tree.map(jnp.copy, params)
    placed = jax.device_put(copied, param_shardings(copied, mesh))
    return init_state(placed, optimizer, replicated=replicated(mesh), **{"with_reference": False, **options})


def stepped(tiny, *, parts=1, mesh=None, aggregate=token_mean, steps=1, batch=None):
    model, params = tiny
    mesh = mesh or make_mesh(data=1)
    optimizer = optax.sgd(1.0)  # so that parameters show the gradient itself
    step = make_train_step(loss_of(model, aggregate=aggregate), optimizer, num_micro_batches=parts)
    state = start(params, optimizer, mesh)
    history = []
    for i in range(steps):
        state, metrics = step(state, shard_rows(batch or make_batch(i), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def full_batch(tiny):
    return stepped(tiny)


@pytest.mark.parametrize("parts", [2, 4])
def test_l2_micro_batches_give_the_update_of_the_whole(tiny, full_batch, parts):
    state, history = stepped(tiny, parts=parts)
    chex.assert_trees_all_close(history, full_batch[1], rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(state.params, full_batch[0].params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_l2_devices_give_the_update_of_one(tiny, full_batch, sizes):
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    state, history = stepped(tiny, mesh=mesh, parts=2)
    chex.assert_trees_all_close(history, full_batch[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.params, full_batch[0].params, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_against_one_over_five_steps(tiny):
    _, params = tiny
    optimizer = make_optimizer(make_schedule(1e-3, warmup_steps=1, total_steps=5, decay="constant"))
    losses = {}
    for name, mesh in {"one": make_mesh(data=1), "eight": make_mesh(data=2, fsdp=2, tensor=2)}.items():
        step = make_train_step(loss_of(build_model(from_hf_config(TINY), mesh=mesh)), optimizer)
        state = start(params, optimizer, mesh)
        losses[name] = []
        for i in range(5):
            state, metrics = step(state, shard_rows(make_batch(i), mesh))
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["eight"], losses["one"], atol=1e-5)
    assert len(set(losses["one"])) == 5


@pytest.mark.parametrize("sizes", [pytest.param((1, 8, 1), marks=pytest.mark.slow), (1, 4, 2)])
def test_the_new_state_lies_where_the_old_one_did(tiny, sizes):
    model, params = tiny
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    optimizer = make_optimizer(make_schedule(1e-3, warmup_steps=1, total_steps=5, decay="constant"))
    state = start(params, optimizer, mesh)
    before = jax.tree.map(lambda x: x.sharding, state)
    state, _ = make_train_step(loss_of(model), optimizer)(state, shard_rows(make_batch(), mesh))
    assert jax.tree.map(lambda x: x.sharding, state) == before


def test_l8_the_first_pass_on_policy(tiny, full_batch):
    """Ratios are 1 and the surrogate's value is minus the mean advantage, yet the gradient is not zero."""
    _, history = full_batch
    batch = make_batch()
    mean = float(np.mean(np.broadcast_to(np.asarray(batch.advantages)[:, None], (B, T))[np.asarray(batch.loss_mask)]))
    assert history[0]["loss"] == pytest.approx(-mean, abs=1e-6)
    assert history[0]["clip_ratio/region_mean"] == 0
    assert history[0]["grad_norm"] > 0.01


def test_l9_the_second_inner_epoch_is_off_policy(tiny):
    model, params = tiny
    optimizer = optax.sgd(0.5)
    step = make_train_step(loss_of(model), optimizer)
    state = start(params, optimizer)
    log_prob_fn = make_log_prob_fn(partial(completion_log_probs, model))
    batch = make_batch()
    old = log_prob_fn(state.params, batch)
    on_policy = batch.replace(old_log_probs=old)
    state, first = step(state, on_policy)
    state, second = step(state, on_policy)
    assert float(first["clip_ratio/region_mean"]) == 0
    assert float(second["clip_ratio/region_mean"]) > 0


def test_old_log_probs_left_out_are_those_of_the_pass_itself(tiny, full_batch):
    model, params = tiny
    old = make_log_prob_fn(partial(completion_log_probs, model))(params, make_batch())
    state, history = stepped(tiny, batch=make_batch().replace(old_log_probs=old))
    assert history[0]["loss"] == pytest.approx(full_batch[1][0]["loss"], abs=1e-6)
    chex.assert_trees_all_close(state.params, full_batch[0].params, atol=1e-5)


def test_l3_more_padding_changes_nothing(tiny, full_batch):
    batch = make_batch()
    pad = {"completion_ids": 9, "completion_mask": False, "loss_mask": False, "rollout_log_probs": 7.0}
    wider = {
        name: jnp.pad(getattr(batch, name), ((0, 0), (0, 10)), constant_values=value) for name, value in pad.items()
    }
    state, history = stepped(tiny, batch=batch.replace(**wider))
    assert history[0]["loss"] == pytest.approx(full_batch[1][0]["loss"], abs=1e-6)
    chex.assert_trees_all_close(state.params, full_batch[0].params, atol=1e-6)


def test_l4_a_batch_without_anything_to_learn_from_changes_nothing(tiny):
    _, params = tiny
    batch = make_batch()
    empty = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
    state, history = stepped(tiny, batch=empty)
    assert history[0]["loss"] == 0
    assert history[0]["grad_norm"] == 0
    chex.assert_trees_all_equal(state.params, jax.device_get(params))


def test_the_state_is_donated_and_counted(tiny):
    model, params = tiny
    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_of(model), optimizer)
    state = start(params, optimizer)
    new, _ = step(state, make_batch())
    assert state.params["embed"]["embedding"].is_deleted()
    assert int(new.step) == 1


def test_bfloat16_compute_keeps_float32_weights():
    config = from_hf_config(TINY)
    model = build_model(config, dtype=jnp.bfloat16)
    params = init_params(config, jax.random.key(1))
    optimizer = make_optimizer(make_schedule(1e-5, warmup_steps=0, total_steps=3, decay="constant"))
    before = jax.device_get(params)
    step = make_train_step(loss_of(model), optimizer)
    state, metrics = step(start(params, optimizer), make_batch())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moved = np.abs(np.asarray(state.params["embed"]["embedding"]) - before["embed"]["embedding"])
    assert 0 < moved.max() < 2e-5  # below what a bfloat16 weight of 0.3 could hold
    assert np.isfinite(float(metrics["loss"]))


def test_no_reference_is_held_unless_asked_for(tiny):
    _, params = tiny
    optimizer = optax.sgd(0.1)
    assert start(params, optimizer).ref_params is None
    state = start(params, optimizer, with_reference=True)
    chex.assert_trees_all_equal(state.ref_params, state.params)
    buffers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)}
    assert not buffers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.ref_params)}


def test_the_reference_stays_until_it_is_refreshed(tiny):
    model, params = tiny
    optimizer = optax.sgd(0.5)
    step = make_train_step(loss_of(model, kl_coef=0.1), optimizer)
    state = start(params, optimizer, with_reference=True)
    log_prob_fn = make_log_prob_fn(partial(completion_log_probs, model))
    for _ in range(2):
        batch = make_batch()
        state, _ = step(state, batch.replace(ref_log_probs=log_prob_fn(state.ref_params, batch)))
    chex.assert_trees_all_equal(jax.device_get(state.ref_params), jax.device_get(params))
    fresh = with_fresh_reference(state)
    chex.assert_trees_all_equal(jax.device_get(fresh.ref_params), jax.device_get(state.params))
    step(fresh, batch.replace(ref_log_probs=log_prob_fn(fresh.ref_params, batch)))  # donates without a clash


def test_what_is_offloaded_lies_on_the_host_between_updates_that_are_the_same(tiny):
    model, params = tiny
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    optimizer = optax.adam(0.1)
    step = make_train_step(loss_of(model, kl_coef=0.1), optimizer)
    log_prob_fn = make_log_prob_fn(partial(completion_log_probs, model))
    batch = shard_rows(make_batch(), mesh)
    found = []
    for offload in ((), ("optimizer", "reference")):
        state = start(params, optimizer, mesh, with_reference=True, offload=offload)
        for _ in range(2):
            reference = log_prob_fn(state.ref_params, batch)
            state, _ = step(with_fresh_reference(state), batch.replace(ref_log_probs=reference))
        found.append(state)
        moments = adam_moments(state.opt_state)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves((moments, state.ref_params))}
        assert kinds == ({"pinned_host"} if offload else {"device"})
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        assert moments["embed"]["embedding"].sharding.spec == state.params["embed"]["embedding"].sharding.spec
    chex.assert_trees_all_equal(*jax.device_get(found))


def test_moments_lie_as_their_parameters(tiny):
    _, params = tiny
    optimizer = make_optimizer(make_schedule(1e-3, warmup_steps=0, total_steps=1, decay="constant"))
    state = start(params, optimizer, make_mesh(data=2, fsdp=2, tensor=2))
    moments = adam_moments(state.opt_state)
    places = jax.tree.map(lambda moment, param: moment.sharding == param.sharding, moments, state.params)
    assert all(jax.tree.leaves(places))
    assert moments["embed"]["embedding"].sharding.shard_shape((32, 32)) == (16, 16)


def adam_moments(opt_state):
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    return next(x for x in states if isinstance(x, optax.ScaleByAdamState)).mu


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_frozen_log_probs_are_the_same_in_micro_batches(tiny, parts):
    model, params = tiny
    batch = make_batch()
    expected, _ = completion_log_probs(model, params, batch)
    ours = make_log_prob_fn(partial(completion_log_probs, model), num_micro_batches=parts)(params, batch)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_batch_of_a_rollout_has_all_of_its_completion_tokens_unless_a_mask_is_given():
    fields = vars(make_batch())
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "rollout_log_probs")
    rollout = Rollout(**{name: fields[name] for name in names}, truncated=jnp.zeros(B, bool))
    batch = Batch.from_rollout(rollout, fields["advantages"])
    chex.assert_trees_all_equal(batch, Batch(**fields))
    extra = {"old_log_probs": rollout.rollout_log_probs, "ref_log_probs": 2 * rollout.rollout_log_probs}
    extra |= {"old_values": jnp.ones((B, T)), "returns": jnp.zeros((B, T)), "loss_mask": jnp.zeros((B, T), bool)}
    chex.assert_trees_all_equal(
        Batch.from_rollout(rollout, fields["advantages"], **extra), Batch(**{**fields, **extra})
    )


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda params, batch: (params * batch).mean(), "loss_fn returned an array; it must return"),
        (lambda params, batch: mean_pair(params * batch, batch > 0), "loss_fn returned a Mean; it must return"),
        (lambda params, batch: ((params * batch).mean(), {}), "loss_fn returned an array and a dict"),
        (lambda params, batch: (mean_pair(params * batch, batch > 0), {"x": params}), "an array as the metric 'x'"),
    ],
)
def test_a_loss_that_is_not_a_mean_with_metrics_is_refused_with_what_to_return(loss_fn, message):
    state = init_state(jnp.ones(()), optax.sgd(0.1), with_reference=False, replicated=replicated(make_mesh(data=1)))
    with pytest.raises(
        TypeError, match=rf"{message}.*\(loss, metrics\): a Mean\(sum, count\), such as loss\.token_mean"
    ):
        make_train_step(loss_fn, optax.sgd(0.1))(state, jnp.ones(4))


def test_a_train_step_is_traced_once_for_batches_of_one_shape():
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def loss_fn(params, batch):
        return mean_pair(params * batch, batch > 0), {}

    step = make_train_step(loss_fn, optax.sgd(0.1), num_micro_batches=2)
    state = init_state(jnp.ones(()), optax.sgd(0.1), with_reference=False, replicated=replicated(make_mesh(data=1)))
    for _ in range(3):
        state, _ = step(state, jnp.arange(4.0))
    assert float(state.params) == pytest.approx(1 - 3 * 0.1 * 2)
    assert int(state.step) == 3


def test_split_rows_takes_every_row_once_and_names_what_does_not_divide():
    parts = split_rows(jnp.arange(12)[:, None], 3)
    assert parts[:, :, 0].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    with pytest.raises(ValueError, match="batch of 12 sequences does not divide into 5"):
        split_rows(jnp.arange(12), 5)


def test_minibatches_are_a_permutation_that_follows_from_the_key():
    batch = make_batch()
    assert shuffled_minibatches(batch, jax.random.key(0), 1)[0] is batch
    parts = shuffled_minibatches(batch, jax.random.key(0), 4)
    assert [part.advantages.shape for part in parts] == [(4,)] * 4
    shuffled = np.concatenate([part.advantages for part in parts])
    assert sorted(shuffled) == sorted(np.asarray(batch.advantages))
    assert not np.array_equal(shuffled, batch.advantages)
    again = shuffled_minibatches(batch, jax.random.key(0), 4)
    chex.assert_trees_all_equal(parts, again)
    with pytest.raises(ValueError, match="does not divide into 3"):
        shuffled_minibatches(batch, jax.random.key(0), 3)


@pytest.mark.parametrize("make_key", [jax.random.PRNGKey, int])
def test_an_old_style_key_is_refused_with_what_to_pass(make_key):
    for f in (
        partial(shuffled_minibatches, make_batch(), num_minibatches=2),
        partial(init_mlp, hidden_size=4),
        partial(init_params, from_hf_config(TINY)),
    ):
        unchecked = partial(inspect.unwrap(f.func), *f.args, **f.keywords)  # by jaxtyping, as users call it
        with pytest.raises(TypeError, match=r"key is an? .*(uint32|int); pass jax\.random\.key\(seed\)"):
            unchecked(key=make_key(0))


def test_schedule_rises_stays_or_falls():
    rates = {
        decay: [float(make_schedule(1.0, warmup_steps=4, total_steps=12, decay=decay)(i)) for i in range(13)]
        for decay in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-6)
    assert rates["constant"][12] == 1
    assert rates["linear"][8] == pytest.approx(0.5)
    assert rates["cosine"][8] == pytest.approx(0.5)
    assert rates["linear"][12] == rates["cosine"][12] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0, "warmup_steps": 0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan"), "warmup_steps": 0}, "learning_rate is nan"),
        ({"learning_rate": 1.0, "warmup_steps": 11}, "warmup_steps is 11"),
    ],
)
def test_schedule_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**options, total_steps=10, decay="constant")


def test_gradients_are_clipped_by_their_global_norm_and_decay_spares_vectors():
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2), "q": {"bias": jnp.ones((2, 2))}}
    schedule = make_schedule(0.1, warmup_steps=0, total_steps=1, decay="constant")
    decaying = make_optimizer(schedule, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = decaying.update(zeros, decaying.init(params), params)
    assert (np.asarray(updates["vector"]) == 0).all()
    assert (np.asarray(updates["q"]["bias"]) == 0).all()
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)

    huge = jax.tree.map(lambda x: 1e6 * x, params)
    optimizer = make_optimizer(schedule, max_grad_norm=1.0)
    with jax.numpy_dtype_promotion("standard"):
        _, opt_state = optimizer.update(huge, optimizer.init(params), params)
    assert float(optax.tree.norm(adam_moments(opt_state))) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) x 1


# Packed rows ---------------------------------------------------------------------------------------------------------

LENGTHS = (5, 8, 3, 2, 6, 1, 4, 7, 2)


def make_examples():
    rng = np.random.default_rng(2)
    loss_masks = [[False, *(rng.random(length - 1) < 0.6)] for length in LENGTHS]
    return [
        Example(rng.integers(0, 32, length).tolist(), list(map(bool, marks)), 1)
        for length, marks in zip(LENGTHS, loss_masks, strict=True)
    ]


@pytest.fixture(scope="module")
def packed_program(tiny):
    return quick_jit(partial(packed_log_probs, tiny[0]))


@pytest.fixture(scope="module")
def packed_gradient(tiny):
    def loss_fn(params, packed):
        mean = supervised_loss(packed_log_probs(tiny[0], params, packed), packed.loss_mask)
        return mean.sum, mean

    return quick_jit(jax.grad(loss_fn, has_aux=True))


@pytest.fixture(scope="module")
def completion_program(tiny):
    return quick_jit(partial(completion_log_probs, tiny[0]))


def alone(example):
    """The example as a prompt of its first token, which nothing predicts, and a completion of the others."""
    length = 8
    ids, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    rest = example.token_ids[1:]
    ids[0, : len(rest)], mask[0, : len(rest)] = rest, True
    first = jnp.asarray([example.token_ids[:1]], jnp.int32)
    return Rows(first, jnp.ones((1, 1), bool), jnp.asarray(ids), jnp.asarray(mask))


def test_a_packed_sequence_has_the_log_probs_that_it_has_alone(tiny, packed_program, completion_program):
    _, params = tiny
    examples = make_examples()
    rows = [[0, 2, 6], [1, 3], [4, 5, 8], [7]]
    packed = packed_rows([[examples[n] for n in row] for row in rows], num_sequences=5, length=12, pad_id=9)
    log_probs = np.asarray(packed_program(params, packed))
    assert log_probs.shape == (5, 12)
    assert np.isfinite(log_probs).all()
    assert (log_probs[:, 0] == 0).all()
    for row, members in enumerate(rows):
        start = 0
        for n in members:
            length = LENGTHS[n]
            expected, _ = completion_program(params, alone(examples[n]))
            np.testing.assert_allclose(
                log_probs[row, start + 1 : start + length], expected[0, : length - 1], atol=1e-5, err_msg=f"example {n}"
            )
            start += length


def test_the_supervised_loss_and_its_gradient_do_not_know_of_packing(tiny, packed_gradient):
    _, params = tiny
    options = {"num_sequences": 9, "length": 12}
    [packed], [spread] = (PackedBatches(make_examples(), packing=packing, **options) for packing in (True, False))
    assert np.asarray(packed.segment_ids).max() > np.asarray(spread.segment_ids).max() == 1
    gradients, means = zip(*(packed_gradient(params, batch) for batch in (packed, spread)), strict=True)
    assert float(means[0].count) == float(means[1].count) == sum(sum(each.loss_mask) for each in make_examples())
    assert float(means[0].value) == pytest.approx(float(means[1].value), abs=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients[0])) > 0.1
    chex.assert_trees_all_close(*gradients, atol=2e-5)


def test_what_stands_in_padding_and_in_other_sequences_is_not_looked_at(tiny, packed_program):
    _, params = tiny
    examples = make_examples()
    other = Example([(token + 1) % 32 for token in examples[2].token_ids], *examples[2][1:])
    one = packed_rows([[examples[0], examples[2]]], num_sequences=5, length=12, pad_id=9)
    two = packed_rows([[examples[0], other]], num_sequences=5, length=12, pad_id=31)
    before, after = (np.asarray(packed_program(params, packed)) for packed in (one, two))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert (before[0, 6:8] != after[0, 6:8]).all()


# Pairs, scores and values --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scoring():
    """A model with a scalar head, none of whose weights is neutral."""
    config = from_hf_config(with_scalar_head({"architectures": ["Qwen3ForCausalLM"], **TINY}))
    return build_model(config), random_params(config)


def make_pairs(rows=3):
    rng = np.random.default_rng(5)
    prompt_lengths, lengths = rng.integers(1, P + 1, rows), rng.integers(1, T + 1, (rows, 2))
    return Pairs(
        prompt_ids=jnp.asarray(rng.integers(0, 32, (rows, P)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(P) >= P - prompt_lengths[:, None]),
        completion_ids=jnp.asarray(rng.integers(0, 32, (rows, 2, T)), jnp.int32),
        completion_mask=jnp.asarray(np.arange(T) < lengths[..., None]),
    )


def test_each_completion_of_a_pair_follows_its_own_prompt():
    pairs = make_pairs()
    rows = as_rows(pairs)
    for n in range(3):
        for side in range(2):
            np.testing.assert_array_equal(rows.prompt_ids[2 * n + side], pairs.prompt_ids[n])
            np.testing.assert_array_equal(rows.prompt_mask[2 * n + side], pairs.prompt_mask[n])
            np.testing.assert_array_equal(rows.completion_ids[2 * n + side], pairs.completion_ids[n, side])
            np.testing.assert_array_equal(rows.completion_mask[2 * n + side], pairs.completion_mask[n, side])
    assert len({str(row) for row in np.asarray(rows.completion_ids)}) == 6


def test_log_probs_of_pairs_are_those_of_each_completion_by_itself(tiny, completion_program):
    model, params = tiny
    pairs = make_pairs()
    log_probs = quick_jit(partial(pair_log_probs, model))(params, pairs)
    assert log_probs.shape == (3, 2, T)
    for n in range(3):
        for side in range(2):
            itself = Rows(
                pairs.prompt_ids[n][None],
                pairs.prompt_mask[n][None],
                pairs.completion_ids[n, side][None],
                pairs.completion_mask[n, side][None],
            )
            expected, _ = completion_program(params, itself)
            mask = np.asarray(itself.completion_mask[0])
            np.testing.assert_allclose(log_probs[n, side][mask], expected[0][mask], atol=1e-5)


def test_scores_of_pairs_are_those_of_each_completion_by_itself(scoring):
    model, params = scoring
    pairs = make_pairs()
    scores = np.asarray(quick_jit(partial(pair_scores, model))(params, pairs))
    program = quick_jit(partial(reward_model_scores, model))
    assert scores.shape == (3, 2)
    for n in range(3):
        for side in range(2):
            ids = np.concatenate(
                [
                    np.asarray(pairs.prompt_ids[n])[np.asarray(pairs.prompt_mask[n])],
                    np.asarray(pairs.completion_ids[n, side])[np.asarray(pairs.completion_mask[n, side])],
                ]
            )
            padded = np.zeros((1, P + T), np.int32)
            padded[0, : len(ids)] = ids
            expected = program(params, jnp.asarray(padded), jnp.asarray(np.arange(P + T)[None] < len(ids)))
            np.testing.assert_allclose(scores[n, side], expected[0], atol=1e-5)
    assert len(set(scores.ravel().round(4).tolist())) == 6


def test_a_value_is_read_from_the_state_before_its_token(scoring):
    model, params = scoring
    batch = make_batch(3, rows=4)
    ids = jnp.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)

    def plainly(params, ids, mask):
        hidden, _ = model.apply(params, ids, positions(mask), mask)
        return hidden @ model.head(params)[0]

    program = quick_jit(partial(completion_values, model))
    values, every = np.asarray(program(params, batch)), np.asarray(quick_jit(plainly)(params, ids, mask))
    real = np.asarray(batch.completion_mask)
    assert values.shape == (4, T)
    np.testing.assert_allclose(values[real], every[:, P - 1 : -1][real], atol=1e-5)

    # The token itself, and all that come after it, are not yet known.
    n = 1
    changed = batch.replace(completion_ids=batch.completion_ids.at[:, n:].set(11))
    after = np.asarray(program(params, changed))
    np.testing.assert_array_equal(after[:, : n + 1], values[:, : n + 1])
    known = real[:, n + 1] & (np.asarray(batch.completion_ids)[:, n] != 11)
    assert known.any()
    assert (after[known, n + 1] != values[known, n + 1]).all()


# An MLP as critic ----------------------------------------------------------------------------------------------------


def test_an_mlp_critic_learns_the_returns_of_its_states_and_leaves_the_policy_alone(tiny):
    model, params = tiny
    batch = make_batch()
    optimizer = make_optimizer(make_schedule(1e-2, warmup_steps=1, total_steps=40, decay="constant"))
    options = {"num_micro_batches": 2, "num_epochs": 40, "seed": 0, "mesh": make_mesh(data=1)}
    critic = MLPCritic(model, TINY["hidden_size"], optimizer=optimizer, **options)
    hidden, values = critic.states_and_values(critic.initial_state, params, batch)
    np.testing.assert_array_equal(values, 0)
    mask = batch.completion_mask
    returns = jnp.where(
        mask, jnp.arange(T, dtype=jnp.float32)[None] / 5 + (batch.completion_ids % 2).astype(jnp.float32), 0
    )
    state, metrics = critic.update(critic.initial_state, CriticBatch(hidden, returns, mask))
    assert metrics.keys() == {"value/mean", "value/error", "value/loss", "value/grad_norm", "value/skipped_updates"}
    assert int(state.step) == 40
    _, values = critic.states_and_values(state, params, batch)
    assert jnp.square(values - returns)[mask].mean() < 0.7 * jnp.square(returns)[mask].mean()


def test_states_in_micro_batches_are_those_of_the_whole_batch(tiny):
    model, params = tiny
    batch = make_batch()
    expected = quick_jit(partial(completion_states, model))(params, batch)
    ours = quick_jit(partial(micro_batched_states, model, num_micro_batches=4))(params, batch)
    mask = np.asarray(batch.completion_mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(expected)[mask], atol=1e-5)
    assert np.abs(np.asarray(expected)[:4] - np.asarray(expected)[4:8])[mask[:4] & mask[4:8]].max() > 1e-2


def test_mlp_values_of_initial_weights_are_0_and_of_bfloat16_states_float32(key):
    states = jnp.ones((2, 3, 4), jnp.bfloat16)
    values = mlp_values(init_mlp(key, 4), states)
    chex.assert_shape(values, (2, 3))
    chex.assert_type(values, jnp.float32)
    np.testing.assert_array_equal(values, 0)


def test_programs_of_a_tpu_gather_weights_before_products():
    assert compiler_options("tpu") == {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    assert compiler_options("cpu") is compiler_options("gpu") is None
