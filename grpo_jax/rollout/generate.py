"""Sampling as one pure function of parameters, prompts and a key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.rollout.checks import check_lengths, check_prompts
from grpo_jax.rollout.decode import DecodeState, decode_step, no_experts, prefill
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
    record_experts: bool = False,
) -> Rollout:
    """Sample ``group_size`` completions of each prompt, as one pure function.

    Decodes until every row is finished, over all rows and a cache of full length; ``Sampler`` returns the same samples
    in a fraction of the time. A sample depends on ``key``, its prompt's ``index`` and its number in the group, not on
    the rest of the batch or on the devices.

    Args:
        model: the policy's model.
        params: parameters of ``model``.
        prompts: N prompts, left-padded to P.
        key: random key of this step.
        sampling: temperature, filters and penalties.
        group_size: G, samples of each prompt (TRL: ``num_generations``).
        max_completion_length: T, in tokens, the EOS token included.
        eos_ids: any of these ends a completion.
        pad_id: filling of ``completion_ids`` after the end; it has no other meaning.
        record_experts: as in ``Sampler``.

    Returns:
        N * G completions, those of a prompt adjacent.

    Raises:
        ValueError: at trace time, for a ``group_size`` or ``max_completion_length`` below 1 or empty ``eos_ids``; and
            as ``check_prompts``, which does not check traced prompts.
    """
    check_lengths(group_size, max_completion_length, eos_ids)
    check_prompts(model, prompts, max_completion_length=max_completion_length, eos_ids=eos_ids)
    B, T = prompts.ids.shape[0] * group_size, max_completion_length
    eos = jnp.array(eos_ids, dtype=jnp.int32)

    class Carry(NamedTuple):
        state: DecodeState
        finished: Bool[Array, " B"]
        ids: Int[Array, "B T"]
        mask: Bool[Array, "B T"]
        log_probs: Float[Array, "B T"]
        experts: Int[Array, "B T L k"] | None

    settings = {"group_size": group_size, "chunks": [cache_columns(T)], "record_experts": record_experts}
    batch, state, _, prompt_experts = prefill(model, params, prompts, key, sampling, **settings)

    def is_unfinished(carry: Carry):
        return (carry.state.step < T) & ~carry.finished.all()

    def step(carry: Carry) -> Carry:
        t, finished = carry.state.step, carry.finished
        options = {"eos_ids": eos_ids, "record_experts": record_experts}
        state, tokens, log_probs, experts = decode_step(model, params, batch, carry.state, sampling, **options)
        return Carry(
            state,
            finished=finished | (tokens[:, None] == eos[None, :]).any(1),
            ids=carry.ids.at[:, t].set(jnp.where(finished, pad_id, tokens)),
            mask=carry.mask.at[:, t].set(~finished),
            log_probs=carry.log_probs.at[:, t].set(jnp.where(finished, 0, log_probs)),
            experts=None if carry.experts is None else carry.experts.at[:, t].set(experts),
        )

    start = Carry(
        state,
        finished=jnp.zeros(B, dtype=bool),
        ids=jnp.full((B, T), pad_id, dtype=jnp.int32),
        mask=jnp.zeros((B, T), dtype=bool),
        log_probs=jnp.zeros((B, T), dtype=jnp.float32),
        experts=no_experts(model, (B, T)) if record_experts else None,
    )
    end = jax.lax.while_loop(is_unfinished, step, start)
    return Rollout(
        prompt_ids=jnp.repeat(prompts.ids, group_size, axis=0),
        prompt_mask=jnp.repeat(prompts.mask, group_size, axis=0),
        completion_ids=end.ids,
        completion_mask=end.mask,
        rollout_log_probs=end.log_probs,
        truncated=~end.finished,
        prompt_experts=None if prompt_experts is None else jnp.repeat(prompt_experts, group_size, axis=0),
        completion_experts=end.experts,
    )
