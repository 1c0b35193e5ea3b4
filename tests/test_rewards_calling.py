"""How rewards are called, here and in a pool."""

import asyncio
import inspect
import os
import time
from functools import partial

import numpy as np
import pytest

from grpo_jax import rewards
from grpo_jax.rewards.calling import arguments, invoke, is_async, is_per_sample, per_sample
from grpo_jax.rewards.compose import RewardOutput, score_with, weighted
from grpo_jax.rewards.workers.pool import RewardPool
from tests import batch_rewards
from tests.batch_rewards import batch_size, chatty, delayed_length, exact_match, misbehaving

P, C, ANSWER, LEVEL = ["p"], ["c"], ["5"], [3]
COLUMNS = {"answer": ANSWER, "level": LEVEL}


def bound(reward, **settings):
    return partial(partial(reward, **settings))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (lambda completions: 0, {"completions": C}),
        (lambda completions, **kwargs: kwargs, {"completions": C, "prompts": P, **COLUMNS}),
        (lambda prompts, completions, **columns: columns, {"prompts": P, "completions": C, **COLUMNS}),
        (lambda completions, prompts: 0, {"prompts": P, "completions": C}),
        (lambda completions, answer: 0, {"completions": C, "answer": ANSWER}),
        (lambda prompts, completions, answer=None, missing=7: 0, {"prompts": P, "completions": C, "answer": ANSWER}),
        (lambda *, completions, level: 0, {"completions": C, "level": LEVEL}),
        (lambda **kwargs: 0, {"prompts": P, "completions": C, **COLUMNS}),
        (lambda p, c, **columns: 0, (P, C, COLUMNS)),
        (lambda questions, replies, level: 0, (P, C, {"level": LEVEL})),
        (lambda p, completions, **columns: 0, (P, C, COLUMNS)),
        (lambda prompts, texts: 0, (P, C, {})),
        (lambda *args: 0, (P, C, {})),
        (bound(lambda completions, answer=None, level=1: 0, level=2), {"completions": C, "answer": ANSWER}),
        (bound(lambda completions, **kwargs: 0, answer=2), {"prompts": P, "completions": C, "level": LEVEL}),
    ],
)
def test_a_reward_gets_what_its_signature_takes(reward, expected):
    args, kwargs = arguments(reward, P, C, COLUMNS)
    if isinstance(expected, tuple):
        assert (*args, kwargs) == expected
    else:
        assert (args, kwargs) == ([], expected)
    reward(*args, **kwargs)


class Stateful:
    def __init__(self):
        self.calls = 0

    def __call__(self, completions, answer):
        self.calls += 1
        return [float(self.calls)] * len(completions)

    def method(self, completions, level):
        return [float(each) for each in level]


def test_objects_methods_and_builtins_are_rewards_too():
    stateful = Stateful()
    assert invoke(stateful, arguments(stateful, P, C, COLUMNS)) == [1.0]
    assert invoke(stateful.method, arguments(stateful.method, P, C, COLUMNS)) == [3.0]
    assert arguments(max, P, C, {}) == ([P, C], {})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, reference: [], "reward 'mine' needs the column 'reference'; the columns are .'answer'"),
        (lambda text: [], r"reward 'mine' has no parameter called completions; .* this one takes \['text'\]"),
        (lambda: [], "reward 'mine' has no parameter called completions"),
    ],
)
def test_a_reward_that_cannot_be_called_is_named_with_the_columns_there_are(reward, message):
    with pytest.raises(ValueError, match=message):
        score_with("mine", reward, P, C, COLUMNS)


BUILTIN = {name: getattr(rewards, name) for name in dir(rewards) if name.endswith("_reward")}
GIVEN = {
    "completion_length": [10, 20],
    "answer": ["5", "6"],
    "tests": [None, None],
    "target_language": ["en", "en"],
}
REQUIRED = {
    "pattern_reward": {"pattern": ".*"},
    "soft_overlong_reward": {"max_length": 100, "cache": 20},
    "cosine_length_reward": {"max_length": 100},
}


