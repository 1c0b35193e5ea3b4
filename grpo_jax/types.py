"""The frozen pytrees that are passed between modules, with a shape for every field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.packed import Packed as Packed
from grpo_jax.packed import PackedRows as PackedRows
from grpo_jax.packed import Packing as Packing
from grpo_jax.packed import Segments as Segments
from grpo_jax.packed import pytree as pytree

Params = Any
"""A pytree of parameter arrays."""

Cache = Any
"""A KV cache: a pytree of arrays whose first axis is the batch."""

COLUMNS = 64
ATTENTION_LENGTH = 2048.0
"""``Model.attention_length`` of a model that does not say; that of a width of about 350."""


def cache_columns(max_completion_length: int) -> int:
    """Columns of a completion's KV cache, in sampler and trainer alike: ``max_completion_length`` rounded up to 64s.

    On CPU, a matrix product over whole tiles rounds the same way whatever else is in the batch; one over an odd length
    does not.
    """
    return -(-max_completion_length // COLUMNS) * COLUMNS


@pytree
class PrefixCache:
    """Prefix KV cache: keys and values before a call's own tokens, N entries that are each shared by a group of rows.

    Without gather indices, the rows of a group are adjacent: B = N * group. With them, rows are in any order, but on
    the device that holds their entry; indices count within that device's shard.

    Attributes:
        cache: N entries of C columns, as returned by ``Model.apply``.
        start: slot of the first token; negative for a prefix of the call's own cache. A token does not attend to slots
            after its own.
        mask: False at slots that no token may attend to, such as padding; None if there are none.
        gather_index: for each entry in turn, the rows that share it. Every entry has the same number of places; an
            unused place holds any row.
        scatter_index: position of each row in ``gather_index``.
        length: slots of the prefix, of which layers with a ring cache hold only the last; None if all layers hold all.
    """

    cache: Cache
    start: Int[Array, ""] | int
    mask: Bool[Array, "N C"] | None = None
    gather_index: Int[Array, "devices places"] | None = None
    scatter_index: Int[Array, "devices rows"] | None = None
    length: Int[Array, ""] | int | None = None


def _unchanged(params: Params) -> Params:
    return params


@dataclass(frozen=True)
class Preparation:
    """Parameters in the form that a train step computes with, and gradients back in the form of storage.

    By default the parameters themselves.

    Attributes:
        prepare: ``params -> params`` in the compute dtype and layout, which ``Model.apply`` and ``Model.head`` accept
            too. A step does it once, so that micro-batches and layers share one copy. With stacked layers ``apply``
            takes whole sequences only (``start`` 0, no prefixes), and returns None in place of the cache.
        constrain: sharding constraints on prepared parameters, or on a tree of their form; their gradients are
            constrained too.
        restore: a tree of the form of prepared parameters, such as gradients of any dtype, in the form of ``params``.
    """

    prepare: Callable[[Params], Params] = _unchanged
    constrain: Callable[[Params], Params] = _unchanged
    restore: Callable[[Params], Params] = _unchanged

    def under(self, name: str) -> Preparation:
        """The preparation of trees that have a model's parameters under ``name``; their other entries are kept."""

        def entry(function: Callable[[Params], Params]) -> Callable[[Params], Params]:
            return lambda tree: {**tree, name: function(tree[name])}

        return Preparation(entry(self.prepare), entry(self.constrain), entry(self.restore))


@dataclass(frozen=True)
class Routing:
    """How a model with experts routes tokens.

    Attributes:
        apply: as ``Model.apply``, with two more arguments and a third result: ``(..., chosen [B, S, L, k],
            with_logits) -> (hidden, cache, routed)``. ``chosen`` are experts recorded earlier, of each layer with
            experts, which are used again (router replay); None to choose; a token with -1 chooses anew.
            ``routed.experts [B, S, L, k]`` are those of the call, and ``routed.logits [B, S, L, E]`` the router's
            logits if asked for.
        num_layers: L, layers with experts.
        num_experts: E.
        per_token: k, experts of a token.
        scoring: function from logits to scores, ``softmax`` or ``sigmoid``.
    """

    apply: Callable[..., tuple[Float[Array, "B S D"], Cache, Any]]
    num_layers: int
    num_experts: int
    per_token: int
    scoring: str


