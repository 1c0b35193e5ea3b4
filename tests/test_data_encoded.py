"""Encoded problems, decoded completions, and the held-out loop over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.data.encoded import EncodedProblems, Texts, Undecoded, decode_completions, undecoded
from grpo_jax.data.problems import Problem
from grpo_jax.loop.held_out import held_out, held_out_rewards
from grpo_jax.rewards.compose import weighted
from grpo_jax.rewards.math.answer import answer_reward
from grpo_jax.tasks.sums import VOCABULARY, make_tokenizer
from grpo_jax.types import Rollout

EOS, PAD = VOCABULARY.index("<eos>"), VOCABULARY.index("<pad>")
PROBLEMS = [Problem("1+2=", "3"), Problem("1+2+3+4=", "10"), Problem("4+4=", "8"), Problem("5+1=", "6")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def encode(tokenizer, problems=PROBLEMS, **options):
    settings = {"max_prompt_length": 6, "pad_id": PAD, "template": "{question}"}
    return EncodedProblems(problems, tokenizer, **settings | options)


def test_prompts_that_do_not_fit_are_dropped_and_counted(tokenizer):
    encoded = encode(tokenizer)
    assert encoded.dropped == 1
    assert encoded.texts == ["1+2=", "4+4=", "5+1="]
    assert [problem.answer for problem in encoded.problems] == ["3", "8", "6"]
    assert len(encoded) == 3
    assert encode(tokenizer, overlong_prompts="truncate").dropped == 0
    with pytest.raises(ValueError, match="longer than max_prompt_length=6"):
        encode(tokenizer, overlong_prompts="error")


def test_padded(tokenizer):
    encoded = encode(tokenizer)
    prompts = encoded.padded([2, 0])
    assert prompts.index.tolist() == [2, 0]
    assert prompts.mask.tolist() == [[False, False, True, True, True, True]] * 2
    assert tokenizer.decode(prompts.ids[0][prompts.mask[0]]) == "5+1="


def test_an_empty_prompt_is_named(tokenizer):
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        encode(tokenizer, [Problem("", "1")])


def rollout_of(tokenizer, texts, ended=True):
    rows = [tokenizer(text)["input_ids"] + [EOS] * ended for text in texts]
    T = max(map(len, rows))
    ids = jnp.array([row + [PAD] * (T - len(row)) for row in rows], jnp.int32)
    mask = jnp.array([[t < len(row) for t in range(T)] for row in rows])
    prompts = jnp.zeros((len(rows), 1), jnp.int32)
    zeros = jnp.zeros(ids.shape, jnp.float32)
    return Rollout(prompts, prompts == 0, ids, mask, zeros, jnp.full(len(rows), not ended))


@pytest.mark.parametrize("ended", [True, False])
def test_completions_are_decoded_without_their_end(tokenizer, ended):
    texts = ["<answer>3</answer>", "<think>1+1=2;</think>"]
    assert decode_completions(tokenizer, rollout_of(tokenizer, texts, ended), (EOS,)) == texts


def test_texts_are_decoded_when_they_are_read_and_once(tokenizer):
    texts = ["<answer>3</answer>", "<think>1+1=2;</think>", "1", "2"]
    rollout = rollout_of(tokenizer, texts)
    decoded = []

    def decode(rows):
        decoded.extend(rows)
        return [f"text {row}" for row in rows]

    lazy = undecoded(tokenizer, rollout, (EOS,))
    assert [*lazy] == texts
    assert lazy == texts
    assert lazy != texts[:3]
    assert (lazy + lazy.at([2]))[:] == [*texts, "1"]
    lazy = Texts([Undecoded(row) for row in range(6)], decode)
    assert lazy[1::2] == ["text 1", "text 3", "text 5"]
    assert (lazy.at([1, 0])[1], lazy[-1], decoded) == ("text 0", "text 5", [1, 3, 5, 0])
    assert len(lazy) == 6
    assert [*lazy] == [f"text {row}" for row in range(6)]
    assert decoded == [1, 3, 5, 0, 2, 4]


def test_an_ending_token_elsewhere_and_other_special_tokens_stay(tokenizer):
    rollout = rollout_of(tokenizer, ["1<pad>2"])
    assert decode_completions(tokenizer, rollout, (EOS,)) == ["1<pad>2"]


def test_an_unfinished_thought_has_no_vote(tokenizer):
    encoded = encode(tokenizer)
    texts = ["<think><answer>3</answer>", "<think><answer>3</answer>", "<answer>4</answer>"]
    drawn = [(place, rollout_of(tokenizer, texts)) for place in range(3)]
    right = held_out(
        encoded,
        drawn,
        lambda rollout: decode_completions(tokenizer, rollout, (EOS,)),
        lambda prompts, completions, **_: [float("4" in text) for text in completions],
        group_size=3,
    )
    assert right["eval/maj@3"] == 1


def test_held_out_counts_every_problem_once(tokenizer):
    encoded = encode(tokenizer)
    answers = {2: ["6", "6", "5"], 0: ["3", "3", "1"], 1: ["8", "2", "2"]}  # in the order they ended
    done = []

    def drawn():
        for place, texts in answers.items():
            yield place, rollout_of(tokenizer, [f"<answer>{text}</answer>" for text in texts])

    def decode(rollout):
        return decode_completions(tokenizer, rollout, (EOS,))

    metrics = held_out(encoded, drawn(), decode, answer_reward, group_size=3, report=done.append)
    assert done == [1, 2, 3]
    assert metrics["eval/pass@1"] == pytest.approx(5 / 9)
    assert metrics["eval/maj@3"] == pytest.approx(2 / 3)
    assert metrics["eval/mean_length"] == 4
    assert np.isfinite(list(metrics.values())).all()

    everything_same = held_out(encoded, drawn(), decode, answer_reward, group_size=3, same=lambda a, b: True)
    assert everything_same["eval/maj@3"] == pytest.approx(2 / 3)  # of numbers nothing is asked

    def ungraded(prompts, completions, **columns):
        scores = answer_reward(prompts, completions, **columns)
        return [None if "2" in completion else score for completion, score in zip(completions, scores, strict=True)]

    metrics = held_out(encoded, drawn(), decode, ungraded, group_size=3)
    assert metrics["eval/frac_ungraded"] == pytest.approx(1 / 3)
    assert metrics["eval/pass@1"] == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="each of the 3 held-out problems has a sample"):
        held_out(encoded, drawn(), decode, lambda p, c, **_: [None] * len(c), group_size=3)
    with pytest.raises(ValueError, match="only 2 of 3 held-out problems were sampled"):
        held_out(encoded, list(drawn())[1:], decode, answer_reward, group_size=3)
    with pytest.raises(ValueError, match="held-out problem 2 was sampled twice"):
        held_out(encoded, [*drawn(), *drawn()], decode, answer_reward, group_size=3)


def test_what_held_out_completions_are_worth_where_nothing_is_right(tokenizer):
    encoded = encode(tokenizer)
    texts = {2: ["6", "66"], 0: ["3", ""], 1: ["8", "222"]}
    drawn = [(place, rollout_of(tokenizer, each)) for place, each in texts.items()]
    seen = []

    def score(prompts, completions, *, completion_length, truncated, answer, **columns):
        seen.extend(zip(prompts, completions, completion_length, truncated, answer, strict=True))
        totals = np.array([float("nan") if not text else len(text) for text in completions], np.float32)
        return weighted({"length": lambda p, c, **_: totals.tolist()}, {"length": 1.0})(prompts, completions)

    def decode(rollout):
        return decode_completions(tokenizer, rollout, (EOS,))

    metrics = held_out_rewards(encoded, drawn, decode, score, group_size=2)
    of_problems = [1.5, 1.0, 2.0]  # means over the samples that have a reward
    assert metrics == {
        "eval/reward": pytest.approx((1 + 2 + 1 + 1 + 3) / 5),
        "eval/reward_stderr": pytest.approx(np.std(of_problems, ddof=1) / 3**0.5),
        "eval/mean_length": pytest.approx(14 / 6),
    }
    assert [row[0] for row in seen] == [encoded.texts[place] for place in (2, 2, 0, 0, 1, 1)]
    assert [row[1] for row in seen] == ["6", "66", "3", "", "8", "222"]
    assert [row[2] for row in seen] == [2, 3, 2, 1, 2, 4]  # with the ending token
    assert [row[4] for row in seen] == [encoded.problems[place].answer for place in (2, 2, 0, 0, 1, 1)]
    nothing = held_out_rewards(encoded, drawn[1:2], decode, lambda p, c, **_: score(p, [""] * 2, **_), group_size=2)
    assert [*nothing] == ["eval/mean_length"]
