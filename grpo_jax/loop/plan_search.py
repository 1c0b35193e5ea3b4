"""Meshes of a topology, ranked by arithmetic before any program is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.memory import LANES, USABLE, choose_rollout_tensor, reckon
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.loop.plan import check_layout
from grpo_jax.loop.planned_model import decoder_of, hf_config_of
from grpo_jax.loop.topologies import Rates
from grpo_jax.models import param_shapes, training_flops
from grpo_jax.models.config import DecoderConfig
from grpo_jax.sharding import divisors, param_shardings

NAMES = tuple(field.name for field in fields(MeshConfig))


class Estimate(NamedTuple):
    """A mesh with the seconds of a step by arithmetic, and whether the state and a row seem to fit."""

    mesh: MeshConfig
    seconds: float
    fits: bool


def read_meshes(texts: Sequence[str], num_devices: int) -> list[MeshConfig]:
    """Meshes such as ``fsdp=16`` or ``data=2,fsdp=4,tensor=2,rollout_tensor=4``.

    Args:
        texts: of the command line.
        num_devices: of the topology, all of which a mesh must use.

    Raises:
        ValueError: a text is not such a mesh.
    """
    meshes = []
    for text in texts:
        values = {name: value for name, _, value in (each.partition("=") for each in text.split(","))}
        unknown = [name for name in values if name.replace("-", "_") not in NAMES]
        if unknown or not all(value.isdigit() and int(value) for value in values.values()):
            raise ValueError(
                f"--meshes has {text}; a mesh is written as fsdp=4,tensor=2 with sizes of {', '.join(NAMES)}"
            )
        mesh = MeshConfig(**{name.replace("-", "_"): int(value) for name, value in values.items()})
        size = mesh.build().size
        if size != num_devices:
            raise ValueError(f"--meshes has {text}, which takes {size} of the {num_devices} devices of --topology")
        meshes.append(mesh)
    return meshes


def rank_meshes(config: Any, num_devices: int, *, limit: int | None, rates: Rates | None) -> list[Estimate]:
    """The meshes of some devices that suit the model and the batch: those that seem to fit first, fast ones first.

    Args:
        config: of the run.
        num_devices: of the topology.
        limit: bytes of a device's memory; None if unknown.
        rates: of a device; None if unknown.

    Raises:
        ValueError: there is none; the error is that of the last.
    """
    hf_config = hf_config_of(config)
    decoder = decoder_of(config, hf_config, scalar_head=isinstance(config, RewardModelConfig))
    shapes, found, problem = param_shapes(decoder), [], ""
    for tensor in divisors(num_devices):
        for fsdp in divisors(num_devices // tensor):
            mesh = MeshConfig(fsdp=fsdp, tensor=tensor)
            tried = replace(config, mesh=mesh)
            try:
                axes = mesh.build().shape
                param_shardings(shapes, mesh.build())
                if decoder.num_kv_heads % tensor:
                    raise ValueError(f"mesh.tensor is {tensor}; it must divide {decoder.num_kv_heads} KV heads")
                check_layout(tried)
                for sampling in _rollout_tensors(tried, decoder, fsdp, tensor):
                    tried = replace(config, mesh=replace(mesh, rollout_tensor=sampling))
                    found.append(_estimate(tried, decoder, axes, limit, rates))
            except ValueError as error:
                problem = str(error)
    if not found:
        raise ValueError(f"no mesh of {num_devices} devices suits the run: {problem}")
    return sorted(found, key=lambda each: (not each.fits, each.seconds))


def _rollout_tensors(config: Any, decoder: DecoderConfig, fsdp: int, tensor: int) -> list[int | None]:
    """Devices that the sampler's weights may be sharded over: the run's own choice may be slower than more of them."""
    if not isinstance(config, OnlineConfig):
        return [None]
    sizes = divisors(fsdp * tensor)
    return [n for n in sizes if n % tensor == 0 and decoder.num_kv_heads % n == 0]


def _estimate(config: Any, decoder: DecoderConfig, axes: Any, limit: int | None, rates: Rates | None) -> Estimate:
    """A step by arithmetic.

    Products at peak, weights gathered and gradients scattered for each micro-batch, activations summed over
    tensor-parallel devices, and weights and caches read for each decoded token.
    """
    rates = rates or Rates(1e14, 1e12, 1e11)
    need = reckon(config, decoder, axes)
    fsdp, tensor, n = axes["fsdp"], axes["tensor"], axes["data"] * axes["fsdp"] * axes["tensor"]
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    weights, length = need.rollout or itemsize * need.state // 16, config.sequence_length
    is_online = isinstance(config, OnlineConfig)
    rows = config.num_completions if is_online else config.num_rows * (2 if config.ROWS == "num_pairs" else 1)
    updates = config.updates_per_step if is_online else 1
    tokens = rows * length // (axes["data"] * fsdp)
    flops = training_flops(decoder, 0, np.full(rows, length)) / n * (4 / 3 if config.remat != "none" else 1)
    narrow = 2 if fsdp > 1 and decoder.hidden_size // fsdp < LANES else 1
    micro = config.micro_batches * updates
    wire = micro * narrow * 3 * weights / tensor * (fsdp > 1)
    wire += 2 * 4 * (weights / itemsize) / (fsdp * tensor) * (axes["data"] > 1) * updates
    wire += 2 * 6 * decoder.num_layers * tokens * decoder.hidden_size * itemsize * (tensor > 1)
    seconds = flops / rates.compute + wire / rates.wire
    held = need.state_on(axes)
    if is_online:
        sampling = choose_rollout_tensor(config, decoder, axes)
        cache = 2 * itemsize * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * rows * length / n
        seconds += config.completion_length * (need.rollout / sampling + cache / 2) / rates.memory
        rows_each = rows * sampling / n * (sampling > 1)  # whose states are summed over the devices
        moved = 4 * decoder.num_layers * rows_each * config.completion_length * decoder.hidden_size * itemsize
        seconds += moved / rates.wire
        held += need.rollout_on(axes, sampling)
    fits = limit is None or (held <= USABLE * limit and need.tokens_on(axes, limit) >= length)
    return Estimate(replace(config.mesh, data=axes["data"]), float(seconds), bool(fits))
