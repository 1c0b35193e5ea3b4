"""``generate``: samples, masks and log-probabilities, independent of batch, padding and devices."""

import inspect
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import quick_jit

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.log_probs import output_logits
from grpo_jax.masked import positions
from grpo_jax.rollout import generate, sample_keys
from grpo_jax.rollout.decode import decode_step, gather_rows, merge, prefill
from grpo_jax.sampling import Sampling, sample_token
from grpo_jax.sharding import make_mesh, param_shardings, shard_rows
from grpo_jax.train import completion_log_probs

EOS = (5, 9)
PAD = 5  # an EOS token too, as in many tokenizers
T = 12
PROMPTS = [[3, 4], [7], [8, 5, 11, 2], [1, 2, 3]]


def roll(
    tiny, prompts=PROMPTS, key=0, *, group_size=4, length=T, width=4, index=None, sampling=None, eos=EOS, params=None
):
    model, own = tiny
    padded = pad_prompts(
        prompts, max_prompt_length=width, pad_id=PAD, index=range(len(prompts)) if index is None else index
    )
    options = {"group_size": group_size, "max_completion_length": length, "eos_ids": eos, "pad_id": PAD}
    return jitted(model, sampling or Sampling(), tuple(options.items()))(params or own, padded, jax.random.key(key))


CACHE = {}


def jitted(model, sampling, options):
    return CACHE.setdefault((sampling, options), jax.jit(partial(generate, model, sampling=sampling, **dict(options))))


@cache
def next_logits(model):
    """``(params, ids, length) -> logits`` after the first ``length`` ids; later ones are masked."""

    @quick_jit
    def logits_of(params, ids, length):
        mask = jnp.arange(ids.shape[1])[None, :] < length
        hidden, _ = model.apply(params, ids, positions(mask), mask, None, 0)
        return output_logits(hidden[:, length - 1], model.head(params))

    return logits_of


@cache
def trainer(model):
    """``(params, rollout, temperature) -> (log-probabilities, entropy)``, one program for all temperatures."""
    return quick_jit(partial(completion_log_probs, model))


def logits_after(tiny, ids):
    """The logits after all of ``ids``, by a forward pass over the whole sequence."""
    model, params = tiny
    return next_logits(model)(params, jnp.array([[*ids, *[PAD] * (16 - len(ids))]]), len(ids))


def by_hand(tiny, prompt, key, sampling=None, length=T, eos=EOS):
    """One completion, by running the whole sequence through the model again for every token."""
    ids, completion = list(prompt), []
    for t in range(length):
        token, _ = sample_token(jax.random.fold_in(key, t)[None], logits_after(tiny, ids), sampling or Sampling())
        completion.append(int(token[0]))
        ids.append(completion[-1])
        if completion[-1] in eos:
            break
    return completion


