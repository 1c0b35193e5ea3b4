"""The pure functions of decoding: prefill, one token for every row, and gathering rows into smaller batches.

Rows of a decode batch have one age: each has as many tokens as every other. Prompts are read once for their whole group
and their keys and values are held once for it. A row's own keys and values lie in chunks, the last of which is written
to: so attention reads about as many as there are, and none is copied for there to be more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.log_probs import output_logits
from grpo_jax.masked import positions
from grpo_jax.sampling import Sampling, adjust_logits, sample_token
from grpo_jax.sharding import take_rows
from grpo_jax.types import COLUMNS, Cache, Model, Params, PrefixCache, Prompts, pytree


@pytree
class DecodeBatch:
    """Rows of one age: what stays as it is while they draw.

    Attributes:
        prompt: keys and values of the prompts, with how rows share them.
        closed: chunks of own keys and values that are full.
        closed_starts: the slot of the first column of each.
        active_start: the slot of the first column of the chunk that is written to.
        keys: one for each row; its noise at each age follows from it.
        lengths: real tokens of each row's prompt.
        prompted: which tokens are in it; None where the sampling does not ask.
    """

    prompt: PrefixCache
    closed: tuple[Cache, ...]
    closed_starts: Int[Array, " chunks"]
    active_start: Int[Array, ""]
    keys: Key[Array, " B"]
    lengths: Int[Array, " B"]
    prompted: Bool[Array, "B V"] | None


@pytree
class State:
    """The same rows: what each token changes.

    Attributes:
        age: tokens that each row has drawn; the slot of the next one.
        active: the chunk of own keys and values that is written to.
        hidden: the state that the next token is drawn from.
        drawn: which tokens each row has drawn; None where the sampling does not ask.
    """

    age: Int[Array, ""]
    active: Cache
    hidden: Float[Array, "B D"]
    drawn: Bool[Array, "B V"] | None


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
) -> tuple[DecodeBatch, State, list[Cache]]:
    """Read the prompts, each once, for ``group_size`` rows each; a prompt's rows are adjacent.

    Gives the cohort, its state with the first chunk of the rows' own cache, and the other chunks.

    Args:
        model: see ``types.Model``.
        params: its parameters.
        prompts: N prompts, left-padded to P.
        key: of this step.
        sampling: what will be drawn with.
        group_size: G.
        chunks: columns of each chunk of the rows' own cache.
        cache_dtype: see ``Model.init_cache``.
    """
    N, P = prompts.ids.shape
    V = jax.eval_shape(model.head, params).shape[0]
    # As the trainer reads it: cut off from a completion of which nothing is there yet, so that both round alike.
    columns = jnp.pad(prompts.mask, ((0, 0), (0, COLUMNS)))
    cache = model.init_cache(N, P + COLUMNS, cache_dtype)
    hidden, cache = model.apply(params, prompts.ids, positions(prompts.mask), columns, cache, 0, block_bounds=(P,))
    cache = model.first_columns(cache, P)
    prompted = drawn = None
    if sampling.needs_prompted:
        real = jnp.where(prompts.mask, prompts.ids, V)
        prompted = jnp.zeros((N, V), bool).at[jnp.arange(N)[:, None], real].set(True, mode="drop")
        prompted = jnp.repeat(prompted, group_size, axis=0)
    if sampling.needs_drawn:
        drawn = jnp.zeros((N * group_size, V), bool)
    cohort = DecodeBatch(
        prompt=PrefixCache(cache, start=jnp.int32(-P), mask=prompts.mask),
        closed=(),
        closed_starts=jnp.zeros(0, jnp.int32),
        active_start=jnp.int32(0),
        keys=sample_keys(key, prompts.index, group_size, prompts.part),
        lengths=jnp.repeat(prompts.mask.sum(1, dtype=jnp.int32), group_size),
        prompted=prompted,
    )
    state = State(
        age=jnp.int32(0),
        active=model.init_cache(N * group_size, chunks[0], cache_dtype),
        hidden=jnp.repeat(hidden[:, -1], group_size, axis=0),
        drawn=drawn,
    )
    return cohort, state, [model.init_cache(N * group_size, length, cache_dtype) for length in chunks[1:]]


def draw_token(
    model: Model,
    params: Params,
    cohort: DecodeBatch,
    state: State,
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    rope: Any = None,
) -> tuple[State, Int[Array, " B"], Float[Array, " B"]]:
    """One token for every row: the state a token later, the tokens, and their log-probabilities as drawn.

    Args:
        model: see ``types.Model``.
        params: its parameters.
        cohort: the rows.
        state: before the token.
        sampling: how it is drawn.
        eos_ids: the ending tokens, which a minimum length rules out.
        rope: ``model.rope`` of the token's positions, where it was computed before.
    """
    age, start = state.age, cohort.active_start
    logits = output_logits(state.hidden, model.head(params), logit_softcap=model.logit_softcap)
    logits = adjust_logits(logits, sampling, length=age, eos_ids=eos_ids, prompted=cohort.prompted, drawn=state.drawn)
    tokens, log_probs = sample_token(jax.vmap(jax.random.fold_in, (0, None))(cohort.keys, age), logits, sampling)
    prefixes = [replace(cohort.prompt, start=cohort.prompt.start - start)]
    for i, chunk in enumerate(cohort.closed):
        prefixes.append(PrefixCache(chunk, start=cohort.closed_starts[i] - start))
    positions = (cohort.lengths + age)[:, None] if rope is None else rope
    hidden, active = model.apply(params, tokens[:, None], positions, None, state.active, age - start, prefixes)
    drawn = None if state.drawn is None else state.drawn.at[jnp.arange(len(tokens)), tokens].set(True)
    return State(age + 1, active, hidden[:, 0], drawn), tokens, log_probs


def draw_tokens(
    model: Model,
    params: Params,
    cohort: DecodeBatch,
    state: State,
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    count: int,
) -> tuple[State, Int[Array, "{count} B"], Float[Array, "{count} B"]]:
    """``count`` tokens for every row, whether it has ended or not; the number is fixed so that no device waits.

    The active chunk must have room for them.
    """
    B = state.hidden.shape[0]
    rope = model.rope(cohort.lengths[:, None] + state.age + jnp.arange(count)[None, :])

    def step(i, carry):
        state, ids, log_probs = carry
        now = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), rope)
        state, token, log_prob = draw_token(model, params, cohort, state, sampling, eos_ids=eos_ids, rope=now)
        return state, ids.at[i].set(token), log_probs.at[i].set(log_prob)

    nothing = jnp.zeros((count, B), jnp.int32), jnp.zeros((count, B), jnp.float32)
    return jax.lax.fori_loop(0, count, step, (state, *nothing))


def take(
    model: Model,
    cohort: DecodeBatch,
    state: State,
    chunks: Sequence[Cache],
    rows: Int[Array, "devices taken"],
    prompts: Int[Array, "devices prompts_taken"],
    gather: Int[Array, "devices places"],
    place: Int[Array, "devices taken"],
    *,
    joined: bool,
) -> tuple[DecodeBatch, State, list[Cache]]:
    """Some of the rows and prompts alone; and their own keys and values, which are not put into the two.

    Args:
        model: see ``types.Model``.
        cohort: of rows and prompts split evenly over ``devices``; all indices count within a device's part.
        state: of the same rows.
        chunks: all of the rows' own keys and values, in order; may be longer than what was written.
        joined: give them back as one chunk.
        rows: those that are taken.
        prompts: those that are taken.
        gather: see ``types.PrefixCache``; in terms of the new rows and prompts.
        place: likewise.
    """

    def some(tree, index):
        return jax.tree.map(lambda x: take_rows(x, index), tree)

    prompt = replace(
        cohort.prompt,
        cache=some(cohort.prompt.cache, prompts),
        mask=some(cohort.prompt.mask, prompts),
        gather_index=gather,
        scatter_index=place,
    )
    cohort = DecodeBatch(
        prompt,
        closed=(),
        closed_starts=jnp.zeros(0, jnp.int32),
        active_start=jnp.int32(0),
        keys=some(cohort.keys, rows),
        lengths=some(cohort.lengths, rows),
        prompted=some(cohort.prompted, rows),
    )
    taken = [some(chunk, rows) for chunk in chunks]
    state = State(state.age, None, some(state.hidden, rows), some(state.drawn, rows))
    return cohort, state, [model.join_columns(taken)] if joined else taken


def join(
    cohorts: Sequence[tuple[DecodeBatch, State]],
    gather: Int[Array, "devices places"],
    place: Int[Array, "devices rows"],
) -> tuple[DecodeBatch, State]:
    """Cohorts of one age and shape as one, device by device.

    Args:
        cohorts: as ``take`` gives them.
        gather: see ``types.PrefixCache``; in terms of all rows and prompts.
        place: likewise.
    """
    devices = gather.shape[0]

    def together(*parts):
        split = [x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for x in parts]
        return jnp.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])

    def all_of(read):
        return jax.tree.map(together, *(read(*each) for each in cohorts))

    cohort, state = cohorts[0]
    cohort = replace(
        cohort,
        prompt=replace(
            cohort.prompt,
            cache=all_of(lambda cohort, _: cohort.prompt.cache),
            mask=all_of(lambda cohort, _: cohort.prompt.mask),
            gather_index=gather,
            scatter_index=place,
        ),
        keys=all_of(lambda cohort, _: cohort.keys),
        lengths=all_of(lambda cohort, _: cohort.lengths),
        prompted=all_of(lambda cohort, _: cohort.prompted),
    )
    state = State(
        state.age,
        active=all_of(lambda _, state: state.active),
        hidden=all_of(lambda _, state: state.hidden),
        drawn=all_of(lambda _, state: state.drawn),
    )
    return cohort, state


def sample_keys(
    key: Key[Array, ""], index: Int[Array, " N"], group_size: int, part: Int[Array, " N"] | None = None
) -> Key[Array, " B"]:
    """A key for each sample, from the step's key, its prompt's index and its number in the group alone.

    Args:
        key: of the step.
        index: of each prompt.
        group_size: samples of each, or of each part.
        part: which part of its group; see ``Prompts``.
    """
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    each_sample = jax.vmap(jax.random.fold_in, (None, 0))
    numbers = jnp.arange(group_size)
    if part is None:
        return jax.vmap(each_sample, (0, None))(prompt_keys, numbers).reshape(-1)
    return jax.vmap(each_sample)(prompt_keys, part[:, None] * group_size + numbers[None]).reshape(-1)
