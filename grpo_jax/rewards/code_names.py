"""Which names a test takes from Python, which from the usual prelude, and which from the program under test."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from grpo_jax.rewards.code_tests import Test, read_tests, reads_stdin

ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "sp": "sympy", "dt": "datetime"}
STARRED = (
    "typing",
    "collections",
    "math",
    "itertools",
    "functools",
    "datetime",
    "decimal",
    "fractions",
    "heapq",
    "bisect",
)
"""Modules whose names many tests use without an import, because harnesses import them with ``*``."""
OWN_MODULES = ("solution", "main", "program", "submission", "candidate", "answer", "task", "module", "your_module")
OWN_MODULES += ("my_module", "your_module_name", "target", "__main__")
"""Modules by which tests import from the program under test."""
WRAPPERS = {"isclose", "set", "sorted", "list", "tuple", "len", "abs", "round", "str", "bool", "Counter", "deepcopy"}
CHECKS = re.compile(r"assert|check|test|fail|exit|raises|verify|expect|main|debug|run", re.IGNORECASE)
NEVER_SUBJECTS = {"globals", "locals", "vars", "eval", "exec", "print", "isinstance", "getattr", "hasattr", "callable"}
BUILTINS = frozenset(vars(builtins)) | {"__name__", "__file__"}


def free_names(source: str) -> set[str]:
    """The names that Python source uses and does not define, Python's own builtins included."""
    top = symtable.symtable(source, "source.py", "exec")
    bound = {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for each in table.get_symbols():
            if each.is_referenced() and (table is top or each.is_global()):
                used.add(each.get_name())
            if each.is_declared_global() and each.is_assigned():
                bound.add(each.get_name())
    return used - bound


@cache
def starred_names() -> dict[str, str]:
    """Names of ``STARRED`` modules, each with its module."""
    found: dict[str, str] = {"deepcopy": "copy"}
    for module in STARRED:
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", None) or [name for name in vars(loaded) if not name.startswith("_")]:
            found.setdefault(name, module)
    return {name: module for name, module in found.items() if name not in BUILTINS}


def plan_tests(tests: Sequence[Any], *, prompt: str = "", entry_point: str | None = None) -> list[dict[str, Any]]:
    """For each test that is Python: its code, and where each of its names comes from.

    Builtins, modules of the standard library and names of ``STARRED`` are Python's own; the program cannot replace
    them. The exception is a function that the tests are about: ``entry_point``, or, where a test calls nothing else,
    the function that it calls first, such as ``sum`` in ``assert sum([1, 2]) == 3``.

    Returns:
        For each a mapping of ``code`` and ``entry_point``; ``lent``, module (and attribute) of every name of the usual
        prelude; ``subjects``, names of the program even where Python has one of that name; ``required``, names that
        are the program's fault where they are missing; and ``told``, whether the prompt or the entry point names them.
    """
    plans = [_plan(test, entry_point) for test in tests]
    called = {name for plan in plans for name in plan.pop("called")}
    if not called:
        for plan in plans:
            candidates = {*plan.pop("candidates")}
            said = {name for name in candidates if prompt and re.search(rf"\b{name}\b\s*\(", prompt)}
            subject = _first_call(plan["tree"], said) or _first_call(plan["tree"], candidates)
            if subject and not plan["entry_point"]:
                plan["subjects"].append(subject)
                plan["lent"].pop(subject, None)
    known = {plan["entry_point"] for plan in plans} - {None}
    subjects = called | {name for plan in plans for name in plan["subjects"]}
    free = {name for plan in plans for name in plan["free"]}
    mentioned = known | {name for name in free | subjects if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt)}
    for plan in plans:
        plan.pop("candidates", None)
        plan["required"], plan["told"] = sorted(mentioned or subjects or free), bool(mentioned)
    return plans


def why_untestable(tests: Any, *, prompt: str = "", entry_point: str | None = None) -> str | None:
    """Why tests of a row can tell nothing of any program; None where they can.

    They cannot be read, import a module that sandboxes lack, use no name of the program, or contain nothing that fails
    for a wrong program: a definition that nothing runs, or calls without a comparison that is asserted.

    Args:
        tests: as ``read_tests`` takes them.
        prompt: of the row; a name that it mentions may be the program's.
        entry_point: the function that the tests are about, where the row has one.
    """
    try:
        listed = read_tests(tests)
    except ValueError as error:
        return str(error)
    if reads_stdin(listed[0]):
        return None
    number = 0
    can_fail = False
    for number, test in enumerate(listed, 1):
        if isinstance(test, dict) and "fn_name" in test:
            can_fail = True
            continue
        (plan,) = plan_tests([test], prompt=prompt, entry_point=entry_point)
        tree = plan["tree"]
        if missing := missing_modules(tree, plan["lent"]):
            return f"test {number} needs the module {missing[0]}, which is not in the sandbox: {_short(test)}"
        live = list(_live(tree))
        if not live:
            return f"test {number} only defines something that nothing runs: {_short(test)}"
        names = {node.id for node in live if isinstance(node, ast.Name)}
        is_used = plan["uses_program"] and (plan["imports_program"] or plan["checks"] or names & {*plan["free"]})
        if not is_used:
            return f"test {number} does not use the program, so it says nothing of it: {_short(test)}"
        can_fail = can_fail or plan["checks"] or any(map(_may_fail, live))
    return None if can_fail else f"nothing in the tests can fail: they compare nothing: {_short(listed[0])}"


