"""Metrics of the devices: memory, and model FLOPs utilization."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of a chip as its vendor publishes them, by ``device_kind`` (of a GPU, its first words)."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None if it is not in ``PEAK_FLOPS``.

    Args:
        device_kind: as reported by JAX, such as ``NVIDIA H100 80GB HBM3``.
    """
    if not device_kind.startswith("NVIDIA"):
        return PEAK_FLOPS.get(device_kind)
    # The memory's size may stand between the name and the form: NVIDIA H100 80GB PCIe.
    words = set(device_kind.replace("-", " ").split())
    fitting = [name for name in PEAK_FLOPS if set(name.split()) <= words]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def device_metrics(mesh: Mesh, *, flops: float, seconds: float) -> dict[str, float]:
    """Device memory and model FLOPs utilization (MFU) of training.

        mfu = flops / (seconds * number of devices * peak FLOP/s of a device)

    The peak is that of bfloat16, whatever the precision of the run.

    Args:
        mesh: the devices, all of one kind.
        flops: model FLOPs (``models.training_flops``) of the updates.
        seconds: wall time in which they were done.

    Returns:
        ``peak_memory_bytes``, the most memory in use on a device since the process started, if the devices report it
        (CPUs do not); ``mfu``, if ``flops`` is not 0 and the device is in ``PEAK_FLOPS``.
    """
    devices = mesh.devices.flatten().tolist()
    own = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in own]
    peak = peak_flops(devices[0].device_kind)
    metrics = {}
    if all("peak_bytes_in_use" in each for each in stats):
        metrics["peak_memory_bytes"] = float(max(each["peak_bytes_in_use"] for each in stats))
    if flops and peak is not None:
        metrics["mfu"] = flops / (seconds * len(devices) * peak)
    return metrics
