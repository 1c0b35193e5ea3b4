"""Imports go down only: a file imports from layers below its own, and pure modules import nothing but jax.

Files and functions are short, and public functions document their arguments.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import grpo_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "grpo_jax"

LAYERS = (
    {"packed", "hosts", "devices"},
    {"heartbeat", "types", "log_probs", "sampling", "evaluate", "checkpoint", "jsonl"},
    {"masked", "sharding", "data", "monitor"},
    {"models", "rollout", "loss", "advantage"},
    {"train"},
    {"rewards"},
    {"tasks"},
    {"config"},
    {"loop"},
)
FLOORS = {unit: floor for floor, units in enumerate(LAYERS) for unit in units}
PURE_UNITS = {"packed", "types", "masked", "log_probs", "sampling", "advantage", "loss"}
"""Arrays in, arrays out: no placement, no compilation, no I/O."""
UPSTAIRS = {"experiments", "notebooks", "tests"}

# What arithmetic needs of the standard library; none of it reads, writes or prints.
PURE = {"__future__", "collections", "dataclasses", "functools", "inspect", "itertools", "math", "typing"}
ARRAYS = {"jax", "jaxtyping", "chex"}
COMPUTE = ARRAYS | set(sys.stdlib_module_names) | {"numpy"}
# Of jax itself: no placement, no compilation, no way out to the host.
PLACED = {"jax.sharding", "jax.experimental", "jax.debug", "jax.jit", "jax.pmap", "jax.device_put", "jax.make_mesh"}
HOST_CALLS = {"jax.pure_callback", "jax.device_get", "jax.shard_map", "jax.monitoring", "jax.profiler"}
BUILTIN_IO = {"print", "open", "input", "exec", "eval", "breakpoint", "__import__"}


def unit_of(module: str) -> str:
    """The file or folder of the package that a module belongs to: ``models`` for ``grpo_jax.models.layers``."""
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
    """Imports and calls of a file that its layer does not allow, one line each."""
    unit = unit_of(module)
    if unit not in FLOORS:
        return [f"{module} is in no layer; add it to LAYERS"]
    floor, tree = FLOORS[unit], ast.parse(source)
    is_pure = unit in PURE_UNITS
    found = []
    for name in sorted(imports_of(tree, module, is_package)):
        top = name.split(".")[0]
        if top == "grpo_jax":
            other = unit_of(name) if "." in name else ""
            if other not in FLOORS:
                found.append(f"{module} imports {name}, which is in no layer")
            elif other != unit and FLOORS[other] >= floor:
                found.append(f"{module} (layer {floor}) imports {name} (layer {FLOORS[other]})")
        elif top in UPSTAIRS:
            found.append(f"{module} imports {name}, which nothing may import")
        elif top == "flax" and unit != "models":
            found.append(f"{module} imports {name}; only models/ may import flax")
        elif is_pure and top not in ARRAYS | PURE:
            found.append(f"{module} imports {name}; pure modules import only {sorted(ARRAYS)}")
        elif unit in ("rollout", "train") and top not in COMPUTE and (unit, top) != ("train", "optax"):
            found.append(f"{module} imports {name}; rollout/ and train/ import jax and numpy, and train/ optax")
        if is_pure and within(name, PLACED | HOST_CALLS):
            found.append(f"{module} imports {name}; placement and compilation come from outside")
    if is_pure:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in BUILTIN_IO:
                found.append(f"{module}:{node.lineno} calls {node.id}; pure modules do no input or output")
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
def test_a_file_imports_only_lower_layers(path, module, is_package):
    assert violations(path.read_text(), module, is_package) == []


def test_the_package_itself_imports_nothing_but_the_standard_library():
    imported = imports_of(ast.parse((PACKAGE / "__init__.py").read_text()), "grpo_jax", is_package=True)
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def imported_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running some code in a fresh interpreter."""
    probe = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split())


NO_DEVICES = """
from jax._src import xla_bridge
from grpo_jax.config.presets import SCRIPTS, preset
for name in SCRIPTS:
    preset(name)
    assert not xla_bridge.backends_are_initialized(), name
"""


