"""The decoder, models from plain functions, and loading and saving of Hugging Face checkpoints.

The only package that imports flax.

Names are imported on first use, so that a command line does not wait for flax before it can answer ``--help``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.models.config import DecoderConfig as DecoderConfig
    from grpo_jax.models.flops import training_flops as training_flops
    from grpo_jax.models.hf import describe_pretrained as describe_pretrained
    from grpo_jax.models.hf import from_pretrained as from_pretrained
    from grpo_jax.models.hf import save_pretrained as save_pretrained
    from grpo_jax.models.hf import weights_digest as weights_digest
    from grpo_jax.models.hf_config import from_hf_config as from_hf_config
    from grpo_jax.models.lora import add_adapters as add_adapters
    from grpo_jax.models.lora import merge_adapters as merge_adapters
    from grpo_jax.models.lora_config import LoRA as LoRA
    from grpo_jax.models.lora_files import save_adapters as save_adapters
    from grpo_jax.models.parameters import init_params as init_params
    from grpo_jax.models.parameters import param_shapes as param_shapes
    from grpo_jax.models.positions import num_positions as num_positions
    from grpo_jax.models.pretrained import Pretrained as Pretrained
    from grpo_jax.models.tokenizers import stop_ids as stop_ids
    from grpo_jax.models.transformer import build_model as build_model
    from grpo_jax.models.uncached import from_apply as from_apply

EXPORTS = {
    "config": ("DecoderConfig",),
    "flops": ("training_flops",),
    "hf": ("describe_pretrained", "from_pretrained", "save_pretrained", "weights_digest"),
    "hf_config": ("from_hf_config",),
    "lora": ("add_adapters", "merge_adapters"),
    "lora_config": ("LoRA",),
    "lora_files": ("save_adapters",),
    "parameters": ("init_params", "param_shapes"),
    "positions": ("num_positions",),
    "pretrained": ("Pretrained",),
    "tokenizers": ("stop_ids",),
    "transformer": ("build_model",),
    "uncached": ("from_apply",),
}
"""Exported names by module."""


def __getattr__(name: str) -> Any:
    for module, names in EXPORTS.items():
        if name in names:
            return getattr(import_module(f"grpo_jax.models.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in EXPORTS.values() for name in names)})
