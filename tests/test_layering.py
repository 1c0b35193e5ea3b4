"""Who may import whom. A file imports from floors below its own; the arithmetic of floors 0 and 1 imports jax alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_jax"

FLOORS = {
    "types": 0,
    "masked": 0,
    "log_probs": 1,
    "advantage": 1,
    "loss": 1,
    "sampling": 1,
    "rollout": 2,
    "train": 2,
    "sharding": 2,
    "models": 3,
    "checkpoint": 3,
    "data": 3,
    "rewards": 3,
    "monitor": 3,
    "evaluate": 3,
    "run": 4,
    "small_base": 4,
    "experiment": 5,
    "text_settings": 5,
    "data_report": 5,
    "tasks": 5,
    "light_critic": 5,
    "rounds": 6,
    "collect": 6,
    "selection": 7,
    "settings": 4,
    "prompt_settings": 4,
    "reward_model_input": 4,
    "reward_settings": 4,
}
# (who, whom) on one floor: whoever needs one says so here, and it goes when the need does.
# Imports within a floor, each because one is made of the other: a cohort's rows are taken device by device, an
# adapter brings its task's own reward, the held-out loop reads problems and grades answers, the default of the settings
# is the embedded base's task, signals of gamed rewards are read with the rewards' own eyes.
NEIGHBOURS = {
    ("masked", "types"),
    ("rollout", "sharding"),
    ("data", "rewards"),
    ("evaluate", "data"),
    ("evaluate", "rewards"),
    ("settings", "small_base"),
    ("settings", "prompt_settings"),
    ("reward_settings", "reward_model_input"),
    ("reward_model_input", "prompt_settings"),
    ("monitor", "rewards"),
}
UPSTAIRS = {"experiments", "notebooks", "tests"}

# What arithmetic needs of the standard library; none of it reads, writes or prints.
PURE = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing"}
ARRAYS = {"jax", "jaxtyping"}
OF_FLOOR_2 = ARRAYS | set(sys.stdlib_module_names) | {"numpy"}
# Of jax itself: no placement, no compilation, no way out to the host, on floors 0 and 1.
PLACED = {"jax.sharding", "jax.experimental", "jax.debug", "jax.jit", "jax.pmap", "jax.device_put", "jax.make_mesh"}
HOST_CALLS = {"jax.pure_callback", "jax.device_get", "jax.shard_map", "jax.monitoring", "jax.profiler"}
BUILTIN_IO = {"print", "open", "input", "exec", "eval", "breakpoint", "__import__"}


def unit_of(module: str) -> str:
    """The file or folder on a floor that a module belongs to: ``models`` for ``grpo_jax.models.layers``."""
    return module.split(".")[1]


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Every module that is imported anywhere in a file, with full dotted names, ``from a import b`` as ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                parent = parts[: len(parts) - node.level + 1]
                origin = ".".join([*parent, origin] if origin else parent)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a file does that its floor does not allow, one line each."""
    unit = unit_of(module)
    if unit not in FLOORS:
        return [f"{module} stands on no floor; give it one in FLOORS"]
    floor, tree = FLOORS[unit], ast.parse(source)
    found = []
    for name in sorted(imports_of(tree, module, is_package)):
        top = name.split(".")[0]
        if top == "grpo_jax":
            other = unit_of(name) if "." in name else ""
            if other not in FLOORS:
                found.append(f"{module} imports {name}, which stands on no floor")
            elif other != unit and FLOORS[other] >= floor and (unit, other) not in NEIGHBOURS:
                found.append(f"{module} (floor {floor}) imports {name} (floor {FLOORS[other]})")
        elif top in UPSTAIRS:
            found.append(f"{module} imports {name}, which nothing may import")
        elif top == "flax" and unit != "models":
            found.append(f"{module} imports {name}; flax belongs into models/ alone")
        elif floor <= 1 and top not in ARRAYS | PURE:
            found.append(f"{module} (floor {floor}) imports {name}; it may use {sorted(ARRAYS)} alone")
        elif floor == 2 and top not in OF_FLOOR_2 and (unit, top) != ("train", "optax"):
            found.append(f"{module} (floor 2) imports {name}; optax in train is the only exception")
        if floor <= 1 and within(name, PLACED | HOST_CALLS):
            found.append(f"{module} (floor {floor}) imports {name}; placement and compilation come from outside")
    if floor <= 1:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in BUILTIN_IO:
                found.append(f"{module}:{node.lineno} calls {node.id}; floors 0 and 1 do no input or output")
            if isinstance(node, ast.Attribute) and (name := dotted(node)) in PLACED | HOST_CALLS:
                found.append(f"{module}:{node.lineno} uses {name}; placement and compilation come from outside")
    return found


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if module != "grpo_jax":
            yield path, module, is_package


@pytest.mark.parametrize(("path", "module", "is_package"), [pytest.param(*f, id=f[1]) for f in files()])
def test_a_file_keeps_to_its_floor(path, module, is_package):
    assert violations(path.read_text(), module, is_package) == []


def test_the_package_itself_imports_nothing():
    assert imports_of(ast.parse((PACKAGE / "__init__.py").read_text()), "grpo_jax", is_package=True) == set()