def missing_modules(tree: ast.AST, lent: dict[str, str]) -> list[str]:
    """Modules that a test imports, or uses by the usual alias, and that neither Python nor the program provides."""
    guarded = {id(each) for node in ast.walk(tree) if isinstance(node, ast.Try) for each in ast.walk(node)}
    wanted = list(lent.values())
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted.append(node.module or "")
    return sorted({name for name in wanted if not _is_there(name)})


def _is_there(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in OWN_MODULES or top == "pytest"  # see inside/runner.py


def _plan(test: Test, entry_point: str | None) -> dict[str, Any]:
    if isinstance(test, dict):
        code = f"{test.get('preamble', '')}\n{test['test']}" if test.get("preamble") else test["test"]
        entry_point = test["entry_point"]
    else:
        code = test
    tree = ast.parse(code)
    free = free_names(code)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    of_module = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    loads = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    attributes = [
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    lent: dict[str, str] = {}
    for name in free - BUILTINS - {entry_point}:
        is_module = name in of_module and loads.count(name) == attributes.count(name)
        if is_module and (name in ALIASES or name in sys.stdlib_module_names):
            lent[name] = ALIASES.get(name, name)
        elif name in starred_names():
            lent[name] = f"{starred_names()[name]}.{name}"
    own = free - BUILTINS - {*lent}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    of_program = [node for node in imports if _from_program(node)]
    explicit = any(isinstance(node, ast.Import) or node.names[0].name != "*" for node in of_program)
    imports_program = bool(of_program)
    other = [alias.asname or alias.name for node in imports if node not in of_program for alias in node.names]
    candidates = (calls & free & BUILTINS - NEVER_SUBJECTS) | {name for name in calls & {*lent} if "." in lent[name]}
    checks = any(
        isinstance(node, ast.FunctionDef) and node.name == "check" and len(node.args.args) == 1 for node in tree.body
    ) and not any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
        for node in _top(tree)
    )
    return {
        "code": code,
        "tree": tree,
        "entry_point": entry_point,
        "lent": lent,
        "subjects": [entry_point] if entry_point else [],
        "called": calls & own,
        "candidates": candidates if not own and not explicit and not checks else set(),
        "free": own | ({entry_point} if entry_point else set()) | (candidates if not own else set()),
        "uses_program": bool(own or imports_program or candidates or checks or (entry_point and entry_point in free)),
        "imports_program": imports_program,
        "imported": other,
        "checks": checks,
    }


def _from_program(node: ast.Import | ast.ImportFrom) -> bool:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return any(module.partition(".")[0] in OWN_MODULES for module in modules)


def _first_call(tree: ast.AST, candidates: set[str]) -> str | None:
    """The first candidate that is called, outermost first, beyond functions that only wrap another call."""
    for node in ast.walk(tree):
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            inner = node.args[0] if node.args else None
            is_wrapped = (
                isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in candidates
            )
            if node.func.id in candidates and not (node.func.id in WRAPPERS and is_wrapped):
                return node.func.id
            if not is_wrapped:
                break
            node = inner
    return None


def _top(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is loaded: not the bodies of functions."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack += getattr(node, "decorator_list", [])
        else:
            stack += ast.iter_child_nodes(node)


def _live(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes of a test that run: top-level statements, what a test runner would collect, and what those refer to."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    waiting: list[ast.AST] = [
        node for node in tree.body if not isinstance(node, (*kinds, ast.Import, ast.ImportFrom, ast.Pass))
    ]
    waiting = [node for node in waiting if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    waiting += [node for node in defined.values() if _is_collected(node)]
    seen = {id(node) for node in waiting}
    while waiting:
        for node in ast.walk(waiting.pop()):
            yield node
            meant = defined.get(node.id) if isinstance(node, ast.Name) else None
            if meant is not None and id(meant) not in seen:
                seen.add(id(meant))
                waiting.append(meant)


def _is_collected(node: ast.AST) -> bool:
    if isinstance(node, ast.ClassDef):
        bases = {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in node.bases}
        has_tests = any(getattr(each, "name", "").startswith("test") for each in node.body)
        return has_tests and (node.name.startswith("Test") or any("TestCase" in base for base in bases))
    name = getattr(node, "name", "")
    return name.startswith("test") or name == "check"


def _may_fail(node: ast.AST) -> bool:
    if isinstance(node, (ast.Assert, ast.Raise)):
        return True
    name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
    return bool(CHECKS.search(name))


def _short(test: Test) -> str:
    return f"{test if isinstance(test, str) else test.get('test', test)!r:.200}"
