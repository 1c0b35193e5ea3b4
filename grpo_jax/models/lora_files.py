"""LoRA adapters in the layout of PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from grpo_jax.models.hf_files import removed_unless_whole
from grpo_jax.models.hf_keys import Entry, key_table
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.types import Params

PREFIX = "base_model.model."


def save_adapters(folder: str | Path, params: Params, like: Pretrained) -> None:
    """Write LoRA adapters as a folder that PEFT loads: ``adapter_config.json`` and ``adapter_model.safetensors``.

    It is written into a hidden folder that is then renamed, as by ``save_pretrained``.

    Args:
        folder: does not exist.
        params: with adapters.
        like: the model that they were added to.

    Raises:
        FileExistsError: ``folder`` exists.
        OSError: it cannot be written, such as on a full disk; ``folder`` is as it was.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another name")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with removed_unless_whole(partial, folder):
        partial.mkdir(parents=True)
        (partial / "adapter_model.safetensors").write_bytes(save(adapter_tensors(params, like), {"format": "pt"}))
        (partial / "adapter_config.json").write_text(json.dumps(adapter_config(like), indent=2) + "\n")
        partial.replace(folder)


def adapter_tensors(params: Params, like: Pretrained) -> dict[str, np.ndarray]:
    """The tensors of ``adapter_model.safetensors``, with those of a scalar head, which is trained as a whole.

    Args:
        params: with adapters.
        like: the model that they were added to.
    """
    assert like.lora is not None
    table, tensors = key_table(like.config), {}
    for layer in range(like.config.num_layers):
        for stored, paths in _stored_modules(like, layer).items():
            a, b = [], []
            for path in paths:
                module: Mapping[str, Any] = params[f"layers_{layer}"]
                for name in path.split("/"):
                    module = module[name]
                a.append(np.asarray(module["kernel_lora_a"], np.float32).T)
                b.append(
                    _outputs(np.asarray(module["kernel_lora_b"], np.float32), table[f"layers_{layer}/{path}/kernel"])
                )
            tensors[f"{PREFIX}{stored}.lora_A.weight"] = np.concatenate(a)
            tensors[f"{PREFIX}{stored}.lora_B.weight"] = np.concatenate(b, axis=1)
    if like.config.scalar_head:
        head = np.asarray(params["score"]["kernel"], np.float32)
        tensors[f"{PREFIX}{table['score/kernel'].names[0]}"] = np.ascontiguousarray(head.T)
    return tensors


def _outputs(b: np.ndarray, entry: Entry) -> np.ndarray:
    """The matrix B of an adapter, with a row for each row of the stored matrix; zeros in rows of other parameters."""
    view, rank = entry.view, len(b)
    if view.axes[-1] != 0:  # several axes of inputs, and all outputs in one
        return np.ascontiguousarray(b.T)
    stored = np.zeros((view.stored[0], rank), np.float32)
    by_rank = replace(view, stored=stored.shape, split=(*view.split[:-1], rank))
    by_rank.write(stored, b.reshape(rank, *entry.shape[1:]))
    return stored


def _stored_modules(like: Pretrained, layer: int) -> dict[str, list[str]]:
    """The matrices of a layer that have adapters, by the stored module that they are, or are parts of.

    The parts of a module have adapters of their own, which together are one of the sum of their ranks.
    """
    assert like.lora is not None
    table, modules = key_table(like.config), {}
    for path in like.lora.matrices(like.config, like.config.kinds[layer]):
        (stored,) = table[f"layers_{layer}/{path}/kernel"].names
        modules.setdefault(stored.removesuffix(".weight"), []).append(path)
    return modules


def adapter_config(like: Pretrained) -> dict[str, Any]:
    """The contents of ``adapter_config.json``.

    Args:
        like: the model that the adapters were added to.
    """
    assert like.lora is not None
    modules = {
        stored.rpartition(".")[2]: len(paths)
        for layer in range(like.config.num_layers)
        for stored, paths in _stored_modules(like, layer).items()
    }
    alpha, fused = like.lora.alpha, {name: count for name, count in modules.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if like.config.scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": like.source,
        "r": like.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": [*modules],
        "rank_pattern": {name: count * (like.lora.rank or 0) for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()},
        "modules_to_save": ["score"] if like.config.scalar_head else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