def test_samples_are_those_of_a_full_forward_pass_for_each_token(tiny):
    rollout = roll(tiny, group_size=2)
    keys = sample_keys(jax.random.key(0), jnp.arange(4), 2)
    for row in (0, 3, 5):
        expected = by_hand(tiny, PROMPTS[row // 2], keys[row])
        length = int(rollout.completion_mask[row].sum())
        assert rollout.completion_ids[row, :length].tolist() == expected


def test_t1_t2_masks_come_from_lengths_and_any_eos_token_ends(tiny):
    rollout = roll(tiny, group_size=16)
    ids, mask = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask)
    ended_by = set()
    for row, real, truncated in zip(ids, mask, np.asarray(rollout.truncated), strict=True):
        ends = [t for t, token in enumerate(row) if token in EOS]
        length = int(real.sum())
        assert real.tolist() == [t < length for t in range(T)]
        if truncated:
            assert length == T
            assert not ends
        else:
            assert length == ends[0] + 1  # the EOS token counts, and the equal pad ids after it do not
            assert (row[length:] == PAD).all()
            ended_by.add(int(row[length - 1]))
    assert ended_by == set(EOS)
    assert not mask.all()


def test_t3_an_end_in_the_last_slot_is_not_truncated(tiny):
    whole = roll(tiny, group_size=16)
    lengths = np.asarray(whole.completion_mask.sum(1))
    cut = int(lengths[(lengths > 1) & ~np.asarray(whole.truncated)][0])
    short = roll(tiny, group_size=16, length=cut)
    ended = lengths <= cut
    ended &= ~np.asarray(whole.truncated)
    assert np.array_equal(np.asarray(short.truncated), ~ended)
    assert (lengths[ended] == cut).any()
    assert np.asarray(short.completion_mask)[~ended].all()


def test_t4_the_pad_id_inside_a_prompt_is_attended(tiny):
    with_pad = roll(tiny, [[8, PAD, 11]], group_size=8)
    without = roll(tiny, [[8, 11]], group_size=8)
    assert with_pad.prompt_mask[0].tolist() == [False, True, True, True]
    assert not np.allclose(with_pad.rollout_log_probs, without.rollout_log_probs)


def test_t5_left_padding_by_any_amount_changes_nothing(tiny):
    tight, wide = roll(tiny, width=4), roll(tiny, width=11)
    assert np.array_equal(tight.completion_ids, wide.completion_ids)
    np.testing.assert_allclose(tight.rollout_log_probs, wide.rollout_log_probs, atol=1e-5)


def test_t14_a_samples_noise_is_its_own(tiny):
    whole = roll(tiny, group_size=4)
    alone = roll(tiny, PROMPTS[2:3], index=[2], group_size=4)  # another batch layout
    assert np.array_equal(whole.completion_ids[8:12], alone.completion_ids)
    fewer = roll(tiny, group_size=2)  # another group size: the first samples are the same
    assert np.array_equal(np.asarray(whole.completion_ids).reshape(4, 4, T)[:, :2].reshape(8, T), fewer.completion_ids)
    assert not np.array_equal(whole.completion_ids, roll(tiny, key=1, group_size=4).completion_ids)


def test_t14_no_two_samples_share_their_noise():
    keys = sample_keys(jax.random.key(0), jnp.arange(64), 64)
    data = np.asarray(jax.random.key_data(keys))
    assert len({tuple(row) for row in data.tolist()}) == 64 * 64


def test_t14_devices_do_not_change_the_samples(tiny):
    model, params = tiny
    one = roll(tiny, group_size=4)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    prompts = shard_rows(pad_prompts(PROMPTS, max_prompt_length=4, pad_id=PAD, index=range(4)), mesh)
    sharded = jax.device_put(params, param_shardings(params, mesh))
    options = {"group_size": 4, "max_completion_length": T, "eos_ids": EOS, "pad_id": PAD}
    many = jax.jit(partial(generate, model, sampling=Sampling(), **options))(sharded, prompts, jax.random.key(0))
    assert np.array_equal(one.completion_ids, many.completion_ids)
    np.testing.assert_allclose(one.rollout_log_probs, many.rollout_log_probs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_t7_t15_sampler_and_trainer_agree(tiny, temperature):
    model, params = tiny
    rollout = roll(tiny, sampling=Sampling(temperature=temperature))
    log_probs, _ = trainer(model)(params, rollout, temperature=temperature)
    mask = np.asarray(rollout.completion_mask)
    np.testing.assert_allclose(np.asarray(rollout.rollout_log_probs)[mask], np.asarray(log_probs)[mask], atol=1e-5)
    assert (np.asarray(rollout.rollout_log_probs)[~mask] == 0).all()


def test_t8_a_token_is_scored_by_those_before_it(tiny):
    """The trainer's log-probabilities against a forward pass of each prefix; a shift by one would show."""
    model, params = tiny
    rollout = roll(tiny, group_size=2)
    log_probs, entropy = trainer(model)(params, rollout)
    row = int(np.argmax(np.asarray(rollout.completion_mask.sum(1))))
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
    completion = rollout.completion_ids[row].tolist()
    for t in range(int(rollout.completion_mask[row].sum())):
        scores = jax.nn.log_softmax(logits_after(tiny, prompt + completion[:t])[0])
        np.testing.assert_allclose(log_probs[row, t], scores[completion[t]], atol=1e-5)
        np.testing.assert_allclose(entropy[row, t], -jnp.sum(jnp.exp(scores) * scores), atol=1e-5)


def test_t10_filters_give_the_truncated_distributions_log_probs(tiny):
    model, params = tiny
    rollout = roll(tiny, sampling=Sampling(top_k=3))
    mask = np.asarray(rollout.completion_mask)
    log_probs, _ = trainer(model)(params, rollout)
    gap = np.asarray(rollout.rollout_log_probs)[mask] - np.asarray(log_probs)[mask]
    assert (gap > -1e-5).all()  # kept tokens only become more likely
    assert gap.max() > 0.1


def test_greedy_takes_the_likeliest_token(tiny):
    rollout = roll(tiny, sampling=Sampling(temperature=0.0), group_size=2)
    keys = sample_keys(jax.random.key(0), jnp.arange(4), 2)
    expected = by_hand(tiny, PROMPTS[0], keys[0], Sampling(temperature=0.0))
    assert rollout.completion_ids[0, : len(expected)].tolist() == expected
    assert np.array_equal(rollout.completion_ids[::2], rollout.completion_ids[1::2])
    assert (np.asarray(rollout.rollout_log_probs) == 0).all()


def test_each_prompt_is_prefilled_once_for_its_group(tiny):
    """Only one call has the prompts' tokens, with a row for each prompt."""
    model, params = tiny
    rows = []

    def counted(params, ids, *rest, **options):
        rows.append(ids.shape)
        return model.apply(params, ids, *rest, **options)

    prompts = pad_prompts(PROMPTS, max_prompt_length=4, pad_id=PAD, index=range(4))
    spy = replace(model, apply=counted)
    options = {"group_size": 8, "max_completion_length": T, "eos_ids": EOS, "pad_id": PAD}
    jax.eval_shape(partial(generate, spy, sampling=Sampling(), **options), params, prompts, jax.random.key(0))
    assert rows[0] == (4, 4)
    assert set(rows[1:]) == {(32, 1)}


def test_decoding_stops_when_all_rows_have_ended(tiny):
    """If every token is an EOS token, a large limit costs only the output arrays."""
    model, params = tiny
    calls = []

    def counted(params, ids, *rest, **options):
        jax.debug.callback(lambda: calls.append(1))
        return model.apply(params, ids, *rest, **options)

    spy = replace(model, apply=counted)
    options = {"group_size": 2, "max_completion_length": 500, "eos_ids": tuple(range(32)), "pad_id": PAD}
    prompts = pad_prompts(PROMPTS, max_prompt_length=4, pad_id=PAD, index=range(4))
    rollout = jax.jit(partial(generate, spy, sampling=Sampling(), **options))(params, prompts, jax.random.key(0))
    assert (np.asarray(rollout.completion_mask.sum(1)) == 1).all()
    jax.effects_barrier()
    assert len(calls) == 2  # prefill and one decode step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size is 0"),
        ({"length": 0}, "max_completion_length is 0"),
        ({"eos": ()}, "eos_ids is empty"),
    ],
)
def test_invalid_settings_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        roll(tiny, **change)