@pytest.mark.parametrize("name", BUILTIN)
def test_a_column_never_replaces_a_setting_of_a_built_in_reward(name):
    reward = BUILTIN[name]
    assert is_per_sample(reward)
    reward = partial(reward, **REQUIRED.get(name, {}))
    completions = [r"<think>We add them up now</think> \boxed{5}", "six"]
    names = {each.name for each in inspect.signature(reward).parameters.values() if each.kind is each.KEYWORD_ONLY}
    settings = names - GIVEN.keys()
    junk = {each: ["junk", 3] for each in settings | {"n", "max_length", "pattern", "partial_credit", "anything"}}
    plain = score_with(name, reward, ["", ""], completions, GIVEN)
    assert score_with(name, reward, ["", ""], completions, {**GIVEN, **junk}) == plain
    total = weighted({name: reward}, {name: 1.0})(["", ""], completions, **GIVEN, **junk).total
    np.testing.assert_allclose(total, [np.nan if each.score is None else each.score for each in plain], rtol=1e-6)


def test_a_bound_language_is_not_replaced_by_a_column_of_that_name():
    german = partial(rewards.language_reward, target_language="de")
    text = ["<think>Now we add the first number to the second one and get five.</think>"]
    plain = score_with("language", german, [""], text, {})
    assert score_with("language", german, [""], text, {"target_language": ["en"]}) == plain
    assert plain[0].score < 0.5


def test_a_declaration_is_seen_through_partial():
    @per_sample(columns=("answer",))
    def declared(prompts, completions, *, answer, scale=1.0, **columns):
        return [scale] * len(completions)

    assert is_per_sample(partial(partial(declared, scale=2.0), answer=1))
    call = arguments(partial(declared, scale=2.0), P, C, {**COLUMNS, "scale": [9]})
    assert call == ([], {"prompts": P, "completions": C, "answer": ANSWER})
    assert not is_per_sample(lambda completions: [])
    assert is_async(partial(exact_match, answer=1))
    assert not is_async(batch_size)


def test_an_async_reward_is_awaited_also_inside_a_running_loop():
    expected = [RewardOutput(1.0), RewardOutput(0.0)]
    call = partial(score_with, "exact", exact_match, P * 2, ["5", "6"], {"answer": ["5", "5"]})
    assert call() == expected

    async def as_in_a_notebook():
        return call()

    assert asyncio.run(as_in_a_notebook()) == expected


# Rewards that abstain ------------------------------------------------------------------------------------------------


def constant(*values):
    return lambda completions: list(values)


