"""Several processes that run one program: values that they exchange, and work that one of them does for all.

Every process calls each of these functions, in the same order, since all run the same code on the same host data. They
exchange values through JAX's coordination service rather than through the devices. So an error names the process that
is missing after a timeout, and both places if two processes are at different ones. ``watch`` ends a process whose
computations would wait for ever for another one.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
Result = TypeVar("Result")
TIMEOUT = 600.0
"""Seconds that a process waits for the others, unless ``set_timeout`` changes them."""
LONGER = 6
"""Factor on the timeout for long work, such as scores or a report."""
CHUNK = 2**20
"""Bytes of a value in the coordination service, whose messages are limited."""
MARGIN = 20.0
"""Further seconds that a process waits for the first one, which may wait for others."""
PREFIX = "grpo_jax"
_calls = 0
_dispatches = 0
_read_by_all: deque[int] = deque()
"""Of the first process: numbers of the exchanges whose values are still stored in the service."""
_place = "the start"
_alone = False
"""Whether the first process runs a function of ``on_main`` or ``joined_on_main``, in which ``gather`` is an error."""
_timeout = TIMEOUT


class MissingProcessError(RuntimeError):
    """A process did not come to an exchange in time."""


def set_timeout(seconds: float) -> None:
    """Set the seconds that this process waits for the others; ``LONGER`` times as many for long work."""
    global _timeout
    _timeout = seconds


def progress() -> tuple[int, str, float]:
    """Exchanges and dispatches of this process so far, the name of the latest exchange, and the timeout in seconds."""
    return _calls + _dispatches, _place, _timeout


def note_dispatch() -> None:
    """Count a dispatch of a program between two exchanges, so that a long computation is not taken for a hung one."""
    global _dispatches
    _dispatches += 1


def membership() -> tuple[int, int]:
    """Number of this process and of all, without starting JAX's devices."""
    state = _state()
    return state.process_id, state.num_processes


def client() -> Any:
    """The client of JAX's coordination service."""
    return _state().client


def is_main() -> bool:
    """Whether this process writes files and prints for all: the first one."""
    return jax.process_index() == 0


def gather(value: T, name: str, *, is_long: bool = False) -> list[T]:
    """The values of all processes, in their order.

    Args:
        value: any object that can be pickled.
        name: what is exchanged, in errors.
        is_long: whether the other processes may need long until they come.

    Raises:
        MissingProcessError: a process did not come in time.
        RuntimeError: a process exchanges something else; or this is within ``on_main``.
    """
    return joined_on_main(value, lambda values: values, name, is_long=is_long)


def joined_on_main(value: T, function: Callable[[list[T]], Result], name: str, *, is_long: bool = False) -> Result:
    """The result of a function that the first process calls with the values of all; its error is raised on all.

    One exchange: the values go to the first process only. As within ``on_main``, the function may use ``agree``.

    Args:
        value: any object that can be pickled.
        function: takes the values in the order of the processes; its result can be pickled.
        name, is_long: as in ``gather``.

    Raises:
        MissingProcessError, RuntimeError: as ``gather``.
    """
    global _alone
    count, own = jax.process_count(), jax.process_index()
    if count == 1:
        return function([value])
    if _alone:
        raise RuntimeError(f"{name}: the others do not come, since the first process is at work for all")
    number, timeout = _begin(name, is_long)
    if own > 0:
        _send(f"{number}/{own}", (name, value))
        return _from_main(number, name, timeout)
    values: list[T] = [value]
    deadline = time.monotonic() + timeout
    try:
        for process in range(1, count):
            its_name, its_value = _receive(f"{number}/{process}", process, name, timeout, deadline)
            _check_place(name, process, its_name)
            values.append(its_value)
    except RuntimeError as error:
        _send(f"{number}/all", (name, None, error))
        raise
    _alone = True
    result, error = outcome(lambda: function(values))
    _alone = False
    _send(f"{number}/all", (name, result, portable(error)))
    if error is not None:
        raise error
    # All have sent this value, so all have read the ones before.
    while _read_by_all and _read_by_all[0] < number:
        client().key_value_delete(f"{PREFIX}/{_read_by_all.popleft()}")
    return cast(Result, result)


