"""Scores in the background: those of the foreground, in turn, with the errors of their own batch."""

import threading
import time

import numpy as np
import pytest

from grpo_jax.rewards.scorer import Scorer
from tests.faulty_rewards import faulty


def scorer(rewards, workers=0, held_out=faulty):
    return Scorer(
        rewards,
        dict.fromkeys(rewards, 1.0),
        held_out,
        learned=None,
        judge=None,
        gates={},
        clip=None,
        workers=workers,
        pool={"deadline": 5.0} if workers else {},
    )


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def test_a_thread_scores_in_turn_and_as_the_foreground():
    """Two batches are started while nothing can be scored; a call in the foreground waits for its turn."""
    allowed, running, most = threading.Event(), [], []

    def slow(completions, answer, **columns):
        assert allowed.wait(20)
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return [float(text == each) for text, each in zip(completions, answer, strict=True)]

    with scorer({"slow": slow, "length": length}) as scoring:
        first = scoring.start(["", ""], ["a", "bb"], answer=["a", "a"])
        second = scoring.start([""], ["ccc"], answer=["ccc"])
        assert not any(future.done() for future in first.futures)
        threading.Timer(0.05, allowed.set).start()
        np.testing.assert_array_equal(scoring.score([""], ["d"], answer=["d"]).total, [2])
        np.testing.assert_array_equal(second.result().total, [4])
        scores = first.result()
        np.testing.assert_array_equal(scores.total, [2, 2])
        np.testing.assert_array_equal(scores.parts["slow"], [1, 0])
        assert set(most) == {1}
        assert len(most) == 3
        assert second.seconds >= first.seconds > 0


def test_an_evaluation_waits_for_the_turn_of_a_thread():
    """The reward of held-out problems may share what is not safe for threads with that of training problems."""
    begun, running, beside = threading.Event(), [], []

    def slow(completions, **columns):
        running.append(1)
        begun.set()
        time.sleep(0.05)
        running.pop()
        return length(completions)

    def held_out(completions, **columns):
        beside.append(len(running))
        return length(completions)

    with scorer({"slow": slow}, held_out=held_out) as scoring, scorer({"other": held_out}) as other:
        for score in (scoring.held_out, lambda *texts: other.score(*texts).total, other.start):  # of another task, too
            begun.clear()
            started = scoring.start([""], ["a"])
            assert begun.wait(20)
            scored = score([""], ["bb"])
            np.testing.assert_array_equal(started.result().total, [1])
            if score == other.start:
                np.testing.assert_array_equal(scored.result().total, [2])
        assert beside == [0, 0, 0]


def test_an_error_in_the_background_is_raised_where_its_scores_are_waited_for():
    def broken(completions, **columns):
        raise KeyError("no such thing")

    with scorer({"broken": broken}) as scoring:
        started = scoring.start([""], ["a"])
        with pytest.raises(ValueError, match=r"reward 'broken' raised KeyError: 'no such thing'\. It was called"):
            started.result()


def test_workers_keep_the_errors_of_a_batch_until_its_scores_are_taken():
    with scorer({"faulty": faulty}, workers=2) as scoring:
        watch = scoring.streaming_scorer(
            ["", ""], {}, lambda ids: ["raise", "good"][ids[0]], eos_ids=[9], max_completion_length=3
        )
        assert watch is not None
        for row in range(2):
            watch(row, [row, 9])
        facts = {"completion_length": [2, 2], "truncated": [False, False]}
        first = scoring.start(["", ""], ["raise", "good"], **facts)
        second = scoring.start([""], ["nan"], completion_length=[1], truncated=[False])
        assert scoring._pool is not None
        assert sum(map(len, scoring._pool._ahead.values())) == 0  # what was scored ahead is taken at the start
        for future in (*first.futures, *second.futures):
            future.result()
        assert scoring.take_errors() == []
        np.testing.assert_array_equal(first.result().total, [np.nan, 4])
        assert [error.completion for error in scoring.take_errors()] == ["raise"]
        np.testing.assert_array_equal(second.result().total, [np.nan])
        assert [error.kind for error in scoring.take_errors()] == ["nan"]
