"""Published speeds of devices, and those of the devices of a run: products, memory, and what they send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_jax.monitor.devices import peak_flops


class Speed(NamedTuple):
    """Published figures of a device, which do not depend on the others.

    Attributes:
        memory: bytes/s of its main memory.
        link: bytes/s that it sends over one link of a torus, or to a switch.
        capacity: bytes of its main memory.
        dimensions: axes of the torus, each with two links of every device; 0 for a switch.
        network: bytes/s that it sends to other hosts, where these are not on the same links; None if they are.
    """

    memory: float
    link: float
    capacity: float
    dimensions: int = 0
    network: float | None = None


SPEEDS = {
    "TPU v4": Speed(1228e9, 45e9, 32e9, 3),
    "TPU v5 lite": Speed(819e9, 45e9, 16e9, 2),
    "TPU v5": Speed(2765e9, 90e9, 95e9, 3),
    "TPU v6 lite": Speed(1640e9, 90e9, 32e9, 2),
    "NVIDIA A100-SXM4-80GB": Speed(2039e9, 300e9, 80e9, network=25e9),
    "NVIDIA H100 80GB HBM3": Speed(3352e9, 450e9, 80e9, network=50e9),
    "NVIDIA H200": Speed(4800e9, 450e9, 141e9, network=50e9),
}
"""By ``device_kind``. TPUs: links in one direction. GPUs: NVLink within a host, and an InfiniBand port of 200 (A100) or
400 Gbit/s for each GPU between hosts."""

LATENCY = {"link": 1e-6, "switch": 3e-6, "network": 12.5e-6}
"""Seconds of a step of a collective, whatever its size. ``link``: a hop of a TPU's torus, as in "How to Scale Your
Model" (https://jax-ml.github.io/scaling-book/sharding), where one of 3 hops took 8e-6 in practice. ``switch`` and
``network``: half of an all-reduce of a few bytes, of 6e-6 on two H100 by NVLink
(https://github.com/NVIDIA/nccl/issues/1259) and of 25e-6 on several hosts (https://github.com/NVIDIA/nccl/issues/1453).
"""


class Rates(NamedTuple):
    """Work that a device does in a second.

    Attributes:
        compute: dense bfloat16 FLOP.
        memory: bytes of its main memory.
        wire: bytes that it sends.
        latency: seconds of a step of a collective, whatever its size.
        dimensions: as in ``Speed``.
        link: bytes that it sends over one link of a torus, or to a switch; 0 if unknown.
    """

    compute: float
    memory: float
    wire: float
    latency: float = 0.0
    dimensions: int = 0
    link: float = 0.0

    def latency_of(self, kind: str, devices: int) -> float:
        """Seconds of a collective operation of a few bytes.

        A torus of ``d`` axes takes ``d (devices^(1/d) - 1)`` hops, a switch one; a sum that all keep takes twice as
        many.

        Args:
            kind: as in HLO, such as ``all-reduce``.
            devices: that take part.
        """
        steps = float(devices > 1)
        if self.dimensions and kind != "collective-permute":
            steps = self.dimensions * (devices ** (1 / self.dimensions) - 1)
        return self.latency * steps * (2 if kind == "all-reduce" else 1)


def rates_of(devices: Sequence[Any]) -> Rates | None:
    """Published speeds of devices that compute together; None if they are unknown, as of a CPU.

    Of a TPU slice, those of a device in a corner, whose links are the fewest. Over several hosts of GPUs, everything is
    counted as sent over the network, which is slower than their links.

    Args:
        devices: of one kind.
    """
    kind = devices[0].device_kind
    peak, speed = peak_flops(kind), SPEEDS.get(kind)
    if peak is None or speed is None:
        return None
    if speed.dimensions:
        links = fewest_links([device.coords for device in devices], speed.dimensions)
        return Rates(peak, speed.memory, links * speed.link, LATENCY["link"], speed.dimensions, speed.link)
    is_networked = speed.network is not None and len({device.process_index for device in devices}) > 1
    wire = (speed.network or 0.0) if is_networked else speed.link
    return Rates(peak, speed.memory, wire, LATENCY["network" if is_networked else "switch"], link=speed.link)


def fewest_links(places: Sequence[Sequence[int]], dimensions: int) -> int:
    """Links of a device in a corner of a TPU slice to others of it; at least 1.

    An axis is closed to a ring, with two links for all, if it is 16 long (v5e, v6e), or if all axes are multiples of 4
    (v4, v5p), as ``https://jax-ml.github.io/scaling-book/tpus`` says.

    Args:
        places: coordinates of each device.
        dimensions: axes of the torus.
    """
    extents = [len(set(along)) for along in zip(*places, strict=True)]
    is_whole = dimensions > 2 and all(extent % 4 == 0 for extent in extents)
    is_closed = [is_whole or (dimensions == 2 and extent == 16) for extent in extents]
    return max(1, sum((extent > 1) + closes for extent, closes in zip(extents, is_closed, strict=True)))


def capacity_of(devices: Sequence[Any]) -> int | None:
    """Memory of a device in bytes; None if it is unknown.

    Args:
        devices: of one kind.
    """
    speed = SPEEDS.get(devices[0].device_kind)
    return None if speed is None else int(speed.capacity)
