"""The frozen pytrees that cross a border between modules, with a shape for every field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")


def pytree(cls: type[T]) -> type[T]:
    """Make a frozen dataclass a pytree whose leaves are its fields.

    JAX puts trees together again that hold anything: shapes, shardings, parts stacked along a new axis. That is done
    without the constructor, so that annotations need to be true only where a tree is made.
    """
    names = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]

    def flatten_with_keys(tree):
        return [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in names], None

    def unflatten(_, leaves):
        tree = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(tree, name, leaf)
        return tree

    def flatten(tree):
        return [getattr(tree, name) for name in names], None

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


Params = Any
"""A tree of parameter arrays."""

Cache = Any
"""A tree of the arrays in which a model keeps keys and values; every leaf has the batch as its first axis."""

COLUMNS = 64


def cache_columns(max_completion_length: int) -> int:
    """The length of a completion's cache, in sampler and trainer alike: a multiple of 64.

    Products of whole tiles round the same whatever else is computed with them; those of odd lengths do not on CPU.
    """
    return -(-max_completion_length // COLUMNS) * COLUMNS


@pytree
@dataclass(frozen=True)
class PrefixCache:
    """Keys and values that a call's tokens attend to before their own: N entries, each shared by a group of rows.

    Without ``gather`` the rows of a group are adjacent: B = N * group. With it they stand anywhere, but on the device
    of their entry: rows and entries are counted within each of the devices that they are split over.

    Attributes:
        cache: N entries of C columns, as ``Model.apply`` gives them back.
        start: the slot of the first column; below 0 for what comes before the call's own cache. Columns above a
            token's slot are not attended to.
        mask: False at columns that nobody may attend to, such as padding; None where there are none.
        gather: for each entry in turn the rows that share it, as many places for each; any row in an empty place.
        place: where each row stands in ``gather``.
    """

    cache: Cache
    start: Int[Array, ""] | int
    mask: Bool[Array, "N C"] | None = None
    gather: Int[Array, "devices places"] | None = None
    place: Int[Array, "devices rows"] | None = None


@dataclass(frozen=True)
class Model:
    """A decoder as the pure functions see it: functions and numbers, no module and no state.

    Attributes:
        apply: ``(params, token_ids [B, S], positions [B, S], mask [B, C], cache, start, prefixes, block_bounds) ->
            (hidden [B, S, D], cache)``. Causal by slot: token ``i`` of the call stands in slot ``start + i`` and
            attends to the slots up to its own: those of ``prefixes``, and those of the cache in which ``mask`` is True
            (None: in all). A mask of integers numbers the sequences that are packed into a row, 0 for padding: a token
            attends to its own number alone. Without a cache (``None``) the call's own S tokens are all there is: C = S,
            ``start`` is 0, and their keys and values are the cache that comes back. With one, they are written into
            its columns ``start .. start + S - 1``. Attention sums over the columns between ``block_bounds`` apart, as it does
            over each context: so that two calls that divide the same columns alike round alike. ``hidden`` is what the
            head multiplies (final norm applied). A query that may attend to nothing gives finite values.
        rope: ``positions [B, S] -> tree`` of what ``apply`` needs of them, each leaf ``[B, S, ...]``; ``apply`` takes
            it instead. Where tokens are drawn one by one, it is computed for several at a time.
        head: ``params -> [V, D]``, the output embedding; ``[1, D]`` of a reward model.
        init_cache: ``(batch, length, dtype) -> cache``, empty. ``dtype`` None is the model's own precision; a coarser
            one rounds keys and values as they are written, and attention to the cache reads the rounded ones.
        first_columns: ``(cache, length) -> cache`` without the columns after that.
        join_columns: caches of the same rows -> one, their columns one after the other.
        logit_softcap: ``c`` in ``c * tanh(logits / c)`` on the output logits; None for models without.
        max_length: tokens of the longest sequence the model was made for; None where that is not known.
        rope_switch_length: a call with longer sequences rotates all of its queries and keys by other frequencies
            (longrope and dynamic scaling); None where frequencies do not depend on the length.
    """

    apply: Callable[..., tuple[Float[Array, "B S D"], Cache]]
    rope: Callable[[Int[Array, "B S"]], Any]
    head: Callable[[Params], Float[Array, "V D"]]
    init_cache: Callable[..., Cache]
    first_columns: Callable[[Cache, int], Cache]
    join_columns: Callable[[Sequence[Cache]], Cache]
    logit_softcap: float | None = None
    max_length: int | None = None
    rope_switch_length: int | None = None


@pytree
@dataclass(frozen=True)
class Prompts:
    """Prompts of one step, left-padded to one length.

    Attributes:
        ids: token ids; what stands in padding is never looked at.
        mask: True at real tokens, a run that ends in the last column.
        index: a number for each prompt that its samples' noise is drawn from; distinct within a step.
        part: which part of its group each is to be drawn for, where a prompt stands here once for each; None where all
            are drawn for as a whole.
    """

    ids: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    index: Int[Array, " N"]
    part: Int[Array, " N"] | None = None


@pytree
@dataclass(frozen=True)
class Rollout:
    """Prompts with a group of completions each. Rows of a group are adjacent: B = N * G.

    Attributes:
        prompt_ids: the prompts, one row a completion, left-padded.
        prompt_mask: True at real prompt tokens.
        completion_ids: what was sampled, verbatim; the pad id after the end.
        completion_mask: True at sampled tokens, the ending one included.
        rollout_log_probs: log-probability of each sampled token under the distribution it was drawn from
            (temperature and filters included); 0 after the end.
        truncated: True where no ending token was drawn within the limit.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    rollout_log_probs: Float[Array, "B T"]
    truncated: Bool[Array, " B"]


