"""Functions named in settings as ``module:function``, with or without keyword arguments in parentheses."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from grpo_jax.rewards.compose import RewardFn

MOST_NAMES = 20
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
    example = "such as my_module:my_function(scale=2.0)"
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


def import_reward(text: str) -> RewardFn:
    """The reward function that ``module:function`` or ``module:function(max_length=24)`` names.

    Raises:
        ValueError: as ``parse_call`` and ``import_function``, or the function does not take an argument.
    """
    name, arguments = parse_call(text, "reward")
    # Not into **columns, which would take a misspelt name without a word.
    return bind(import_function(name, "reward"), arguments, name, "reward", into_kwargs=False)


def bind(
    function: Callable[..., Any], arguments: Mapping[str, Any], name: str, setting: str, *, into_kwargs: bool = True
) -> Callable[..., Any]:
    """``function`` with keyword arguments bound.

    Args:
        function: any function.
        arguments: to bind.
        name: of the function, for the error.
        setting: the setting that names it, for the error.
        into_kwargs: whether ``**kwargs`` of the function take arguments of any name.

    Raises:
        ValueError: the function does not take an argument.
    """
    if not arguments:
        return function
    known = accepted(function, into_kwargs=into_kwargs)
    unknown = [] if known is None else [each for each in arguments if each not in known]
    if unknown:
        raise ValueError(f"{setting}: {name} has no argument {unknown[0]!r}; it has {', '.join(known or ())}")
    return partial(function, **arguments)


def accepted(function: Callable, *, into_kwargs: bool = True) -> list[str] | None:
    """Names of the parameters that can be passed by keyword; None if any can.

    Args:
        function: any function.
        into_kwargs: whether ``**kwargs`` of the function count.
    """
    parameters = inspect.signature(function).parameters.values()
    if into_kwargs and any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def import_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, on Python's path or in the working directory.

    Args:
        name: ``module:function``.
        setting: the setting that has this value, for errors.

    Raises:
        ValueError: ``name`` has another form, or the module or function does not exist. Errors raised while the module
            is imported are not caught.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{setting} is {name!r}; it must be module:function, such as my_module:my_function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"there is no module {module_name!r} on Python's path or in {here}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = {name: getattr(module, name, None) for name in dir(module) if not name.startswith("_")}
        present = sorted(name for name, value in functions.items() if inspect.isfunction(value))
        close = difflib.get_close_matches(attribute, present, n=5, cutoff=0.4) or present[:MOST_NAMES]
        raise ValueError(f"{module_name} has no function {attribute!r}; it has {', '.join(close) or 'no functions'}")
    return function


def reward_name(text: str) -> str:
    """The name of a reward's metrics: that of its function, without module and arguments."""
    return parse_call(text, "reward")[0].rpartition(":")[2]


def read_weighted(text: str) -> tuple[str, float]:
    """The name and weight of ``module:function=0.5`` or ``module:function(scale=2.0)=0.5``; the default weight is 1.

    Raises:
        ValueError: the weight is not a finite number.
    """
    end = text.rfind(")") + 1  # arguments have equals signs too
    name, equals, weight = text[end:].partition("=")
    name = text[:end] + name
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"the weight of a reward must be a number, as in my_rewards:politeness=0.5; got {text!r}")
    return name, value
