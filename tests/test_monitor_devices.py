"""Device memory and MFU, on devices that say which they are."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from grpo_jax.monitor.devices import device_metrics, peak_flops


class Device:
    def __init__(self, kind, stats):
        self.device_kind, self.process_index, self._stats = kind, 0, stats

    def memory_stats(self):
        return self._stats


def mesh_of(*devices):
    return Mesh(np.array([devices], object), ("data", "fsdp"))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3090", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_published_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_utilization_is_of_all_devices_and_memory_of_the_fullest():
    mesh = mesh_of(*(Device("TPU v4", {"peak_bytes_in_use": size, "bytes_in_use": 1}) for size in (5, 7)))
    assert device_metrics(mesh, flops=275e12, seconds=2.0) == {"peak_memory_bytes": 7, "mfu": pytest.approx(0.25)}
    assert "mfu" not in device_metrics(mesh, flops=0.0, seconds=2.0)


def test_metrics_that_a_device_cannot_give_are_absent():
    assert device_metrics(mesh_of(Device("NVIDIA X1", None)), flops=1e12, seconds=1.0) == {}
    half = mesh_of(Device("TPU v4", {"peak_bytes_in_use": 5}), Device("TPU v4", {}))
    assert list(device_metrics(half, flops=1e12, seconds=1.0)) == ["mfu"]
    cpu = Mesh(np.array(jax.devices("cpu")[:1]), ("data",))
    assert device_metrics(cpu, flops=1e12, seconds=1.0) == {}
