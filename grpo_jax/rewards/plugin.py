"""Functions of the user's own modules, named on the command line as ``module:function``."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.rewards.compose import RewardFn


def import_reward(name: str) -> RewardFn:
    """The reward function that ``module:function`` names; errors as in ``import_function``."""
    return import_function(name, "reward")


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
        present = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{module_name} has no function {attribute!r}; it has {present}")
    return function


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