AS_STORED = Preparation()
"""The preparation that changes nothing."""


@dataclass(frozen=True)
class Model:
    """A decoder as pure functions and numbers, without modules and state.

    Attributes:
        apply: ``(params, token_ids [B, S], positions [B, S], mask [B, C], cache, start, prefixes, block_bounds) ->
            (hidden [B, S, D], cache)``. Token ``i`` of the call has slot ``start + i`` and attends to slots up to its
            own: to those of ``prefixes``, and to those of the cache where ``mask`` is True (None: to all). An integer
            mask holds segment ids of packed sequences, 0 for padding; tokens attend within their segment; ``Segments``
            are a mask too. Without a cache (None), C = S, ``start`` is 0, and the call's keys and values are returned
            as the cache. With one, they are written to columns ``start .. start + S - 1``. Attention sums over each
            prefix, and over each block of columns between ``block_bounds``, separately: two calls with the same blocks
            round identically. ``hidden`` is the input of the output embedding (final norm applied). A query that may
            attend to nothing has a finite output.
        rope: ``positions [B, S] -> tree`` of rotary cosines and sines, each leaf ``[B, S, ...]``, which ``apply``
            accepts in place of positions. Decoding computes them for several steps at once.
        head: ``params -> [V, D]``, the output embedding; ``[1, D]`` for a reward model. None in its place if ``hidden``
            are the logits themselves, D = V.
        token_scores: ``(params, hidden [B, T, D], token_ids [B, T], *, temperature, chunk_size, mask, min_chunks) ->
            (log-probabilities [B, T], entropies [B, T])``, as ``log_probs.chunked_log_probs`` of ``head(params)``;
            ``chunk_size`` counts tokens on a device, ``min_chunks`` is as in ``log_probs.ChunkedHead``.
        init_cache: ``(batch, length, dtype, ring=False) -> cache`` of zeros. ``dtype`` None is the model's compute
            dtype; a coarser one rounds keys and values when they are written, and attention reads the rounded values.
            With ``ring``, layers with a sliding window have no more columns than the window, rounded up to
            ``COLUMNS``: the token of slot ``s`` is in column ``s`` modulo their number. Such a cache takes calls of
            one token without a mask, at slots 0, 1, 2, ... in turn.
        first_columns: ``(cache, length) -> cache`` of a ``PrefixCache`` with this ``length``: the first ``length``
            columns of a cache that is not a ring, as a ring.
        join_columns: ``(caches, starts, length) -> cache``: ring caches of the same rows, one after the other, as one
            that continues the first. ``starts [written]`` are the slots of the first tokens of those that were written
            to, the others are empty; ``length`` is the number of tokens in all of them.
        vocab_size: V; 1 for a reward model.
        logit_softcap: ``c`` in ``c * tanh(logits / c)`` on the output logits; None without.
        max_length: longest sequence that the model supports, in tokens; None if unknown.
        rope_switch_length: a call with longer sequences uses other rotary frequencies for all of its tokens (longrope
            and dynamic scaling); None if frequencies do not depend on the length.
        packing: how prompts and completions are best packed for ``apply``: ``separate`` where an attention kernel takes
            segment ids but not ``Segments``; None if they cannot be packed.
        attention_length: length of rows over which attention costs as much as all other work, in tokens.
        preparation: of the parameters for a train step.
        token_shards: devices over which the tokens of a sequence are split. With more than one, ``apply`` takes whole
            sequences without a cache.
        routing: of a model with experts; None without.
        init_states: ``(batch) -> states`` of zeros of the layers that are recurrences, a list with a dict for each
            layer, empty for others; None for a model without. They are entries of a cache's dicts beside those of
            ``init_cache``: ``apply`` begins from the states in its cache, from zeros without any, and returns those
            after its last tokens. Padding leaves them as they are. A call at a later slot than 0 must have them.
    """

    apply: Callable[..., tuple[Float[Array, "B S D"], Cache]]
    rope: Callable[[Int[Array, "B S"]], Any]
    head: Callable[[Params], Float[Array, "V D"] | None]
    token_scores: Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]
    init_cache: Callable[..., Cache]
    first_columns: Callable[[Cache, int], Cache]
    join_columns: Callable[[Sequence[Cache], Int[Array, " written"], Int[Array, ""]], Cache]
    vocab_size: int
    logit_softcap: float | None = None
    max_length: int | None = None
    rope_switch_length: int | None = None
    packing: Packing | None = None
    attention_length: float = ATTENTION_LENGTH
    preparation: Preparation = AS_STORED
    token_shards: int = 1
    routing: Routing | None = None
    init_states: Callable[[int], Cache] | None = None