def test_the_core_exists_and_every_floor_is_looked_at():
    seen = {unit_of(module) for _, module, _ in files()}
    assert {name for name, floor in FLOORS.items() if floor <= 2} <= seen


def test_no_leave_to_import_a_neighbour_is_stale_circular_or_between_floors():
    used = {
        (unit_of(module), unit_of(name))
        for path, module, is_package in files()
        for name in imports_of(ast.parse(path.read_text()), module, is_package)
        if name.startswith("grpo_jax.")
    }
    assert used >= NEIGHBOURS
    assert not {(whom, who) for who, whom in NEIGHBOURS} & used
    assert all(FLOORS[who] == FLOORS[whom] for who, whom in NEIGHBOURS)


# The checker itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("grpo_jax.masked", "from grpo_jax.loss import grpo_loss", "grpo_jax.loss.grpo_loss (floor 1)"),
        ("grpo_jax.types", "from grpo_jax import masked", "grpo_jax.masked (floor 0)"),
        ("grpo_jax.loss", "import grpo_jax.train", "grpo_jax.train (floor 2)"),
        ("grpo_jax.loss", "from . import sampling", "grpo_jax.sampling (floor 1)"),
        ("grpo_jax.loss", "from .advantage import rloo", "grpo_jax.advantage.rloo (floor 1)"),
        ("grpo_jax.loss", "def f():\n    from grpo_jax.models import config", "grpo_jax.models.config (floor 3)"),
        ("grpo_jax.loss", "import optax", "optax"),
        ("grpo_jax.loss", "import flax.linen as nn", "flax.linen"),
        ("grpo_jax.loss", "import numpy as np", "numpy"),
        ("grpo_jax.loss", "from pathlib import Path", "pathlib.Path"),
        ("grpo_jax.loss", "import logging", "logging"),
        ("grpo_jax.loss", "import orbax.checkpoint", "orbax.checkpoint"),
        ("grpo_jax.loss", "def f(x):\n    print(x)", "calls print"),
        ("grpo_jax.loss", "data = open('x').read()", "calls open"),
        ("grpo_jax.loss", "import jax\n@jax.jit\ndef f(x):\n    return x", "uses jax.jit"),
        ("grpo_jax.loss", "import jax\nf = jax.vmap(jax.jit(g))", "uses jax.jit"),
        ("grpo_jax.loss", "from jax import jit", "imports jax.jit"),
        ("grpo_jax.loss", "from jax.sharding import PartitionSpec", "jax.sharding.PartitionSpec"),
        ("grpo_jax.loss", "import jax\njax.debug.print('x')", "uses jax.debug"),
        ("grpo_jax.types", "from jax.experimental import io_callback", "jax.experimental.io_callback"),
        ("grpo_jax.rollout", "import optax", "optax"),
        ("grpo_jax.train", "import flax", "flax"),
        ("grpo_jax.train", "import orbax.checkpoint", "orbax.checkpoint"),
        ("grpo_jax.train", "from grpo_jax.rollout import generate", "grpo_jax.rollout.generate (floor 2)"),
        ("grpo_jax.rewards.math", "from grpo_jax.data import tasks", "grpo_jax.data.tasks (floor 3)"),
        ("grpo_jax.checkpoint", "from flax.training import checkpoints", "flax"),
        ("grpo_jax.evaluate", "from grpo_jax.run import start", "grpo_jax.run.start (floor 4)"),
        ("grpo_jax.run", "from experiments.countdown import Config", "experiments.countdown.Config"),
        ("grpo_jax.run", "import flax", "flax"),
        ("grpo_jax.attic", "", "grpo_jax.attic stands on no floor"),
        ("grpo_jax.run", "from grpo_jax.attic import x", "grpo_jax.attic.x, which stands on no floor"),
    ],
)
def test_the_checker_finds_a_planted_violation(module, source, culprit):
    found = violations(source, module)
    assert len(found) == 1
    assert culprit in found[0]
    assert module in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("grpo_jax.loss", "import jax\nimport jax.numpy as jnp\nfrom grpo_jax.masked import mean_pair"),
        ("grpo_jax.loss", "from collections.abc import Callable\nfrom functools import partial"),
        ("grpo_jax.loss", "from .masked import mean_pair"),
        ("grpo_jax.masked", "from grpo_jax.types import Mean"),
        ("grpo_jax.train", "import optax\nfrom jax.sharding import Sharding\nimport jax\njax.jit(f)"),
        ("grpo_jax.sharding", "import re\nimport numpy as np"),
        (
            "grpo_jax.models.layers",
            "import flax.linen as nn\nfrom .config import Config\nfrom grpo_jax.models import hf",
        ),
        ("grpo_jax.rewards.math", "import json\nprint(1)\nfrom grpo_jax.types import Rollout"),
        ("grpo_jax.run", "from grpo_jax import models, data"),
    ],
)
def test_the_checker_allows_what_is_allowed(module, source):
    assert violations(source, module) == []


def test_relative_imports_are_resolved_from_a_folder_as_from_a_file():
    tree = ast.parse("from . import a\nfrom .b import c\nfrom ..masked import d")
    expected = {"grpo_jax.models.a", "grpo_jax.models.b.c", "grpo_jax.masked.d"}
    assert imports_of(tree, "grpo_jax.models.layers") == expected
    assert imports_of(tree, "grpo_jax.models", is_package=True) == expected
