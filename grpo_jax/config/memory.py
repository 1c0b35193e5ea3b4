"""Whether a run fits its devices, and how many tokens an update takes at once: reckoned from the model's sizes."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from grpo_jax.config.decoding import Decoding, decoding_of
from grpo_jax.config.speeds import rates_of
from grpo_jax.devices import all_devices, device_bytes, first_device, planned
from grpo_jax.hosts import gather
from grpo_jax.log_probs import CHUNK_SIZE
from grpo_jax.sharding import (
    PARAM_RULES,
    ROLLOUT_RULES,
    divisors,
    fitted_spec,
    num_row_shards,
    num_shards,
    params_by_name,
)

if TYPE_CHECKING:
    from grpo_jax.models.config import DecoderConfig

MICRO_BATCH_TOKENS = 16_384
"""Tokens of a micro-batch on a device whose memory is unknown, such as a CPU."""
USABLE = 0.9
"""Share of a device's memory that is planned for; the rest is lost between arrays."""
CACHE = 0.2
"""Share that the KV cache has by default (``rollout.buckets.default_cache_bytes``)."""
QUANTIZED_BYTES = {"int8": 1, "int4": 0.5, "nf4": 0.5}
"""Of a frozen weight, without its scale."""
LANES = 128
"""Columns of a tile of a TPU."""
Axes = Mapping[str, int]
"""Sizes of a mesh's axes."""


@dataclass(frozen=True)
class Reckoning:
    """Memory of training in bytes, before it is divided by axes of the mesh.

    Attributes:
        state: weights (float32; with LoRA adapters, frozen ones in the precision of the computation), optimizer state
            and the reference policy, without what is offloaded.
        update: beside the state, in an update: gradients, summed and of a micro-batch; weights in the precision of the
            computation, stacked; logits. Offloaded optimizer state comes when these have gone.
        rollout: the sampler's weights.
        token: an update's activations for each token.
        rollout_is_shared: whether the sampler uses the weights that are trained if they lie as it needs them.
        matrices: path within a layer and shape of each of the model's matrices, whose sizes axes may not divide, and
            their number.
        experts: in an update, those of one layer, which only ``expert`` and ``tensor`` divide.
    """

    state: int
    update: int
    rollout: int
    token: int
    rollout_is_shared: bool
    matrices: Mapping[tuple[str, tuple[int, ...]], int]
    experts: int = 0

    def state_on(self, axes: Axes) -> int:
        """State on each device of a mesh."""
        return int(self.state * share_on(self.matrices, axes, PARAM_RULES))

    def rollout_on(self, axes: Axes, rollout_tensor: int) -> int:
        """The sampler's weights on each device, beside the state.

        Args:
            axes: sizes of the mesh's axes.
            rollout_tensor: devices that they are sharded over.
        """
        share = self.rollout_share(rollout_tensor)
        is_in_place = axes["fsdp"] * axes.get("expert", 1) == 1 and axes["tensor"] == rollout_tensor
        is_shared = self.rollout_is_shared and is_in_place and share == share_on(self.matrices, axes, PARAM_RULES)
        return 0 if is_shared else int(self.rollout * share)

    def rollout_share(self, rollout_tensor: int) -> float:
        """The part of the sampler's weights that each of ``rollout_tensor`` devices has."""
        return share_on(self.matrices, {"fsdp": 1, "tensor": rollout_tensor}, ROLLOUT_RULES)

    def tokens_on(self, axes: Axes, limit: int) -> int:
        """Tokens of a micro-batch that a device has memory for.

        Args:
            axes: sizes of the mesh's axes.
            limit: the device's memory, in bytes.
        """
        held = int((self.state + self.update) * share_on(self.matrices, axes, PARAM_RULES))
        held += self.experts // (axes.get("expert", 1) * axes["tensor"])
        return max(0, int(USABLE * limit) - held) // self.token


