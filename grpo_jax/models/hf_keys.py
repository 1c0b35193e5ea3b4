"""The table from parameters to Hugging Face tensors: path, tensor name, layout."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.transformer import param_shapes

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EMBEDDING_SUFFIX = "embed_tokens.weight"
TOP_MODULES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head", "score": "score"}
BLOCK_MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
BLOCK_MODULES_WITH_POST_NORMS = BLOCK_MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


# The layout of a stored tensor: the order of the parameter's axes, and the index in that order of a heads axis that is
# merged with the next one.
HEADS_OUT, HEADS_IN, LINEAR, HEADS_BIAS = ((1, 2, 0), 0), ((2, 0, 1), 1), ((1, 0), None), ((0, 1), 0)
LAYOUTS = {
    **{f"attention/{name}/kernel": HEADS_OUT for name in "qkv"},
    **{f"attention/{name}/bias": HEADS_BIAS for name in "qkv"},
    "attention/o/kernel": HEADS_IN,
    **{f"mlp/{name}/kernel": LINEAR for name in ("gate", "up", "down")},
    "score/kernel": LINEAR,
}


@dataclass(frozen=True)
class Entry:
    """The tensor of a parameter in a Hugging Face checkpoint.

    Attributes:
        name: of the stored tensor.
        shape: of the parameter.
        axes: the parameter's axes in the order of the stored tensor.
        merged: index in ``axes`` of a heads axis that is merged with the next one in the stored tensor; or None.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    merged: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        shape = [self.shape[axis] for axis in self.axes]
        if self.merged is not None:
            shape[self.merged : self.merged + 2] = [shape[self.merged] * shape[self.merged + 1]]
        return tuple(shape)


def _flatten(tree: Any) -> dict[str, Any]:
    """A nested dict as a flat one, with keys joined by slashes."""
    return flatten_dict(tree, sep="/")


def key_table(config: DecoderConfig) -> dict[str, Entry]:
    """The stored tensor of each parameter, by the parameter's path such as ``layers_0/attention/q/kernel``."""
    block_modules = BLOCK_MODULES_WITH_POST_NORMS if config.post_norms else BLOCK_MODULES
    table = {}
    for path, leaf in _flatten(param_shapes(config)).items():
        module, kind = path.rsplit("/", 1)
        layer, _, in_block = path.partition("/")
        if layer in TOP_MODULES:
            stored_module = TOP_MODULES[layer]
        else:
            stored_module = f"model.layers.{layer.removeprefix('layers_')}.{block_modules[module.partition('/')[2]]}"
        axes, merged = LAYOUTS.get(in_block if in_block.count("/") else path, (tuple(range(leaf.ndim)), None))
        name = f"{stored_module}.{'bias' if kind == 'bias' else 'weight'}"
        table[path] = Entry(name, leaf.shape, axes, merged)
    return table
