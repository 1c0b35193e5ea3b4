"""Reinforcement learning of language models in JAX, as pure functions on arrays.

Modules are imported when they are first used: ``import grpo_jax``, then ``grpo_jax.loss.grpo_loss``.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

_MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"grpo_jax has no module {name!r}; it has {', '.join(_MODULES)}")
    return importlib.import_module(f"grpo_jax.{name}")


def __dir__() -> list[str]:
    return _MODULES
