"""The table from parameters to Hugging Face tensors: path, tensor names, layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.hf_families import FAMILIES
from grpo_jax.models.hf_layouts import LAYOUTS, View, as_is
from grpo_jax.models.parameters import param_shapes

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING_SUFFIX = "embed_tokens.weight"
TOP_MODULES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "score": "score"}
EXPERT = "{}"
"""In a tensor's name, in the place of an expert's number."""


@dataclass(frozen=True)
class Entry:
    """A parameter in a Hugging Face checkpoint.

    Attributes:
        names: of the stored tensor; or those of its slices along the first axis, if each is stored by itself.
        shape: of the parameter.
        view: of the stored tensor; of each slice, if there are several.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    view: View

    @property
    def is_sliced(self) -> bool:
        """Whether slices of the parameter are tensors of their own."""
        return len(self.view.axes) < len(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The parameter's axes in the order in which they are stored."""
        return (0, *(axis + 1 for axis in self.view.axes)) if self.is_sliced else self.view.axes


def _flatten(tree: Any) -> dict[str, Any]:
    """A nested dict as a flat one, with keys joined by slashes."""
    return flatten_dict(tree, sep="/")


def key_table(config: DecoderConfig, variant: int = 0) -> dict[str, Entry]:
    """The stored tensors of each parameter, by the parameter's path such as ``layers_0/attention/q/kernel``.

    Args:
        config: of the decoder.
        variant: 0 for the form that checkpoints are written in; others are those of ``Family.variants``.
    """
    family = FAMILIES[config.family]
    more_modules, more_layouts = ({}, {}) if variant == 0 else family.variants[variant - 1]
    modules = {**family.modules, **more_modules}
    layouts = {**LAYOUTS, **family.layouts, **more_layouts}
    table = {}
    for path, leaf in _flatten(param_shapes(config)).items():
        layer, _, in_block = path.partition("/")
        if layer in TOP_MODULES:
            key, prefix = path, ""
            module, kind = TOP_MODULES[layer], path.rpartition("/")[2]
        else:
            key, prefix = in_block, f"model.layers.{layer.removeprefix('layers_')}."
            module, kind = _module(in_block, modules)
        name = prefix + module if kind == "" else f"{prefix}{module}.{'bias' if kind == 'bias' else 'weight'}"
        names, shape = (name,), leaf.shape
        if EXPERT in name:
            names, shape = tuple(name.replace(EXPERT, str(i)) for i in range(shape[0])), shape[1:]
        table[path] = Entry(names, leaf.shape, layouts.get(key, as_is)(shape, config))
    return table


def _module(path: str, modules: Any) -> tuple[str, str]:
    """The stored name of a parameter of a layer, and its kind; no kind if the name is the whole of it."""
    if path in modules:
        return modules[path], ""
    module, _, kind = path.rpartition("/")
    return modules[module], kind


def best_table(config: DecoderConfig, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    """The table whose names and shapes are those of the most stored tensors.

    Args:
        config: of the decoder.
        stored: shapes of the stored tensors by their name, with the prefix ``model.``.
    """
    tables = [key_table(config, variant) for variant in range(1 + len(FAMILIES[config.family].variants))]

    def found(table: dict[str, Entry]) -> int:
        return sum(stored.get(entry.names[0]) == entry.view.stored for entry in table.values())

    return max(tables, key=found)
