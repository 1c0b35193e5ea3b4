"""From a loss function to a train step: state in, state out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int, Key

from grpo_jax.log_probs import chunked_log_probs
from grpo_jax.masked import last_unmasked, positions
from grpo_jax.types import (
    Batch,
    Mean,
    Metrics,
    Model,
    Packed,
    Pairs,
    Params,
    Rollout,
    TrainState,
    cache_columns,
)

Tokens = Float[Array, "B T"]
LossFn = Callable[[Params, Any], tuple[Mean, Metrics]]
VECTORS = ("scale", "bias")


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
    hidden, _ = model.apply(params, ids, positions(mask), columns, cache, 0, cuts=(P,))
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
    hidden, _ = model.apply(params, packed.token_ids, packed.positions, packed.segments)
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
    return sequence_scores(model, params, ids, mask).reshape(-1, 2)


def as_rows(pairs: Pairs) -> Rows:
    """Each completion of a pair in a row of its own, with its prompt before it."""
    T = pairs.completion_ids.shape[2]
    return Rows(
        jnp.repeat(pairs.prompt_ids, 2, axis=0),
        jnp.repeat(pairs.prompt_mask, 2, axis=0),
        pairs.completion_ids.reshape(-1, T),
        pairs.completion_mask.reshape(-1, T),
    )


def sequence_scores(
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


def make_scorer(
    log_probs: Callable[[Params, Rollout], tuple[Tokens, Tokens]], *, num_micro_batches: int = 1
) -> Callable[[Params, Rollout], Tokens]:
    """A jitted ``(params, rollout) -> log-probabilities`` for policies that are not being trained: old and reference.

    Args:
        log_probs: ``(params, sequences) -> (log-probabilities, entropy)``, such as ``completion_log_probs`` of a model.
        num_micro_batches: parts that are computed one after the other, to save memory.

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def score(params, rollout):
        parts = split_rows(rollout, num_micro_batches)
        scores = jax.lax.map(lambda part: log_probs(params, part)[0], parts)
        return jnp.swapaxes(scores, 0, 1).reshape(rollout.completion_ids.shape)

    return jax.jit(score)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, num_micro_batches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A jitted ``(state, batch) -> (state, metrics)`` that applies one update; the state passed in is donated.

    The new state lies on its devices as the old one did. Inside another jitted function it is that function's part.

    The batch is computed in ``num_micro_batches`` parts. Sums and counts are added over the parts and divided at the
    end, so the update is that of the whole batch, whatever the number of parts, and however long the sequences in each.

    Args:
        loss_fn: ``(params, batch) -> (loss, metrics)``, both in the form of ``masked`` that is merged by adding.
            ``batch`` may be any tree of arrays with the sequences first.
        optimizer: any optax transformation.
        num_micro_batches: more parts take less memory and more time.

    Returns:
        The step. Its metrics are scalars: those of ``loss_fn``, ``loss`` and ``grad_norm`` (before any clipping).

    Raises:
        ValueError: at trace time, when num_micro_batches does not divide the batch.
    """

    def loss_sum(params, batch):
        loss, metrics = loss_fn(params, batch)
        return loss.sum, {**metrics, "loss": loss}

    def micro_step(params, grads, batch):
        new_grads, metrics = jax.grad(loss_sum, has_aux=True)(params, batch)
        return jax.tree.map(lambda sum, new: sum + new.astype(jnp.float32), grads, new_grads), metrics

    def step(state: TrainState, batch):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        parts = split_rows(batch, num_micro_batches)
        grads, metrics = jax.lax.scan(lambda grads, part: micro_step(state.params, grads, part), zeros, parts)
        merged = {name: metric.reduce() for name, metric in metrics.items()}
        loss = merged["loss"]
        assert isinstance(loss, Mean)
        grads = jax.tree.map(lambda g: g / jnp.where(loss.count > 0, loss.count, 1), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer counters with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        scalars = {name: metric.value for name, metric in merged.items()}
        scalars["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state, state.ref_params), scalars

    @cache
    def jitted(treedef, shardings):
        # Without this the compiler may lay parameters out anew, and every later program would be another one.
        return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(treedef, shardings), None))

    def train_step(state: TrainState, batch):
        leaves, treedef = jax.tree.flatten(state)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return step(state, batch)
        return jitted(treedef, tuple(leaf.sharding for leaf in leaves))(state, batch)

    return train_step


def split_rows(batch, parts: int):
    """Cut every array's rows into ``parts``, stacked: ``[B, ...] -> [parts, B / parts, ...]``.

    Part i takes rows i, i + parts, ...: rows that lie sharded over devices are cut where they lie.

    Raises:
        ValueError: when ``parts`` does not divide the number of rows.
    """

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} sequences does not divide into {parts} equal parts")
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def shuffled_minibatches(batch: Batch, key: Key[Array, ""], num_minibatches: int) -> list[Batch]:
    """Cut a batch into minibatches of rows drawn without replacement; one minibatch is the batch as it is.

    Raises:
        ValueError: when ``num_minibatches`` does not divide the number of rows.
    """
    if num_minibatches == 1:
        return [batch]
    order = jax.random.permutation(key, batch.advantages.shape[0])
    parts = split_rows(jax.tree.map(lambda x: x[order], batch), num_minibatches)
    return [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(num_minibatches)]


def make_schedule(
    learning_rate: float, *, warmup_steps: int, total_steps: int, decay: Literal["constant", "linear", "cosine"]
) -> optax.Schedule:
    """Rise linearly from 0 over ``warmup_steps`` updates, then stay, or fall to 0 at ``total_steps``.

    Raises:
        ValueError: a learning rate that is not above 0, or a warm-up that is longer than the run.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; it must be above 0")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be from 0 to the run's {total_steps} updates")
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }
    # The first update has learning_rate / (warmup_steps + 1): one at 0 would be a step wasted.
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[decay]], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    Args:
        schedule: from update number to learning rate.
        max_grad_norm: gradients whose global norm is larger are scaled down to it.
        weight_decay: decoupled, on matrices only: norms and biases are not pulled to 0.
        b1: decay of the first moment.
        b2: decay of the second moment.
    """

    def decayed(params):
        def is_matrix(path, x):  # by name too: the bias of several heads has two axes
            return x.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) not in VECTORS

        return jax.tree.map_with_path(is_matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_reference: bool, replicated: Sharding
) -> TrainState:
    """A fresh state around ``params`` as they lie on their devices; the optimizer's moments lie as their parameters.

    Args:
        params: taken over: the first train step donates them.
        optimizer: the one that the train step uses.
        with_reference: whether a copy of the parameters is held as the reference policy.
        replicated: where the state's scalars lie.
    """
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda _: replicated,
    )
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(params),
        ref_params=jax.tree.map(jnp.copy, params) if with_reference else None,
    )


def with_fresh_reference(state: TrainState) -> TrainState:
    """The state with a copy of its own parameters as the reference policy."""
    return TrainState(state.step, state.params, state.opt_state, jax.tree.map(jnp.copy, state.params))
