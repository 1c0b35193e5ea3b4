"""The pure functions of decoding: prefill, a decode step, and gathering rows into smaller batches.

All rows of a decode batch are at the same step. Each prompt is prefilled once, and its prefix KV cache is shared by its
group. A row's own KV cache is a list of chunks, of which the last is written to: attention reads about as many columns
as are in use, and opening a chunk copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.log_probs import output_logits
from grpo_jax.masked import positions
from grpo_jax.sampling import Sampling, adjust_logits, check_key, sample_token
from grpo_jax.sharding import take_rows
from grpo_jax.types import COLUMNS, Cache, Model, Params, PrefixCache, Prompts, pytree


@pytree
class DecodeBatch:
    """The part of a batch that decode steps only read.

    Attributes:
        prompt: prefix KV cache of the prompts.
        full_chunks: the chunks of the rows' own KV cache that are full.
        full_chunk_starts: slot of the first column of each full chunk.
        active_start: slot of the first column of the active chunk.
        keys: a random key for each row, from which the key of each step is derived.
        prompt_lengths: real tokens of each row's prompt.
        in_prompt: True at the tokens of each row's prompt; None if the sampling has no repetition penalty.
    """

    prompt: PrefixCache
    full_chunks: tuple[Cache, ...]
    full_chunk_starts: Int[Array, " chunks"]
    active_start: Int[Array, ""]
    keys: Key[Array, " B"]
    prompt_lengths: Int[Array, " B"]
    in_prompt: Bool[Array, "B V"] | None


@pytree
class DecodeState:
    """The part of a batch that every decode step updates.

    Attributes:
        step: tokens sampled for each row, which is the slot of the next one.
        active_chunk: the chunk of the rows' own KV cache that is written to.
        hidden: last hidden state of each row, of which the next token is sampled.
        in_completion: True at the tokens sampled for each row; None if the sampling has no penalties.
        states: of the layers that are recurrences, as of ``Model.init_states``; None for a model without.
    """

    step: Int[Array, ""]
    active_chunk: Cache
    hidden: Float[Array, "B D"]
    in_completion: Bool[Array, "B V"] | None
    states: Cache = None


def prefill(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    sampling: Sampling,
    *,
    group_size: int,
    chunks: Sequence[int],
    cache_dtype: Any = None,
    record_experts: bool = False,
) -> tuple[DecodeBatch, DecodeState, list[Cache], Int[Array, "N P L k"] | None]:
    """Compute the prompts' KV cache and states, once for ``group_size`` rows; the rows of a prompt are adjacent.

    Args:
        model: the policy's model.
        params: parameters of ``model``.
        prompts: N prompts, left-padded to P.
        key: random key of this step.
        sampling: decides which masks over the vocabulary are kept.
        group_size: G, rows of each prompt.
        chunks: columns of each chunk of the rows' own KV cache.
        cache_dtype: dtype of keys and values; None for the model's compute dtype.
        record_experts: whether to return the experts of each token.

    Returns:
        The batch, its state with the first chunk, the other chunks, empty, and the experts of the prompts' tokens.

    Raises:
        AssertionError: at trace time, for fields of ``prompts`` whose shapes do not match.
        TypeError: at trace time, as ``sampling.check_key``.
    """
    check_key(key)
    (N, P), V = prompts.ids.shape, model.vocab_size
    chex.assert_shape(prompts.mask, (N, P), custom_message="prompts.mask")
    for name in ("index", "part"):
        if getattr(prompts, name) is not None:
            chex.assert_shape(getattr(prompts, name), (N,), custom_message=f"prompts.{name}")
    # With a block of empty columns, as in the trainer's call on prompt and completion, so that both round identically.
    columns = jnp.pad(prompts.mask, ((0, 0), (0, COLUMNS)))
    cache = model.init_cache(N, P + COLUMNS, cache_dtype)
    inputs = (params, prompts.ids, positions(prompts.mask), columns, cache, 0)
    hidden, cache, experts = _apply(model, record_experts, *inputs, block_bounds=(P,))
    states = None
    if model.init_states is not None:
        _, states = _split(cache, model.init_states(N))
        states = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), states)
    cache = model.first_columns(cache, P)
    in_prompt = in_completion = None
    if sampling.needs_prompt_tokens:
        real = jnp.where(prompts.mask, prompts.ids, V)
        in_prompt = jnp.zeros((N, V), bool).at[jnp.arange(N)[:, None], real].set(True, mode="drop")
        in_prompt = jnp.repeat(in_prompt, group_size, axis=0)
    if sampling.needs_completion_tokens:
        in_completion = jnp.zeros((N * group_size, V), bool)
    batch = DecodeBatch(
        prompt=PrefixCache(cache, start=jnp.int32(-P), mask=prompts.mask),
        full_chunks=(),
        full_chunk_starts=jnp.zeros(0, jnp.int32),
        active_start=jnp.int32(0),
        keys=sample_keys(key, prompts.index, group_size, prompts.part),
        prompt_lengths=jnp.repeat(prompts.mask.sum(1, dtype=jnp.int32), group_size),
        in_prompt=in_prompt,
    )
    state = DecodeState(
        step=jnp.int32(0),
        active_chunk=model.init_cache(N * group_size, chunks[0], cache_dtype, ring=True),
        hidden=jnp.repeat(hidden[:, -1], group_size, axis=0),
        in_completion=in_completion,
        states=states,
    )
    empty = [model.init_cache(N * group_size, length, cache_dtype, ring=True) for length in chunks[1:]]
    return batch, state, empty, experts


def _apply(model: Model, record_experts: bool, *inputs: Any, **options: Any) -> tuple[Array, Cache, Array | None]:
    """``model.apply``, and the experts of each token as int16 if they are recorded."""
    if not record_experts or model.routing is None:
        return *model.apply(*inputs, **options), None
    hidden, cache, routed = model.routing.apply(*inputs, **options)
    return hidden, cache, routed.experts.astype(jnp.int16)


def decode_step(
    model: Model,
    params: Params,
    batch: DecodeBatch,
    state: DecodeState,
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    rope: Any = None,
    record_experts: bool = False,
) -> tuple[DecodeState, Int[Array, " B"], Float[Array, " B"], Int[Array, "B L k"] | None]:
    """Sample one token for every row.

    Args:
        model: the policy's model.
        params: parameters of ``model``.
        batch: B rows.
        state: the state of ``batch``; its active chunk has a free column.
        sampling: temperature, filters and penalties.
        eos_ids: the EOS tokens, which a minimum length masks.
        rope: ``model.rope`` of the tokens' positions; None to compute it.
        record_experts: whether to return the experts of each token.

    Returns:
        The next state, the tokens, their log-probabilities under the sampling distribution, and their experts.

    Raises:
        AssertionError: at trace time, for a batch and a state with different numbers of rows.
    """
    chex.assert_equal_shape_prefix([batch.keys, batch.prompt_lengths, state.hidden], 1, custom_message="rows")
    step, start = state.step, batch.active_start
    logits = output_logits(state.hidden, model.head(params), logit_softcap=model.logit_softcap)
    logits = adjust_logits(
        logits,
        sampling,
        length=step,
        eos_ids=eos_ids,
        in_prompt=batch.in_prompt,
        in_completion=state.in_completion,
    )
    tokens, log_probs = sample_token(jax.vmap(jax.random.fold_in, (0, None))(batch.keys, step), logits, sampling)
    starts = [*batch.full_chunk_starts, start]
    prefixes = [replace(batch.prompt, start=batch.prompt.start - start, length=-batch.prompt.start)]
    for i, chunk in enumerate(batch.full_chunks):
        prefixes.append(PrefixCache(chunk, start=starts[i] - start, length=starts[i + 1] - starts[i]))
    positions = (batch.prompt_lengths + step)[:, None] if rope is None else rope
    cache = state.active_chunk
    if state.states is not None:
        cache = [{**columns, **own} for columns, own in zip(cache, state.states, strict=True)]
    inputs = (params, tokens[:, None], positions, None, cache, step - start, prefixes)
    hidden, cache, experts = _apply(model, record_experts, *inputs)
    chunk, states = (cache, None) if state.states is None else _split(cache, state.states)
    in_completion = state.in_completion
    if in_completion is not None:
        in_completion = in_completion.at[jnp.arange(len(tokens)), tokens].set(True)
    state = DecodeState(step + 1, chunk, hidden[:, 0], in_completion, states)
    return state, tokens, log_probs, None if experts is None else experts[:, 0]


def decode_steps(
    model: Model,
    params: Params,
    batch: DecodeBatch,
    state: DecodeState,
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    count: int,
    record_experts: bool = False,
) -> tuple[DecodeState, Int[Array, "{count} B"], Float[Array, "{count} B"], Int[Array, "{count} B L k"] | None]:
    """Sample ``count`` tokens for every row, finished or not: a fixed number, so that no device waits for another.

    Args:
        model: the policy's model.
        params: parameters of ``model``.
        batch: B rows.
        state: the state of ``batch``; its active chunk has ``count`` free columns.
        sampling: temperature, filters and penalties.
        eos_ids: the EOS tokens, which a minimum length masks.
        count: decode steps.
        record_experts: whether to return the experts of each token.

    Returns:
        The state after the last step, the tokens, their log-probabilities under the sampling distribution, and their
        experts.
    """
    B = state.hidden.shape[0]
    rope = model.rope(batch.prompt_lengths[:, None] + state.step + jnp.arange(count)[None, :])

    def body(i, carry):
        state, ids, log_probs, experts = carry
        rope_i = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), rope)
        settings = {"eos_ids": eos_ids, "rope": rope_i, "record_experts": record_experts}
        state, token, log_prob, chosen = decode_step(model, params, batch, state, sampling, **settings)
        experts = None if experts is None else experts.at[i].set(chosen)
        return state, ids.at[i].set(token), log_probs.at[i].set(log_prob), experts

    experts = no_experts(model, (count, B)) if record_experts else None
    start = state, jnp.zeros((count, B), jnp.int32), jnp.zeros((count, B), jnp.float32), experts
    return jax.lax.fori_loop(0, count, body, start)


def no_experts(model: Model, tokens: tuple[int, int]) -> Int[Array, "_ _ L k"] | None:
    """An array for the experts of tokens, filled with -1; None for a model without experts.

    Args:
        model: of the policy.
        tokens: the two axes of the tokens.
    """
    routing = model.routing
    return None if routing is None else jnp.full((*tokens, routing.num_layers, routing.per_token), -1, jnp.int16)


def gather_rows(
    model: Model,
    batch: DecodeBatch,
    state: DecodeState,
    chunks: Sequence[Cache],
    rows: Int[Array, "devices rows"],
    prompts: Int[Array, "devices prompts"],
    gather_index: Int[Array, "devices places"],
    scatter_index: Int[Array, "devices rows"],
    *,
    join_chunks: bool,
) -> tuple[DecodeBatch, DecodeState, list[Cache]]:
    """A smaller batch of some of the rows and prompts. All indices count within a device's shard.

    Args:
        model: the policy's model.
        batch: rows and prompts, sharded evenly over ``devices``.
        state: the state of ``batch``.
        chunks: all chunks of the rows' own KV cache, in order, empty ones included.
        rows: the rows to gather.
        prompts: the prompts to gather.
        gather_index: as in ``types.PrefixCache``, in terms of the gathered rows and prompts.
        scatter_index: as in ``types.PrefixCache``.
        join_chunks: concatenate the chunks into one.

    Returns:
        The batch and its state, both without chunks, and the gathered chunks.

    Raises:
        AssertionError: at trace time, for indices of different numbers of devices or rows.
    """
    chex.assert_shape(scatter_index, rows.shape, custom_message="scatter_index")
    chex.assert_equal_shape_prefix([rows, prompts, gather_index], 1, custom_message="devices")

    def take(tree, index):
        return jax.tree.map(lambda x: take_rows(x, index), tree)

    starts = jnp.append(batch.full_chunk_starts, batch.active_start)
    batch = DecodeBatch(
        prompt=PrefixCache(
            take(batch.prompt.cache, prompts),
            batch.prompt.start,
            take(batch.prompt.mask, prompts),
            gather_index=gather_index,
            scatter_index=scatter_index,
        ),
        full_chunks=(),
        full_chunk_starts=jnp.zeros(0, jnp.int32),
        active_start=jnp.int32(0),
        keys=take(batch.keys, rows),
        prompt_lengths=take(batch.prompt_lengths, rows),
        in_prompt=take(batch.in_prompt, rows),
    )
    states = take(state.states, rows)
    state = DecodeState(state.step, None, take(state.hidden, rows), take(state.in_completion, rows), states)
    gathered = [take(chunk, rows) for chunk in chunks]
    return batch, state, [model.join_columns(gathered, starts, state.step)] if join_chunks else gathered


def merge(
    batches: Sequence[tuple[DecodeBatch, DecodeState]],
    gather_index: Int[Array, "devices places"],
    scatter_index: Int[Array, "devices rows"],
) -> tuple[DecodeBatch, DecodeState]:
    """One batch of several at the same step and of the same shape, concatenated on each device.

    Args:
        batches: batches with their states, as returned by ``gather_rows``, with one chunk.
        gather_index: as in ``types.PrefixCache``, in terms of the rows and prompts of all batches.
        scatter_index: as in ``types.PrefixCache``.

    Raises:
        AssertionError: at trace time, for batches of different shapes or dtypes.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(*batches)
    devices = gather_index.shape[0]

    def concatenate(*parts):
        sharded = [x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for x in parts]
        return jnp.concatenate(sharded, axis=1).reshape(-1, *parts[0].shape[1:])

    def merged(read):
        return jax.tree.map(concatenate, *(read(batch, state) for batch, state in batches))

    batch, state = batches[0]
    batch = replace(
        batch,
        prompt=PrefixCache(
            merged(lambda batch, _: batch.prompt.cache),
            batch.prompt.start,
            merged(lambda batch, _: batch.prompt.mask),
            gather_index=gather_index,
            scatter_index=scatter_index,
        ),
        keys=merged(lambda batch, _: batch.keys),
        prompt_lengths=merged(lambda batch, _: batch.prompt_lengths),
        in_prompt=merged(lambda batch, _: batch.in_prompt),
    )
    state = DecodeState(
        state.step,
        active_chunk=merged(lambda _, state: state.active_chunk),
        hidden=merged(lambda _, state: state.hidden),
        in_completion=merged(lambda _, state: state.in_completion),
        states=merged(lambda _, state: state.states),
    )
    return batch, state


def _split(cache: Cache, states: Cache) -> tuple[Cache, Cache]:
    """Columns and states of a cache that has both, the states with the names of ``states``."""
    layers = list(zip(cache, states, strict=True))
    columns = [{name: x for name, x in entry.items() if name not in own} for entry, own in layers]
    return columns, [{name: entry[name] for name in own} for entry, own in layers]


def sample_keys(
    key: Key[Array, ""], index: Int[Array, " N"], group_size: int, part: Int[Array, " N"] | None = None
) -> Key[Array, " B"]:
    """A random key for each sample: a function of the step's key, the prompt's index and the number in the group.

    Args:
        key: random key of the step.
        index: index of each prompt.
        group_size: samples of each row of ``index``: of its group, or of its part of a group.
        part: which part of the group each row is, as in ``Prompts``; None for whole groups.
    """
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    fold_in_numbers = jax.vmap(jax.random.fold_in, (None, 0))
    numbers = jnp.arange(group_size)
    if part is None:
        return jax.vmap(fold_in_numbers, (0, None))(prompt_keys, numbers).reshape(-1)
    return jax.vmap(fold_in_numbers)(prompt_keys, part[:, None] * group_size + numbers[None]).reshape(-1)
