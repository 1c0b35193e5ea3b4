"""From prompts to completions: one pure function, to be jitted from outside."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.log_probs import output_logits
from grpo_jax.masked import positions
from grpo_jax.sampling import Sampling, sample_token
from grpo_jax.types import Cache, Model, Params, Prompts, Rollout


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
    """Draw ``group_size`` completions of each prompt.

    Each prompt is read once, whatever the group's size; its keys and values are then copied for each sample. Decoding
    ends when every row has ended. What a sample draws is a function of ``key``, its prompt's ``index`` and its number
    in the group: neither the batch around it nor the devices it is computed on change it.

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
        ValueError: at trace time, for a group_size or max_completion_length below 1, or no eos_ids.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; at least 1 sample is drawn for each prompt")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}; it must be at least 1 token")
    if not eos_ids:
        raise ValueError("eos_ids is empty; without an ending token no completion would ever end")
    N, P = prompts.ids.shape
    B, T = N * group_size, max_completion_length

    def each(x):
        return jnp.repeat(x, group_size, axis=0)

    room = jnp.ones((N, T), dtype=bool)
    slots = jnp.concatenate([prompts.mask, room], axis=1)
    hidden, cache = model.apply(
        params, prompts.ids, positions(prompts.mask), slots, model.init_cache(N, P + T), jnp.int32(0)
    )
    slots, lengths = each(slots), each(prompts.mask.sum(1, dtype=jnp.int32))
    keys = sample_keys(key, prompts.index, group_size)
    stops = jnp.array(eos_ids, dtype=jnp.int32)

    class State(NamedTuple):
        t: Int[Array, ""]
        cache: Cache
        hidden: Float[Array, "B D"]
        ended: Bool[Array, " B"]
        ids: Int[Array, "B T"]
        mask: Bool[Array, "B T"]
        log_probs: Float[Array, "B T"]

    def going(state: State):
        return (state.t < T) & ~state.ended.all()

    def step(state: State) -> State:
        t = state.t
        logits = output_logits(state.hidden, model.head(params), logit_softcap=model.logit_softcap)
        tokens, log_probs = sample_token(jax.vmap(jax.random.fold_in, (0, None))(keys, t), logits, sampling)
        tokens = jnp.where(state.ended, pad_id, tokens)
        hidden, cache = model.apply(params, tokens[:, None], (lengths + t)[:, None], slots, state.cache, P + t)
        return State(
            t=t + 1,
            cache=cache,
            hidden=hidden[:, 0],
            ended=state.ended | (tokens[:, None] == stops[None, :]).any(1),
            ids=state.ids.at[:, t].set(tokens),
            mask=state.mask.at[:, t].set(~state.ended),
            log_probs=state.log_probs.at[:, t].set(jnp.where(state.ended, 0, log_probs)),
        )

    state = jax.lax.while_loop(
        going,
        step,
        State(
            t=jnp.int32(0),
            cache=jax.tree.map(each, cache),
            hidden=each(hidden[:, -1]),
            ended=jnp.zeros(B, dtype=bool),
            ids=jnp.full((B, T), pad_id, dtype=jnp.int32),
            mask=jnp.zeros((B, T), dtype=bool),
            log_probs=jnp.zeros((B, T), dtype=jnp.float32),
        ),
    )
    return Rollout(
        prompt_ids=each(prompts.ids),
        prompt_mask=each(prompts.mask),
        completion_ids=state.ids,
        completion_mask=state.mask,
        rollout_log_probs=state.log_probs,
        truncated=~state.ended,
    )


def sample_keys(key: Key[Array, ""], index: Int[Array, " N"], group_size: int) -> Key[Array, " B"]:
    """A key for each sample, from the step's key, its prompt's index and its number in the group alone."""
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    each_sample = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(each_sample, (0, None))(prompt_keys, jnp.arange(group_size)).reshape(-1)
