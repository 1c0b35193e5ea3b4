"""Stop strings."""

import pytest
from checkpoints import tiny_tokenizer

from grpo_jax.rollout.stop import stop_strings
from grpo_jax.tasks.sums import make_tokenizer


@pytest.fixture(scope="module")
def letters():
    return make_tokenizer()


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_a_completion_ends_with_the_token_that_completes_a_string(letters):
    stop = stop_strings(letters, ["</answer>", "=="])
    ids = ids_of(letters, "3+4=7</answer>5+5=")
    whole = ids_of(letters, "3+4=7</answer>")
    assert stop(ids, 0) == len(whole)
    assert stop(whole[:-1], 0) is None
    assert stop(ids_of(letters, "3==4==5"), 0) == 3  # the first of them


def test_ids_seen_before_are_not_searched_again_but_may_begin_a_string():
    tokenizer = tiny_tokenizer()
    ids = ids_of(tokenizer, "w3 w4 w5 w6 w7 w8")
    stop = stop_strings(tokenizer, ["w5 w6"])
    for seen in range(4):
        assert stop(ids, seen) == 4
    assert stop(ids[:3], 2) is None
    assert stop_strings(tokenizer, ["w9"])(ids, 0) is None


def test_special_tokens_count_with_their_text():
    tokenizer = tiny_tokenizer()
    assert stop_strings(tokenizer, ["<eos>"])([4, 5, tokenizer.eos_token_id, 6], 0) == 3


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "abc"])
def test_strings_that_are_none_or_empty_are_refused(letters, strings):
    with pytest.raises(ValueError, match="none of them empty"):
        stop_strings(letters, strings)
