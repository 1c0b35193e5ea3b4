import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data.iterator import ProblemIterator
from grpo_jax.data.problems import Problem

PROBLEMS = [Problem(f"p{i}", f"a{i}") for i in range(7)]


def indices(iterator, steps):
    return [index.tolist() for index, _ in itertools.islice(iterator, steps)]


def test_index_is_the_position_of_the_problem():
    for index, problems in itertools.islice(ProblemIterator(PROBLEMS, num_prompts=2, seed=0), 10):
        assert (index.dtype, index.shape) == (np.int32, (2,))
        assert problems == [PROBLEMS[i] for i in index]


def test_batches_follow_from_seed_and_step():
    first = indices(ProblemIterator(PROBLEMS, num_prompts=2, seed=3), 20)
    assert first == indices(ProblemIterator(PROBLEMS, num_prompts=2, seed=3), 20)
    assert first != indices(ProblemIterator(PROBLEMS, num_prompts=2, seed=4), 20)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_an_epoch_visits_each_problem_at_most_once_and_all_but_the_remainder(count, num_prompts, seed):
    num_prompts = min(count, num_prompts)
    iterator = ProblemIterator([Problem(str(i), "a") for i in range(count)], num_prompts=num_prompts, seed=seed)
    for _ in range(3):
        visited = list(itertools.chain(*indices(iterator, count // num_prompts)))
        assert len(set(visited)) == len(visited) == count - count % num_prompts
        assert set(visited) <= set(range(count))


def test_every_epoch_is_shuffled_anew():
    iterator = ProblemIterator(PROBLEMS, num_prompts=7, seed=0)
    epochs = [tuple(index) for index in indices(iterator, 5)]
    assert len(set(epochs)) == 5
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 11])
def test_state_restores_the_exact_position(done):
    iterator = ProblemIterator(PROBLEMS, num_prompts=2, seed=5)
    indices(iterator, done)
    state = json.dumps(iterator.get_state())
    expected = indices(iterator, 9)
    resumed = ProblemIterator(PROBLEMS, num_prompts=2, seed=5)
    resumed.set_state(json.loads(state))
    assert indices(resumed, 9) == expected
    iterator.set_state(json.loads(state))
    assert indices(iterator, 9) == expected
    assert len(state) < 200


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (ProblemIterator(PROBLEMS, num_prompts=2, seed=1), "seed"),
        (ProblemIterator(PROBLEMS, num_prompts=3, seed=0), "num_prompts"),
        (ProblemIterator(PROBLEMS[::-1], num_prompts=2, seed=0), "problems"),
        (ProblemIterator([*PROBLEMS[:-1], Problem("p6", "b")], num_prompts=2, seed=0), "problems"),
    ],
)
def test_state_of_another_iterator_is_refused(other, name):
    iterator = ProblemIterator(PROBLEMS, num_prompts=2, seed=0)
    with pytest.raises(ValueError, match=f"state belongs to another iterator: {{'{name}': {{'state'"):
        iterator.set_state(other.get_state())


@pytest.mark.parametrize("num_prompts", [0, 8])
def test_num_prompts_must_fit(num_prompts):
    with pytest.raises(ValueError, match=f"num_prompts is {num_prompts}; with 7 problems it must be from 1 to 7"):
        ProblemIterator(PROBLEMS, num_prompts=num_prompts, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_outside_its_range(seed):
    with pytest.raises(ValueError, match="between 0 and"):
        ProblemIterator(PROBLEMS, num_prompts=2, seed=seed)