def reckon(config: Any, decoder: DecoderConfig, axes: Axes) -> Reckoning:
    """The memory of a run that trains a model.

    Args:
        config: of the run.
        decoder: sizes of the model.
        axes: sizes of the mesh's axes.
    """
    from grpo_jax.models import param_shapes  # late, since it imports flax
    from grpo_jax.models.kernels import hardware, resolve_attention
    from grpo_jax.models.memory import activation_bytes, experts_bytes

    optimizer, _ = config.optimizer.build(total_updates=1)
    shapes, dtype = param_shapes(decoder), config.compute_dtype
    count, itemsize = sum(leaf.size for leaf in jax.tree.leaves(shapes)), jnp.dtype(dtype).itemsize
    moments = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
    has_adapters, trained, rollout = config.lora.is_used, count, itemsize * count
    if has_adapters:
        trained = config.lora.size(decoder)
        adapted = [config.lora.matrices(decoder, kind).values() for kind in decoder.kinds]
        quantized = sum(inputs * outputs for of_layer in adapted for inputs, outputs in of_layer)
        rollout -= int(quantized * (itemsize - QUANTIZED_BYTES.get(config.lora.quantize, itemsize)))
    # The rest is frozen, as the sampler and the reference compute with it.
    frozen = rollout if has_adapters else 0
    of_moments = sum(leaf.size * leaf.dtype.itemsize for leaf in moments) / count
    # PPO's own critic is trained as a whole.
    all_trained = trained + (config.trained_models - 1) * count
    most_trained = max(trained, count if config.trained_models > 1 else 0)
    state = 4 * all_trained + frozen
    update = jnp.dtype(config.optimizer.gradient_dtype).itemsize * most_trained + 12 * CHUNK_SIZE * decoder.vocab_size
    if most_trained == count:
        update += (1 + (itemsize < 4)) * itemsize * count
    elif _param_shards(axes) > 1:  # only there are layers with adapters stacked
        update += frozen
    if "optimizer" not in config.offload:
        state += int(of_moments * all_trained)
    if config.has_reference and "reference" not in config.offload:
        state += itemsize * trained
    kind = hardware(first_device())
    attention = resolve_attention(config.attention, decoder, dtype, kind)
    return Reckoning(
        state=state,
        update=update,
        rollout=rollout,
        token=activation_bytes(
            decoder,
            length=config.sequence_length,
            itemsize=itemsize,
            remat=config.remat,
            fused_attention=attention in ("cudnn", "splash"),
            tensor=axes["tensor"],
            expert=axes.get("expert", 1),
        ),
        rollout_is_shared=itemsize == 4 or has_adapters,
        matrices=_matrices(shapes),
        experts=experts_bytes(decoder, itemsize),
    )


def share_on(matrices: Mapping[tuple[str, tuple[int, ...]], int], axes: Axes, rules: Any) -> float:
    """The part of a model's matrices that each device of a mesh has.

    Args:
        matrices: as in ``Reckoning``.
        axes: sizes of the mesh's axes.
        rules: as in ``sharding.param_shardings``.
    """
    whole = on_device = 0.0
    for (name, shape), count in matrices.items():
        size = count * math.prod(shape)
        whole += size
        on_device += size / num_shards(fitted_spec(name, shape, axes, rules), axes)
    return on_device / whole


def _matrices(shapes: Any) -> Mapping[tuple[str, tuple[int, ...]], int]:
    found = params_by_name(shapes)
    return Counter(
        (re.sub(r"^layers_\d+/", "", name), shape) for name, shape in found if len(shape) > 1 and "bias" not in name
    )


def micro_batch_tokens(config: Any) -> int:
    """Tokens of a micro-batch on each device: ``MICRO_BATCH_TOKENS``, or by the memory of devices that report theirs.

    Args:
        config: of a run that trains a model.
    """
    limit = memory_limit()
    decoder = None if limit is None else config.decoder
    if limit is None or decoder is None:
        return MICRO_BATCH_TOKENS
    axes = config.mesh.build().shape
    return reckon(config, decoder, axes).tokens_on(axes, limit)


def memory_limit() -> int | None:
    """Memory of the smallest device of all processes, in bytes; None where devices do not report theirs (CPU)."""
    plan = planned()
    if plan is not None:
        return plan.memory
    limit = device_bytes(jax.local_devices())
    return limit if jax.process_count() == 1 else _smallest_of_all(limit)


@cache
def _smallest_of_all(limit: int | None) -> int | None:
    limits = gather(limit, "the memory of the devices")
    known = [each for each in limits if each is not None]
    return min(known) if len(known) == len(limits) else None