@pytree
class Prompts:
    """The prompts of one step, left-padded to one length.

    Attributes:
        ids: token ids; values in padding are ignored.
        mask: True at real tokens, which end in the last column.
        index: a number for each prompt, distinct within a step, that seeds the noise of its samples.
        part: which part of its group a row is sampled for, if groups are split to fit memory (a prompt is then repeated
            for each part); None if groups are sampled whole.
    """

    ids: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    index: Int[Array, " N"]
    part: Int[Array, " N"] | None = None


@pytree
class Rollout:
    """Prompts with a group of completions each. Rows of a group are adjacent: B = N * G.

    Attributes:
        prompt_ids: the prompt of each completion, left-padded.
        prompt_mask: True at real prompt tokens.
        completion_ids: sampled tokens, verbatim; the pad id after the end.
        completion_mask: True at sampled tokens, the EOS token included.
        rollout_log_probs: log-probability of each sampled token under the sampling distribution (temperature and
            filters included); 0 after the end.
        truncated: True if no EOS token was sampled within the limit.
        prompt_experts, completion_experts: experts that computed each token in the sampler, in each layer with experts,
            for the trainer to use again (router replay); None if not recorded.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    rollout_log_probs: Float[Array, "B T"]
    truncated: Bool[Array, " B"]
    prompt_experts: Int[Array, "B P L k"] | None = None
    completion_experts: Int[Array, "B T L k"] | None = None


@pytree
class Batch:
    """The data of a policy update; the first axis of every field but ``rows`` is the batch of sequences.

    Attributes:
        prompt_ids, prompt_mask, completion_ids, completion_mask, prompt_experts, completion_experts: as in ``Rollout``.
        loss_mask: True at the completion tokens that the loss includes (a subset of ``completion_mask``).
        advantages: one for each sequence, or for each token.
        rollout_log_probs: log-probabilities from the sampler; None if nothing is compared with them.
        old_log_probs: the policy's log-probabilities at the start of the update; None in strictly on-policy training,
            where they equal those of the update's forward pass.
        ref_log_probs: the reference policy's log-probabilities; None without a reference.
        old_values: the critic's values at the start of the update; None without a critic.
        returns: the critic's targets.
        rows: the packed rows that hold the sequences, in a micro-batch of a ``PackedBatch``; B = R * K then.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    advantages: Float[Array, " B"] | Float[Array, "B T"]
    rollout_log_probs: Float[Array, "B T"] | None
    old_log_probs: Float[Array, "B T"] | None = None
    ref_log_probs: Float[Array, "B T"] | None = None
    old_values: Float[Array, "B T"] | None = None
    returns: Float[Array, "B T"] | None = None
    prompt_experts: Int[Array, "B P L k"] | None = None
    completion_experts: Int[Array, "B T L k"] | None = None
    rows: PackedRows | None = None

    @classmethod
    def from_rollout(
        cls,
        rollout: Rollout,
        advantages: Float[Array, " B"] | Float[Array, "B T"],
        *,
        loss_mask: Bool[Array, "B T"] | None = None,
        old_log_probs: Float[Array, "B T"] | None = None,
        ref_log_probs: Float[Array, "B T"] | None = None,
        old_values: Float[Array, "B T"] | None = None,
        returns: Float[Array, "B T"] | None = None,
    ) -> Batch:
        """The batch of all sequences of a rollout.

        Args:
            rollout: prompts, completions and the sampler's log-probabilities.
            advantages: one for each sequence, or for each token.
            loss_mask: True at the completion tokens that the loss includes; None for all of them.
            old_log_probs, ref_log_probs, old_values, returns: as the attributes.
        """
        return cls(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            completion_ids=rollout.completion_ids,
            completion_mask=rollout.completion_mask,
            loss_mask=rollout.completion_mask if loss_mask is None else loss_mask,
            advantages=advantages,
            rollout_log_probs=rollout.rollout_log_probs,
            old_log_probs=old_log_probs,
            ref_log_probs=ref_log_probs,
            old_values=old_values,
            returns=returns,
            prompt_experts=rollout.prompt_experts,
            completion_experts=rollout.completion_experts,
        )


