"""A model's layout on a mesh that does not divide its sizes, in a line for the run's header."""

from __future__ import annotations

import re

from jax.sharding import Mesh

from grpo_jax.models import Pretrained
from grpo_jax.models.head_layout import head_layout
from grpo_jax.sharding import PARAM_RULES, axis_names, fitted_spec, param_spec, params_by_name
from grpo_jax.types import Params

LARGE = r"(kernel|embedding|experts/(gate|up|down))$"
"""Paths of the large parameters, which a note names if a mesh does not divide them."""


def layout_note(model: Pretrained, mesh: Mesh) -> str:
    """Heads and parameters that the axes of a mesh do not divide; empty if they divide all.

    Args:
        model: the model.
        mesh: its devices.
    """
    heads = "" if model.config.latent is not None else head_layout(model.config, mesh).description
    return "; ".join(filter(None, (heads, uneven_params(model.params, mesh))))


def uneven_params(shapes: Params, mesh: Mesh) -> str:
    """The parameters whose dimensions a mesh's axes do not divide, and how they are laid out; empty if there are none.

    Args:
        shapes: a tree of arrays or ``jax.ShapeDtypeStruct``.
        mesh: a mesh of ``make_mesh``.
    """
    found: dict[str, list[str]] = {}
    for name, shape in params_by_name(shapes):
        wanted, fitted = param_spec(name), fitted_spec(name, shape, mesh.shape, PARAM_RULES)
        if wanted is None or fitted is None or not re.search(LARGE, name):  # others are small
            continue
        own = {axis for entry in wanted for axis in axis_names(entry)}
        others = [axis for axis in ("expert", "context") if axis not in own]  # which split what fsdp does
        for dimension, axis in enumerate(wanted):
            short = re.sub(r"layers_\d+/|/(kernel|embedding)$", "", name) + f" ({shape[dimension]})"
            for one in ("fsdp", *others) if axis == "fsdp" else axis_names(axis):
                if one in axis_names(fitted[dimension]) or mesh.shape[one] == 1:
                    continue
                other = any(one in axis_names(entry) for entry in fitted)
                size = f"{one} {mesh.shape[one]}"
                how = f"{size} splits another dimension of" if other else f"replicated over {size}:"
                found.setdefault(how, []).append(short)
    return "; ".join(f"{how} {', '.join(dict.fromkeys(names))}" for how, names in found.items())