def fewest_micro_batches(config: Any, rows: int, *, sequences_per_row: int = 1) -> int:
    """The smallest number of equal micro-batches that keeps each within ``micro_batch_tokens`` per device.

    Args:
        config: of a run that trains a model.
        rows: of an update.
        sequences_per_row: 2 for pairs.
    """
    parts = config.mesh.build().shape
    devices = num_row_shards(parts)
    tokens = devices * parts["context"] * micro_batch_tokens(config)
    most = max(devices, tokens // (sequences_per_row * config.sequence_length))
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most and rows // n % devices == 0]
    return min(fitting, default=1)


def check_memory(config: Any) -> None:
    """Check that each device has memory for the state of a run and for the sampler's weights.

    Where devices do not report their memory, or the model's configuration cannot be read yet, nothing is checked.

    Args:
        config: of a run that trains a model.

    Raises:
        ValueError: it has not; the message has the numbers, and meshes of the same devices that would do.
    """
    limit = memory_limit()
    decoder = None if limit is None else config.decoder
    if limit is None or decoder is None:
        return
    mesh = config.mesh.build()
    need, axes = reckon(config, decoder, mesh.shape), mesh.shape
    if not config.has_sampler:
        need = replace(need, rollout=0)
    tensor = choose_rollout_tensor(config, decoder, axes)
    state, rollout = need.state_on(axes), need.rollout_on(axes, tensor)
    if state + rollout <= limit:
        return
    found = [
        f"--mesh.fsdp {other['fsdp']} --mesh.tensor {other['tensor']}"
        for other in _meshes(mesh.size, decoder)
        if need.state_on(other) + need.rollout_on(other, rollout_tensor(need, decoder, other, limit)) <= limit
    ]
    advice = f"of the meshes of these {mesh.size} devices, {found[0]} does" if found else "no mesh of them does"
    held = "weights, optimizer state and reference" if config.has_reference else "weights and optimizer state"
    sampler = f", and the sampler's weights {_gb(rollout)} (mesh.rollout_tensor {tensor})" if config.has_sampler else ""
    expert = f" x mesh.expert {axes['expert']}" * (axes["expert"] > 1)
    raise ValueError(
        f"{config.model} does not fit devices of {_gb(limit)}: {held} take {_gb(state)} on each (mesh.fsdp "
        f"{axes['fsdp']}{expert} x mesh.tensor {axes['tensor']}){sampler}; {advice}"
    )


def rollout_tensor(
    need: Reckoning, decoder: DecoderConfig, axes: Axes, limit: int, decoding: Decoding | None = None
) -> int:
    """Devices that the sampler's weights are sharded over: the fastest number that leaves room for state and KV cache.

    Without the speed of decoding, it is the fewest that leave room; so also if KV heads must be repeated for it.

    Args:
        need: memory of the run.
        decoder: sizes of the model; only numbers that divide its query heads and experts are chosen.
        axes: sizes of the mesh's axes.
        limit: memory of a device in bytes.
        decoding: steps of the run; None if their speed is unknown.
    """
    most = _param_shards(axes)
    sizes = [axes["tensor"] * n for n in divisors(most) if splits(decoder, axes["tensor"] * n)]

    def room_for_cache(n: int) -> float:
        # Twice, as it is copied when rows finish.
        return CACHE * limit if decoding is None else min(CACHE * limit, 2 * decoding.cache_on(n))

    state = need.state_on(axes)
    fitting = [n for n in sizes if state + need.rollout_on(axes, n) + room_for_cache(n) <= USABLE * limit]
    whole = [n for n in fitting if decoder.num_kv_heads % n == 0]
    if decoding is None or not whole:
        return min(fitting, default=max(sizes, default=axes["tensor"]))
    return min(whole, key=lambda n: (decoding.seconds(n, need.rollout * need.rollout_share(n)), n))


def _param_shards(axes: Axes) -> int:
    """Devices that parameters are sharded over in the way of ``fsdp``."""
    return axes["fsdp"] * axes.get("expert", 1) * axes.get("context", 1)


def splits(decoder: DecoderConfig, tensor: int) -> bool:
    """Whether query heads and experts divide over the devices of the axis ``tensor``.

    Args:
        decoder: sizes of the model.
        tensor: size of the axis.
    """
    return decoder.num_heads % tensor == 0 and (decoder.experts is None or decoder.experts.count % tensor == 0)


def choose_rollout_tensor(config: Any, decoder: DecoderConfig, axes: Axes) -> int:
    """``mesh.rollout_tensor`` of a run with a policy, or the default on its devices; the same on every process.

    Where devices do not report their memory (CPU), and for policies that are not trained, it is ``mesh.tensor``; where
    their speed is unknown, or if steps do not sample, the fewest that leave room.

    Args:
        config: of the run.
        decoder: sizes of the policy.
        axes: sizes of the mesh's axes.
    """
    wanted, limit = config.mesh.rollout_tensor, memory_limit()
    if wanted is not None or limit is None or not config.trained_models:
        return axes["tensor"] if wanted is None else wanted
    rates, decoding = rates_of(all_devices()), None
    if rates is not None and hasattr(config, "num_completions"):
        decoding = decoding_of(config, decoder, limit=limit, share=CACHE, rates=rates)
    need = reckon(config, decoder, axes)
    return rollout_tensor(need if config.has_sampler else replace(need, rollout=0), decoder, axes, limit, decoding)


def warn_of_narrow_shards(hidden_size: int, axes: Axes) -> None:
    """Warn of a mesh whose shards of weights are narrower than a TPU's tile.

    They are summed over all devices instead of gathered, by twice the traffic.

    Args:
        hidden_size: the model's width, which fsdp splits.
        axes: sizes of the mesh's axes.
    """
    fsdp, context = axes["fsdp"], axes.get("context", 1)
    width = hidden_size // (fsdp * context)
    if fsdp == 1 or width >= LANES:
        return
    most = max(n for n in divisors(fsdp) if n == 1 or hidden_size // (n * context) >= LANES)
    warnings.warn(
        f"mesh.fsdp {fsdp} leaves {width} of the model's {hidden_size} columns on a device, fewer than "
        f"the {LANES} of a tile, which doubles the traffic of weights on a TPU; --mesh.fsdp {most} --mesh.data "
        f"{axes['data'] * fsdp // most} does not",
        stacklevel=2,
    )


def _meshes(devices: int, decoder: DecoderConfig) -> Iterator[Axes]:
    """Meshes of some devices that divide the model, those with the smallest tensor and fsdp axes first."""
    for tensor in divisors(devices):
        for fsdp in divisors(devices // tensor):
            if decoder.num_kv_heads % tensor == decoder.hidden_size % fsdp == 0 and splits(decoder, tensor):
                yield {"data": devices // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
