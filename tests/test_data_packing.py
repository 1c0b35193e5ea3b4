"""Packing: every example once, complete, and separated from the others of its row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.conversations import Example
from grpo_jax.data.packing import PackedBatches, pack, packed_rows

EMPTY, NUM_SEQUENCES, LENGTH = 99, 3, 8


def make_example(number, length):
    """Token ids that tell examples and places apart."""
    return Example([10 * number + n for n in range(length)], [n % 2 == 1 for n in range(length)], 0)


def make_examples(lengths):
    return [make_example(number, length) for number, length in enumerate(lengths)]


LENGTHS = [3, 8, 5, 2, 2, 6, 1, 7, 4, 3, 5]


def make_batches(lengths=LENGTHS, **options):
    options = {"num_sequences": NUM_SEQUENCES, "length": LENGTH, "pad_id": EMPTY} | options
    return PackedBatches(make_examples(lengths), **options)


def members(batch):
    """The examples of a batch as lists of token ids, read back by their segments."""
    ids, segments = np.asarray(batch.token_ids), np.asarray(batch.segment_ids)
    return [ids[row][segments[row] == n].tolist() for row in range(len(ids)) for n in range(1, segments[row].max() + 1)]


def test_an_example_goes_where_it_leaves_the_least_room():
    assert pack([5, 6, 3, 2], 8) == [[0, 2], [1, 3]]
    assert pack([5, 7, 1, 3], 8) == [[0, 3], [1, 2]]  # first fit would put the third one beside the first
    assert pack([4, 4, 4], 8) == [[0, 1], [2]]
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([], 8) == []


@given(st.lists(st.integers(1, 16), max_size=40), st.integers(16, 20))
def test_nobody_is_lost_and_no_row_is_too_full(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[n] for n in row) <= capacity for row in rows)
    # A row was opened only for what fitted nowhere else.
    assert all(row == sorted(row) for row in rows)
    for later in range(1, len(rows)):
        opener = rows[later][0]
        for row in rows[:later]:
            assert sum(lengths[n] for n in row if n < opener) + lengths[opener] > capacity


@pytest.mark.parametrize(("lengths", "message"), [([3, 9], "example 1 has 9 tokens"), ([0], "example 0 has 0 tokens")])
def test_what_fits_into_no_row(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, 8)


@given(st.lists(st.integers(1, LENGTH), min_size=1, max_size=20), st.integers(0, 3), st.booleans())
def test_each_epoch_visits_every_example_once_and_whole(lengths, seed, packing):
    one, two = (make_batches(lengths, seed=seed, packing=packing, num_epochs=count) for count in (1, 2))
    everyone = sorted(each.token_ids for each in make_examples(lengths))
    for steps in (range(len(one)), range(len(one), len(two))):
        assert sorted(member for step in steps for member in members(two[step])) == everyone


def test_each_epoch_has_an_order_of_its_own():
    one, two = make_batches(packing=False), make_batches(packing=False, num_epochs=2)
    orders = [[members(two[step]) for step in range(start, start + len(one))] for start in (0, len(one))]
    assert len(two) == 2 * len(one)
    assert orders[0] != orders[1]


def test_each_epoch_packs_anew():
    batches = make_batches(num_epochs=2)
    rows = [
        [tuple(np.asarray(batch.token_ids)[n].tolist()) for n in range(NUM_SEQUENCES)]
        for batch in (batches[step] for step in range(len(batches)))
    ]
    one = len(make_batches())
    assert {row for batch in rows[:one] for row in batch} != {row for batch in rows[one:] for row in batch}


def test_a_batch_follows_from_seed_and_step_alone():
    one, same, other = make_batches(num_epochs=2), make_batches(num_epochs=2), make_batches(num_epochs=2, seed=1)
    backwards = {step: members(same[step]) for step in reversed(range(len(same)))}
    assert backwards == {step: members(one[step]) for step in range(len(one))}
    assert members(make_batches()[0]) == members(one[0])  # whatever the number of epochs
    assert [members(one[step]) for step in range(2)] != [members(other[step]) for step in range(2)]


def test_without_packing_each_example_has_a_row_of_its_own():
    batches = make_batches(packing=False)
    assert len(batches) == 4
    for step in range(len(batches)):
        assert np.asarray(batches[step].segment_ids).max() == 1
        assert (np.asarray(batches[step].token_ids)[:, 0] % 10).tolist()[:2] == [0, 0]
    packed = make_batches()
    assert any(np.asarray(packed[step].segment_ids).max() > 1 for step in range(len(packed)))


def test_the_last_batch_is_filled_up_with_empty_rows():
    batches = make_batches(packing=False)
    last = batches[len(batches) - 1]
    assert last.token_ids.shape == (NUM_SEQUENCES, LENGTH)
    assert (np.asarray(last.segment_ids) > 0).any(axis=1).tolist() == [True, True, False]
    np.testing.assert_array_equal(last.token_ids[2], [EMPTY] * LENGTH)
    assert not np.asarray(last.loss_mask)[2].any()
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_sequences_of_a_row_are_numbered_from_one_and_their_positions_restart():
    rows = [[make_example(1, 3), make_example(2, 2)], [make_example(3, 6)]]
    packed = packed_rows(rows, num_sequences=3, length=6, pad_id=EMPTY)
    np.testing.assert_array_equal(packed.token_ids, [[10, 11, 12, 20, 21, 99], range(30, 36), [99] * 6])
    np.testing.assert_array_equal(packed.segment_ids, [[1, 1, 1, 2, 2, 0], [1] * 6, [0] * 6])
    np.testing.assert_array_equal(packed.positions, [[0, 1, 2, 0, 1, 0], range(6), [0] * 6])
    np.testing.assert_array_equal(packed.loss_mask, [[0, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1], [0] * 6])
    assert {packed.token_ids.dtype, packed.segment_ids.dtype, packed.positions.dtype} == {np.dtype("int32")}


def test_neither_first_tokens_nor_padding_are_learnt():
    tokenized = [Example([5] * length, [False] + [True] * (length - 1), 0) for length in LENGTHS]
    batches = PackedBatches(tokenized, num_sequences=NUM_SEQUENCES, length=LENGTH)
    for step in range(len(batches)):
        batch = batches[step]
        inner = (np.asarray(batch.segment_ids) > 0) & (np.asarray(batch.positions) > 0)
        np.testing.assert_array_equal(batch.loss_mask, inner)
    count = sum(int(batches[step].loss_mask.sum()) for step in range(len(batches)))
    assert count == sum(LENGTHS) - len(LENGTHS)


def test_the_digest_tells_examples_apart():
    examples = make_examples(LENGTHS)

    def digest(examples, **options):
        return PackedBatches(examples, num_sequences=NUM_SEQUENCES, length=LENGTH, **options).digest

    assert digest(examples) == digest(make_examples(LENGTHS)) == digest(examples, seed=1)
    other_token = [Example([7, *examples[0].token_ids[1:]], *examples[0][1:]), *examples[1:]]
    other_mark = [Example(examples[0].token_ids, [False] * 3, 0), *examples[1:]]
    digests = {digest(each) for each in (examples, other_token, other_mark, examples[1:], examples[::-1])}
    assert len(digests) == 5


@pytest.mark.parametrize("packing", [True, False])
def test_the_share_of_places_that_are_used(packing):
    batches = make_batches(packing=packing, num_epochs=2)
    places = [np.asarray(batches[step].segment_ids) > 0 for step in range(len(batches))]
    assert batches.packing_efficiency == pytest.approx(np.mean(places))
    assert make_batches([LENGTH] * NUM_SEQUENCES, packing=packing).packing_efficiency == 1


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "there are no examples to train on"),
        ([3, 9], {}, "the longest example has 9 tokens; the length of a row is 8"),
        ([3], {"num_sequences": 0}, "num_sequences is 0; it must be at least 1"),
        ([3], {"length": 0}, "length is 0"),
        ([3], {"num_epochs": 0}, "num_epochs is 0"),
    ],
)
def test_batches_that_cannot_be_made(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        make_batches(lengths, **options)
