"""Arguments that cannot be sampled with, refused before anything is compiled."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer

from grpo_jax.types import Model, Params, Prompts


def check_lengths(group_size: int, max_completion_length: int, eos_ids: tuple[int, ...]) -> None:
    """Refuse what no completion could be drawn with."""
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; at least 1 sample is drawn for each prompt")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}; it must be at least 1 token")
    if not eos_ids:
        raise ValueError("eos_ids is empty; without an ending token no completion would ever end")


def check_prompts(
    model: Model, params: Params, prompts: Prompts, *, max_completion_length: int, eos_ids: tuple[int, ...]
) -> None:
    """Refuse prompts that would be sampled from wrongly without an error: XLA clamps indices that are out of range.

    Args:
        model: as of ``types.Model``.
        params: its parameters.
        prompts: N prompts; those that are being traced are not looked at.
        max_completion_length: T, in tokens.
        eos_ids: the ending tokens.

    Raises:
        ValueError: a prompt without tokens or with padding after them, a token id or an ending one outside the
            vocabulary, two prompts with one ``index``, or a prompt that has no room for a completion in the model's
            positions, or below the length at which its rotary frequencies change.
    """
    V = jax.eval_shape(model.head, params).shape[0]
    if V == 1:
        raise ValueError(
            "the model is a reward model: its head gives a score and no tokens; sample from a language model"
        )
    outside = [each for each in eos_ids if not 0 <= each < V]
    if outside:
        raise ValueError(f"eos_ids has {outside}, which a model of {V} tokens can never sample")
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(prompts)):
        return
    ids, mask, index = (np.asarray(x) for x in (prompts.ids, prompts.mask, prompts.index))
    lengths = mask.sum(1)
    padded_after = (lengths == 0) | (np.diff(mask.astype(np.int8), axis=1) < 0).any(1) | ~mask[:, -1]
    if padded_after.any():
        n = int(padded_after.argmax())
        raise ValueError(
            f"prompt {n} is not left-padded: its mask must be True at its {lengths[n]} tokens, at least one, and these "
            "must stand in the last columns; data.prompts.pad_prompts pads so"
        )
    unknown = mask & ((ids < 0) | (ids >= V))
    if unknown.any():
        n, column = (int(each[0]) for each in np.nonzero(unknown))
        raise ValueError(
            f"prompt {n} holds the token id {ids[n, column]}, and the model's vocabulary has {V}: the tokenizer is not "
            "this model's, or its embedding was not extended"
        )
    if prompts.part is None and len(np.unique(index)) < len(index):
        raise ValueError(
            f"prompts share an index ({index.tolist()!s:.200}): their samples would be drawn with the same noise"
        )
    T, max_length = max_completion_length, model.max_length
    if max_length is not None and lengths.max(initial=0) + T > max_length:
        n = int(lengths.argmax())
        raise ValueError(
            f"prompt {n} has {lengths[n]} tokens: with a completion of up to {T} it does not fit the model's "
            f"{max_length} positions; shorten it"
            + (f", or set max_completion_length to at most {max_length - lengths[n]}" * bool(lengths[n] < max_length))
        )
    switch = model.rope_switch_length
    if switch is not None and lengths.max(initial=0) + T > switch:
        n = int(lengths.argmax())
        raise ValueError(
            f"prompt {n} has {lengths[n]} tokens: with a completion of up to {T} it may pass the {switch} tokens after "
            "which this model's rotary frequencies change, in the middle of a completion; load the model with "
            f"rope_length={max_length or lengths[n] + T} (--rope-length), which chooses them once for all sequences"
        )
