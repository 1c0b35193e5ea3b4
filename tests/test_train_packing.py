"""Packed rows give the log-probabilities, losses, gradients and values of padded ones."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import quick_jit
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_losses import loss_of

from grpo_jax import loss
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.data.packing import bucket_length
from grpo_jax.loop.batch_layout import BatchLayout, cut
from grpo_jax.loss import value_loss
from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.models.attention import attention_mask
from grpo_jax.models.hf_config import with_scalar_head
from grpo_jax.sharding import make_mesh, param_shardings, replicated, shard_rows
from grpo_jax.train import (
    completion_log_probs,
    completion_values,
    init_state,
    make_log_prob_fn,
    make_train_step,
    micro_batch,
    pack,
    policy_and_values,
    with_value_head,
)
from grpo_jax.train.packing import by_sequence, in_batch_order, row_lengths
from grpo_jax.types import Batch, Rollout

P, T, GROUP = 5, 9, 4
PACKINGS = ["shared", "separate"]


def make_batch(seed=0, groups=4, group=GROUP, *, shuffled=False, lengths=None):
    """Groups of completions of 1 to T tokens, two of which have tokens that the loss leaves out."""
    rng = np.random.default_rng(seed)
    rows = groups * group
    prompt_lengths = np.repeat(rng.integers(1, P + 1, groups), group)
    lengths = rng.integers(1, T + 1, rows) if lengths is None else np.asarray(lengths)
    mask = np.arange(T) < lengths[:, None]
    loss_mask = mask & (rng.random((rows, T)) < 0.8)
    loss_mask[1] = False
    numbers = partial(rng.normal, size=(rows, T))
    batch = Batch(
        prompt_ids=np.repeat(rng.integers(0, 32, (groups, P)), group, axis=0).astype(np.int32),
        prompt_mask=np.arange(P) >= P - prompt_lengths[:, None],
        completion_ids=rng.integers(0, 32, (rows, T)).astype(np.int32),
        completion_mask=mask,
        loss_mask=loss_mask,
        advantages=rng.normal(size=rows).astype(np.float32),
        rollout_log_probs=(-np.abs(numbers())).astype(np.float32),
        old_log_probs=(-3 - 0.1 * numbers()).astype(np.float32),
        ref_log_probs=(-3 - 0.1 * numbers()).astype(np.float32),
        old_values=numbers().astype(np.float32),
        returns=numbers().astype(np.float32),
    )
    order = rng.permutation(rows) if shuffled else np.arange(rows)
    return jax.tree.map(lambda x: jnp.asarray(x[order]), batch)


def packed_of(batch, packing, **options):
    return pack(batch, packing, **{"row_length": 20, "micro_batch_tokens": 40, **options})


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PACKINGS), st.integers(14, 60), st.integers(1, 5), st.booleans())
def test_every_completion_token_sees_its_prompt_and_the_tokens_before_it_and_nothing_else(
    seed, packing, row_length, group, shuffled
):
    batch = jax.tree.map(np.asarray, make_batch(seed, groups=5, group=group, shuffled=shuffled))
    packed = packed_of(batch, packing, row_length=row_length)
    seen = []
    for i in range(int(packed.count)):
        rows = jax.tree.map(lambda x, i=i: x[i], packed.rows)
        visible = np.asarray(attention_mask(rows.attention_mask, jnp.arange(row_length), 0, row_length, None))
        rows = jax.tree.map(np.asarray, rows)
        for r, row in enumerate(rows.sequence_index):
            for place in np.flatnonzero(row >= 0):
                sequence = int(row[place])
                seen.append(sequence)
                prompt = batch.prompt_ids[sequence][batch.prompt_mask[sequence]]
                completion = batch.completion_ids[sequence][batch.completion_mask[sequence]]
                for t, token in enumerate(completion):
                    target = int(rows.starts[r, place]) + t
                    column = rows.target_columns[r, target]
                    before = [*prompt, *completion[:t]]
                    assert rows.token_ids[r][visible[r, column]].tolist() == before
                    assert rows.positions[r][visible[r, column]].tolist() == list(range(len(before)))
                    assert rows.target_ids[r, target] == token
                    assert rows.target_mask[r, target]
    assert sorted(seen) == list(range(len(batch.advantages)))
    assert int(packed.rows.target_mask.sum()) == int(batch.completion_mask.sum())
    assert not packed.rows.segment_ids[int(packed.count) :].any()


def test_a_prompt_is_in_a_row_once_if_it_is_shared():
    batch = make_batch(groups=2)
    used = {packing: int((packed_of(batch, packing, row_length=99).rows.segment_ids > 0).sum()) for packing in PACKINGS}
    prompts = np.asarray(batch.prompt_mask).sum(1) - 1
    completions = int(batch.completion_mask.sum())
    assert used["separate"] == completions + prompts.sum()
    assert used["shared"] == completions + prompts[::GROUP].sum()


def stepped(params, loss_fn, batch, *, mesh=None, parts=1):
    """Parameters after a step of SGD with a learning rate of 1, which show the gradient, and metrics."""
    mesh = mesh or make_mesh(data=1)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), param_shardings(params, mesh))
    state = init_state(placed, optax.sgd(1.0), with_reference=False, replicated=replicated(mesh))
    state, metrics = make_train_step(loss_fn, optax.sgd(1.0), num_micro_batches=parts)(state, batch)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def assert_same(result, expected):
    chex.assert_trees_all_close(result[1], expected[1], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(result[0], expected[0], rtol=1e-5, atol=1e-5)


TERMS = {"temperature": 0.8, "kl_coef": 0.04, "entropy_coef": 0.01}


@pytest.fixture(scope="module")
def padded(tiny):
    """The step of ``make_batch`` in padded rows."""
    model, params = tiny
    return stepped(params, loss_of(model, **TERMS), make_batch())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("tokens", [20, 40, 1000])
def test_an_update_of_packed_rows_is_that_of_padded_ones(tiny, padded, packing, tokens):
    model, params = tiny
    packed = packed_of(make_batch(), packing, micro_batch_tokens=tokens)
    assert int(packed.count) == -(-int((packed.rows.segment_ids > 0).any(-1).sum()) // max(1, tokens // 20))
    assert_same(stepped(params, loss_of(model, **TERMS), packed), padded)


def test_micro_batches_are_equal_if_every_sequence_needs_a_row():
    batch = make_batch()
    B = len(batch.advantages)
    for most in (1, 2, 5, B - 1, 10**6):
        count, rows, _ = packed_of(batch, "separate", micro_batch_tokens=20 * most).rows.token_ids.shape
        assert rows <= most
        assert count == -(-B // min(most, B))  # as few as fit
        assert count * rows - B < count  # with at most one empty row in each


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_an_update_of_packed_rows_over_eight_devices_is_that_of_one(tiny, padded, sizes, packing):
    _, params = tiny
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    model = build_model(from_hf_config(TINY), mesh=mesh)
    packed = packed_of(make_batch(), packing, micro_batch_tokens=20, mesh=mesh)
    assert_same(stepped(params, loss_of(model, **TERMS), packed, mesh=mesh), padded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_every_loss_is_the_same_over_packed_rows(tiny, name):
    model, params = tiny
    options = {"max_completion_length": T} if name == "dr_grpo" else {}
    loss_fn = loss_of(model, getattr(loss, f"{name}_loss"), importance_cap=2.0, **TERMS, **options)
    expected = stepped(params, loss_fn, make_batch())
    assert_same(stepped(params, loss_fn, packed_of(make_batch(), "shared")), expected)


WINDOWED = {**TINY, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize("packing", PACKINGS)
def test_windows_are_measured_in_the_positions_of_a_sequence(packing):
    config = from_hf_config(WINDOWED)
    assert set(config.windows) == {None, 4}
    model, params, batch = build_model(config), init_params(config, jax.random.key(1)), make_batch()
    expected, _ = quick_jit(partial(completion_log_probs, model))(params, batch)
    ours = make_log_prob_fn(partial(completion_log_probs, model))(params, packed_of(batch, packing))
    mask = np.asarray(batch.completion_mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(expected)[mask], atol=1e-5)


def test_frozen_log_probs_are_in_the_order_of_the_batch(tiny):
    model, params = tiny
    batch = make_batch(shuffled=True, lengths=[0, *range(1, 10), 3, 9, 9, 9, 1, 2])
    rollout = Rollout(
        *(batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask, batch.rollout_log_probs),
        truncated=jnp.zeros(16, bool),
    )
    expected, _ = quick_jit(partial(completion_log_probs, model))(params, batch)
    ours = make_log_prob_fn(partial(completion_log_probs, model))(params, packed_of(rollout, "shared"))
    mask = np.asarray(batch.completion_mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(expected)[mask], atol=1e-5)
    assert not np.asarray(ours)[~mask.any(1)].any()


@pytest.mark.parametrize("packing", [pytest.param("shared", marks=pytest.mark.slow), "separate"])
def test_values_and_their_loss_are_those_of_padded_rows(tiny, packing):
    _, params = tiny
    config = from_hf_config(with_scalar_head(TINY))
    critic, critic_params = build_model(config), init_params(config, jax.random.key(2))

    def loss_fn(params, batch):
        values = completion_values(critic, params, batch)
        return value_loss(values, batch.returns, batch.loss_mask, old_values=batch.old_values, epsilon=0.2)

    packed = packed_of(make_batch(), packing)
    assert_same(stepped(critic_params, loss_fn, packed), stepped(critic_params, loss_fn, make_batch()))

    model, policy = tiny[0], with_value_head(params, 32)
    policy["value"]["kernel"] += 0.1
    first = micro_batch(packed, 0)
    expected = policy_and_values(model, policy, make_batch())
    for ours, padded in zip(policy_and_values(model, policy, first), expected, strict=True):
        ours = np.asarray(in_batch_order(ours, first.rows, jnp.full(padded.shape, jnp.nan)))
        there = np.asarray(make_batch().completion_mask) & ~np.isnan(ours)
        assert there.any()
        np.testing.assert_allclose(ours[there], np.asarray(padded)[there], atol=1e-5)


def test_sequences_of_tokens_and_unused_places():
    packed = packed_of(make_batch(), "shared")
    part = micro_batch(packed, int(packed.count) - 1)
    places = np.asarray(part.rows.sequence_index).reshape(-1)
    assert part.loss_mask.shape == (places.size, T)
    assert not np.asarray(part.loss_mask | part.completion_mask)[places < 0].any()
    used = np.flatnonzero(places >= 0)
    for name in ("completion_ids", "loss_mask", "advantages", "returns"):
        np.testing.assert_array_equal(getattr(part, name)[used], getattr(make_batch(), name)[places[used]])
    targets = np.asarray(by_sequence(part.rows.target_ids.astype(jnp.float32), part.rows, T))
    mask = np.asarray(part.completion_mask)
    np.testing.assert_array_equal(targets[mask], np.asarray(part.completion_ids)[mask])


def test_other_lengths_need_no_other_program(tiny):
    model, params = tiny
    traced = []

    def loss_fn(params, batch):
        traced.append(1)
        return loss_of(model)(params, batch)

    step = make_train_step(loss_fn, optax.sgd(1.0))
    mesh = make_mesh(data=1)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), param_shardings(params, mesh))
    state = init_state(placed, optax.sgd(1.0), with_reference=False, replicated=replicated(mesh))
    counts = set()
    for seed, lengths in enumerate([None, [1] * 16, [9] * 16, [1, 9] * 8]):
        packed = packed_of(make_batch(seed, lengths=lengths), "shared")
        counts.add(int(packed.count))
        state, metrics = step(state, packed)
        traced_once = len(traced) if seed == 0 else traced_once
        assert np.isfinite(float(metrics["loss"]))
    assert len(counts) > 1
    assert len(traced) == traced_once


def test_a_wide_model_shares_prompts_in_longer_rows(tiny):
    """Of prompts of 300 tokens with two completions of 200, one fits a row of 512 tokens and both one of 768."""
    prompts = np.repeat(np.arange(2), 2)[:, None] + np.zeros((4, 300), np.int32)
    ids, mask, numbers = np.zeros((4, 200), np.int32), np.ones((4, 200), bool), np.zeros((4, 200), np.float32)
    batch = jax.tree.map(
        jnp.asarray, Batch(prompts, np.ones((4, 300), bool), ids, mask, mask, np.zeros(4, np.float32), numbers)
    )
    lengths = [
        pack(batch, "shared", micro_batch_tokens=768, attention_length=length).rows.token_ids.shape[-1]
        for length in (100.0, 50_000.0)
    ]
    assert lengths == [512, 768]
    for length, row_length in ((100.0, 512), (50_000.0, 768)):
        model = replace(tiny[0], attention_length=length)
        layout = BatchLayout(config(packing="shared"), model, make_mesh(data=1))
        assert layout(batch).rows.token_ids.shape[-1] == row_length


def test_attention_costs_as_much_as_the_matrices_of_a_layer():
    decoder = from_hf_config({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    D, F = decoder.hidden_size, decoder.intermediate_size
    weights = D * (64 + 32 + 32) + 64 * D + 3 * D * F  # q, k and v, o, the MLP
    assert build_model(decoder).attention_length == weights / (2 * 64)


def test_row_lengths_are_few():
    assert row_lengths(1, 20) == [256, 320, 384]
    assert row_lengths(257, 4096) == [320, 384, 512]
    assert row_lengths(1536, 4096) == [1536, 2048, 2560]
    assert row_lengths(1536, 1536) == [1536, 2048, 2560]
    assert row_lengths(33_000, 33_790) == [33_792, 40_960, 49_152, 65_536]  # all sequences fit the first
    assert len({length for longest in range(1, 4097) for length in row_lengths(longest, 4096)}) < 20
    assert [bucket_length(n, 1024) for n in (0, 64, 65, 200, 385, 800)] == [64, 64, 128, 256, 512, 1024]
    assert bucket_length(65, 100) == 100


def test_the_cheapest_row_length_is_taken():
    """8 completions of 128 tokens after 64: with 320 tokens, two to a row leave one place unused, with 384, 65."""
    lengths, rows = np.full(8, 128), 8
    batch = Batch(
        *(np.zeros((rows, 64), np.int32), np.ones((rows, 64), bool), np.zeros((rows, 128), np.int32)),
        *(np.arange(128) < lengths[:, None],) * 2,
        *(np.zeros(rows, np.float32), np.zeros((rows, 128), np.float32)),
    )
    packed = pack(batch, "shared", micro_batch_tokens=1)
    assert packed.rows.token_ids.shape == (8, 1, 320)
    assert int(packed.count) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: replace(b, completion_mask=b.completion_mask.at[2, 0].set(False)), "without holes"),
        (lambda b: replace(b, prompt_mask=b.prompt_mask.at[3].set(False)), "a prompt has no tokens"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    batch = make_batch(lengths=[3] * 16)
    with pytest.raises(ValueError, match=message):
        packed_of(change(batch), "shared")


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"take \d+ places in a row of 8; increase row_length"):
        packed_of(make_batch(), "shared", row_length=8)


# The layout of a run -------------------------------------------------------------------------------------------------


def config(**options):
    return GRPOConfig(
        model="unknown/model", num_prompts=8, group_size=4, max_prompt_length=200, max_completion_length=300, **options
    )


def test_padded_rows_are_cut_to_a_bucket_and_log_probs_have_their_old_shape(tiny):
    model, params = tiny
    model = replace(model, max_length=None)
    rng = np.random.default_rng(0)
    lengths, prompt_lengths = rng.integers(1, 50, 8), rng.integers(1, 60, 8)
    rollout = Rollout(
        prompt_ids=jnp.asarray(rng.integers(0, 32, (8, 200)), jnp.int32),
        prompt_mask=jnp.asarray(np.arange(200) >= 200 - prompt_lengths[:, None]),
        completion_ids=jnp.asarray(rng.integers(0, 32, (8, 300)), jnp.int32),
        completion_mask=jnp.asarray(np.arange(300) < lengths[:, None]),
        rollout_log_probs=jnp.zeros((8, 300)),
        truncated=jnp.zeros(8, bool),
    )
    shorter = cut(rollout)
    assert (shorter.prompt_ids.shape, shorter.completion_ids.shape) == ((8, 64), (8, 64))
    assert shorter.truncated.shape == (8,)
    log_prob_fn = make_log_prob_fn(partial(completion_log_probs, model))
    layout = BatchLayout(config(dtype="float32"), model, make_mesh(data=1))
    assert layout.packing is None
    ours, expected = (
        layout.make_log_prob_fn(partial(completion_log_probs, model))(params, rollout),
        log_prob_fn(params, rollout),
    )
    assert ours.shape == (8, 300)
    mask = np.asarray(rollout.completion_mask)
    np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(expected)[mask], atol=1e-5)


def test_the_packing_in_effect(tiny):
    model, _ = tiny
    mesh = make_mesh(data=1)
    assert model.packing == "shared"
    assert BatchLayout(config(dtype="bfloat16"), model, mesh).packing == "shared"
    assert BatchLayout(config(dtype="bfloat16"), replace(model, packing="separate"), mesh).packing == "separate"
    assert BatchLayout(config(dtype="bfloat16", packing="none"), model, mesh).packing is None
    assert BatchLayout(config(dtype="float32", packing="shared"), model, mesh).packing == "shared"
    assert BatchLayout(config(dtype="bfloat16"), replace(model, packing=None), mesh).packing is None
    with pytest.raises(ValueError, match="packing is shared, but this model's rotary frequencies depend on the length"):
        BatchLayout(config(packing="shared"), replace(model, packing=None), mesh)


def test_a_layout_packs_with_the_memory_of_the_padded_micro_batches(tiny):
    model, _ = tiny
    mesh = make_mesh(data=1)
    batch = make_batch(groups=8)
    packed = BatchLayout(config(packing="shared", num_micro_batches=8, mesh=MeshConfig(data=1)), model, mesh)(batch)
    _, rows, length = packed.rows.token_ids.shape
    assert rows * length <= 32 * 500 // 8 < (rows + 1) * length
    padded = BatchLayout(config(packing="none"), model, mesh)(batch)
    chex.assert_trees_all_equal(padded, shard_rows(batch, mesh))
