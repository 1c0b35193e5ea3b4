"""Rewards of other people's modules, named on the command line."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from collections.abc import Callable
from typing import Any, cast

from grpo_jax.rewards.compose import RewardFn


def import_reward(name: str) -> RewardFn:
    """The reward ``module:function``; see ``import_function``."""
    return cast(RewardFn, import_function(name, "reward"))


def import_function(name: str, setting: str) -> Callable[..., Any]:
    """The function ``module:function``, found on Python's path or in the working directory.

    Args:
        name: module and function.
        setting: the setting that names it, for errors.

    Raises:
        ValueError: the name has another form, there is no such module or function, or it is no function. An error
            inside the module is raised as it is.
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
        present = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{module_name} has no function {attribute!r}; it has {present}")
    return function


def read_weighted(text: str) -> tuple[str, float]:
    """The name and weight in ``module:function=0.5`` or ``module:function(scale=2.0)=0.5``; without a weight it is 1.

    Raises:
        ValueError: the weight is no finite number.
    """
    end = text.rfind(")") + 1  # arguments have equals signs too
    name, equals, weight = text[end:].partition("=")
    name = text[:end] + name
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"a reward's weight is a number, as in my_rewards:politeness=0.5; this is {text!r}")
    return name, value
