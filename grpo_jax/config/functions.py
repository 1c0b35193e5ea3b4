"""Functions named in settings: a built-in name or ``module:function``, each with keyword arguments."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from grpo_jax.rewards.plugin import import_function

CALL = re.compile(r"\s*([\w.]+(?::[\w.]+)?)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_call(text: str, setting: str) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments in ``name``, ``name(epsilon=0.3)`` or ``module:function(epsilon=0.3)``.

    Args:
        text: the value of the setting.
        setting: its name, for the error.

    Raises:
        ValueError: another form, or an argument that is not a keyword with a literal value.
    """
    match = CALL.fullmatch(text)
    example = "such as sapo(temperature_positive=0.8) or my_module:my_function(scale=2.0)"
    if match is None:
        raise ValueError(f"{setting} is {text!r}; it must be a name or module:function, {example}")
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("arguments are given by name")
        return match[1], {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{setting} is {text!r}; its arguments are keywords with literal values, {example}: {error}"
        ) from None


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
    known = accepted(function)
    unknown = [] if known is None else [each for each in arguments if each not in known]
    if unknown:
        raise ValueError(f"{setting}: {name} has no argument {unknown[0]!r}; it has {', '.join(known or ())}")
    clashing = [each for each in arguments if each in passed]
    if clashing:
        raise ValueError(
            f"{setting}: the run passes {clashing[0]!r} to {name}; leave it out of the parentheses, and use the "
            "setting of that name if there is one"
        )
    return partial(function, **arguments) if arguments else function


def accepted(function: Callable) -> list[str] | None:
    """Names of the parameters that can be passed by keyword; None if any can."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def call_with(function: Callable, *args: Any, **available: Any) -> Any:
    """``function(*args, ...)`` with those of the available keyword arguments that it takes."""
    known = accepted(function)
    return function(*args, **{name: value for name, value in available.items() if known is None or name in known})
