"""Memory of a training step of GRPO, PPO, DPO and SFT by the compiler's analysis, without allocating weights.

Compiles each update at the shapes of a model with 7 billion parameters and reads the memory of state, batch, temporary
arrays and further models. Prints one JSON line.

    python experiments/bench/memory.py --topology v5p:2x2x2            # by the TPU compiler; needs no TPU
    python experiments/bench/memory.py --shape small                   # the toy model, by this device's compiler
    python experiments/bench/memory.py --model-config path/to/config.json    # any other model

With the CPU compiler remat saves almost nothing, so its results for large models do not carry over to other devices.
The TPU compiler comes with the extra "tpu" and takes some minutes for each update.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from grpo_jax.config.compare import WITH_REWARD_MODEL
from grpo_jax.config.run import require_at_least
from grpo_jax.loop.benchmark import SHAPES
from grpo_jax.loop.command import run_command
from grpo_jax.loop.update_memory import METHODS, UpdateShapes, size_of, update_memory
from grpo_jax.models import from_hf_config, param_shapes
from grpo_jax.models.remat import Remat
from grpo_jax.sharding import make_mesh
from grpo_jax.tasks.toy_config import HF_CONFIG

MODELS = {"7b": SHAPES["qwen2.5-7b"] | {"max_position_embeddings": 131_072}, "small": HF_CONFIG}


@dataclass(frozen=True)
class Config:
    """Model, batch and methods."""

    shape: Literal["7b", "small"] = "7b"
    """The model: Qwen2.5-7B or the toy model."""
    model_config: Path | None = None
    """A Hugging Face config.json of another model."""
    rows: int = 16
    """Sequences per micro-batch over all devices; half as many pairs."""
    num_micro_batches: int = 4
    """Micro-batches per update."""
    max_prompt_length: int = 512
    """In tokens."""
    max_completion_length: int = 1024
    """In tokens."""
    remat: Remat = "block"
    """Which activations the backward pass recomputes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights, gradients and optimizer moments are float32."""
    topology: str | None = None
    """Compile for a TPU topology such as v5p:2x2x2, with weights, moments and rows sharded over all its devices.
    Default: one device of this machine."""
    methods: tuple[Literal[METHODS], ...] = METHODS  # pyright: ignore[reportInvalidTypeForm]
    """Methods to compare."""

    def __post_init__(self):
        require_at_least(self, rows=2, num_micro_batches=1, max_prompt_length=1, max_completion_length=1)
        if self.rows % 2:
            raise ValueError(f"rows is {self.rows}; it must be even, because DPO has two sequences per pair")

    @property
    def shapes(self) -> UpdateShapes:
        """Model and batch in effect."""
        names = ("rows", "num_micro_batches", "max_prompt_length", "max_completion_length", "remat", "dtype")
        return UpdateShapes(hf_config=self.hf_config, **{name: getattr(self, name) for name in names})

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """Hugging Face config of the model in effect."""
        return MODELS[self.shape] if self.model_config is None else json.loads(self.model_config.read_text())

    @property
    def mesh(self) -> Mesh:
        """The devices to compile for, with everything sharded by fsdp."""
        if self.topology is None:
            return make_mesh(devices=jax.devices()[:1])
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the compiler runs without a TPU
        devices = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        return make_mesh(data=1, fsdp=len(devices), devices=devices)


def main(config: Config) -> None:
    memory = {}
    for name in config.methods:
        memory |= (step := update_memory(config.shapes, name, config.mesh))
        print(f"{name}: {step}", file=sys.stderr)  # compiling for another device takes minutes
    devices = config.mesh.devices
    result = {
        "bench": "memory",
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "parameters": size_of(param_shapes(from_hf_config(config.hf_config))),
        "tokens_at_once": config.rows * (config.max_prompt_length + config.max_completion_length),
        "dtype": config.dtype,
        **{name: asdict(step) for name, step in memory.items()},
    }
    for suffix in ("", WITH_REWARD_MODEL):
        grpo, ppo = memory.get(f"grpo{suffix}"), memory.get(f"ppo{suffix}")
        if grpo and ppo:
            result[f"grpo_of_ppo{suffix}"] = round(grpo.peak_bytes / ppo.peak_bytes, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
