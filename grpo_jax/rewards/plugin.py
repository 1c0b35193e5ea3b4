"""Rewards of other people's modules, named on the command line."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import cast

from grpo_jax.rewards.compose import RewardFn


def import_reward(name: str) -> RewardFn:
    """The reward ``module:function``, found on Python's path or in the working directory.

    Raises:
        ValueError: the name has another form, there is no such module or function, or it is no function. An error
            inside the module is raised as it is.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"a reward is named module:function, such as my_rewards:politeness; this is {name!r}")
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
    return cast(RewardFn, function)


def read_weighted(text: str) -> tuple[str, float]:
    """The name and weight in ``module:function=0.5``; without a weight it is 1.

    Raises:
        ValueError: the weight is no finite number.
    """
    name, equals, weight = text.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"a reward's weight is a number, as in my_rewards:politeness=0.5; this is {text!r}")
    return name, value
