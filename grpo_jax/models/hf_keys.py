"""The table from parameters to Hugging Face tensors: path, tensor names, layout."""

from __future__ import annotations

import re
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


def key_table(config: DecoderConfig) -> dict[str, Entry]:
    """The stored tensors of each parameter, by the parameter's path such as ``layers_0/attention/q/kernel``."""
    family = FAMILIES[config.family]
    layouts = {**LAYOUTS, **family.layouts}
    table = {}
    for path, leaf in _flatten(param_shapes(config)).items():
        layer, _, in_block = path.partition("/")
        if layer in TOP_MODULES:
            key, prefix = path, ""
            module, kind = TOP_MODULES[layer], path.rpartition("/")[2]
        else:
            key, prefix = in_block, f"model.layers.{layer.removeprefix('layers_')}."
            module, kind = _module(in_block, family.modules)
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
