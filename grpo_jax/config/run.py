"""Settings of every run: folder, seed, checkpoints, trackers, devices; and named presets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import jax
import tyro
from jax.sharding import Mesh

from grpo_jax.heartbeat import CONNECTION_TIMEOUT, SILENCE, connect
from grpo_jax.hosts import TIMEOUT
from grpo_jax.sharding import AXES, make_mesh, num_row_shards, row_axes

AnyConfig = TypeVar("AnyConfig", bound=Any)
LAYOUT_FIELDS = (
    *("run_dir", "mesh", "remat", "attention", "trackers", "plain", "save_every", "keep_checkpoints"),
    *("save_minutes", "distributed"),
)
"""Fields of every run that may change on resume: they affect results by rounding at most."""

Export = Literal["last", "best"]
"""The checkpoint that is exported: the last step, or the step with the best held-out evaluation."""


@dataclass(frozen=True)
class Preset(Generic[AnyConfig]):
    """A named, complete configuration.

    Attributes:
        config: makes the settings: a preset that is not used is not checked.
        summary: one line for ``--help``.
        paper: what it reproduces.
        hardware: what it is meant to run on.
        memory: device memory; says how it was obtained.
        cost: wall time; says how it was obtained.
        score: the expected result; says whether it was measured here or is published.
    """

    config: Callable[[], AnyConfig]
    summary: str
    paper: str = ""
    hardware: str = ""
    memory: str = ""
    cost: str = ""
    score: str = ""


def require_at_least(config: Any, **least: int) -> None:
    """Check lower bounds of fields; fields that are None are skipped.

    Args:
        config: any object with these attributes.
        least: the smallest allowed value of each field.

    Raises:
        ValueError: a value is below its bound.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}; it must be at least {smallest}")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts. On TPU pods, SLURM and Open MPI, ``auto`` is enough."""

    auto: bool = False
    """Find the other processes by what the cluster says: a TPU pod, SLURM or Open MPI 4."""
    coordinator: str | None = None
    """Address of the first process, host:port, where the cluster does not say."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    connection_timeout: int = CONNECTION_TIMEOUT
    """Seconds in which all processes must have been started."""
    timeout: int = int(TIMEOUT)
    """Seconds that processes wait for each other; six times as many for scores and reports."""
    silence: int = int(SILENCE)
    """Seconds without a sign of life after which a process counts as lost, and the others end."""

    @property
    def is_used(self) -> bool:
        """Whether there are several processes to connect."""
        return self.auto or self.coordinator is not None

    def connect(self) -> None:
        """Connect with the other processes, if there are some to connect with; again, it does nothing."""
        if self.is_used:
            connect(
                self.coordinator,
                self.num_processes,
                self.process_id,
                timeout=self.timeout,
                connection_timeout=self.connection_timeout,
                silence=self.silence,
            )

    def __post_init__(self):
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise ValueError("coordinator, num_processes and process_id belong together; set all three")
        require_at_least(self, num_processes=1, process_id=0, connection_timeout=1, timeout=1, silence=5)
        if self.process_id is not None and self.process_id >= (self.num_processes or 0):
            raise ValueError(f"process_id is {self.process_id}; it must be below num_processes = {self.num_processes}")
        if self.auto and self.coordinator is not None:
            raise ValueError("auto is set, and so is coordinator; set one of them")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, checkpoints and logs.

    Attributes:
        RESUMABLE_FIELDS: fields that may change on resume, as ``LAYOUT_FIELDS`` may: they do not change results.
        EXTENDABLE_FIELDS: fields with which a finished run continues when they change.
        COMMON_FLAGS: the flags that ``--help`` explains.
    """

    RESUMABLE_FIELDS: ClassVar[tuple[str, ...]] = ()
    EXTENDABLE_FIELDS: ClassVar[tuple[str, ...]] = ()
    COMMON_FLAGS: ClassVar[str] = ""

    run_dir: Path
    """Folder of the run: logs, checkpoints, curves, the trained model."""
    seed: int = 0
    """Seed of data order, initialization and sampling."""
    save_every: int = 10
    """Steps between checkpoints."""
    save_minutes: Annotated[float | None, tyro.conf.Suppress] = None
    """Minutes between checkpoints, in addition to those of save_every; 0 for one after every step. Default: none."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to log to, in addition to the run folder."""
    plain: bool = False
    """Print plain lines instead of the live view."""
    distributed: Annotated[DistributedConfig, tyro.conf.Suppress] = DistributedConfig()
    """Several hosts."""

    def __post_init__(self):
        require_at_least(self, seed=0, save_every=1, save_minutes=0, keep_checkpoints=1)
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.run_dir)):  # a Path has one of the two slashes
            raise ValueError(
                f"run_dir is {self.run_dir}, an address; it must be a folder: mount the bucket (gcsfuse, Filestore, "
                "FSx) and name the folder where it is mounted"
            )

    @property
    def resumable_fields(self) -> tuple[str, ...]:
        """All fields that may change on resume."""
        return (*LAYOUT_FIELDS, *self.RESUMABLE_FIELDS, *self.extendable_fields)

    @property
    def extendable_fields(self) -> tuple[str, ...]:
        """Fields with which a finished run continues when they change."""
        return self.EXTENDABLE_FIELDS


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. The batch is split over data x fsdp x expert."""

    data: int = -1
    """Data-parallel replicas; -1 uses all devices that the other axes leave."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are sharded over."""
    tensor: int = 1
    """Devices that attention heads and hidden units are sharded over."""
    expert: Annotated[int, tyro.conf.Suppress] = 1
    """Devices that a model's experts are sharded over in training, and other parameters as over fsdp. The sampler has
    them as replicas, and shards experts over rollout_tensor."""
    context: Annotated[int, tyro.conf.Suppress] = 1
    """Devices that the tokens of each sequence are sharded over in training, and parameters as over fsdp: for sequences
    that are too long for one device. The sampler has them as replicas."""
    rollout_tensor: Annotated[int | None, tyro.conf.Suppress] = None
    """Devices that the sampler's weights are sharded over, a multiple of tensor that divides fsdp x expert x context x
    tensor. Default: of those that fit beside the state of training, the fastest by the devices' published speeds; on a
    CPU, tensor."""

    def build(self) -> Mesh:
        """The mesh.

        Raises:
            ValueError: the axes do not fit the number of devices, or leave out some of several hosts.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        mesh = make_mesh(**sizes)
        if jax.process_count() > 1 and mesh.size != jax.device_count():
            raise ValueError(
                f"{' x '.join(f'mesh.{name}' for name in AXES)} is {mesh.size}; on several hosts it must be all "
                f"{jax.device_count()} devices"
            )
        return mesh

    def check_divides(self, count: int, name: str) -> None:
        """Check that rows divide evenly over the devices that share a batch.

        Args:
            count: number of rows.
            name: the rows' name or setting, for the error.

        Raises:
            ValueError: they do not, or as ``build``.
        """
        check_divides(count, self.build(), name)


def check_divides(count: int, mesh: Mesh, name: str) -> None:
    """As ``MeshConfig.check_divides``, over a given mesh.

    Args:
        count: number of rows.
        mesh: the mesh.
        name: the rows' name or setting, for the error.
    """
    parts = num_row_shards(mesh)
    if count % parts:
        raise ValueError(f"{name}: {count} do not divide over mesh {row_axes(mesh)} = {parts} devices")