def test_settings_start_no_devices():
    """Those of the experiments' presets: processes must be connected before JAX's devices are used."""
    subprocess.run([sys.executable, "-c", NO_DEVICES], check=True)


def test_modules_are_listed_and_loaded_on_first_use():
    assert "jax" not in imported_by("import grpo_jax")
    for code in ("import grpo_jax.loss", "import grpo_jax; grpo_jax.loss.grpo_loss, grpo_jax.advantage.gae"):
        assert not {"flax", "transformers", "optax"} & imported_by(code)
    assert dir(grpo_jax) == sorted(FLOORS)
    assert grpo_jax.masked is sys.modules["grpo_jax.masked"]
    with pytest.raises(AttributeError, match="no module 'losses'; it has advantage, "):
        grpo_jax.losses  # noqa: B018


COMMAND = """
import contextlib, io, runpy, sys
sys.argv = {argv!r}
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("arguments", ["grpo --help", "grpo --no-such-flag", "r1 --help"])
def test_help_and_a_mistyped_flag_do_not_wait_for_what_only_a_run_needs(arguments):
    script, flag = arguments.split()
    imported = imported_by(COMMAND.format(argv=[str(ROOT / "experiments" / f"{script}.py"), flag]))
    assert {"jax", "tyro"} <= imported  # the script has run
    late = {"transformers", "flax", "orbax", "matplotlib", "grain", "torch", "datasets", "pyarrow", "safetensors"}
    assert not (late | {"sympy", "mpmath", "py3langid"}) & imported


def scripts():
    return sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_no_script_imports_another(path):
    names = {each.stem for each in scripts()} | UPSTAIRS
    imported = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()), path.stem)}
    assert not imported & names


def test_files_and_functions_are_short():
    """Prints the lines of code of each folder: no blank lines, comments or docstrings."""
    code, long_files, long_functions = Counter(), set(), set()
    for path in [*sorted(PACKAGE.rglob("*.py")), *scripts()]:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        tree = ast.parse(text)
        code["/".join(path.relative_to(ROOT).parts[:-1][:2])] += lines_of_code(text, tree)
        if len(text.splitlines()) > 400:
            long_files.add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 100:
                long_functions.add(f"{name}:{node.name}")
    print(dict(code), sum(code.values()))
    assert not long_files
    assert not long_functions


def lines_of_code(text, tree):
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def public_functions(body: list[ast.stmt], owner: ast.ClassDef | None = None):
    """``(function, its class or None)`` for each public function, and each public method of a public class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node, owner


def documents(function: ast.FunctionDef) -> bool:
    return "Args:" in (ast.get_docstring(function) or "")


