"""How a parameter lies in a stored tensor of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.models.config import DecoderConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A parameter as a part of a stored tensor: ``stored.reshape(split)[index].reshape(ordered)``, transposed.

    Attributes:
        stored: shape of the stored tensor.
        axes: the parameter's axes in the order of the stored tensor.
        split: shape that the stored tensor is viewed in.
        index: the parameter's part of that view.
    """

    stored: Shape
    axes: tuple[int, ...]
    split: Shape
    index: tuple[slice, ...] = ()

    def read(self, tensor: Any, shape: Sequence[int], ranges: Sequence[range]) -> np.ndarray:
        """A slice of the parameter, without reading the rest of the stored tensor.

        Args:
            tensor: the stored tensor, such as a memory map.
            shape: of the parameter.
            ranges: a contiguous range of each axis of the parameter.
        """
        ordered = tensor.reshape(self.split)[self.index].reshape([shape[axis] for axis in self.axes])
        part = ordered[tuple(slice(ranges[axis].start, ranges[axis].stop) for axis in self.axes)]
        return part.transpose(np.argsort(self.axes))

    def write(self, tensor: np.ndarray, param: np.ndarray) -> None:
        """Write the parameter to its part of a stored tensor.

        Args:
            tensor: contiguous, of the shape ``stored``.
            param: the whole parameter.
        """
        part = tensor.reshape(self.split)[self.index]
        part[...] = param.transpose(self.axes).reshape(part.shape)


Layout = Callable[[Shape, DecoderConfig], View]
"""``(shape of a parameter, config) -> its View``."""


def ordered(*axes: int, merged: int | None = None) -> Layout:
    """A parameter that is a stored tensor with its axes in another order.

    Args:
        axes: of the parameter, in the order of the stored tensor.
        merged: index in ``axes`` of a heads axis that is merged with the next one in the stored tensor.
    """

    def view(shape: Shape, config: DecoderConfig) -> View:
        split = tuple(shape[axis] for axis in axes)
        stored = split
        if merged is not None:
            stored = (*split[:merged], split[merged] * split[merged + 1], *split[merged + 2 :])
        return View(stored, axes, split)

    return view


def part(layout: Layout, axis: int, sizes: Callable[[DecoderConfig], Sequence[int]], which: int) -> Layout:
    """A parameter that is stored in one tensor with others, one after the other along an axis.

    Args:
        layout: of the parameter alone.
        axis: of its ``View.split``.
        sizes: of all of the tensor's parts along the axis.
        which: the parameter's part.
    """

    def view(shape: Shape, config: DecoderConfig) -> View:
        all_sizes, whole = tuple(sizes(config)), list(shape)
        start = sum(all_sizes[:which])
        whole[layout(shape, config).axes[axis]] = sum(all_sizes)
        of_all = layout(tuple(whole), config)
        return replace(of_all, index=(*[slice(None)] * axis, slice(start, start + all_sizes[which])))

    return view


def rows(
    which: int,
    sizes: Callable[[DecoderConfig], Sequence[int]],
    *,
    axes: tuple[int, ...],
    groups: Callable[[DecoderConfig], int] = lambda config: 1,
    rest: Callable[[DecoderConfig], Shape] = lambda config: (config.hidden_size,),
) -> Layout:
    """A parameter in some rows of a stored tensor: the tensor is groups of rows, and each group has a part of it.

    Args:
        which: the parameter's part of a group.
        sizes: rows of each part of a group.
        axes: of the parameter, in the order of the stored tensor; the first ones are merged into the rows.
        groups: number of groups.
        rest: shape of the stored tensor without its rows.
    """

    def view(shape: Shape, config: DecoderConfig) -> View:
        all_sizes, count, others = tuple(sizes(config)), groups(config), rest(config)
        start, total = sum(all_sizes[:which]), sum(all_sizes)
        index = (slice(None), slice(start, start + all_sizes[which]))
        return View((count * total, *others), axes, (count, total, *others), index)

    return view