def prefilled(tiny, prompts=PROMPTS, key=None, **changes):
    """A batch of two rows for each prompt and its state, as shapes; without the tests' check of annotations."""
    model, params = tiny
    padded = replace(pad_prompts(prompts, max_prompt_length=4, pad_id=PAD, index=range(len(prompts))), **changes)
    start = partial(inspect.unwrap(prefill), model, sampling=Sampling(), group_size=2, chunks=[64])
    return jax.eval_shape(start, params, padded, jax.random.key(0) if key is None else key)


@pytest.mark.parametrize(
    ("change", "name"), [({"mask": (4, 3)}, "mask"), ({"index": (3,)}, "index"), ({"part": (1,)}, "part")]
)
def test_fields_of_prompts_that_do_not_fit_are_refused_at_trace_time(tiny, change, name):
    with pytest.raises(AssertionError, match=rf"\[prompts.{name}\]"):
        prefilled(tiny, **{field: jnp.ones(shape, bool if field == "mask" else int) for field, shape in change.items()})


def test_an_old_style_key_is_refused_at_trace_time(tiny):
    with pytest.raises(TypeError, match=r"key is .*uint32"):
        prefilled(tiny, key=jax.random.PRNGKey(0))


def test_batches_that_do_not_fit_are_refused_at_trace_time(tiny):
    model, params = tiny
    batch, state, *_ = prefilled(tiny)
    small, small_state, *_ = prefilled(tiny, PROMPTS[:2])
    step = partial(inspect.unwrap(decode_step), model, sampling=Sampling(), eos_ids=EOS)
    with pytest.raises(AssertionError, match=r"\[rows\]"):
        jax.eval_shape(step, params, batch, small_state)
    index = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    with pytest.raises(AssertionError, match=r"keys.: shapes: \(8,\) != \(4,\)"):
        jax.eval_shape(inspect.unwrap(merge), [(batch, state), (small, small_state)], index, index)
    gather = partial(inspect.unwrap(gather_rows), model, join_chunks=True)
    two = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    with pytest.raises(AssertionError, match=r"\[scatter_index\]"):
        jax.eval_shape(gather, batch, state, [], index, index, index, two)
    with pytest.raises(AssertionError, match=r"\[devices\]"):
        jax.eval_shape(gather, batch, state, [], index, two, index, index)
