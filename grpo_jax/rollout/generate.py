"""Sampling as one pure function of parameters, prompts and a key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.rollout.checks import check_lengths, check_prompts
from grpo_jax.rollout.decode import State, draw_token, prefill
from grpo_jax.sampling import Sampling
from grpo_jax.types import Model, Params, Prompts, Rollout, cache_columns


def generate(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Draw ``group_size`` completions of each prompt, as one pure function.

    Decoding goes on until every row has ended, over all rows and a cache of full length: see ``Sampler`` for the same
    samples in a fraction of the time. What a sample draws is a function of ``key``, its prompt's ``index`` and its
    number in the group: neither the batch around it nor the devices it is computed on change it.

    Args:
        model: see ``types.Model``.
        params: its parameters.
        prompts: N prompts, left-padded to P.
        key: of this step.
        sampling: temperature and filters.
        group_size: G, samples for each prompt (TRL: ``num_generations``).
        max_completion_length: T, in tokens, the ending one included.
        eos_ids: any of these ends a completion.
        pad_id: what ``completion_ids`` holds after the end; it has no other meaning.

    Returns:
        N * G completions, those of a prompt adjacent.

    Raises:
        ValueError: at trace time, for a group_size or max_completion_length below 1, or no eos_ids; and as
            ``check_prompts`` for prompts whose values are known, which they are not inside another jitted function.
    """
    check_lengths(group_size, max_completion_length, eos_ids)
    check_prompts(model, params, prompts, max_completion_length=max_completion_length, eos_ids=eos_ids)
    B, T = prompts.ids.shape[0] * group_size, max_completion_length
    stops = jnp.array(eos_ids, dtype=jnp.int32)

    class Drawn(NamedTuple):
        state: State
        ended: Bool[Array, " B"]
        ids: Int[Array, "B T"]
        mask: Bool[Array, "B T"]
        log_probs: Float[Array, "B T"]

    columns = [cache_columns(T)]
    cohort, state, _ = prefill(model, params, prompts, key, sampling, group_size=group_size, chunks=columns)

    def going(drawn: Drawn):
        return (drawn.state.age < T) & ~drawn.ended.all()

    def step(drawn: Drawn) -> Drawn:
        t, ended = drawn.state.age, drawn.ended
        state, tokens, log_probs = draw_token(model, params, cohort, drawn.state, sampling, eos_ids=eos_ids)
        return Drawn(
            state,
            ended=ended | (tokens[:, None] == stops[None, :]).any(1),
            ids=drawn.ids.at[:, t].set(jnp.where(ended, pad_id, tokens)),
            mask=drawn.mask.at[:, t].set(~ended),
            log_probs=drawn.log_probs.at[:, t].set(jnp.where(ended, 0, log_probs)),
        )

    start = Drawn(
        state,
        ended=jnp.zeros(B, dtype=bool),
        ids=jnp.full((B, T), pad_id, dtype=jnp.int32),
        mask=jnp.zeros((B, T), dtype=bool),
        log_probs=jnp.zeros((B, T), dtype=jnp.float32),
    )
    drawn = jax.lax.while_loop(going, step, start)
    return Rollout(
        prompt_ids=jnp.repeat(prompts.ids, group_size, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, group_size, axis=0),
        completion_ids=drawn.ids,
        completion_mask=drawn.mask,
        rollout_log_probs=drawn.log_probs,
        truncated=~drawn.ended,
    )
