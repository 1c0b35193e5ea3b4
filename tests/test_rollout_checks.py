"""Prompts that XLA would accept and sample from wrongly are refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.rollout import Sampler, generate
from grpo_jax.sampling import Sampling

OPTIONS = {"group_size": 2, "max_completion_length": 8, "eos_ids": (1,), "pad_id": 0}


def padded(prompts=((3, 4), (5, 6, 7)), width=4):
    return pad_prompts(
        [list(prompt) for prompt in prompts], max_prompt_length=width, pad_id=0, index=range(len(prompts))
    )


def generated(tiny, prompts, **options):
    return generate(*tiny, prompts, jax.random.key(0), Sampling(), **OPTIONS | options)


def sampled(tiny, prompts, **options):
    return Sampler(tiny[0], Sampling(), **OPTIONS | options)(tiny[1], prompts, jax.random.key(0))


def streamed(tiny, prompts, **options):
    sampler = Sampler(tiny[0], Sampling(), **OPTIONS | options)
    return list(sampler.stream(tiny[1], [prompts], jax.random.key(0), num_prompts=2))


def with_mask(rows):
    return replace(padded(), mask=jnp.array(rows, dtype=bool))


def with_id(token_id):
    return padded(((3, 4), (5, token_id, 7)))


REFUSED = {
    "padded on the right": (with_mask([[0, 0, 1, 1], [1, 1, 1, 0]]), "prompt 1 is not left-padded"),
    "padded on both sides": (with_mask([[0, 1, 1, 0], [0, 1, 1, 1]]), "prompt 0 is not left-padded"),
    "a hole": (with_mask([[0, 0, 1, 1], [1, 0, 1, 1]]), "prompt 1 is not left-padded"),
    "no tokens": (with_mask([[0, 0, 0, 0], [0, 1, 1, 1]]), "prompt 0 is not left-padded"),
    "id of the vocabulary's size": (with_id(32), "prompt 1 has the token id 32, and the model's vocabulary has 32"),
    "negative id": (with_id(-1), "prompt 1 has the token id -1"),
    "one index twice": (replace(padded(), index=jnp.array([3, 3])), "prompts share an index"),
    "longer than the model": (padded(((3,) * 130,), 130), r"prompt 0 has 130 tokens.*128 positions; shorten it$"),
    "no room for a completion": (padded(((3,) * 122,), 122), "at most 6"),
}


@pytest.mark.parametrize("draw", [generated, sampled, streamed])
@pytest.mark.parametrize("case", REFUSED)
def test_prompts_are_refused(tiny, draw, case):
    prompts, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        draw(tiny, prompts)


@pytest.mark.parametrize("draw", [generated, sampled, streamed])
@pytest.mark.parametrize("eos_id", [32, -1])
def test_eos_ids_outside_the_vocabulary_are_refused(tiny, draw, eos_id):
    with pytest.raises(ValueError, match=rf"eos_ids has \[{eos_id}\], which a model of 32 tokens can never sample"):
        draw(tiny, padded(), eos_ids=(1, eos_id))


def test_ids_in_padding_have_no_effect(tiny):
    prompts = padded()
    strange = replace(prompts, ids=jnp.where(prompts.mask, prompts.ids, 99))
    np.testing.assert_array_equal(sampled(tiny, strange).completion_ids, sampled(tiny, prompts).completion_ids)


def test_traced_prompts_are_not_checked_but_their_eos_ids_are(tiny):
    prompts, _ = REFUSED["padded on the right"]
    traced = partial(generate, tiny[0], sampling=Sampling(), **OPTIONS)
    assert jax.eval_shape(traced, tiny[1], prompts, jax.random.key(0)).completion_ids.shape == (4, 8)
    with pytest.raises(ValueError, match="can never sample"):
        jax.eval_shape(partial(traced, eos_ids=(40,)), tiny[1], prompts, jax.random.key(0))
