"""Several processes that run one program: what they tell each other, and what one of them does for all.

Every process calls each of these functions, in the same order, since all run the same code on the same host data. They
exchange values through JAX's coordination service rather than through the devices. So an error names the process that
is missing after a timeout, and both places if two processes are at different ones.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds that a process waits for the others."""
LONG_TIMEOUT = 3600.0
"""Seconds that it waits for work that takes the others long, such as scores or a report."""
CONNECTION_TIMEOUT = 60
"""Seconds in which the processes must have found each other."""
CHUNK = 2**20
"""Bytes of a value in the coordination service, whose messages are limited."""
_calls = 0


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connect with the other processes, before JAX is used otherwise; again, it does nothing.

    Args:
        coordinator: address of the first process, host:port; None, and None for the others, if the cluster tells (TPU
            pods, SLURM, Open MPI).
        num_processes: how many there are.
        process_id: number of this one.

    Raises:
        RuntimeError: the others do not answer in time, or JAX was used before.
        ValueError: the cluster does not tell.
    """
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=CONNECTION_TIMEOUT)


def is_main() -> bool:
    """Whether this process writes files and prints for all: the first one."""
    return jax.process_index() == 0


def gather(value: T, name: str, *, timeout: float = TIMEOUT) -> list[T]:
    """The values of all processes, in their order.

    Args:
        value: any object that can be pickled.
        name: what is exchanged, in errors.
        timeout: seconds to wait for the other processes.

    Raises:
        RuntimeError: a process did not come in time, or exchanges something else.
    """
    count, own = jax.process_count(), jax.process_index()
    if count == 1:
        return [value]
    global _calls
    number, _calls = _calls, _calls + 1
    client = _client()
    data = pickle.dumps((name, value))
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    for i, part in enumerate(parts):
        client.key_value_set_bytes(f"grpo_jax/{number}/{own}/{i}", part)
    client.key_value_set_bytes(f"grpo_jax/{number}/{own}", str(len(parts)).encode())
    deadline, values = time.monotonic() + timeout, []
    for process in range(count):
        prefix = f"grpo_jax/{number}/{process}"
        size = int(_read(prefix, deadline, process, name, timeout))
        whole = b"".join(_read(f"{prefix}/{i}", deadline, process, name, timeout) for i in range(size))
        its_name, its_value = pickle.loads(whole)
        if its_name != name:
            raise RuntimeError(
                f"the processes are out of step: process {own} is at {name!r}, process {process} at {its_name!r}"
            )
        values.append(its_value)
    # All have sent this value, so all have read the one before.
    if number > 0:
        client.key_value_delete(f"grpo_jax/{number - 1}/{own}")
    return values


def agree(value: T, name: str, *, timeout: float = TIMEOUT) -> T:
    """The value of the first process.

    Args:
        value: of this process.
        name, timeout: as in ``gather``.
    """
    return gather(value if is_main() else None, name, timeout=timeout)[0]  # pyright: ignore[reportReturnType]


def any_of(flag: bool, name: str) -> bool:
    """Whether the flag is set on any process.

    Args:
        flag: of this process.
        name: as in ``gather``.
    """
    return any(gather(bool(flag), name))


def on_main(function: Callable[[], T], name: str, *, timeout: float = TIMEOUT) -> T:
    """The result of a function that the first process calls for all; its error is raised on all.

    Args:
        function: its result can be pickled.
        name: what it does, in errors.
        timeout: seconds that the others wait for it.
    """
    if jax.process_count() == 1:
        return function()
    result: Any = None
    own: BaseException | None = None
    if is_main():
        result, own = outcome(function)
    result, error = agree((result, portable(own)), name, timeout=timeout)
    error = own or error  # its own has the traceback
    if error is not None:
        raise error
    return result


def outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The result of a call, or the exception that it raised, to be told to the other processes.

    Args:
        function: also interruptions are caught.
    """
    try:
        return function(), None
    except BaseException as error:
        return None, error


def portable(error: BaseException | None) -> BaseException | None:
    """An exception that can be sent to other processes, or a ``RuntimeError`` that says what it was.

    Args:
        error: None for none.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def fetch(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole on every process.

    Args:
        tree: arrays that may be sharded over the processes.
    """

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def _read(key: str, deadline: float, process: int, name: str, timeout: float) -> bytes:
    try:
        return _client().blocking_key_value_get_bytes(key, max(1, int(1000 * (deadline - time.monotonic()))))
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"process {process} of {jax.process_count()} did not come to {name!r} within {timeout:g} s; it is hung, "
            "has ended, or is out of step (its own output says more)"
        ) from error


def _client() -> Any:
    # Private, for lack of a public API: multihost_utils runs collectives on the devices, which have no timeout.
    from jax._src import distributed

    return distributed.global_state.client
