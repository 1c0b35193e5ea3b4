"""Selection of samples: every filter, their order, and balanced difficulty for random data."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.problems import Problem
from grpo_jax.data.selection import (
    FILTERS,
    ProblemSamples,
    Selection,
    SelectionConfig,
    balance_difficulty,
    check_some_left,
    preference_pairs,
    reaches,
    select,
)

ALL = SelectionConfig(threshold=-1e6, per_problem=100)


def collected(completions, total, place=0, truncated=None, **rewards):
    G = len(completions)
    return ProblemSamples(
        place=place,
        problem=Problem("1+2=", "3"),
        prompt="1+2=",
        completions=completions,
        lengths=[len(each) for each in completions],
        truncated=truncated or [False] * G,
        total=total,
        rewards={"accuracy": [1.0] * G, **rewards},
    )


def chosen(found, **settings):
    return select(found, replace(ALL, **settings))[0].samples


def test_without_a_score_cut_off_or_blank_nothing_is_kept():
    found = collected(["a", "b", " \n", "d"], [None, 1.0, 1.0, 1.0], truncated=[False, True, False, False])
    choice, left = select(found, ALL)
    assert choice == Selection(place=0, num_scored=3, num_passed=1, samples=(3,))
    assert left == {"sampled": 4, "scored": 3, "complete": 1} | dict.fromkeys(FILTERS[3:-1], 1)


def test_the_least_total_is_reached_in_spite_of_rounding_and_no_further():
    found = collected(["a", "b", "c"], [0.9999999, 0.9999, 1.0])
    assert chosen(found, threshold=1.0) == (2, 0)
    assert chosen(found, threshold=1.001) == ()
    assert not reaches(None, -1e9)


def test_required_parts_must_be_there_and_reach_their_least():
    found = collected(["a", "b", "c"], [1.0] * 3, format=[1.0, 0.0, None], language=[0.5, 1.0, 1.0])
    assert chosen(found, require=("format=1",)) == (0,)
    assert chosen(found, require=("language=0.9",)) == (1, 2)
    assert chosen(found, require=("format=1", "language=0.9")) == ()
    assert chosen(found, require=("absent=0",)) == ()
    assert SelectionConfig(require=("format=1", "a=b=-2e-1")).minima == {"format": 1.0, "a=b": -0.2}


def test_of_equal_texts_the_best_is_kept_and_white_space_tells_none_apart():
    found = collected(["a  b", "a b", "ab", "a\nb "], [1.0, 2.0, 1.0, 2.0])
    choice, left = select(found, ALL)
    assert choice.samples == (1, 2)
    assert (left["required"], left["distinct"]) == (4, 2)
    assert choice.num_passed == 4  # how hard a problem is does not follow from how its solutions are worded


def test_the_cap_keeps_the_highest_totals_and_of_equal_ones_the_first():
    found = collected(["a", "bbbb", "c", "d"], [1.0, 2.0, 2.0, 1.0])
    assert chosen(found, per_problem=1) == (1,)
    assert chosen(found, per_problem=3) == (1, 2, 0)


def test_problems_that_pass_too_often_are_left_out():
    found = collected([*"abcde"], [1.0, 1.0, 0.0, 0.0, None])
    assert select(found, SelectionConfig())[0].pass_rate == 0.5  # of those that have a score
    assert chosen(found, threshold=1.0, max_pass_rate=0.5) == (0, 1)
    choice, left = select(found, SelectionConfig(max_pass_rate=0.49))
    assert (choice.samples, left["distinct"], left["below_max_pass_rate"]) == ((), 2, 0)


@pytest.mark.parametrize(("passed", "bucket"), [(0, -1), (1, 0), (3, 0), (4, 1), (6, 1), (7, 2), (9, 2), (10, 3)])
def test_buckets_are_of_equal_width_and_exact(passed, bucket):
    """Bounds are 2.5, 5, 7.5 of ten: with 0.3 as a float, ten buckets would put three of ten into the fourth."""
    bounds = [0, 2.5, 5, 7.5, 10]
    assert Selection(0, 10, passed, ()).bucket(4) == next(
        (n for n in range(4) if bounds[n] < passed <= bounds[n + 1]), -1
    )
    if passed:
        assert Selection(0, 10, passed, ()).bucket(10) == passed - 1
    assert Selection(0, 0, 0, ()).bucket(4) == -1


samples = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "a ", " ", "c d", "c  d"]),
        st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]),
        st.booleans(),
        st.sampled_from([None, 0.0, 1.0]),
    ),
    min_size=1,
    max_size=12,
)


@given(samples, st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.3, 0.5, 1.0]), st.booleans())
def test_whatever_is_drawn_all_that_is_kept_is_good_and_nothing_better_is_left_out(drawn, cap, least, most, with_form):
    texts, totals, truncated, form = map(list, zip(*drawn, strict=True))
    settings = SelectionConfig(least, ("format=1",) if with_form else (), cap, most)
    choice, left = select(collected(texts, totals, truncated=truncated, format=form), settings)
    good = [
        n
        for n, text in enumerate(texts)
        if totals[n] is not None and totals[n] >= least and not truncated[n] and text.strip()
        if form[n] == 1 or not with_form
    ]
    assert set(choice.samples) <= set(good)
    kept = [texts[n].split() for n in choice.samples]
    assert len({*map(tuple, kept)}) == len(kept) <= cap
    counts = [left[name] for name in FILTERS[:-1]]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (len(texts), len(kept))
    assert choice.num_passed == len(good)
    worths = [totals[n] for n in choice.samples]
    assert worths == sorted(worths, reverse=True)
    if len(good) > most * choice.num_scored:
        assert not kept
    else:
        assert len(kept) == min(cap, len({tuple(texts[n].split()) for n in good}))
        missed = [n for n in good if texts[n].split() not in kept]
        assert all(totals[n] <= min(worths) for n in missed)


# Plain numbers: type checks of a Selection draw from random, which a strategy must not.
drawn_of_problems = st.lists(
    st.integers(1, 10).flatmap(lambda scored: st.tuples(st.just(scored), st.integers(0, scored), st.integers(1, 5))),
    max_size=12,
)


def as_choices(numbers):
    return [
        Selection(n, scored, passed, tuple(range(min(passed, cap)))) for n, (scored, passed, cap) in enumerate(numbers)
    ]


def rows_by_bucket(found, buckets):
    rows = Counter()
    for each in found:
        rows[each.bucket(buckets)] += len(each.samples)
    return +rows


@given(drawn_of_problems, st.integers(1, 6), st.integers(0, 2**32))
def test_no_bucket_has_more_than_an_equal_share_and_no_other_loses_anything(numbers, buckets, seed):
    found = as_choices(numbers)[::-1]
    before, kept = rows_by_bucket(found, buckets), balance_difficulty(found, buckets=buckets, seed=seed)
    share = math.ceil(sum(before.values()) / max(len(before), 1))
    assert rows_by_bucket(kept, buckets) == {bucket: min(rows, share) for bucket, rows in before.items()}
    assert [each.place for each in kept] == sorted(each.place for each in kept)
    of_place = {each.place: each for each in found}
    for each in kept:  # the best of each problem stay
        whole = of_place[each.place]
        assert each == replace(whole, samples=whole.samples[: len(each.samples)])
        assert each.samples
    assert kept == balance_difficulty(found[::-1], buckets=buckets, seed=seed)


@given(drawn_of_problems, st.integers(2, 6))
def test_within_a_bucket_no_problem_loses_two_before_another_loses_one(numbers, buckets):
    found = as_choices(numbers)
    kept = {each.place: len(each.samples) for each in balance_difficulty(found, buckets=buckets, seed=0)}
    for each in found:
        for other in found:
            if each.bucket(buckets) == other.bucket(buckets):
                mine, others = kept.get(each.place, 0), kept.get(other.place, 0)
                assert mine >= min(others - 1, len(each.samples))


@given(drawn_of_problems, st.sampled_from([0, 1]))
def test_without_buckets_nothing_is_taken_away(numbers, buckets):
    found = as_choices(numbers)
    there = sorted((each for each in found if each.samples), key=lambda each: each.place)
    assert balance_difficulty(found, buckets=buckets, seed=3) == there


def test_who_goes_without_is_drawn_from_the_seed():
    easy = [Selection(place, 4, 4, (0, 1)) for place in range(40)]
    found = [*easy, Selection(40, 4, 1, (2,))]
    one, same, other = (balance_difficulty(found, buckets=4, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert sum(len(each.samples) for each in one) == 42  # 41 of 81, and the hard one
    assert balance_difficulty(found[:-1], buckets=4, seed=0) == easy


@pytest.mark.parametrize(
    ("emptied", "said"),
    [
        ("scored", "reward_errors.jsonl"),
        ("complete", "max_completion_length"),
        ("correct", "threshold = 1.0"),
        ("required", r"\['format=1'\]"),
        ("below_max_pass_rate", "max_pass_rate = 1.0"),
    ],
)
def test_nothing_left_is_an_error_that_names_the_filter(emptied, said):
    counts = {name: 0 if n >= FILTERS.index(emptied) else 5 for n, name in enumerate(FILTERS)}
    with pytest.raises(ValueError, match=f"no completion is selected: .*{said}.*'sampled': 5"):
        check_some_left(counts, SelectionConfig(require=("format=1",)))
    check_some_left(dict.fromkeys(FILTERS, 1), SelectionConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": math.nan}, "threshold is nan"),
        ({"per_problem": 0}, "per_problem is 0; it must be at least 1"),
        ({"max_pass_rate": 0.0}, "max_pass_rate is 0.0; it must be above 0"),
        ({"max_pass_rate": 1.5}, "max_pass_rate is 1.5"),
        ({"balance": -1}, "balance is -1"),
        ({"require": ("format",)}, "'format' must be a reward's name and minimum score, such as format=1"),
        ({"require": ("format=high",)}, "'format=high' must be"),
        ({"require": ("=1",)}, "'=1' must be"),
        ({"require": ("format=nan",)}, "'format=nan' must be"),
        ({"require": ("format=1", "format=0.5")}, "'format' is given twice"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**settings)


def test_what_is_required_must_be_scored():
    settings = SelectionConfig(require=("format=1", "code/tests=1"))
    settings.check_parts(["format", "code"])
    with pytest.raises(
        ValueError, match=r"no rewards named \['code/tests'\]; the rewards are \['accuracy', 'format'\]"
    ):
        settings.check_parts(["accuracy", "format"])
    with pytest.raises(ValueError, match="require: format=2 keeps nothing; the highest score of format is 1"):
        SelectionConfig(require=("format=2",)).check_parts(["format"])


def test_pairs_are_of_a_right_and_a_wrong_completion_and_none_is_in_two():
    found = collected(["a", "b", "c", "d", "e"], [0.0, 1.0, 0.0, 1.0, 0.0])
    right = SelectionConfig()
    assert preference_pairs(found, right, max_pairs=9) == [(1, 0), (3, 2)]
    assert preference_pairs(found, right, max_pairs=1) == [(1, 0)]
    assert preference_pairs(found, SelectionConfig(threshold=0.0), max_pairs=9) == []
    assert preference_pairs(collected(["a", "b"], [0.4, 0.2]), SelectionConfig(threshold=0.3), max_pairs=9) == [(0, 1)]
    formed = collected(["a", "b", "c"], [1.0, 1.0, 1.0], format=[0.0, 1.0, None])
    assert preference_pairs(formed, SelectionConfig(require=("format=1",)), max_pairs=9) == [(1, 0)]


def test_what_is_cut_off_blank_without_a_score_or_said_twice_is_in_no_pair():
    texts = ["right", "cut", "wrong", " ", "absent", "right", "wrong ", "cut too"]
    totals = [1.0, 1.0, 0.0, 0.0, None, 1.0, 0.0, 0.0]
    truncated = [False, True, False, False, False, False, False, True]
    assert preference_pairs(collected(texts, totals, truncated=truncated), SelectionConfig(), max_pairs=9) == [(0, 2)]
    assert preference_pairs(collected(["x", "x"], [1.0, 0.0]), SelectionConfig(), max_pairs=9) == []
