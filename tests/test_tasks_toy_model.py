"""The toy model: a loadable Hugging Face folder, and the composition of its corpus."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from grpo_jax.models import from_pretrained
from grpo_jax.tasks.errands import Errand
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.tasks.toy_config import HF_CONFIG, MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, ToyConfig
from grpo_jax.tasks.toy_model import corpus, make_toy_model

QUICK = ToyConfig(skill_steps=4, mixture_steps=4, batch_size=64)


@pytest.fixture(scope="module")
def batches():
    return list(corpus(QUICK))


def texts(batch):
    tokenizer = make_tokenizer()
    sides = ((batch.prompt_ids, batch.prompt_mask), (batch.completion_ids, batch.completion_mask))
    return [
        [tokenizer.decode(row[real]) for row, real in zip(np.asarray(ids), np.asarray(mask), strict=True)]
        for ids, mask in sides
    ]


def test_the_first_part_is_worked_and_the_second_guessed(batches):
    shares = [np.mean([text.startswith("<think>") for text in texts(batch)[1]]) for batch in batches]
    assert np.mean(shares[:4]) == pytest.approx(QUICK.skill_share, abs=0.06)
    assert np.mean(shares[4:]) == pytest.approx(QUICK.worked_share, abs=0.06)


def test_no_held_out_sum_is_learnt_from(batches):
    from grpo_jax.tasks.sums import Sum

    for batch in batches:
        for prompt in texts(batch)[0]:
            assert not Sum(tuple(map(int, prompt.removesuffix("=").split("+")))).held_out


def test_every_completion_ends_and_is_learnt_from(batches):
    for batch in batches:
        assert all(text.endswith("<eos>") for text in texts(batch)[1])
        assert np.array_equal(batch.loss_mask, batch.completion_mask)
        assert batch.completion_ids.shape == (64, MAX_COMPLETION_LENGTH)
        assert batch.prompt_ids.shape == (64, MAX_PROMPT_LENGTH)


def test_the_longest_sum_fits():
    tokenizer = make_tokenizer()
    from grpo_jax.tasks.sums import Sum, worked

    longest = Sum((9,) * ToyConfig().max_terms)
    assert len(tokenizer(longest.question)["input_ids"]) <= MAX_PROMPT_LENGTH
    assert len(tokenizer(worked(longest))["input_ids"]) + 1 <= MAX_COMPLETION_LENGTH


def test_the_base_follows_from_its_seed_and_is_reported(tmp_path):
    quick = replace(QUICK, skill_steps=2, mixture_steps=1, batch_size=8)
    reports = []
    make_toy_model(tmp_path / "one", quick, report=lambda step, metrics: reports.append((step, metrics["loss"])))
    make_toy_model(tmp_path / "two", quick)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert texts(next(corpus(quick))) != texts(next(corpus(replace(quick, seed=1))))
    assert [step for step, _ in reports] == [1, 2, 3]
    assert reports[0][1] == pytest.approx(np.log(HF_CONFIG["vocab_size"]), rel=0.3)

    loaded = from_pretrained(tmp_path / "one")
    assert loaded.config.vocab_size == HF_CONFIG["vocab_size"]
    assert loaded.tokenizer.decode(loaded.eos_ids[0]) == "<eos>"
    assert sum(x.size for x in jax.tree.leaves(loaded.params)) < 300_000


def test_errands_stand_beside_the_sums_with_good_replies_at_first_and_careless_ones_later():
    qualities = []
    for batch in corpus(replace(QUICK, errand_share=0.5)):
        prompts, completions = texts(batch)
        kinds = [prompt.startswith("?") for prompt in prompts]
        assert sum(kinds) == 32 == len(set(prompts[32:]))
        assert all(reply.startswith("<") for reply, is_errand in zip(completions, kinds, strict=True) if not is_errand)
        errands = [
            Errand(prompt.removeprefix("?")) for prompt, is_errand in zip(prompts, kinds, strict=True) if is_errand
        ]
        assert not any(errand.held_out for errand in errands)
        replies = [reply.removesuffix("<eos>") for reply in completions[32:]]
        qualities.append(np.mean([errand.quality(reply) == 1 for errand, reply in zip(errands, replies, strict=True)]))
    assert np.mean(qualities[:4]) == pytest.approx(QUICK.skill_share + 0.25 * (1 - QUICK.skill_share), abs=0.06)
    assert np.mean(qualities[4:]) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 6), (1.0, 64)])
def test_the_share_of_errands_is_of_each_batch(share, count):
    quick = replace(QUICK, skill_steps=1, mixture_steps=1, errand_share=share)
    assert [sum(prompt.startswith("?") for prompt in texts(batch)[0]) for batch in corpus(quick)] == [count] * 2


@pytest.mark.slow
def test_the_size_is_the_recipes_and_the_default_is_what_it_was(tmp_path):
    assert ToyConfig().hf_config == HF_CONFIG
    make_toy_model(tmp_path / "small", replace(QUICK, skill_steps=1, mixture_steps=1, hidden_size=32, num_layers=1))
    loaded = from_pretrained(tmp_path / "small")
    assert (loaded.config.hidden_size, loaded.hf_config["intermediate_size"]) == (32, 64)
    assert loaded.hf_config["num_hidden_layers"] == 1
    assert {name: value for name, value in loaded.hf_config.items() if name in HF_CONFIG}.keys() == HF_CONFIG.keys()


@pytest.mark.parametrize("name", ["hidden_size", "num_layers"])
def test_a_model_of_no_size_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        ToyConfig(**{name: 0})