@pytree
@dataclass(frozen=True)
class Batch:
    """What a policy update learns from; every field has the sequences as its first axis.

    Attributes:
        prompt_ids, prompt_mask, completion_ids, completion_mask: as in ``Rollout``.
        loss_mask: True at the completion tokens that are learnt from (a subset of ``completion_mask``).
        advantages: one for each sequence, or for each token.
        rollout_log_probs: the sampler's own log-probabilities.
        old_log_probs: the policy's at the start of the update; None where the update is its first, strictly on
            policy, so that they are those of the update's own forward pass.
        ref_log_probs: the reference policy's; None where there is no reference.
        old_values: the critic's at the start of the update; None where there is no critic.
        returns: what it is to predict.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    advantages: Float[Array, " B"] | Float[Array, "B T"]
    rollout_log_probs: Float[Array, "B T"]
    old_log_probs: Float[Array, "B T"] | None = None
    ref_log_probs: Float[Array, "B T"] | None = None
    old_values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None


@pytree
@dataclass(frozen=True)
class Packed:
    """Sequences packed into rows, to be imitated.

    Attributes:
        token_ids: the sequences of a row one after the other, then padding.
        segments: the number of each token's sequence in its row, from 1; 0 in padding.
        positions: of each token in its sequence, from 0.
        loss_mask: True at the tokens that are learnt from; never at the first of a sequence.
    """

    token_ids: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    loss_mask: Bool[Array, "B S"]


@pytree
@dataclass(frozen=True)
class Pairs:
    """Prompts with two completions each, the chosen one before the rejected one.

    Attributes:
        prompt_ids: left-padded.
        prompt_mask: True at real prompt tokens.
        completion_ids: right-padded.
        completion_mask: True at real completion tokens, the ending one included.
        margins: by how much each chosen one is to win; None where that is not known.
        ref_log_probs: the reference policy's, summed over each completion; None where there is no reference.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B 2 T"]
    completion_mask: Bool[Array, "B 2 T"]
    margins: Float[Array, " B"] | None = None
    ref_log_probs: Float[Array, "B 2"] | None = None


@pytree
@dataclass(frozen=True)
class TrainState:
    """Everything a policy is, to the optimizer: what a train step takes and gives back.

    Attributes:
        step: how many updates were applied.
        params: the parameters, in the precision they are stored in.
        opt_state: the optimizer's state.
        ref_params: the reference policy's parameters; None where there is no reference.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ref_params: Params | None = None


@pytree
@dataclass(frozen=True)
class Mean:
    """A mean on its way to completion: a sum, and the count it will be divided by.

    Means over a global batch travel in this form, so that neither gradient accumulation nor sharding can change the
    result: parts are merged by adding sums and counts, and divided once at the end.
    """

    sum: Float[Array, ""]
    count: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """``sum / count``; 0 where ``count`` is 0."""
        return jnp.where(self.count > 0, self.sum / jnp.where(self.count > 0, self.count, 1), 0)

    def reduce(self) -> Mean:
        """Merge the parts stacked along the first axis."""
        return Mean(self.sum.sum(0), self.count.sum(0))


@pytree
@dataclass(frozen=True)
class Max:
    """A maximum on its way to completion; ``-inf`` is the maximum of nothing."""

    max: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """The maximum; 0 where there was nothing to take it of."""
        return jnp.where(jnp.isneginf(self.max), 0, self.max)

    def reduce(self) -> Max:
        """Merge the parts stacked along the first axis."""
        return Max(self.max.max(0))


Metrics = dict[str, Mean | Max]
