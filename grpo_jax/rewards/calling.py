"""Calls of reward functions: by batch or by sample, with the columns of their signature, awaited if they are async."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, overload

Function = TypeVar("Function", bound=Callable[..., Any])
Arguments = tuple[list[Any], dict[str, Any]]


@overload
def per_sample(function: Function) -> Function: ...
@overload
def per_sample(
    *, columns: Sequence[str] | None = None, warm_up: Callable[[], Any] | None = None
) -> Callable[[Function], Function]: ...
def per_sample(function=None, *, columns=None, warm_up=None):
    """Decorator: the reward's score of a completion does not depend on the rest of the batch.

    A ``RewardPool`` then scores each sample separately, on any worker and with its own deadline, and starts while other
    completions are still being sampled. Without the decorator a reward is called with the whole batch.

    Args:
        function: the reward; it takes lists of any length, as every reward does.
        columns: the parameters that are columns of the data set; all others are settings. "*" stands for the columns
            that go into ``**kwargs``. Default: every parameter but ``prompts`` and ``completions`` is a column.
        warm_up: called once in the process from which workers are forked, to load what all of them need.
    """

    def declare(function):
        function.per_sample = True
        function.columns = None if columns is None else tuple(columns)
        function.warm_up = warm_up
        return function

    return declare if function is None else declare(function)


def is_per_sample(reward: Callable[..., Any]) -> bool:
    """Whether a reward, or the function inside of its ``partial``, is declared ``per_sample``."""
    return bool(_declared(reward, "per_sample"))


def is_async(reward: Callable[..., Any]) -> bool:
    """Whether a reward is a coroutine function."""
    function = _innermost(reward)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def warm_up(reward: Callable[..., Any]) -> None:
    """Call a reward's ``warm_up``, if it has one."""
    function = _declared(reward, "warm_up")
    if function is not None:
        function()


def arguments(
    reward: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> Arguments:
    """The positional and keyword arguments with which to call a reward, selected by its signature.

    Parameters called ``prompts`` and ``completions`` are passed by name, in any order; a function with other names for
    them gets both as its first two arguments. A column is passed to the parameter of the same name, or into
    ``**kwargs``. It never replaces a setting: an argument bound by ``partial``, or a parameter that is not listed in
    ``per_sample(columns=...)``.

    Args:
        reward: the function.
        prompts, completions: ``[B]``.
        columns: columns of the data set by name, ``[B]`` each.

    Raises:
        ValueError: a parameter without a default has no column, or the reward does not take completions. The message
            is to be prefixed with the reward's name.
    """
    parameters = _parameters(reward)
    kinds = [parameter.kind for parameter in parameters.values()]
    names = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    settings, declared = _bound(reward), _declared(reward, "columns")
    args: list[Any] = []
    available: dict[str, Any] = {"prompts": prompts, "completions": completions}
    free = [name for name in positional if name not in settings]
    is_variadic = inspect.Parameter.VAR_POSITIONAL in kinds
    if "completions" in names:
        has_other_names = free[1:2] == ["completions"] and free[0] != "prompts" and free[0] not in columns
    else:
        has_other_names = len(free) > 1 or (is_variadic and not free)
    if has_other_names:
        args, available = [prompts, completions], {}
        names -= set(free[:2])
    elif "completions" not in names and not takes_any:
        raise ValueError(
            "has no parameter called completions; a reward takes completions, or prompts and completions, and this one "
            f"takes {[*parameters]}"
        )
    for name, values in columns.items():
        if declared is None or ("*" in declared and name not in names):
            wanted = name in names or takes_any
        else:
            wanted = name in declared
        if wanted and name not in settings and name not in ("prompts", "completions"):
            available[name] = values
    kwargs = {name: values for name, values in available.items() if takes_any or name in names}
    missing = [
        name
        for name in names - kwargs.keys() - settings
        if parameters[name].default is inspect.Parameter.empty and name not in ("prompts", "completions")
    ]
    if missing:
        raise ValueError(f"needs the column {sorted(missing)[0]!r}; the columns are {[*columns]}")
    return args, kwargs


def invoke(reward: Callable[..., Any], call: Arguments) -> Any:
    """The result of a reward; a coroutine is awaited, also inside of a running event loop.

    Args:
        reward: the function.
        call: its positional and keyword arguments, from ``arguments``.
    """
    args, kwargs = call
    values = reward(*args, **kwargs)
    return _awaited(values) if inspect.isawaitable(values) else values


def invoke_each(reward: Callable[..., Any], calls: Sequence[Arguments], *, seconds: float) -> list[Any]:
    """The results of several calls of an async reward, awaited together.

    Args:
        reward: the coroutine function.
        calls: the arguments of each call, from ``arguments``.
        seconds: timeout of each call.

    Returns:
        For each call its result, or the exception that it raised (``TimeoutError`` after ``seconds``).
    """
    import asyncio  # late: most rewards are not async

    async def run_all() -> list[Any]:
        running = (asyncio.wait_for(reward(*args, **kwargs), seconds) for args, kwargs in calls)
        return await asyncio.gather(*running, return_exceptions=True)

    return _awaited(run_all())


def _awaited(awaitable: Any) -> Any:
    import asyncio

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as other_thread:  # in a notebook the event loop is already running
        return other_thread.submit(asyncio.run, wait()).result()


def _innermost(reward: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(reward, partial):
        reward = reward.func
    return reward


def _declared(reward: Callable[..., Any], name: str) -> Any:
    return getattr(_innermost(reward), name, None)


def _bound(reward: Callable[..., Any]) -> set[str]:
    """The keyword arguments bound by ``partial``."""
    names: set[str] = set()
    while isinstance(reward, partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def _parameters(reward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        any_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {str(kind): inspect.Parameter(f"_{int(kind)}", kind) for kind in any_kinds}
