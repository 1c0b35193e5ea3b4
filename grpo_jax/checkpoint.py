"""Whole-state save and restore.

A checkpoint is one tree of arrays and one small JSON object (where the data iterator stands). It is written beside its
final name and renamed when complete, so that a kill at any moment leaves the one before it in place.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: created if need be.
        keep: how many of the newest stay; older ones are deleted unless ``save`` protects them.

    Raises:
        ValueError: keep below 1.
    """

    def __init__(self, folder: Path | str, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; a run that can be resumed keeps at least 1 checkpoint")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True),
        )

    def steps(self) -> list[int]:
        """The steps of which there is a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict, *, protected: Collection[int] = ()) -> None:
        """Write a checkpoint, wait until it is complete, and delete those that are not kept.

        Args:
            step: how many steps of the run are done.
            state: a tree of arrays.
            position: whatever else the run needs to go on, as JSON.
            protected: steps whose checkpoints stay besides the newest, such as that of the best evaluation.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
            )
            self._manager.wait_until_finished()
        except Exception as error:
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({free / 2**20:.0f} MiB free there); complete checkpoints: {self.steps() or 'none'}"
            ) from error
        for old in self.steps()[: -self._keep]:
            if old not in protected:
                self._manager.delete(old)

    def read(self, step: int, like: Any) -> Any:
        """The state of one step's checkpoint, laid out as ``like``, which is only read for shapes and shardings.

        Raises:
            RuntimeError: there is no checkpoint of this step, or it cannot be read.
        """
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise RuntimeError(f"the checkpoint {self.folder / str(step)} cannot be read: {error!s:.200}") from error

    def restore(self, like: Any) -> tuple[int, Any, dict] | None:
        """The newest complete checkpoint, laid out as ``like``; None where there is no checkpoint at all.

        A damaged one is named in a warning and set aside (``damaged-<step>``), and the one before it is taken.

        Args:
            like: a tree of arrays with the shapes, dtypes and shardings to restore into; its values are not used.

        Returns:
            Step, state and position, as given to ``save``.

        Raises:
            RuntimeError: there are checkpoints, and none of them can be read.
        """
        steps = self.steps()[::-1]
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        failures = []
        for step in steps:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(template), position=ocp.args.JsonRestore()),
                )
                self._set_aside(steps[: steps.index(step)])
                return step, restored["state"], restored["position"]
            except Exception as error:
                failures.append(
                    f"{self.folder / str(step)}: {str(error).splitlines()[0][:200] if str(error) else error!r}"
                )
                warnings.warn(f"damaged checkpoint, not used: {failures[-1]}", stacklevel=2)
        if failures:
            raise RuntimeError(
                "no checkpoint can be read; remove the folder to start from the beginning:\n  " + "\n  ".join(failures)
            )
        return None

    def require_space(self, state: Any) -> None:
        """Check, before any compute is spent, that the checkpoints of this state will fit on the disk.

        Args:
            state: the tree that will be saved, or its shapes.

        Raises:
            OSError: less is free than the checkpoints that are kept, that of the best evaluation and the one being
                written take.
        """
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        needed = size * (self._keep + 2 - len(self.steps()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} has {free / 2**30:.2f} GiB free; {self._keep} checkpoints, the best one and "
                f"the one being written take {needed / 2**30:.2f} GiB. Free some space, lower keep_checkpoints, "
                "or choose another run_dir"
            )

    def _set_aside(self, damaged: list[int]) -> None:
        for step in damaged:  # so that the step can be saved again when the run comes back to it
            (self.folder / str(step)).rename(self.folder / f"damaged-{step}")
        self._manager.reload()

    def close(self) -> None:
        """Release what the folder's manager holds."""
        self._manager.close()
