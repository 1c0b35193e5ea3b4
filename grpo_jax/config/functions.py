"""Functions named in settings: a built-in name or ``module:function``, each with keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from grpo_jax.rewards.plugin import accepted, bind, import_function, parse_call


def find_function(text: str, setting: str, table: Mapping[str, Callable], passed: Collection[str]) -> Callable:
    """The function that a setting names, with its keyword arguments bound.

    Args:
        text: a name in ``table`` or ``module:function``, with or without arguments; see ``parse_call``.
        setting: its name, for errors.
        table: the built-in functions.
        passed: names of the arguments that the run passes, which cannot be bound.

    Raises:
        ValueError: there is no such function, it does not take an argument, or the run passes that argument.
    """
    name, arguments = parse_call(text, setting)
    if ":" not in name and name not in table:
        raise ValueError(f"{setting} is {name!r}; it must be one of {', '.join(table)}, or module:function of your own")
    function = import_function(name, setting) if ":" in name else table[name]
    bound = bind(function, arguments, name, setting)
    clashing = [each for each in arguments if each in passed]
    if clashing:
        raise ValueError(
            f"{setting}: the run passes {clashing[0]!r} to {name}; leave it out of the parentheses, and use the "
            "setting of that name if there is one"
        )
    return bound


def call_with(function: Callable, *args: Any, **available: Any) -> Any:
    """``function(*args, ...)`` with those of the available keyword arguments that it takes."""
    known = accepted(function)
    return function(*args, **{name: value for name, value in available.items() if known is None or name in known})
