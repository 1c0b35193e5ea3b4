"""Memory, traffic and compile time of a training step of GRPO, PPO, DPO and SFT by the compiler, without weights.

Compiles each update as a run does (mesh, attention kernel, rematerialization) at the shapes of a model with 7 billion
parameters, and reads the memory of state, batch, temporary arrays and further models. Prints one JSON line.

    python experiments/bench/memory.py --topology v5e:4x4 --dtype bfloat16 --rows 128 --num-micro-batches 2
    python experiments/bench/memory.py --topology v5e:4x4 --dtype bfloat16 --rows 256 --lora.rank 16 --methods grpo
    python experiments/bench/memory.py --topology h100:8 --dtype bfloat16 --rows 64 --num-micro-batches 4 --methods grpo
    python experiments/bench/memory.py --shape small                   # the toy model, by this device's compiler
    python experiments/bench/memory.py --model-config path/to/config.json    # any other model

With --topology no device is needed. The line then has for each program, by device: memory, matrix products, memory
traffic, bytes on the wire, the seconds that each takes at the device's published speed, and for GRPO the model FLOPs
utilization if they follow one another ("mfu_bound"): an upper bound for a step without overlap. The TPU compiler comes
with the extra "tpu", the CUDA compiler with "cuda".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.compare import WITH_REWARD_MODEL
from grpo_jax.config.run import require_at_least
from grpo_jax.config.speeds import capacity_of, rates_of
from grpo_jax.loop.benchmark import SHAPES
from grpo_jax.loop.command import run_command
from grpo_jax.loop.compiled_updates import Program, program_bytes
from grpo_jax.loop.kernel_work import kernel_flops, kernel_of
from grpo_jax.loop.roofline import measure
from grpo_jax.loop.topologies import topology_devices
from grpo_jax.loop.update_memory import METHODS, UpdateShapes, size_of, update_memory
from grpo_jax.models import LoRA, from_hf_config, param_shapes, training_flops
from grpo_jax.models.kernels import AttentionName
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
    num_layers: int | None = None
    """Number of layers, if not the model's."""
    rows: int = 16
    """Sequences per micro-batch over all devices; half as many pairs."""
    num_micro_batches: int = 4
    """Micro-batches per update."""
    max_prompt_length: int = 512
    """In tokens."""
    max_completion_length: int = 1024
    """In tokens."""
    remat: Remat = "block"
    """Activations in the backward pass, as in training."""
    attention: AttentionName = "auto"
    """Attention kernel, as in training."""
    scan_layers: bool | None = None
    """Loop over stacked layers. Default: as in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights and optimizer moments are float32."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are accumulated."""
    packing: Literal["auto", "shared", "separate", "none"] = "auto"
    """Layout of the completions of GRPO and PPO, as in training; all have the greatest length."""
    group_size: int = 8
    """Completions of each prompt, which packed rows may share."""
    lora: LoRA = LoRA()
    """LoRA adapters to train in place of the model."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory between updates."""
    topology: str | None = None
    """Compile for a TPU topology such as v5p:2x2x2, or for GPUs (h100:8). Default: devices of this machine."""
    fsdp: int | None = None
    """Devices of the topology that weights and moments are sharded over. Default: all that the others leave."""
    tensor: int = 1
    """Devices of the topology that heads and hidden units are sharded over."""
    context: int = 1
    """Devices of the topology that the tokens of each sequence are sharded over."""
    compiler_options: tuple[str, ...] = ()
    """Options of the compiler in addition to those of a run, such as exec_time_optimization_effort=-1."""
    methods: tuple[Literal[METHODS], ...] = METHODS  # pyright: ignore[reportInvalidTypeForm]
    """Methods to compare."""

    def __post_init__(self):
        require_at_least(self, rows=2, num_micro_batches=1, max_prompt_length=1, max_completion_length=1)
        require_at_least(self, num_layers=1, fsdp=1, tensor=1, context=1, group_size=1)
        if self.rows % 2:
            raise ValueError(f"rows is {self.rows}; it must be even, because DPO has two sequences per pair")
        for option in self.compiler_options:
            if "=" not in option:
                raise ValueError(f"compiler_options: {option!r} is not name=value")

    @property
    def shapes(self) -> UpdateShapes:
        """Model and batch in effect."""
        names = (
            *("rows", "num_micro_batches", "max_prompt_length", "max_completion_length", "remat", "dtype"),
            *("attention", "scan_layers", "gradient_dtype", "packing", "group_size", "lora", "offload_optimizer"),
        )
        return UpdateShapes(hf_config=self.hf_config, **{name: getattr(self, name) for name in names})

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """Hugging Face config of the model in effect."""
        config = MODELS[self.shape] if self.model_config is None else json.loads(self.model_config.read_text())
        return config if self.num_layers is None else {**config, "num_hidden_layers": self.num_layers}

    @property
    def mesh(self) -> Mesh:
        """The devices to compile for."""
        if self.topology is None:
            return make_mesh(data=1, fsdp=self.fsdp or 1, context=self.context, tensor=self.tensor)
        devices = topology_devices(self.topology)
        fsdp = len(devices) // (self.tensor * self.context) if self.fsdp is None else self.fsdp
        return make_mesh(fsdp=fsdp, context=self.context, tensor=self.tensor, devices=devices)

    @property
    def options(self) -> dict[str, Any] | None:
        """Compiler options in effect."""
        pairs = dict(option.split("=", 1) for option in self.compiler_options)
        return {name: float(x) if x.lstrip("-").replace(".", "").isdigit() else x for name, x in pairs.items()} or None