@pytree
class PackedBatch:
    """Sequences with the packed rows that hold them, in micro-batches of equal shape, as ``train.pack`` makes them.

    Attributes:
        sequences: the sequences, in their own order.
        rows: stacked micro-batches; those after the first ``count`` are empty.
        count: micro-batches that hold sequences.
    """

    sequences: Batch | Rollout
    rows: PackedRows
    count: Int[Array, ""]


@pytree
class Pairs:
    """Preference pairs: a prompt with its chosen completion (index 0) and its rejected one (index 1).

    Attributes:
        prompt_ids: left-padded.
        prompt_mask: True at real prompt tokens.
        completion_ids: right-padded.
        completion_mask: True at real completion tokens, the EOS token included.
        margins: annotated margin by which the chosen completion is better; None if unknown.
        ref_log_probs: the reference policy's log-probability of each completion; None without a reference.
    """

    prompt_ids: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    completion_ids: Int[Array, "B 2 T"]
    completion_mask: Bool[Array, "B 2 T"]
    margins: Float[Array, " B"] | None = None
    ref_log_probs: Float[Array, "B 2"] | None = None


@pytree
class TrainState:
    """Parameters and optimizer state: the input and output of a train step.

    Attributes:
        step: number of updates applied.
        params: the parameters, in their storage dtype; with LoRA adapters, the frozen ones, too.
        opt_state: the optimizer's state, of the parameters that are trained.
        ref_params: the reference policy's parameters, of those that are trained; None without a reference.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ref_params: Params | None = None


@pytree
class Mean:
    """A mean as a sum and a count.

    Means over a global batch are merged by adding sums and counts, and divided once at the end, so that gradient
    accumulation and sharding do not change the result.
    """

    sum: Float[Array, ""]
    count: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """``sum / count``; 0 if ``count`` is 0."""
        return jnp.where(self.count > 0, self.sum / jnp.where(self.count > 0, self.count, 1), 0)

    def reduce(self) -> Mean:
        """Merge the parts stacked along the first axis."""
        return Mean(self.sum.sum(0), self.count.sum(0))


@pytree
class Max:
    """A maximum that can be merged; ``-inf`` is the maximum of nothing."""

    max: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """The maximum; 0 if it is ``-inf``."""
        return jnp.where(jnp.isneginf(self.max), 0, self.max)

    def reduce(self) -> Max:
        """Merge the parts stacked along the first axis."""
        return Max(self.max.max(0))


Metrics = dict[str, Mean | Max]
