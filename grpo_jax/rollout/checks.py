"""Checks of arguments before anything is compiled."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer

from grpo_jax.types import Model, Prompts


def check_lengths(group_size: int, max_completion_length: int, eos_ids: tuple[int, ...]) -> None:
    """Check the settings of sampling.

    Args:
        group_size: samples of each prompt.
        max_completion_length: in tokens.
        eos_ids: token ids that end a completion.

    Raises:
        ValueError: a size below 1, or no ``eos_ids``.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be at least 1 sample for each prompt")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length is {max_completion_length}; it must be at least 1 token")
    if not eos_ids:
        raise ValueError("eos_ids is empty; without an EOS token every completion would be truncated")


def check_prompts(model: Model, prompts: Prompts, *, max_completion_length: int, eos_ids: tuple[int, ...]) -> None:
    """Check prompts that XLA would accept and sample from wrongly: it clamps indices that are out of range.

    Args:
        model: the policy's model.
        prompts: N prompts; traced values are not checked.
        max_completion_length: T, in tokens.
        eos_ids: token ids that end a completion.

    Raises:
        ValueError: the model is a reward model; a prompt has no tokens or is not left-padded; a token id or an EOS id
            is outside the vocabulary; two prompts have one ``index``; or prompt and completion may exceed the model's
            positions, or the length at which its rotary frequencies change.
    """
    V = model.vocab_size
    if V == 1:
        raise ValueError(
            "the model is a reward model: its head gives a score and no tokens; sample from a language model"
        )
    outside = [eos_id for eos_id in eos_ids if not 0 <= eos_id < V]
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
            "must be in the last columns, as data.prompts.pad_prompts puts them"
        )
    unknown = mask & ((ids < 0) | (ids >= V))
    if unknown.any():
        n, column = (int(indices[0]) for indices in np.nonzero(unknown))
        raise ValueError(
            f"prompt {n} has the token id {ids[n, column]}, and the model's vocabulary has {V}: the tokenizer is not "
            "this model's, or its embedding was not resized"
        )
    if prompts.part is None and len(np.unique(index)) < len(index):
        raise ValueError(
            f"prompts share an index ({index.tolist()!s:.200}): their samples would have the same noise; number them"
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
            f"rope_length={max_length or lengths[n] + T} (--rope-length), which fixes them for all sequences"
        )
