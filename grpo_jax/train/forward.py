"""Forward passes over prompts and completions: log-probabilities, values and reward-model scores."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.log_probs import chunked_log_probs
from grpo_jax.masked import last_unmasked, positions
from grpo_jax.types import (
    Batch,
    Model,
    Packed,
    Pairs,
    Params,
    Rollout,
    cache_columns,
)

Tokens = Float[Array, "B T"]


class Rows(NamedTuple):
    """Prompts and completions, one of each a row."""

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]


Sequences = Rollout | Batch | Rows


def completion_states(model: Model, params: Params, sequences: Sequences) -> Float[Array, "B T D"]:
    """The hidden state before each completion token: what it is drawn from, and what a critic values.

    Args:
        model: see ``types.Model``.
        params: its parameters.
        sequences: prompts and completions.
    """
    P, T = sequences.prompt_ids.shape[1], sequences.completion_ids.shape[1]
    # Cut between prompt and completion, and with a cache of the sampler's length: sums over keys then run over the same
    # ones in the same order, and round alike. The last token predicts nothing; it stays in for the same reason.
    ids = jnp.concatenate([sequences.prompt_ids, sequences.completion_ids], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.completion_mask], axis=1)
    cache = model.init_cache(ids.shape[0], P + cache_columns(T))
    columns = jnp.pad(mask, ((0, 0), (0, cache_columns(T) - T)))
    hidden, _ = model.apply(params, ids, positions(mask), columns, cache, 0, block_bounds=(P,))
    return hidden[:, P - 1 : -1]


def completion_log_probs(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tokens, Tokens]:
    """Log-probability and entropy (nats) of each completion token given the tokens before it.

    Args:
        model: see ``types.Model``.
        params: its parameters.
        sequences: prompts and completions; values at masked positions are finite and mean nothing.
        temperature: that of the policy, as in sampling.
        chunk_size: see ``log_probs.chunked_log_probs``.
    """
    return chunked_log_probs(
        completion_states(model, params, sequences),
        model.head(params),
        sequences.completion_ids,
        temperature=temperature,
        logit_softcap=model.logit_softcap,
        chunk_size=chunk_size,
    )


def completion_values(model: Model, params: Params, sequences: Sequences) -> Tokens:
    """A critic's value of the state before each completion token, in float32, by its scalar head."""
    return read_scalars(completion_states(model, params, sequences), model.head(params))[..., 0]


def with_value_head(params: Params, hidden_size: int) -> Params:
    """A policy's parameters with a head of zeros beside them that reads a value from its hidden states."""
    return {"policy": params, "value": {"kernel": jnp.zeros((hidden_size, 1), jnp.float32)}}


def policy_and_values(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    shares_trunk: bool = True,
) -> tuple[Tokens, Tokens, Tokens]:
    """Log-probabilities, entropies and values in one pass, of parameters that ``with_value_head`` made.

    Args:
        model: see ``types.Model``.
        params: a policy's and its value head's.
        sequences: prompts and completions.
        temperature: that of the policy.
        chunk_size: see ``log_probs.chunked_log_probs``.
        shares_trunk: whether the values' gradient reaches the policy; if not, it ends at the head.
    """
    states = completion_states(model, params["policy"], sequences)
    log_probs, entropy = chunked_log_probs(
        states,
        model.head(params["policy"]),
        sequences.completion_ids,
        temperature=temperature,
        logit_softcap=model.logit_softcap,
        chunk_size=chunk_size,
    )
    states = states if shares_trunk else jax.lax.stop_gradient(states)
    return log_probs, entropy, read_scalars(states, params["value"]["kernel"].T)[..., 0]


def pair_log_probs(model: Model, params: Params, pairs: Pairs, *, chunk_size: int = 1024) -> Float[Array, "B 2 T"]:
    """Log-probability of each token of both completions of each pair."""
    _, _, T = pairs.completion_ids.shape
    log_probs, _ = completion_log_probs(model, params, as_rows(pairs), chunk_size=chunk_size)
    return log_probs.reshape(-1, 2, T)


def packed_log_probs(model: Model, params: Params, packed: Packed, *, chunk_size: int = 1024) -> Tokens:
    """Log-probability of each token given those before it in its own sequence; 0 in the first column.

    What stands at the first token of a sequence and in padding is finite and means nothing.
    """
    hidden, _ = model.apply(params, packed.token_ids, packed.positions, packed.segment_ids)
    log_probs, _ = chunked_log_probs(
        hidden[:, :-1],
        model.head(params),
        packed.token_ids[:, 1:],
        logit_softcap=model.logit_softcap,
        chunk_size=chunk_size,
    )
    return jnp.pad(log_probs, ((0, 0), (1, 0)))


def pair_scores(model: Model, params: Params, pairs: Pairs) -> Float[Array, "B 2"]:
    """A reward model's scores of both completions of each pair."""
    rows = as_rows(pairs)
    ids = jnp.concatenate([rows.prompt_ids, rows.completion_ids], axis=1)
    mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
    return reward_model_scores(model, params, ids, mask).reshape(-1, 2)


def as_rows(pairs: Pairs) -> Rows:
    """Each completion of a pair in a row of its own, with its prompt before it."""
    T = pairs.completion_ids.shape[2]
    return Rows(
        jnp.repeat(pairs.prompt_ids, 2, axis=0),
        jnp.repeat(pairs.prompt_mask, 2, axis=0),
        pairs.completion_ids.reshape(-1, T),
        pairs.completion_mask.reshape(-1, T),
    )


def reward_model_scores(
    model: Model, params: Params, token_ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> Float[Array, " B"]:
    """A reward model's score of each sequence, in float32: its scalar head at the last attended token.

    Args:
        model: one with a scalar head.
        params: its parameters.
        token_ids: whole sequences, padded on either side; what stands in padding is never looked at.
        mask: True at real tokens; a row without any scores 0.
    """
    hidden, _ = model.apply(params, token_ids, positions(mask), mask)
    return last_unmasked(read_scalars(hidden, model.head(params))[..., 0], mask)


def read_scalars(hidden: Float[Array, "B S D"], head: Float[Array, "N D"]) -> Float[Array, "B S N"]:
    """What scalar heads make of hidden states, in float32."""
    return hidden.astype(jnp.float32) @ head.T.astype(jnp.float32)
