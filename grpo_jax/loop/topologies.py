"""Devices that programs can be compiled for without having them."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

TPUS = {"v4": "2x2x4", "v5e": "4x4", "v5p": "2x2x4", "v6e": "4x4"}
"""An example of a slice of each kind."""
HOPPER = {
    "core_count": 132,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "l2_cache_size": 52_428_800,
    "clock_rate_ghz": 1.98,
}
GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "generation": 8,
        "memory_bandwidth": 2_039_000_000_000,
        "device_memory_size": 85_198_045_184,
        "core_count": 108,
        "shared_memory_per_core": 167_936,
        "shared_memory_per_block_optin": 166_912,
        "l2_cache_size": 41_943_040,
        "clock_rate_ghz": 1.41,
    },
    "h100": HOPPER
    | {
        "name": "NVIDIA H100 80GB HBM3",
        "generation": 9,
        "memory_bandwidth": 3_352_320_000_000,
        "device_memory_size": 84_929_347_584,
    },
    "h200": HOPPER
    | {
        "name": "NVIDIA H200",
        "generation": 9,
        "memory_bandwidth": 4_800_000_000_000,
        "device_memory_size": 150_754_820_096,
    },
}
"""The GPUs that ``--topology`` names, with the fields of ``TARGET``."""
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {generation} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
KINDS = f"{', '.join(map(':'.join, TPUS.items()))} (the chips along each axis), {', '.join(GPUS)} as in h100:8 or \
h100:2x8 (hosts x GPUs), and cpu:N"


LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment with which the TPU's compiler neither looks for a TPU, nor warns that there is none, nor locks it."""


def topology_devices(name: str) -> list[Any]:
    """Devices to compile for that need not be there.

    Args:
        name: a TPU topology such as ``v5p:2x2x2``; ``h100:8``, or ``h100:2x8`` for two hosts of eight; ``cpu:N`` for
            this machine's, which are there.

    Raises:
        ValueError: there is no such topology, or its compiler is not installed.
    """
    kind, _, size = name.partition(":")
    is_gpu = kind in GPUS
    if kind not in (*TPUS, *GPUS, "cpu") or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise ValueError(f"topology is {name}: it must be one of {KINDS}")
    if kind in TPUS and size.count("x") != TPUS[kind].count("x"):
        axes = 1 + TPUS[kind].count("x")
        raise ValueError(f"topology is {name}: a slice of {kind} has {axes} axes, as in {kind}:{TPUS[kind]}")
    if kind == "cpu":
        found = jax.devices("cpu")
        if not size.isdigit() or int(size) > len(found):
            raise ValueError(f"topology is {name}: this machine has {len(found)} CPU devices")
        return found[: int(size)]
    installed = ("jax_cuda13_plugin", "jax_cuda12_plugin") if is_gpu else ("libtpu",)
    if not any(map(find_spec, installed)):
        extra = "cuda13" if is_gpu else "tpu"
        raise ValueError(f"topology is {name}: its compiler is not installed: pip install 'grpo_jax[{extra}]'")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        if not is_gpu:
            # As they run: the two cores of a chip are one device, which is the default only from v5p on.
            form = {"chip_config_name": "megacore"} if kind == "v4" else {}
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **form).devices)
        hosts, _, gpus = size.rpartition("x")
        if not (hosts or "1").isdigit():
            raise ValueError("a GPU topology is the number of GPUs, or hosts x GPUs")
        fpus = 64 if GPUS[kind]["generation"] == 8 else 128
        target = TARGET.format(**GPUS[kind], fpus_per_core=fpus)
        form = f"1x{hosts or 1}x{gpus}"
        return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=form).devices)
    except Exception as error:  # the compilers' own classes
        example = f" (as in {kind}:{TPUS[kind]})" if kind in TPUS else ""
        raise ValueError(f"topology is {name}: {str(error).splitlines()[0]}{example}") from error
