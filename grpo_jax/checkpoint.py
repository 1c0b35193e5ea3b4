"""Saving and restoring of a run's state.

A checkpoint is a pytree of arrays and a small JSON object (the state of the data iterator). It is written under a
temporary name and renamed when complete, so that a kill at any moment leaves the previous checkpoint intact.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.hosts import agree, gather, on_main


def _abstract(tree: Any) -> Any:
    """The shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: created if it does not exist.
        keep: number of newest checkpoints to keep; older ones are deleted unless ``save`` protects them.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(self, folder: Path | str, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1, or the run could not be resumed")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True),
        )

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending."""
        return agree(sorted(self._manager.all_steps()), "the list of checkpoints")

    def save(self, step: int, state: Any, position: dict, *, protected: Collection[int] = ()) -> None:
        """Write a checkpoint, wait until it is complete, and delete those that are not kept.

        Args:
            step: number of completed steps.
            state: a pytree of arrays.
            position: other state that the run needs to resume, as JSON.
            protected: steps to keep in addition to the newest, such as that of the best evaluation.

        Raises:
            OSError: the disk is full or the folder is not writable; earlier checkpoints are unchanged.
        """
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
            )
            self._manager.wait_until_finished()
        except Exception as error:
            free = shutil.disk_usage(self.folder).free
            complete = sorted(self._manager.all_steps()) or "none"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({free / 2**20:.0f} MiB free there); complete checkpoints: {complete}"
            ) from error
        for old in self.steps()[: -self._keep]:
            if old not in protected:
                self._manager.delete(old)

    def read(self, step: int, like: Any) -> Any:
        """The state in the checkpoint of a step.

        Args:
            step: of the checkpoint.
            like: a tree of arrays with the shapes, dtypes and shardings to restore into; its values are not used.

        Raises:
            RuntimeError: there is no checkpoint of this step, or it cannot be read.
        """
        template = _abstract(like)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise RuntimeError(f"the checkpoint {self.folder / str(step)} cannot be read: {error!s:.200}") from error

    def restore(self, like: Any) -> tuple[int, Any, dict] | None:
        """The newest readable checkpoint; None if there are no checkpoints.

        A damaged checkpoint is reported in a warning and renamed to ``damaged-<step>``, and the one before it is tried.

        Args:
            like: a tree of arrays with the shapes, dtypes and shardings to restore into; its values are not used.

        Returns:
            Step, state and position, as passed to ``save``.

        Raises:
            RuntimeError: there are checkpoints, and none can be read.
        """
        steps = self.steps()[::-1]
        template = _abstract(like)
        failures = []
        for step in steps:
            restored, failure = None, None
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(template), position=ocp.args.JsonRestore()),
                )
            except Exception as error:
                failure = f"{self.folder / str(step)}: {str(error).splitlines()[0][:200] if str(error) else error!r}"
            # A checkpoint that one process cannot read is damaged for all.
            failure = next((each for each in gather(failure, f"the checkpoint of step {step}") if each), None)
            if failure is None and restored is not None:
                self._set_aside(steps[: steps.index(step)])
                return step, restored["state"], restored["position"]
            failures.append(failure)
            warnings.warn(f"damaged checkpoint, not used: {failure}", stacklevel=2)
        if failures:
            raise RuntimeError(
                "no checkpoint can be read; remove the folder to start again:\n  " + "\n  ".join(failures)
            )
        return None

    def require_space(self, state: Any) -> None:
        """Check that the checkpoints of a state will fit on the disk, before the run starts.

        Args:
            state: the tree that will be saved, or its shapes.

        Raises:
            OSError: less space is free than needed for the checkpoints that are kept, that of the best evaluation and
                the one being written.
        """
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        needed = size * (self._keep + 2 - len(self.steps()))
        free = agree(shutil.disk_usage(self.folder).free, "the space for checkpoints")
        if free < needed:
            raise OSError(
                f"{self.folder} has {free / 2**30:.2f} GiB free; {self._keep} checkpoints, the best one and "
                f"the one being written take {needed / 2**30:.2f} GiB. Free some space, lower keep_checkpoints, "
                "or choose another run_dir"
            )

    def _set_aside(self, damaged: list[int]) -> None:
        def rename() -> None:
            for step in damaged:  # so that the step can be saved again when the run comes back to it
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}")

        on_main(rename, "setting damaged checkpoints aside")
        self._manager.reload()

    def close(self) -> None:
        """Close the checkpoint manager."""
        self._manager.close()
