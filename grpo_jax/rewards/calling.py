"""How a reward function is called: with a batch or a sample, with which columns, and awaited if it is async."""

from __future__ import annotations

import asyncio
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
    """Declare that a reward scores every completion by itself, whatever else is in the batch.

    A ``RewardPool`` then scores each sample on its own, on any worker, under a deadline of its own, and begins while
    other completions are still being sampled. Without the declaration a reward is called with the whole batch.

    Args:
        function: the reward; it takes lists of any length, as every reward does.
        columns: the columns of the data set that it reads, where its other parameters are settings; "*" among them
            stands for those that go into ``**kwargs``. By default every parameter besides ``prompts`` and
            ``completions`` names a column.
        warm_up: called once in the process that workers are forked from, so that none of them pays for it again.
    """

    def declare(function):
        function.per_sample = True
        function.columns = None if columns is None else tuple(columns)
        function.warm_up = warm_up
        return function

    return declare if function is None else declare(function)


def is_per_sample(reward: Callable[..., Any]) -> bool:
    """Whether a reward, or what it is a ``partial`` of, is declared ``per_sample``."""
    return bool(_declared(reward, "per_sample"))


def is_async(reward: Callable[..., Any]) -> bool:
    """Whether calling a reward gives a coroutine."""
    function = _innermost(reward)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def warm_up(reward: Callable[..., Any]) -> None:
    """Call a reward's ``warm_up``, if it has one."""
    function = _declared(reward, "warm_up")
    if function is not None:
        function()


def arguments(
    reward: Callable[..., Any],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> Arguments:
    """The arguments that a reward's signature takes of a batch.

    ``f(completions, **kwargs)`` and ``f(prompts, completions, ...)`` get these two by name, in any order; a function
    with other names for them gets prompts and completions as its first two arguments. A column goes to the
    parameter of its name, or into ``**kwargs``. It never replaces a setting: an argument bound by ``partial``, or a
    parameter that ``per_sample(columns=...)`` leaves out.

    Args:
        reward: the function.
        prompts, completions: ``[B]``.
        columns: of the data set, ``[B]`` each.

    Raises:
        ValueError: the reward has a parameter without a default that no column is named after, or takes no
            completions. The message goes on after the reward's name.
    """
    parameters = _parameters(reward)
    names = {name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    positional = [
        each for each in parameters.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    settings, declared = _bound(reward), _declared(reward, "columns")
    args: list[Any] = []
    given: dict[str, Any] = {"prompts": prompts, "completions": completions}
    free = [each.name for each in positional if each.name not in settings]
    is_variadic = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    if "completions" in names:
        has_other_names = free[1:2] == ["completions"] and free[0] != "prompts" and free[0] not in columns
    else:
        has_other_names = len(free) > 1 or (is_variadic and not free)
    if has_other_names:
        args, given = [prompts, completions], {}
        names -= set(free[:2])
    elif "completions" not in names and not takes_any:
        raise ValueError(
            "has no parameter called completions; a reward is a function of completions, or of prompts and "
            f"completions, and this one takes {[*parameters]}"
        )
    for name, values in columns.items():
        if declared is None or ("*" in declared and name not in names):
            wanted = name in names or takes_any
        else:
            wanted = name in declared
        if wanted and name not in settings and name not in ("prompts", "completions"):
            given[name] = values
    kwargs = {name: values for name, values in given.items() if takes_any or name in names}
    missing = [
        name
        for name in names - kwargs.keys() - settings
        if parameters[name].default is inspect.Parameter.empty and name not in ("prompts", "completions")
    ]
    if missing:
        raise ValueError(f"needs the column {sorted(missing)[0]!r}; the columns are {[*columns]}")
    return args, kwargs


def invoke(reward: Callable[..., Any], call: Arguments) -> Any:
    """What a reward returns of a batch; a coroutine is run to its end, also inside a running event loop."""
    args, kwargs = call
    values = reward(*args, **kwargs)
    return _awaited(values) if inspect.isawaitable(values) else values


def invoke_each(reward: Callable[..., Any], calls: Sequence[Arguments], *, seconds: float) -> list[Any]:
    """What an async reward returns of several batches, awaited together, each for at most ``seconds``.

    Returns:
        For each batch its values, or the exception it raised (``TimeoutError`` after ``seconds``).
    """

    async def run_all() -> list[Any]:
        running = (asyncio.wait_for(reward(*args, **kwargs), seconds) for args, kwargs in calls)
        return await asyncio.gather(*running, return_exceptions=True)

    return _awaited(run_all())


def _awaited(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as other_thread:  # as in a notebook, whose loop runs already
        return other_thread.submit(asyncio.run, wait()).result()


def _innermost(reward: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(reward, partial):
        reward = reward.func
    return reward


def _declared(reward: Callable[..., Any], name: str) -> Any:
    return getattr(_innermost(reward), name, None)


def _bound(reward: Callable[..., Any]) -> set[str]:
    """The names that a ``partial`` has bound."""
    names: set[str] = set()
    while isinstance(reward, partial):
        names |= reward.keywords.keys()
        reward = reward.func
    return names


def _parameters(reward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of a builtin that tells none
        any_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {str(kind): inspect.Parameter(f"_{int(kind)}", kind) for kind in any_kinds}