def undocumented(sources: dict[str, str]) -> list[str]:
    """Public functions with two or more parameters and no ``Args:`` in the docstring.

    Exempt are overloads, and methods whose ``Args:`` are at a base class in the same sources.
    """
    trees = {module: ast.parse(source) for module, source in sources.items()}
    classes = {n.name: n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}

    def has_arguments(function):
        args = function.args
        names = {arg.arg for arg in args.posonlyargs + args.args + args.kwonlyargs}
        is_overload = any((dotted(each) or "").split(".")[-1] == "overload" for each in function.decorator_list)
        return len(names - {"self", "cls"}) >= 2 and not is_overload

    def inherits(owner, name):
        bases = [classes[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in classes]
        methods = [node for base in bases for node in base.body if getattr(node, "name", None) == name]
        return any(map(documents, methods)) or any(inherits(base, name) for base in bases)

    return [
        f"{module}:{function.name}"
        for module, tree in trees.items()
        for function, owner in public_functions(tree.body)
        if has_arguments(function)
        and not documents(function)
        and not (owner is not None and inherits(owner, function.name))
    ]


def test_public_functions_document_their_arguments():
    assert undocumented({module: path.read_text() for path, module, _ in files()}) == []


def test_every_unit_of_the_layers_exists():
    assert {unit_of(module) for _, module, _ in files()} == set(FLOORS)


# The checker itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("grpo_jax.masked", "from grpo_jax.loss import grpo_loss", "grpo_jax.loss.grpo_loss (layer 3)"),
        ("grpo_jax.types", "from grpo_jax import masked", "grpo_jax.masked (layer 2)"),
        ("grpo_jax.loss", "import grpo_jax.train", "grpo_jax.train (layer 4)"),
        ("grpo_jax.loss", "from . import advantage", "grpo_jax.advantage (layer 3)"),
        ("grpo_jax.loss", "from .advantage import rloo", "grpo_jax.advantage.rloo (layer 3)"),
        ("grpo_jax.loss", "def f():\n    from grpo_jax.models import config", "grpo_jax.models.config (layer 3)"),
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
        ("grpo_jax.rollout", "from grpo_jax.train import make_train_step", "grpo_jax.train.make_train_step (layer 4)"),
        ("grpo_jax.data.prompts", "from grpo_jax.rewards import math", "grpo_jax.rewards.math (layer 5)"),
        ("grpo_jax.monitor.plots", "from grpo_jax.models import config", "grpo_jax.models.config (layer 3)"),
        ("grpo_jax.rewards.math", "from grpo_jax.tasks import sums", "grpo_jax.tasks.sums (layer 6)"),
        ("grpo_jax.config.run", "from grpo_jax.loop.run import Run", "grpo_jax.loop.run.Run (layer 8)"),
        ("grpo_jax.checkpoint", "from flax.training import checkpoints", "flax"),
        ("grpo_jax.evaluate", "from grpo_jax.loop import run", "grpo_jax.loop.run (layer 8)"),
        ("grpo_jax.loop.run", "from experiments.countdown import Config", "experiments.countdown.Config"),
        ("grpo_jax.loop.run", "import flax", "flax"),
        ("grpo_jax.attic", "", "grpo_jax.attic is in no layer"),
        ("grpo_jax.loop.run", "from grpo_jax.attic import x", "grpo_jax.attic.x, which is in no layer"),
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
        ("grpo_jax.rewards.math.compare", "import json\nprint(1)\nfrom grpo_jax.types import Rollout"),
        ("grpo_jax.loop.run", "from grpo_jax import models, data"),
    ],
)
def test_the_checker_allows_what_is_allowed(module, source):
    assert violations(source, module) == []


TRACKER = """
class Tracker:
    def log(self, metrics, step):
        {docstring}

class File(Tracker):
    def log(self, metrics, step):
        pass
"""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x, y):\n    'Sum.'", ["a:f"]),
        ("async def f(x, *, y):\n    'Sum.'", ["a:f"]),
        ("class A:\n    @classmethod\n    def f(cls, x, /, y): ...", ["a:f"]),
        ("def f(x, y):\n    'Sum.\\n\\n    Args:\\n        x: one.'", []),
        ("def f(x, **y): ...", []),
        ("def _f(x, y): ...", []),
        ("class _A:\n    def f(self, x, y): ...", []),
        ("class A:\n    def __init__(self, x, y): ...\n    def f(self, x): ...", []),
        ("@typing.overload\ndef f(x, y): ...", []),
        (TRACKER.format(docstring="'Log.'"), ["a:log", "a:log"]),
        (TRACKER.format(docstring="'Log. Args: all.'"), []),
    ],
)
def test_the_checker_finds_functions_without_documented_arguments(source, found):
    assert undocumented({"a": source}) == found


def test_arguments_may_be_documented_at_a_base_class_in_another_module():
    base = "class Base:\n    def f(self, x, y):\n        'Args: x and y.'"
    derived = "class Middle(Base): ...\nclass A(Middle):\n    def f(self, x, y): ..."
    assert undocumented({"a": base, "b": derived}) == []
    assert undocumented({"b": derived}) == ["b:f"]


def test_relative_imports_are_resolved_from_a_folder_as_from_a_file():
    tree = ast.parse("from . import a\nfrom .b import c\nfrom ..masked import d")
    expected = {"grpo_jax.models.a", "grpo_jax.models.b.c", "grpo_jax.masked.d"}
    assert imports_of(tree, "grpo_jax.models.layers") == expected
    assert imports_of(tree, "grpo_jax.models", is_package=True) == expected