def describe(config: Config, mesh: Mesh, method: str, program: Program) -> dict[str, Any]:
    """A program's memory and work on one device, and how long it takes at the least.

    ``peak_bytes`` is the most that is in use at a time, ``device_bytes`` with what is lost between arrays, where the
    compiler counts it. A TPU's compiler refuses a program that does not fit.

    Args:
        config: model and batch.
        mesh: the devices.
        method: what is updated.
        program: the compiled update.
    """
    devices, decoder = list(mesh.devices.flat), from_hf_config(config.hf_config)
    rates, capacity = rates_of(devices), capacity_of(devices)
    text, analysis = program.compiled.as_text() or "", program.compiled.memory_analysis()
    fused = kernel_flops(
        kernel_of(config.attention, decoder, jnp.dtype(config.dtype), mesh),
        decoder,
        mesh,
        rows=program.rows,
        length=program.row_length,
        remat=config.remat,
        prompts_are_shared=program.prompts_are_shared,
    )
    measured = measure(program.compiled, devices[0].platform, more_flops=fused)
    assert analysis is not None
    result = {
        "method": method,
        "compile_seconds": round(program.seconds, 1),
        "row_length": program.row_length,
        "prompts_are_shared": program.prompts_are_shared,
        "argument_bytes": measured.arguments,
        "host_argument_bytes": analysis.host_argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "device_bytes": program_bytes(program.compiled),
        "peak_bytes": measured.peak,
        "hlo_lines": text.count("\n"),
        "flops": measured.flops,
        "memory_traffic_bytes": measured.traffic,
        "wire_bytes": measured.wire,
        "collective_bytes": measured.collectives,
    }
    if rates is None or capacity is None:
        return result
    seconds = measured.times(rates)
    result |= {"fits": measured.peak <= capacity, "seconds": seconds}
    if method == "grpo":
        lengths = config.max_prompt_length, config.max_completion_length
        prompts, completions = (np.full(config.rows * config.num_micro_batches, n) for n in lengths)
        shared_by = config.group_size if program.prompts_are_shared else 1
        ideal = training_flops(decoder, prompts, completions, group_size=shared_by, lora=config.lora)
        ideal /= mesh.size * rates.compute
        result["mfu_bound"] = round(ideal / sum(seconds.values()), 3)
    return result


def main(config: Config) -> None:
    if config.lora.is_used and "ppo" in config.methods:
        raise ValueError("methods has ppo, whose critic has no adapters; with lora.rank, name grpo, dpo or sft")
    memory, programs, mesh = {}, [], config.mesh
    for name in config.methods:
        found: list[Program] = []
        memory |= (
            step := update_memory(config.shapes, name, mesh, more_options=config.options, on_program=found.append)
        )
        print(f"{name}: {step}", file=sys.stderr)  # compiling for another device takes minutes
        programs += [describe(config, mesh, name, program) for program in found]
    result = {
        "bench": "memory",
        "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "parameters": size_of(param_shapes(from_hf_config(config.hf_config))),
        "tokens_at_once": config.rows * (config.max_prompt_length + config.max_completion_length),
        "dtype": config.dtype,
        **{name: asdict(step) for name, step in memory.items()},
    }
    for suffix in ("", WITH_REWARD_MODEL):
        grpo, ppo = memory.get(f"grpo{suffix}"), memory.get(f"ppo{suffix}")
        if grpo and ppo:
            result[f"grpo_of_ppo{suffix}"] = round(grpo.peak_bytes / ppo.peak_bytes, 3)
    print(json.dumps(result | {"programs": programs}))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))
