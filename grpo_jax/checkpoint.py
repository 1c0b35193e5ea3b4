"""Saving and restoring of a run's state.

A checkpoint is a pytree of arrays and a small JSON object (the state of the data iterator). It is written under a
temporary name and renamed when complete, so that a kill at any moment leaves the previous checkpoint intact. The run
goes on while it is written: ``save`` returns once the state is copied.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from grpo_jax.hosts import LONGER, agree, client, gather, on_main, progress

T = TypeVar("T")

UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name under which orbax writes a checkpoint."""


def _abstract(tree: Any) -> Any:
    """The shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _copied(x: jax.Array) -> jax.Array:
    """The array, or a copy of one in the host's memory.

    orbax transfers an array from its devices before ``save`` returns, but reads one in the host's memory in place while
    the next update, to which the state is donated, may overwrite it.
    """
    is_on_host = x.sharding.memory_kind not in (None, "device") or next(iter(x.sharding.device_set)).platform == "cpu"
    return jax.device_put(x, x.sharding, may_alias=False) if is_on_host else x


def _reason(error: Exception) -> str:
    """The last part of an error of TensorStore, such as "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error).split(": ")[-1].split(" [os_error")[0]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Wait until all processes are at a place in the writing of a checkpoint, unless this one has failed.

    A thread of orbax's that could not write would otherwise wait here for the others, which wait elsewhere for its
    part, and raise the timeout in place of the error.
    """
    has_failed = threading.current_thread() is not threading.main_thread() and sys.exception() is not None
    if jax.process_count() > 1 and not has_failed:
        client().wait_at_barrier(key, timeout_ms)


def _read_state(path: Any, template: Any) -> Any:
    with closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(path / "state", args=ocp.args.StandardRestore(template))


def _read_all(path: Any, template: Any) -> tuple[Any, dict]:
    return _read_state(path, template), dict(ocp.JsonCheckpointHandler().restore(path / "position"))


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
        self._writing: tuple[int, frozenset[int]] | None = None
        self._failure: Exception | None = None
        on_main(self._remove_unfinished, "removing unfinished checkpoints")
        longest = max(1, int(progress()[2] * LONGER))  # seconds that processes wait for each other's parts
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                async_options=ocp.options.AsyncOptions(timeout_secs=longest, barrier_sync_fn=_wait_for_others),
            ),
        )

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending; waits for one that is being written."""
        self.wait()
        return agree(sorted(self._manager.all_steps()), "the list of checkpoints")

    def save(self, step: int, state: Any, position: dict, *, protected: Collection[int] = ()) -> None:
        """Copy a state and start to write it; the arrays may be donated as soon as this returns.

        Waits for the checkpoint before, so that one is written at a time. Once this one is complete, those that are not
        kept are deleted: by ``wait``, which ``save``, ``steps``, ``read`` and ``restore`` call first.

        Args:
            step: number of completed steps.
            state: a pytree of arrays.
            position: other state that the run needs to resume, as JSON.
            protected: steps to keep in addition to the newest, such as that of the best evaluation.

        Raises:
            OSError: the disk is full or the folder is not writable; earlier checkpoints are unchanged.
        """
        self.wait()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(_copied, state)), position=ocp.args.JsonSave(position)
        )
        try:
            self._manager.save(step, args=args, force=True)  # an error, not False, for a step that has a checkpoint
        except Exception as error:
            raise self._not_written(step, error) from error
        self._writing = step, frozenset(protected)

    @property
    def is_written(self) -> bool:
        """Whether this process has ended writing a checkpoint, or failed to, and ``wait`` was not called since."""
        return self._writing is not None and not self._manager.is_saving_in_progress()

    @property
    def has_failed(self) -> bool:
        """Whether this process could not write its part of a checkpoint, which ``wait`` will say.

        The other processes cannot know: orbax waits for this one's part until its timeout.
        """
        if self.is_written and self._failure is None:
            self._failure = self._ended()
        return self._failure is not None

    def _ended(self) -> Exception | None:
        """The error of the checkpoint that is being written, once it ends; orbax raises it once."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return error
        return None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, and delete those that are not kept.

        Raises:
            OSError: it could not be written, as ``save``; raised once.
        """
        if self._writing is None:
            return
        (step, protected), self._writing = self._writing, None
        error, self._failure = self._failure or self._ended(), None
        if error is not None:
            # Without telling the others in an exchange: they wait in orbax for this one's part, and end when they hear
            # that this process has ended, and why.
            raise self._not_written(step, error) from error
        gather(None, f"the checkpoint of step {step}", is_long=True)  # none is deleted before all have written
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            if old not in protected:
                self._manager.delete(old)

    def _not_written(self, step: int, error: Exception) -> OSError:
        free = shutil.disk_usage(self.folder).free
        self._manager.reload()
        complete = [number for number in sorted(self._manager.all_steps()) if number != step] or "none"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({free / 2**20:.0f} MiB free there): "
            f"{_reason(error)}; complete checkpoints: {complete}"
        )

    def _remove_unfinished(self) -> None:
        """Remove what a process that was killed left of a checkpoint: it takes the space of a whole one."""
        for path in self.folder.glob(f"*{UNFINISHED}*"):
            warnings.warn(f"half-written checkpoint, removed: {path}", stacklevel=2)
            shutil.rmtree(path)

    def _read(self, step: int, read: Callable[[Any, Any], T], like: Any) -> tuple[T | None, str | None]:
        """A checkpoint, or why it cannot be read: by the first of the processes that cannot.

        ``CheckpointManager.restore`` ends in a computation over all devices, in which the others would wait for ever
        for a process that raised an error. So its handlers are called without it, and the processes exchange errors.

        Args:
            step: of the checkpoint.
            read: takes the folder of the checkpoint, a path of orbax's, and a tree of shapes, dtypes and shardings.
            like: as in ``restore``.
        """
        path, found, failure = self._manager.directory / str(step), None, None
        try:
            found = read(path, _abstract(like))
        except Exception as error:
            failure = _first_line(error)[:200]
            if jax.process_count() > 1:  # before the exchange, which may fail too
                warnings.warn(f"process {jax.process_index()} cannot read its part of {path}: {failure}", stacklevel=3)
        failures = gather(failure, f"reading the checkpoint of step {step}", is_long=True)
        for process, text in enumerate(failures):
            if text is not None:
                return None, text if len(failures) == 1 else f"process {process} of {len(failures)}: {text}"
        return found, None

    def read(self, step: int, like: Any) -> Any:
        """The state in the checkpoint of a step.

        Args:
            step: of the checkpoint.
            like: a tree of arrays with the shapes, dtypes and shardings to restore into; its values are not used.

        Raises:
            RuntimeError: there is no checkpoint of this step, or it cannot be read.
        """
        self.wait()
        state, failure = self._read(step, _read_state, like)
        if failure is not None:
            raise RuntimeError(f"the checkpoint {self.folder / str(step)} cannot be read: {failure}")
        return state

    def restore(self, like: Any) -> tuple[int, Any, dict] | None:
        """The newest readable checkpoint; None if there are no checkpoints.

        A damaged checkpoint is reported in a warning and renamed to ``damaged-<step>``, and the one before it is tried.
        One that a single process cannot read is damaged for all.

        Args:
            like: a tree of arrays with the shapes, dtypes and shardings to restore into; its values are not used.

        Returns:
            Step, state and position, as passed to ``save``.

        Raises:
            RuntimeError: there are checkpoints, and none can be read.
        """
        steps = self.steps()[::-1]
        failures = []
        for step in steps:
            found, failure = self._read(step, _read_all, like)
            if found is not None:
                self._set_aside(steps[: steps.index(step)])
                return step, *found
            failures.append(f"{self.folder / str(step)}: {failure}")
            warnings.warn(f"damaged checkpoint, not used: {failures[-1]}", stacklevel=2)
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
                name = f"damaged-{step}"  # an earlier one of the same step is kept
                names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
                free = next(path for path in map(self.folder.joinpath, names) if not path.exists())
                (self.folder / str(step)).rename(free)

        on_main(rename, "setting damaged checkpoints aside")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, without the other processes, and close the manager.

        Raises:
            OSError: it could not be written, as ``save``.
        """
        writing, self._writing = self._writing, None
        try:
            self._manager.close()
            if self._failure is not None and writing:  # known, but not yet raised
                raise self._failure
        except Exception as error:
            raise (self._not_written(writing[0], error) if writing else error) from error