def as_is(shape: Shape, config: DecoderConfig) -> View:
    """A parameter that is a stored tensor.

    Args:
        shape: of the parameter.
        config: of the decoder.
    """
    return View(shape, tuple(range(len(shape))), shape)


LINEAR = ordered(1, 0)
HEADS_OUT, HEADS_IN, HEADS_BIAS = ordered(1, 2, 0, merged=0), ordered(2, 0, 1, merged=1), ordered(0, 1, merged=0)
LAYOUTS = {
    **{f"attention/{name}/kernel": HEADS_OUT for name in "qkv"},
    **{f"attention/{name}/bias": HEADS_BIAS for name in "qkv"},
    "attention/o/kernel": HEADS_IN,
    **{f"mlp/{name}/kernel": LINEAR for name in ("gate", "up", "down")},
    "score/kernel": LINEAR,
    **{f"mlp/shared/{name}/kernel": LINEAR for name in ("gate", "up", "down")},
    **{f"mlp/experts/{name}": LINEAR for name in ("gate", "up", "down")},
    "mlp/router/kernel": LINEAR,
    "mlp/shared_gate/kernel": LINEAR,
    "attention/q_a/kernel": LINEAR,
    "attention/kv_a/kernel": LINEAR,
    "attention/q_b/kernel": HEADS_OUT,
    **{f"delta/{name}/kernel": HEADS_OUT for name in "qkvz"},
    "delta/a/kernel": LINEAR,
    "delta/b/kernel": LINEAR,
    "delta/o/kernel": HEADS_IN,
}
"""Layouts of parameters, by their path in the layer; others are stored as they are."""


def _heads(config: DecoderConfig) -> tuple[int, int, int]:
    return config.num_heads, config.num_kv_heads, config.num_kv_heads


def _widths(config: DecoderConfig) -> tuple[int, int]:
    return config.intermediate_size, config.intermediate_size


FUSED_QKV = {f"attention/{name}/kernel": part(HEADS_OUT, 0, _heads, i) for i, name in enumerate("qkv")}
FUSED_GATE_UP = {f"mlp/{name}/kernel": part(LINEAR, 0, _widths, i) for i, name in enumerate(("gate", "up"))}


def _expert_widths(config: DecoderConfig) -> tuple[int, int]:
    assert config.experts is not None
    return config.experts.intermediate_size, config.experts.intermediate_size


def _latent_sizes(config: DecoderConfig) -> tuple[int, int]:
    assert config.latent is not None
    return config.latent.key_dim, config.latent.value_dim


def alternating(which: int) -> Layout:
    """One of two parameters whose entries alternate along the last axis of a stored tensor.

    Args:
        which: 0 for the first.
    """

    def view(shape: Shape, config: DecoderConfig) -> View:
        index = (*[slice(None)] * len(shape), slice(which, which + 1))
        return View((*shape[:-1], 2 * shape[-1]), tuple(range(len(shape))), (*shape, 2), index)

    return view


LATENT_HEADS = {f"attention/{name}": part(HEADS_OUT, 1, _latent_sizes, i) for i, name in enumerate(("k_b", "v_b"))}
# Experts in one tensor, with the gate and the other input one after the other: as [E, 2 F, D], or transposed.
FUSED_EXPERTS = {
    **{f"mlp/experts/{name}": part(ordered(0, 2, 1), 1, _expert_widths, i) for i, name in enumerate(("gate", "up"))},
    "mlp/experts/down": ordered(0, 2, 1),
}
FUSED_EXPERTS_TRANSPOSED = {
    **{f"mlp/experts/{name}": part(ordered(0, 1, 2), 2, _expert_widths, i) for i, name in enumerate(("gate", "up"))},
    "mlp/experts/down": as_is,
}
ALTERNATING_EXPERTS = {
    **{f"mlp/experts/{name}{end}": alternating(i) for i, name in enumerate(("gate", "up")) for end in ("", "_bias")},
    "mlp/experts/down": as_is,
}