def test_the_other_rewards_count_where_one_abstains_and_none_where_one_failed():
    failed = RewardOutput(None, failed=True)
    parts = {"a": constant(None, None, 1.0, failed, np.nan, 1.0), "b": constant(2.0, None, 2.0, 2.0, 2.0, None)}
    scores = weighted(parts, {"a": 1.0, "b": 0.5}, may_abstain=("a",))(["p"] * 6, ["c"] * 6)
    np.testing.assert_array_equal(scores.total, [1, np.nan, 2, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(scores.outcome, scores.total)
    np.testing.assert_array_equal(scores.counted["a"], [np.nan, np.nan, 1, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(scores.counted["b"], [2, np.nan, 2, np.nan, np.nan, np.nan])
    both = weighted(parts, {"a": 1.0, "b": 0.5}, may_abstain=("a", "b"))(["p"] * 6, ["c"] * 6)
    np.testing.assert_array_equal(both.total, [1, np.nan, 2, np.nan, np.nan, 1])


def test_a_gated_reward_that_abstains_is_left_out_whatever_its_gate_says():
    parts = {"own": constant(None, 1.0, 1.0, 1.0), "format": constant(0.0, 0.0, 1.0, None)}
    compose = weighted(parts, {"own": 1.0, "format": 0.5}, gates={"own": "format"}, may_abstain=("own",))
    np.testing.assert_array_equal(compose(["p"] * 4, ["c"] * 4).total, [0, 0, 1.5, np.nan])


def test_only_rewards_may_abstain():
    with pytest.raises(ValueError, match=r"may_abstain has \['c'\]; the rewards are \['a'\]"):
        weighted({"a": constant(1.0)}, {"a": 1.0}, may_abstain=("c",))


# In a pool -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed():
    return []


@pytest.fixture(scope="module")
def pool(printed):
    functions = {"size": batch_size, "bad": misbehaving, "chatty": chatty, "exact": exact_match}
    functions |= {"delayed": delayed_length}
    with RewardPool(functions, workers=2, deadline=0.8, batch_deadline=1.5, show=printed.append) as pool:
        yield pool


def scores(pool, name, completions, **columns):
    return [each.score for each in pool.rewards[name]([""] * len(completions), completions, **columns)]


def test_a_batch_reward_is_called_once_with_the_batch_in_a_process_that_is_kept(pool):
    assert scores(pool, "size", ["a", "b", "c"]) == [3.1] * 3
    assert scores(pool, "size", ["a", "b"], level=[1, 2]) == [2.2] * 2
    pool.score_ahead("", "a", {})  # not a batch
    assert scores(pool, "size", ["a"]) == [1.3]
    assert scores(pool, "size", []) == []
    assert batch_rewards.CALLS == []  # of this process


@pytest.mark.parametrize(("what", "kind"), [("raise", "raised"), ("die", "died"), ("hang", "deadline")])
def test_a_batch_that_fails_has_no_score_and_the_next_one_has(pool, what, kind):
    assert scores(pool, "bad", [what, "x", "y"]) == [None] * 3
    (error,) = pool.take_errors()
    assert (error.reward, error.kind, error.completion) == ("bad", kind, what)
    assert "the 3 completions of this batch have no score" in error.detail
    assert scores(pool, "bad", ["fine", "x"]) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", "reward 'bad' must return one entry for each completion: 3, not 1"),
        ("text", "reward 'bad' returned 'good'; an entry must be None or a number"),
    ],
)
def test_a_batch_reward_that_returns_no_list_of_scores_is_an_error(pool, what, message):
    with pytest.raises(ValueError, match=message):
        scores(pool, "bad", [what, "x", "y"])
    assert scores(pool, "bad", ["fine", "x"]) == [2.0, 2.0]
    with pytest.raises(ValueError, match=message):
        score_with("bad", misbehaving, [""] * 3, [what, "x", "y"], {})


def test_what_a_reward_prints_is_shown_behind_its_name(pool, printed):
    printed.clear()
    assert scores(pool, "chatty", ["a", "b"]) == [0.0, 0.0]
    assert sorted(printed) == ["chatty: and \N{GREEK SMALL LETTER ALPHA} to stderr", "chatty: batch of 2"]
    printed.clear()
    scores(pool, "chatty", ["long"])
    assert len(printed) == 21
    assert printed[-3] == "chatty: line 29"
    assert printed[-1] == "chatty: ... 12 earlier lines are not shown"


def test_async_rewards_in_a_pool(pool):
    assert scores(pool, "exact", ["5", "6"], answer=["5", "5"]) == [1.0, 0.0]
    started = time.monotonic()
    assert scores(pool, "delayed", ["hang", "abc", "raise", *["ab"] * 20]) == [None, 3.0, None, *[2.0] * 20]
    assert time.monotonic() - started < 5  # one after the other, they would take 7
    errors = sorted((error.kind, error.completion) for error in pool.take_errors())
    assert errors == [("deadline", "hang"), ("raised", "raise")]


def test_a_missing_column_is_an_error_before_anything_is_sent(pool):
    with pytest.raises(ValueError, match=r"reward 'exact' needs the column 'answer'; the columns are \['level'\]"):
        pool.probe("", "", {"level": 1})


@per_sample
def slow_once(prompts, completions):
    time.sleep(float(completions[0]))
    return [1.0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a process its priority back")
def test_a_worker_that_was_slow_once_goes_on():
    with RewardPool({"slow": slow_once}, workers=2, deadline=10.0) as pool:
        assert scores(pool, "slow", ["0.7", *["0.001"] * 100]) == [1.0] * 101
        assert scores(pool, "slow", ["0.001"] * 100) == [1.0] * 100
        assert pool.replaced == 0
        assert pool.take_errors() == []


def test_workers_are_forked_with_the_parser_loaded_and_used():
    with RewardPool({"math": rewards.math_reward}, workers=2) as pool:
        started = time.process_time()
        completions = [rf"\boxed{{\frac{{x+{n}}}{{3}}}}" for n in range(20)]
        assert scores(pool, "math", completions, answer=[rf"\frac{{{n}+x}}{{3}}" for n in range(20)]) == [1.0] * 20
        assert pool.replaced == 0
        assert time.process_time() - started < 60