def agree(value: T, name: str, *, is_long: bool = False) -> T:
    """The value of the first process; within ``on_main``, that of this one.

    Args:
        value: of this process.
        name, is_long: as in ``gather``.
    """
    if _alone or jax.process_count() == 1:
        return value
    number, timeout = _begin(name, is_long)
    if is_main():  # without waiting for the others
        _send(f"{number}/all", (name, value, None))
        return value
    _send(f"{number}/{jax.process_index()}", (name, None))
    return _from_main(number, name, timeout)


def any_of(flag: bool, name: str) -> bool:
    """Whether the flag is set on any process; within ``on_main``, on this one.

    Args:
        flag: of this process.
        name: as in ``gather``.
    """
    return flag if _alone else any(gather(bool(flag), name))


def on_main(function: Callable[[], T], name: str, *, is_long: bool = False) -> T:
    """The result of a function that the first process calls for all; its error is raised on all.

    The function may use ``agree``, ``any_of`` and ``on_main``, and so whatever decides by them.

    Args:
        function: its result can be pickled.
        name: what it does, in errors.
        is_long: whether it may take long.
    """
    global _alone
    if _alone or jax.process_count() == 1:
        return function()
    result: Any = None
    own: BaseException | None = None
    if is_main():
        _alone = True
        result, own = outcome(function)
        _alone = False
    result, error = agree((result, portable(own)), name, is_long=is_long)
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


def own_rows(count: int) -> range:
    """The rows of a batch that are this process's work; the processes take turns.

    Args:
        count: rows of the batch.
    """
    return range(jax.process_index(), count, jax.process_count())


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """The values of all rows, from those that each process has of its ``own_rows``.

    Args:
        parts: of each process, in their order.
    """
    rows: list[Any] = [None] * sum(map(len, parts))
    for process, part in enumerate(parts):
        rows[process :: len(parts)] = part
    return rows


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


def _begin(name: str, is_long: bool) -> tuple[int, float]:
    """Number of an exchange, and the seconds to wait in it."""
    global _calls, _place
    number, _calls, _place = _calls, _calls + 1, name
    if is_main():
        _read_by_all.append(number)
    return number, _timeout * (LONGER if is_long else 1)


def _from_main(number: int, name: str, timeout: float) -> Any:
    """The result that the first process sends; waits longer than that process, which itself waits for all others."""
    timeout += MARGIN
    its_name, result, problem = _receive(f"{number}/all", 0, name, timeout, time.monotonic() + timeout)
    if problem is not None:
        raise problem
    _check_place(name, 0, its_name)
    return result


def _check_place(name: str, process: int, its_name: str) -> None:
    if its_name != name:
        raise RuntimeError(
            f"the processes are out of step: process {jax.process_index()} is at {name!r}, process {process} at "
            f"{its_name!r}"
        )


def _send(key: str, message: Any) -> None:
    data = pickle.dumps(message)
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    for i, part in enumerate(parts[1:], 1):
        client().key_value_set_bytes(f"{PREFIX}/{key}/{i}", part)
    client().key_value_set_bytes(f"{PREFIX}/{key}", len(parts).to_bytes(4, "big") + parts[0])


def _receive(key: str, process: int, name: str, timeout: float, deadline: float) -> Any:
    def read(key: str) -> bytes:
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            return client().blocking_key_value_get_bytes(f"{PREFIX}/{key}", left)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise MissingProcessError(f"the connection with process 0 was lost at {name!r}: {error}") from error
            raise MissingProcessError(
                f"process {process} of {jax.process_count()} did not come to {name!r} within {timeout:g} s; it is "
                "hung, has ended, or is out of step (its own output says more)"
            ) from error

    first = read(key)
    parts = [first[4:], *(read(f"{key}/{i}") for i in range(1, int.from_bytes(first[:4], "big")))]
    return pickle.loads(b"".join(parts))


def _state() -> Any:
    # Private, for lack of a public API: multihost_utils runs collectives on the devices, which have no timeout.
    from jax._src import distributed

    return distributed.global_state
