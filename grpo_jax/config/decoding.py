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
        """Bytes of the KV cache and the states of all rows on a device.

        Args:
            tensor: devices that heads are sharded over; over more than there are, KV heads are repeated.
        """
        decoder, rows = self.decoder, self.rows * tensor / self.devices
        numbers = 2 * -(-decoder.num_kv_heads // tensor) * decoder.head_dim
        states = decoder.state_bytes(self.itemsize) / tensor
        return rows * (numbers * self.columns * self.cache_itemsize + states)

    def seconds(self, tensor: int, weights: float | int) -> float:
        """Seconds of a decode step of all rows.

        Weights and half of the KV cache are read while products are computed; then the states of rows are summed over
        ``tensor`` devices, twice a layer. Rows whose cache exceeds the limit come in several batches, each of which
        reads the weights.

        Args:
            tensor: devices that weights and heads are sharded over.
            weights: bytes of the weights on each of them.
        """
        decoder, rates = self.decoder, self.rates
        rows, cache = self.rows * tensor / self.devices, self.cache_on(tensor)
        batches = max(1, math.ceil(cache / self.cache_limit))
        products = 2 * weights / self.itemsize * rows / rates.compute
        step = max(products, (batches * weights + cache / 2) / rates.memory)
        sums = 2 * decoder.num_layers + 1  # and of the embedding
        sent = 2 * sums * rows * decoder.hidden_size * self.itemsize * (tensor - 1) / tensor
        if rates.dimensions:  # neighbours use two of a torus' links
            wire, of_sum = min(rates.wire, 2 * rates.link), rates
        elif tensor <= self.near:
            wire, of_sum = rates.link, rates._replace(latency=LATENCY["switch"])
        else:
            wire, of_sum = rates.wire, rates
        return step + sent / wire + batches * sums * of_sum.latency_of("all-reduce", tensor)


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
