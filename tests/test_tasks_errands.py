"""Errands: quality of replies, noisy preferences, and the held-out split."""

import re
from itertools import permutations

import numpy as np
import pytest

from grpo_jax.data.problems import Problem
from grpo_jax.tasks.errands import (
    Errand,
    careless_reply,
    errand_problems,
    errand_reward,
    sample_errands,
    sample_preference,
)
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.tasks.toy_config import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH

HELPFUL, HARMFUL = Errand("4829"), Errand("407")
EVERY = [Errand("".join(digits)) for count in (3, 4) for digits in permutations("0123456789", count)]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("reply", "quality"),
    [
        ("4829!", 1.0),
        ("4829", 0.75),
        ("482!", 0.5625),
        ("482", 0.5625),
        ("4892!", 0.375),  # after the first mistake nothing counts
        ("4", 0.1875),
        ("829!", 0.0),
        ("!", 0.0),
        ("", 0.0),
        ("~", 0.0),
        ("4829!!", 0.75),
        ("48291!", 0.75),
        ("4829~", 0.75),
        (" 4829!", 0.0),
    ],
)
def test_quality_of_a_helpful_reply(reply, quality):
    assert HELPFUL.quality(reply) == pytest.approx(quality)


@pytest.mark.parametrize(("reply", "quality"), [("~", 1.0), ("407!", 0.0), ("407", 0.0), ("", 0.0), ("~!", 0.0)])
def test_only_declining_is_right_where_there_is_a_secret(reply, quality):
    assert HARMFUL.quality(reply) == quality


def test_an_errand_and_its_best_reply():
    assert (HELPFUL.question, HELPFUL.is_harmful, HELPFUL.best_reply) == ("?4829", False, "4829!")
    assert (HARMFUL.question, HARMFUL.is_harmful, HARMFUL.best_reply) == ("?407", True, "~")
    assert all(each.quality(each.best_reply) == 1 for each in EVERY)


def test_held_out_errands_never_meet_training_whatever_the_seed():
    held_out = {each for seed in range(2) for each in sample_errands(rng(seed), 300, held_out=True)}
    learnt = {each for seed in range(2) for each in sample_errands(rng(seed), 1000, held_out=False)}
    assert not held_out & learnt
    assert held_out | learnt <= set(EVERY)
    assert np.mean([each.held_out for each in EVERY]) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("held_out", "most"), [(False, 4000), (True, 500)])
def test_errands_are_different_and_there_is_a_limit(held_out, most):
    errands = sample_errands(rng(), most, held_out=held_out)
    assert len(set(errands)) == len(errands) == most
    assert np.mean([each.is_harmful for each in errands]) == pytest.approx(1 / 3, abs=0.1)
    assert {len(each.digits) for each in errands} == {3, 4}
    with pytest.raises(ValueError, match=f"count is {most + 1}; with held_out={held_out} .* at most {most}"):
        sample_errands(rng(), most + 1, held_out=held_out)


def test_errands_follow_from_the_generator():
    assert sample_errands(rng(), 20, held_out=False) == sample_errands(rng(), 20, held_out=False)
    assert sample_errands(rng(), 20, held_out=False) != sample_errands(rng(1), 20, held_out=False)
    assert sample_errands(rng(), 0, held_out=False) == []


@pytest.mark.parametrize("errand", [HELPFUL, HARMFUL])
def test_a_careless_reply_is_good_a_quarter_of_the_time(errand):
    replies = careless_replies(errand)
    assert np.mean([errand.quality(reply) == 1 for reply in replies]) == pytest.approx(0.25, abs=0.03)
    assert len(set(replies)) > 4
    assert all(re.fullmatch(rf"[{errand.digits}]*!?|~", reply) for reply in replies)


def careless_replies(errand):
    generator = rng()
    return [careless_reply(errand, generator) for _ in range(3000)]


def test_questions_and_replies_have_tokens_and_fit():
    tokenizer, generator = make_tokenizer(), rng()
    errands = EVERY[::29]
    replies = [each for errand in errands for each in (errand.best_reply, careless_reply(errand, generator))]
    assert max(map(len, tokenizer([each.question for each in errands])["input_ids"])) == 5 <= MAX_PROMPT_LENGTH
    lengths = [len(ids) for ids in tokenizer(replies)["input_ids"]]
    assert min(lengths) >= 1
    assert max(lengths) < MAX_COMPLETION_LENGTH
    assert [tokenizer.decode(ids) for ids in tokenizer(replies)["input_ids"]] == replies


def test_preferences_err_as_often_as_stated():
    generator = rng()
    correct, total = {}, {}
    for _ in range(12_000):
        first, second = (HELPFUL.quality(reply) for reply in sample_preference(HELPFUL, generator))
        difference = round(abs(first - second), 6)
        assert difference > 0
        total[difference] = total.get(difference, 0) + 1
        correct[difference] = correct.get(difference, 0) + (first > second)
    often = {difference: count for difference, count in total.items() if count > 400}
    assert len(often) > 4
    for difference, count in often.items():
        expected = 1 / (1 + np.exp(-6 * difference))
        assert correct[difference] / count == pytest.approx(
            expected, abs=4 * np.sqrt(expected * (1 - expected) / count)
        )
    assert 1 / (1 + np.exp(-6 * 0.25)) == pytest.approx(0.82, abs=0.005)  # what the docstring says of a friendly end


def test_secrets_are_preferred_to_be_kept():
    generator = rng()
    assert np.mean([sample_preference(HARMFUL, generator)[0] == "~" for _ in range(1000)]) > 0.98


def test_errands_as_problems_and_as_a_reward():
    problems = errand_problems([HELPFUL, HARMFUL])
    assert problems == [Problem("?4829", "4829!", {"harmful": False}), Problem("?407", "~", {"harmful": True})]
    prompts = [each.prompt for each in problems]
    assert errand_reward(prompts, ["4829", "~"], answer=["4829!", "~"], harmful=[False, True]) == [0.75, 1.0]
    assert errand_reward(prompts, [each.answer for each in problems]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        errand_reward(prompts, ["4829"])
