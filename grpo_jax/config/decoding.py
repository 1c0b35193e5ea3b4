"""Time of decoding by arithmetic, by which the sampler's weights are sharded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from grpo_jax.config.speeds import LATENCY, Rates
from grpo_jax.devices import all_devices
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.kv_cache import ring_columns
from grpo_jax.models.sizes import expert_size


@dataclass(frozen=True)
class Decoding:
    """The decode steps of a run.

    Attributes:
        decoder: sizes of the model.
        rows: completions of a step.
        columns: of a row in the KV cache, summed over layers: its completion, and its part of the prompt of a group.
        itemsize: bytes of a number in the precision of the computation.
        cache_itemsize: bytes of a number in the KV cache.
        cache_limit: bytes of the KV cache on a device.
        devices: all that sample.
        near: of them, those that no network separates.
        rates: of a device.
    """

    decoder: DecoderConfig
    rows: int
    columns: float | int
    itemsize: int
    cache_itemsize: int
    cache_limit: float | int
    devices: int
    near: int
    rates: Rates

    def cache_on(self, tensor: int) -> float:
        """Bytes of the KV cache of all rows on a device.

        Args:
            tensor: devices that heads are sharded over; over more than there are, KV heads are repeated.
        """
        decoder, rows = self.decoder, self.rows * tensor / self.devices
        if decoder.latent is not None:  # one head, which is not sharded
            numbers = decoder.latent.rank + decoder.latent.rope_dim
        else:
            numbers = 2 * -(-decoder.num_kv_heads // tensor) * decoder.head_dim
        states = decoder.state_bytes(self.itemsize) / tensor
        return rows * (numbers * self.columns * self.cache_itemsize + states)

    def seconds(self, tensor: int, weights: float | int) -> float:
        """Seconds of a decode step of all rows.

        Weights and half of the KV cache are read while products are computed; then the states of rows are summed over
        ``tensor`` devices, twice a layer. Rows whose cache exceeds the limit come in several batches, each of which
        reads the weights. Of the experts, a TPU reads those that rows are sent to, at most as many as there are
        choices, and a GPU all (``models.expert_groups``); products are those of the experts that a row is sent to.

        Args:
            tensor: devices that weights and heads are sharded over.
            weights: bytes of the weights on each of them.
        """
        decoder, rates = self.decoder, self.rates
        rows, cache = self.rows * tensor / self.devices, self.cache_on(tensor)
        batches = max(1, math.ceil(cache / self.cache_limit))
        idle, unread = self.unused(tensor, rows / batches)
        products = 2 * (weights - idle) / self.itemsize * rows / rates.compute
        step = max(products, (batches * (weights - unread) + cache / 2) / rates.memory)
        sums = 2 * decoder.num_layers + 1  # and of the embedding
        sent = 2 * sums * rows * decoder.hidden_size * self.itemsize * (tensor - 1) / tensor
        if rates.dimensions:  # neighbours use two of a torus' links
            wire, of_sum = min(rates.wire, 2 * rates.link), rates
        elif tensor <= self.near:
            wire, of_sum = rates.link, rates._replace(latency=LATENCY["switch"])
        else:
            wire, of_sum = rates.wire, rates
        return step + sent / wire + batches * sums * of_sum.latency_of("all-reduce", tensor)

    def unused(self, tensor: int, rows: float | int) -> tuple[float, float]:
        """Bytes of a device's experts that a row is not multiplied with on average, and of those that are not read.

        Args:
            tensor: devices that experts are sharded over.
            rows: of a batch, on these devices.
        """
        e = self.decoder.experts
        if e is None:
            return 0.0, 0.0
        size = self.decoder.num_sparse() * e.count * expert_size(self.decoder) * self.itemsize / tensor
        read = min(1.0, max(1.0, rows) * e.per_token / e.count) if self.rates.dimensions else 1.0
        return size * (1 - e.per_token / e.count), size * (1 - read)


def decoding_of(config: Any, decoder: DecoderConfig, *, limit: float | int, share: float, rates: Rates) -> Decoding:
    """The decode steps of a run that samples, on its devices.

    Args:
        config: of the run.
        decoder: sizes of the model.
        limit: memory of a device, in bytes.
        share: of it that the KV cache has by default.
        rates: of a device.
    """
    from grpo_jax.rollout.buckets import chunk_lengths  # late, since the whole sampler comes with it

    devices, dtype, size = all_devices(), jnp.dtype(config.compute_dtype), config.mesh.build().size
    near = sum(device.process_index == devices[0].process_index for device in devices)
    return Decoding(
        decoder=decoder,
        rows=config.num_completions,
        columns=sum(
            sum(ring_columns(window, length) for length in chunk_lengths(config.completion_length))
            + ring_columns(window, config.prompt_length) / config.group_size
            for window in (kind.window for kind in decoder.kinds if kind.mixer == "attention")
        ),
        itemsize=dtype.itemsize,
        cache_itemsize=jnp.dtype(config.cache_dtype or dtype).itemsize,
        cache_limit=share * limit if config.cache_bytes is None else config.cache_bytes / size,
        devices=size,
        near=size if rates.dimensions else near,
        rates=rates,
    )
