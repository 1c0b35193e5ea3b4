"""Meshes of a topology, ranked by arithmetic before any program is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.decoding import decoding_of
from grpo_jax.config.memory import CACHE, LANES, USABLE, choose_rollout_tensor, reckon, splits
from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.speeds import Rates
from grpo_jax.loop.plan import check_layout
from grpo_jax.loop.planned_model import decoder_of, hf_config_of
from grpo_jax.models import param_shapes, training_flops
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.mesh_checks import check_mesh
from grpo_jax.models.sizes import expert_size
from grpo_jax.sharding import divisors, num_row_shards, param_shardings

SHORTEST_PART = 2048
"""Tokens of a sequence that a device has at the least for a mesh with ``context`` to be a candidate."""
UNKNOWN = Rates(1e14, 1e12, 1e11, link=1e11)
"""Rates by which meshes are ranked where those of the devices are unknown."""
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
    for mesh in _meshes(num_devices, config.sequence_length, has_experts=decoder.experts is not None):
        tried = replace(config, mesh=mesh)
        try:
            axes = mesh.build().shape
            param_shardings(shapes, mesh.build())
            check_mesh(decoder, mesh.build())
            if decoder.num_kv_heads % mesh.tensor:
                raise ValueError(f"mesh.tensor is {mesh.tensor}; it must divide {decoder.num_kv_heads} KV heads")
            check_layout(tried)
            for may_repeat in (False, True):
                estimates = []
                for sampling in _rollout_tensors(tried, decoder, may_repeat=may_repeat):
                    sampled = replace(config, mesh=replace(mesh, rollout_tensor=sampling))
                    estimates.append(_estimate(sampled, decoder, axes, limit, rates or UNKNOWN))
                found += estimates
                if any(each.fits for each in estimates):
                    break
        except ValueError as error:
            problem = str(error)
    if not found:
        raise ValueError(f"no mesh of {num_devices} devices suits the run: {problem}")
    return sorted(found, key=lambda each: (not each.fits, each.seconds))


def _meshes(num_devices: int, length: int, *, has_experts: bool) -> Iterator[MeshConfig]:
    """Meshes of all devices; sequences are split as long as each device has ``SHORTEST_PART`` tokens of one."""
    for tensor in divisors(num_devices):
        for context in divisors(num_devices // tensor):
            if context > 1 and length // context < SHORTEST_PART:
                continue
            for expert in divisors(num_devices // (tensor * context)) if has_experts else (1,):
                for fsdp in divisors(num_devices // (tensor * context * expert)):
                    yield MeshConfig(fsdp=fsdp, expert=expert, context=context, tensor=tensor)


def _rollout_tensors(config: Any, decoder: DecoderConfig, *, may_repeat: bool) -> list[int | None]:
    """Devices that the sampler's weights may be sharded over: the run's own choice may not be the fastest.

    Args:
        config: of the run.
        decoder: sizes of the model.
        may_repeat: only numbers for which KV heads must be repeated, in the place of those that divide them.
    """
    if not isinstance(config, OnlineConfig):
        return [None] * (not may_repeat)
    mesh, devices = config.mesh, config.mesh.build().size
    sizes = [mesh.tensor * n for n in divisors(mesh.fsdp * mesh.expert * mesh.context)]
    sizes = [n for n in sizes if splits(decoder, n) and (decoder.num_kv_heads % n != 0) == may_repeat]
    fitting = [n for n in sizes if config.num_completions % (devices // n) == 0]
    if not fitting and not may_repeat:
        raise ValueError(f"{config.num_completions} completions do not divide over the sampler's {devices} devices")
    return [*fitting]


def _estimate(config: Any, decoder: DecoderConfig, axes: Any, limit: int | None, rates: Rates) -> Estimate:
    """A step by arithmetic.

    Products at peak; for each micro-batch, weights gathered and gradients scattered, and keys and values gathered over
    ``context``; tokens gathered over ``expert``, whose experts need not be; activations summed over tensor-parallel
    devices; and weights and caches read for each decoded token.
    """
    need = reckon(config, decoder, axes)
    fsdp, expert, context, tensor = (axes[name] for name in ("fsdp", "expert", "context", "tensor"))
    shards = fsdp * expert * context
    n = axes["data"] * shards * tensor
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    weights, length = need.rollout or itemsize * need.state // 16, config.sequence_length
    is_online = isinstance(config, OnlineConfig)
    rows = config.num_completions if is_online else config.num_rows * (2 if config.ROWS == "num_pairs" else 1)
    updates = config.updates_per_step if is_online else 1
    tokens = rows * length // num_row_shards(axes)  # of a device and of those that share its rows
    flops = training_flops(decoder, 0, np.full(rows, length)) / n * (4 / 3 if config.remat != "none" else 1)
    narrow = 2 if shards > 1 and decoder.hidden_size // shards < LANES else 1
    micro = config.micro_batches * updates
    experts = itemsize * decoder.num_sparse() * expert_size(decoder) * (decoder.experts.count if decoder.experts else 0)
    wire = micro * narrow * 3 * (weights - experts) / tensor * (shards > 1)
    wire += micro * 3 * experts / (expert * tensor) * (fsdp * context > 1)
    sent = tokens / context * decoder.hidden_size * itemsize * (expert - 1)
    wire += 6 * decoder.num_sparse() * sent  # gathered and summed, each forward, again and backward
    wire += 2 * 4 * (weights / itemsize) / (shards * tensor) * (axes["data"] > 1) * updates
    wire += 2 * 6 * decoder.num_layers * tokens / context * decoder.hidden_size * itemsize * (tensor > 1)
    kv_size = 2 * decoder.num_kv_heads * decoder.head_dim * itemsize / tensor
    wire += 3 * decoder.num_attention_layers * tokens * kv_size * (context > 1)  # forward, again, and their gradients
    seconds = flops / rates.compute + wire / rates.wire
    held = need.state_on(axes)
    if is_online:
        sampling = choose_rollout_tensor(config, decoder, axes)
        memory = float("inf") if limit is None else limit
        decoding = decoding_of(config, decoder, limit=memory, share=CACHE, rates=rates)
        step = decoding.seconds(sampling, need.rollout * need.rollout_share(sampling))
        seconds += config.completion_length * step
        held += need.rollout_on(axes, sampling)
    fits = limit is None or (held <= USABLE * limit and need.tokens_on(axes, limit) >= length / context)
    return Estimate(replace(config.mesh, data=axes["data"]), float(seconds), bool(fits))
