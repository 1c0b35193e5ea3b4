import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.math.answer import answer_reward, extract_answer
from grpo_jax.tasks.sums import (
    CHINESE_DIGITS,
    PLAIN,
    VOCABULARY,
    Sum,
    blurted,
    make_tokenizer,
    sample_sums,
    sum_problems,
    worked,
)

terms = st.lists(st.integers(0, 9), min_size=2, max_size=9).map(tuple)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def sample(seed, count, **options):
    return sample_sums(np.random.default_rng(seed), count, **options)


def test_worked_and_blurted():
    problem = Sum((3, 8, 5))
    assert problem.question == "3+8+5="
    assert problem.answer == "16"
    assert worked(problem) == "<think>3+8=11;11+5=16;</think><answer>16</answer>"
    assert re.fullmatch(r"<answer>\d+</answer>", blurted(problem, np.random.default_rng(0)))


def test_a_blurted_answer_is_a_guess():
    problem, rng = Sum((9, 9, 9, 9, 9)), np.random.default_rng(0)
    guesses = [int(extract_answer(blurted(problem, rng))) for _ in range(2000)]
    assert max(guesses) <= 45
    assert np.mean(guesses) == pytest.approx(22.5, abs=1)
    assert len(set(guesses)) > 30


@given(terms)
def test_every_step_is_true_and_the_completion_is_right_and_well_formed(digits):
    problem = Sum(digits)
    steps = worked(problem).removeprefix("<think>").split(";</think>")[0].split(";")
    assert len(steps) == len(digits) - 1
    for step in steps:
        left, right = step.split("=")
        before, term = left.split("+")
        assert int(before) + int(term) == int(right)
    completions = [worked(problem)]
    assert answer_reward([], completions, answer=[problem.answer]) == [1.0]
    assert format_reward([""], completions) == [1.0]
    in_chinese = worked(problem, in_chinese=True)
    arabic = {ord(digit): str(value) for value, digit in enumerate(CHINESE_DIGITS)}
    assert in_chinese.translate(arabic) == completions[0]
    assert in_chinese != completions[0]
    assert extract_answer(in_chinese) == str(sum(digits))
    assert extract_answer(completions[0]) == str(sum(digits))


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_are_different_and_of_one_kind(held_out):
    sums = sample(0, 300, held_out=held_out)
    assert len(set(sums)) == len(sums) == 300
    assert {each.held_out for each in sums} == {held_out}
    assert {len(each.terms) for each in sums} == {3, 4, 5, 6, 7}
    assert {digit for each in sums for digit in each.terms} == set(range(10))


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=10)
def test_training_never_meets_what_is_held_out(seed, other):
    train = sample(seed, 60, min_terms=2, max_terms=3, held_out=False)
    assert not set(train) & set(sample(other, 60, min_terms=2, max_terms=3, held_out=True))


def test_split_is_the_same_on_every_machine_and_about_a_tenth():
    every = [Sum((a, b, c)) for a in range(10) for b in range(10) for c in range(10)]
    held_out = [each for each in every if each.held_out]
    assert 70 <= len(held_out) <= 130
    assert [each.question for each in held_out[:3]] == ["0+0+3=", "0+0+6=", "0+0+9="]


def test_sums_follow_from_the_generator():
    assert sample(1, 20, held_out=False) == sample(1, 20, held_out=False)
    assert sample(1, 20, held_out=False) != sample(2, 20, held_out=False)


def test_number_of_terms_is_uniform():
    counts = np.bincount([len(each.terms) for each in sample(0, 2000, min_terms=4, max_terms=6, held_out=False)])
    np.testing.assert_allclose(counts[4:] / 2000, 1 / 3, atol=0.04)


def test_all_there_are_can_be_had_and_no_more():
    train, held_out = (sample(0, count, min_terms=2, max_terms=2, held_out=h) for h, count in SIZES.items())
    assert len({*train, *held_out}) == 100
    with pytest.raises(ValueError, match=f"only about {SIZES[True]} different sums of 2 to 2 "):
        sample(0, SIZES[True] + 1, min_terms=2, max_terms=2, held_out=True)


HELD_OUT_PAIRS = sum(Sum((a, b)).held_out for a in range(10) for b in range(10))
SIZES = {False: 100 - HELD_OUT_PAIRS, True: HELD_OUT_PAIRS}


@pytest.mark.parametrize(("low", "high"), [(1, 3), (4, 3)])
def test_terms_out_of_range(low, high):
    with pytest.raises(ValueError, match=f"min_terms={low} and max_terms={high} must satisfy"):
        sample(0, 1, min_terms=low, max_terms=high, held_out=False)


def test_problems_have_the_form_of_other_sources(tokenizer):
    problems = sum_problems([Sum((3, 8, 5))])
    assert problems == [Problem("3+8+5=", "16", {"terms": 3})]
    [ids] = encode_prompts([problems[0].prompt], tokenizer, template=PLAIN)
    assert tokenizer.convert_ids_to_tokens(ids) == list("3+8+5=")


def test_a_tag_and_a_character_are_one_token_each(tokenizer):
    text = worked(Sum((3, 8, 5))) + "<eos><pad>"
    tokens = tokenizer.tokenize(text)
    expected = ["<think>", *"3+8=11;11+5=16;", "</think>", "<answer>", *"16", "</answer>", "<eos>", "<pad>"]
    assert tokens == expected
    assert len(tokenizer) == len(VOCABULARY) == 32
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


@given(st.lists(st.integers(0, len(VOCABULARY) - 1)))
def test_encoding_what_was_decoded_gives_the_same_ids(ids):
    tokenizer = make_tokenizer()
    text = tokenizer.decode(ids)
    assert text == "".join(VOCABULARY[i] for i in ids)
    assert tokenizer(text)["input_ids"] == ids


def test_tags_stay_where_special_tokens_are_skipped(tokenizer):
    text = worked(Sum((3, 8, 5)))
    assert tokenizer.decode(tokenizer(text + "<eos><pad>")["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["a", "3 4", "3\n4", "<think", "\uff13", "<s>"])
def test_unknown_character_raises(tokenizer, text):
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer(text)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = list(range(len(VOCABULARY)))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(ids) == tokenizer.decode(ids)
    assert loaded("".join(VOCABULARY))["input_ids"] == ids
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, None)
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        loaded("a")
