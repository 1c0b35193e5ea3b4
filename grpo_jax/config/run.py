"""Settings of every run: folder, seed, checkpoints, trackers, devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from grpo_jax.sharding import make_mesh

LAYOUT_FIELDS = ("run_dir", "mesh", "remat", "attention", "trackers", "plain", "save_every", "keep_checkpoints")
"""Settings that a resumed run may have other values of in every experiment: they change no number beyond rounding."""

Export = Literal["last", "best"]
"""Which of a run's models is exported: that of its last step, or that of its best held-out evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lies and what it leaves."""

    run_dir: Path
    """The run's own folder: logs, checkpoints, curves, the trained model."""
    seed: int = 0
    """Of everything that is drawn."""
    save_every: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest stay."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides the run's folder."""
    plain: bool = False
    """Print plain lines even on a terminal."""

    def __post_init__(self):
        require_at_least(self, seed=0, save_every=1, keep_checkpoints=1)


def require_at_least(config: Any, **least: int) -> None:
    """Check that settings are not too small; those that are None are not looked at.

    Raises:
        ValueError: one is; it says which, and what would do.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}; it must be at least {smallest}")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are used."""

    data: int = -1
    """Copies of the model that share the batch; -1 takes the devices that the other axes leave."""
    fsdp: int = 1
    """Devices that parameters, optimizer state and batch are split over."""
    tensor: int = 1
    """Devices that heads and hidden units are split over."""

    def build(self) -> Mesh:
        """The mesh; see ``sharding.make_mesh`` for what it raises."""
        return make_mesh(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
