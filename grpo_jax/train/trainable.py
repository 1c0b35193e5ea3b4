"""The part of a model's parameters that is trained: all of them, or LoRA adapters and scalar heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from grpo_jax.types import Params, TrainState

ADAPTERS = ("kernel_lora_a", "kernel_lora_b")
HEADS = ("score", "value")
"""Modules that are trained beside adapters: they start from zeros, so that a low rank would not suffice."""


def has_adapters(params: Params) -> bool:
    """Whether some matrix has LoRA adapters."""
    if isinstance(params, tuple):
        return any(map(has_adapters, params))
    if not isinstance(params, dict):
        return False
    return any(name in ADAPTERS or has_adapters(value) for name, value in params.items())


def trainable_part(params: Params) -> Params:
    """The parameters that are trained: with LoRA adapters, these and scalar heads; otherwise all of them.

    Args:
        params: any pytree; adapters are found in nested dicts, and in the tuple of stacked layers.

    Returns:
        The tree itself, or a nested dict of some of its arrays.
    """
    return _adapters_and_heads(params) if has_adapters(params) else params


def _adapters_and_heads(params: Any) -> Any:
    if isinstance(params, tuple):
        return tuple(map(_adapters_and_heads, params))
    part = {}
    for name, value in params.items():
        if name in ADAPTERS or name in HEADS:
            part[name] = value
        elif isinstance(value, dict | tuple) and (inner := _adapters_and_heads(value)):
            part[name] = inner
    return part


def join(trainable: Params, params: Params) -> Params:
    """``params`` with its trainable part replaced.

    Args:
        trainable: as of ``trainable_part``.
        params: all parameters.
    """
    if not has_adapters(params):
        return trainable
    return _joined(trainable, params)


def _joined(part: Any, whole: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_joined, part, whole))
    if not isinstance(part, dict):
        return part
    return {**whole, **{name: _joined(value, whole[name]) for name, value in part.items()}}


def without_frozen(states: Any) -> Any:
    """Train states with the trainable part of their parameters only, as checkpoints hold them.

    Args:
        states: a pytree with ``TrainState`` in it.
    """
    return _map_states(lambda state: replace(state, params=trainable_part(state.params)), states)


def with_frozen(states: Any, like: Any) -> Any:
    """The inverse of ``without_frozen``.

    Args:
        states: as of ``without_frozen``.
        like: with the frozen parameters.
    """
    return _map_states(lambda state, whole: replace(state, params=join(state.params, whole.params)), states, like)


def _map_states(change: Any, *trees: Any) -> Any:
    def one(node: Any, *others: Any) -> Any:
        return change(node, *others) if isinstance(node, TrainState) else node

    return jax.tree.map(one, *trees, is_leaf=lambda node: isinstance(node, TrainState))
