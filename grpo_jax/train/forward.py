"""Forward passes over prompts and completions: log-probabilities, values and reward-model scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.log_probs import CHUNK_SIZE
from grpo_jax.masked import last_unmasked, positions
from grpo_jax.train.packing import by_sequence
from grpo_jax.train.router import RouterTerms, router_terms
from grpo_jax.types import Batch, Model, Packed, PackedRows, Pairs, Params, Rollout, cache_columns

CHUNKS_OF_PACKED_ROWS = 8
"""Fewest chunks of logits: targets come first in a packed row, and chunks without any are skipped."""
Tokens = Float[Array, "B T"]
Scalar = float | Float[Array, ""]


class Rows(NamedTuple):
    """A prompt and a completion per row."""

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]


Sequences = Rollout | Batch | Rows
AnySequences = TypeVar("AnySequences", bound=Rollout | Batch | Rows)


def completion_states(model: Model, params: Params, sequences: Sequences) -> Float[Array, "B T D"]:
    """The hidden state before each completion token, from which the token is predicted and a critic reads its value.

    Args:
        model: the policy's decoder.
        params: the policy's parameters.
        sequences: prompts and completions, in padded rows.
    """
    P = sequences.prompt_ids.shape[1]
    if model.token_shards > 1:
        return _whole_states(model, params, sequences)[0][:, P - 1 : -1]
    inputs = _padded_inputs(model, params, sequences)
    return _apply(model, inputs, _experts(sequences), block_bounds=(P,))[:, P - 1 : -1]


def _padded_inputs(model: Model, params: Params, sequences: Sequences) -> tuple:
    """Arguments of ``model.apply`` for padded rows; ``block_bounds`` is ``(P,)``.

    Attention is split between prompt and completion, over a cache of the sampler's length: sums over keys then have the
    same terms in the same order, and round identically. The last token, which predicts nothing, is kept for it.
    """
    P, T = sequences.prompt_ids.shape[1], sequences.completion_ids.shape[1]
    ids = jnp.concatenate([sequences.prompt_ids, sequences.completion_ids], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.completion_mask], axis=1)
    cache = model.init_cache(ids.shape[0], P + cache_columns(T))
    columns = jnp.pad(mask, ((0, 0), (0, cache_columns(T) - T)))
    return params, ids, positions(mask), columns, cache, 0


def _experts(sequences: Sequences) -> Int[Array, "B S L k"] | None:
    """The recorded experts of prompts and completions; None if there are none."""
    of_prompts, of_completions = (getattr(sequences, f"{part}_experts", None) for part in ("prompt", "completion"))
    if of_prompts is None or of_completions is None:
        return None
    return jnp.concatenate([of_prompts, of_completions], axis=1)


def without_experts(sequences: AnySequences) -> AnySequences:
    """The sequences without recorded experts, for another model than the policy that sampled them.

    Args:
        sequences: prompts and completions, in padded rows or a micro-batch of packed ones.
    """
    if isinstance(sequences, Rows):
        return sequences
    own: Any = replace(sequences, prompt_experts=None, completion_experts=None)
    rows = getattr(sequences, "rows", None)
    return own if rows is None else replace(own, rows=replace(rows, experts=None))


def _apply(model: Model, inputs: tuple, experts: Int[Array, "B S L k"] | None, **options: Any) -> Float[Array, "B S D"]:
    """Hidden states of ``model.apply``, with recorded experts if there are any."""
    return model.apply(*inputs, **options)[0] if experts is None else _routed(model, inputs, experts, **options)[0]


def _routed(model: Model, inputs: tuple, experts: Int[Array, "B S L k"] | None, **options: Any) -> tuple:
    """Results of ``model.routing.apply``, with recorded experts if there are any."""
    if model.routing is None:
        raise ValueError("experts are recorded or have losses, and this model has no experts")
    return model.routing.apply(*inputs, **options, chosen=None if experts is None else experts.astype(jnp.int32))


def _whole_states(
    model: Model, params: Params, sequences: Sequences
) -> tuple[Float[Array, "B S D"], Int[Array, "B S"]]:
    """Hidden states of prompts and completions, and their token ids."""
    ids = jnp.concatenate([sequences.prompt_ids, sequences.completion_ids], axis=1)
    mask = jnp.concatenate([sequences.prompt_mask, sequences.completion_mask], axis=1)
    return _apply(model, (params, ids, positions(mask), mask), _experts(sequences)), ids


class _Predicting(NamedTuple):
    """Hidden states that predict completion tokens, in padded or packed rows.

    Where devices share the tokens of a row, ``states`` are those of all tokens, since moving them to the places of the
    completion tokens would send them to other devices; numbers for each token are moved instead.
    """

    states: Float[Array, "R S D"]
    target_ids: Int[Array, "R S"]
    target_mask: Bool[Array, "R S"]
    rows: PackedRows | None
    length: int
    first: int = 0
    columns: Int[Array, "R S"] | None = None

    def token_scores(self, model: Model, params: Params, *, temperature: Scalar, chunk_size: int):
        """Log-probabilities and entropies [B, T]."""
        log_probs, entropy = model.token_scores(
            params,
            self.states,
            self.target_ids,
            temperature=temperature,
            chunk_size=chunk_size,
            mask=self.target_mask,
            min_chunks=1 if self.rows is None else CHUNKS_OF_PACKED_ROWS,
        )
        return self.per_sequence(log_probs), self.per_sequence(entropy)

    def per_sequence(self, x: Float[Array, "R S"]) -> Tokens:
        """``[R, S] -> [B, T]``."""
        if self.rows is None:
            return x[:, self.first : self.first + self.length]
        x = x if self.columns is None else jnp.take_along_axis(x, self.columns, axis=1, mode="promise_in_bounds")
        return by_sequence(x, self.rows, self.length)


def _predicting_states(model: Model, params: Params, sequences: Sequences) -> _Predicting:
    rows, T = getattr(sequences, "rows", None), sequences.completion_ids.shape[1]
    if rows is None and model.token_shards > 1:
        first, mask = sequences.prompt_ids.shape[1] - 1, sequences.completion_mask
        states, ids = _whole_states(model, params, sequences)
        targets = jnp.pad(mask, ((0, 0), (first, 1)))
        return _Predicting(states, jnp.roll(ids, -1, axis=1), targets, None, T, first)
    if rows is None:
        states = completion_states(model, params, sequences)
        return _Predicting(states, sequences.completion_ids, sequences.completion_mask, None, T)
    hidden = _apply(model, (params, rows.token_ids, rows.positions, rows.attention_mask), rows.experts)
    if model.token_shards > 1:
        target_ids, target_mask = rows.by_column()
        return _Predicting(hidden, target_ids, target_mask, rows, T, columns=rows.target_columns)
    return _Predicting(rows.predicting(hidden), rows.target_ids, rows.target_mask, rows, T)


def completion_log_probs(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: Scalar = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tokens, Tokens]:
    """Log-probability and entropy (nats) of each completion token given the tokens before it.

    Args:
        model: the policy's decoder.
        params: the policy's parameters.
        sequences: prompts and completions, in padded rows or a micro-batch of packed ones.
        temperature: of the policy, as in sampling.
        chunk_size: number of tokens on a device whose logits exist at a time (``log_probs.chunked_log_probs``).

    Returns:
        Log-probabilities and entropies, float32; finite but meaningless at masked positions.
    """
    predicting = _predicting_states(model, params, sequences)
    return predicting.token_scores(model, params, temperature=temperature, chunk_size=chunk_size)


def routed_log_probs(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: Scalar = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tokens, Tokens, RouterTerms]:
    """``completion_log_probs`` of a model with experts, and the terms of its router's losses for each completion token.

    A term is that of the token before, from which the completion token is predicted.

    Args:
        model, params, sequences, temperature, chunk_size: as there.

    Raises:
        ValueError: at trace time, for a model without experts, or one whose tokens are split over devices.
    """
    if model.routing is None or model.token_shards > 1:
        raise ValueError("a router's losses need a model with experts whose tokens are not split over mesh.context")
    rows, (P, T) = getattr(sequences, "rows", None), (sequences.prompt_ids.shape[1], sequences.completion_ids.shape[1])
    if rows is None:
        inputs, own = _padded_inputs(model, params, sequences), slice(P - 1, -1)
        hidden, _, routed = _routed(model, inputs, _experts(sequences), block_bounds=(P,), with_logits=True)
        predicting = _Predicting(hidden[:, own], sequences.completion_ids, sequences.completion_mask, None, T)
        counts = jnp.pad(sequences.completion_mask, ((0, 0), (P - 1, 1)))
        terms = jax.tree.map(lambda x: x[:, own], router_terms(model.routing, routed, counts, None))
    else:
        inputs = (params, rows.token_ids, rows.positions, rows.attention_mask)
        hidden, _, routed = _routed(model, inputs, rows.experts, with_logits=True)
        predicting = _Predicting(rows.predicting(hidden), rows.target_ids, rows.target_mask, rows, T)
        of_columns = router_terms(model.routing, routed, rows.by_column()[1], rows.segment_ids)
        terms = jax.tree.map(lambda x: rows.predicting(x[..., None])[..., 0], of_columns)
    log_probs, entropies = predicting.token_scores(model, params, temperature=temperature, chunk_size=chunk_size)
    return log_probs, entropies, jax.tree.map(predicting.per_sequence, terms)


def completion_values(model: Model, params: Params, sequences: Sequences) -> Tokens:
    """A critic's value of the state before each completion token, float32.

    Args:
        model: a decoder with a scalar head.
        params: the critic's parameters.
        sequences: prompts and completions, in padded rows or a micro-batch of packed ones.
    """
    predicting = _predicting_states(model, params, without_experts(sequences))
    return predicting.per_sequence(read_scalars(predicting.states, model.head(params))[..., 0])


def with_value_head(params: Params, hidden_size: int) -> Params:
    """``{"policy": params, "value": ...}`` with a linear value head of zeros, for ``policy_and_values``.

    Args:
        params: the policy's parameters.
        hidden_size: D, the width of the policy's hidden states.
    """
    return {"policy": params, "value": {"kernel": jnp.zeros((hidden_size, 1), jnp.float32)}}


def policy_and_values(
    model: Model,
    params: Params,
    sequences: Sequences,
    *,
    temperature: Scalar = 1.0,
    chunk_size: int = CHUNK_SIZE,
    shares_trunk: bool = True,
) -> tuple[Tokens, Tokens, Tokens]:
    """Log-probabilities, entropies and values of completion tokens in one forward pass.

    Args:
        model: the policy's decoder.
        params: policy and value head, as ``with_value_head`` makes them.
        sequences: prompts and completions, in padded rows or a micro-batch of packed ones.
        temperature: of the policy, as in sampling.
        chunk_size: number of tokens on a device whose logits exist at a time (``log_probs.chunked_log_probs``).
        shares_trunk: whether the gradient of the values flows into the policy; if not, it stops at the head.
    """
    predicting = _predicting_states(model, params["policy"], sequences)
    log_probs, entropy = predicting.token_scores(
        model, params["policy"], temperature=temperature, chunk_size=chunk_size
    )
    states = predicting.states if shares_trunk else jax.lax.stop_gradient(predicting.states)
    values = read_scalars(states, params["value"]["kernel"].T)[..., 0]
    return log_probs, entropy, predicting.per_sequence(values)


def pair_log_probs(
    model: Model, params: Params, pairs: Pairs, *, chunk_size: int = CHUNK_SIZE
) -> Float[Array, "B 2 T"]:
    """Log-probability of each token of both completions of each pair.

    Args:
        model: the policy's decoder.
        params: the policy's parameters.
        pairs: B prompts with two completions each.
        chunk_size: number of tokens on a device whose logits exist at a time (``log_probs.chunked_log_probs``).
    """
    _, _, T = pairs.completion_ids.shape
    log_probs, _ = completion_log_probs(model, params, as_rows(pairs), chunk_size=chunk_size)
    return log_probs.reshape(-1, 2, T)


def packed_log_probs(model: Model, params: Params, packed: Packed, *, chunk_size: int = CHUNK_SIZE) -> Tokens:
    """Log-probability of each token given those before it in its own sequence; 0 in the first column.

    Finite but meaningless at the first token of a sequence and in padding.

    Args:
        model: the policy's decoder.
        params: the policy's parameters.
        packed: rows of packed sequences.
        chunk_size: number of tokens on a device whose logits exist at a time (``log_probs.chunked_log_probs``).
    """
    hidden, _ = model.apply(params, packed.token_ids, packed.positions, packed.segment_ids)
    # Token ids are moved, not hidden states, whose tokens several devices may share.
    next_ids, is_token = jnp.roll(packed.token_ids, -1, axis=1), packed.segment_ids > 0
    mask = jnp.pad(is_token[:, 1:], ((0, 0), (0, 1)))
    log_probs, _ = model.token_scores(params, hidden, next_ids, chunk_size=chunk_size, mask=mask)
    return jnp.pad(log_probs[:, :-1], ((0, 0), (1, 0)))


def pair_scores(model: Model, params: Params, pairs: Pairs) -> Float[Array, "B 2"]:
    """A reward model's scores of both completions of each pair.

    Args:
        model: a decoder with a scalar head.
        params: the reward model's parameters.
        pairs: B prompts with two completions each.
    """
    rows = as_rows(pairs)
    ids = jnp.concatenate([rows.prompt_ids, rows.completion_ids], axis=1)
    mask = jnp.concatenate([rows.prompt_mask, rows.completion_mask], axis=1)
    return reward_model_scores(model, params, ids, mask).reshape(-1, 2)


def as_rows(pairs: Pairs) -> Rows:
    """Rows [2 B] of the completions, chosen and rejected in turn, each with its prompt."""
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
    """A reward model's score of each sequence, float32: the output of its scalar head at the last real token.

    Args:
        model: a decoder with a scalar head.
        params: the reward model's parameters.
        token_ids: whole sequences, padded on either side; token ids in padding are ignored.
        mask: True at real tokens; the score of a row without any is 0.
    """
    hidden, _ = model.apply(params, token_ids, positions(mask), mask)
    return last_unmasked(read_scalars(hidden, model.head(params))[..., 0], mask)


def read_scalars(hidden: Float[Array, "B S D"], head: Float[Array, "N D"] | None) -> Float[Array, "B S N"]:
    """Outputs of N scalar heads at each hidden state, float32.

    Args:
        hidden: final norm applied.
        head: weights of the heads; None if ``hidden`` are the outputs themselves.
    """
    hidden = hidden.astype(jnp.float32)
    return hidden if head is None else hidden @ head.T.astype(jnp.float32)
