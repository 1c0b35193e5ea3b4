"""Tests of programs: assertions, inputs with outputs, and calls."""

from __future__ import annotations

import ast
import builtins
import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from grpo_jax.rewards.code import assertions
from grpo_jax.rewards.code.program import bound_names, free_names

Test = str | dict[str, Any]
"""One of three kinds:

- ``{"input": "3\\n4\\n", "output": "7\\n"}``: what the program reads, and what it must write;
- ``{"fn_name": "add", "input": [3, 4], "output": 7}``: a function of it, its arguments, and what it must return;
- ``"assert add(3, 4) == 7"``: Python that may use every name of the program and raises unless all is well. It is run
  as pytest, unittest and HumanEval would: functions and classes of tests and a ``check(candidate)`` that it only
  defines are called.
"""
PRELUDE = {
    "bisect": ("bisect_left", "bisect_right", "insort"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple"),
    "copy": ("deepcopy",),
    "dataclasses": ("dataclass",),
    "datetime": ("timedelta",),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "functools": ("cache", "cmp_to_key", "lru_cache", "partial", "reduce"),
    "heapq": ("heapify", "heappop", "heappush", "nlargest", "nsmallest"),
    "io": ("StringIO",),
    "itertools": ("accumulate", "chain", "combinations", "groupby", "islice", "permutations", "product", "zip_longest"),
    "math": (
        "ceil",
        "comb",
        "cos",
        "e",
        "factorial",
        "floor",
        "gcd",
        "inf",
        "isclose",
        "lcm",
        "log",
        "pi",
        "sin",
        "sqrt",
    ),
    "operator": ("attrgetter", "itemgetter"),
    "typing": ("Any", "Callable", "Dict", "Iterable", "List", "Optional", "Set", "Tuple", "Union"),
}
"""Names that tests use without importing them, because their data sets run programs with these imports before them."""
FROM_PRELUDE = {name: module for module, names in PRELUDE.items() for name in names}
ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib", "sp": "scipy", "tf": "tensorflow", "torch": "torch"}
MAIN_CALLS = ("unittest.main", "pytest.main", "sys.exit", "exit")
PROGRAM_MODULES = ("solution", "your_solution", "candidate", "submission", "main")
"""What tests call the module of the program that they import."""


def check_tests(tests: Any) -> list[Test]:
    """The tests, if they can be run.

    Raises:
        ValueError: they are not a list with at least one test, all of one kind; says what is wrong and where.
    """
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"tests must be a list with at least one test, not {tests!r:.200}")
    for number, test in enumerate(tests, 1):
        if isinstance(test, str):
            if _tree(test) is None:
                raise ValueError(f"test {number} is not Python: {test!r:.200}")
        elif not isinstance(test, dict) or "input" not in test or "output" not in test:
            raise ValueError(f"test {number} must be Python text or have input and output; it is {test!r:.200}")
        elif test.get("fn_name"):
            if not isinstance(test["input"], list):
                raise ValueError(f"test {number} calls a function and its input must be a list: {test!r:.200}")
        elif test.get("testtype") == "functional":
            raise ValueError(f"test {number} is functional and names no function (fn_name): {test!r:.200}")
        elif not isinstance(test["input"], str) or not isinstance(test["output"], str):
            raise ValueError(f"test {number} has no fn_name, so input and output must be text: {test!r:.200}")
    if len({reads_input(test) for test in tests}) > 1:
        raise ValueError("some tests call the program and others give it input; they must be of one way")
    return list(tests)


def reads_input(test: Test) -> bool:
    """Whether a test gives the program input to read, instead of calling it."""
    return not isinstance(test, str) and not test.get("fn_name")


def why_untestable(tests: Any) -> str | None:
    """Why tests tell nothing of a program: malformed, unable to fail, in need of what sandboxes lack; None if not."""
    try:
        checked = check_tests(tests)
    except ValueError as error:
        return str(error)
    texts = [test for test in checked if isinstance(test, str)]
    for number, test in enumerate(texts, 1):
        if missing := missing_modules(test):
            return f"test {number} imports {missing[0]}, which programs' sandboxes do not have: {test!r:.200}"
    if texts and not any(map(can_fail, texts)):
        return f"no test can fail: none asserts anything that depends on the program: {texts[0]!r:.200}"
    if texts and not used_names(texts):
        return f"no test uses a name of the program: {texts[0]!r:.200}"
    return None


def can_fail(test: str) -> bool:
    """Whether some program fails a test, as far as its text tells: see ``assertions.can_fail``."""
    tree = _tree(test)
    return tree is not None and assertions.can_fail(tree)


def missing_modules(test: str) -> list[str]:
    """The modules that a test imports and that are not of the standard library, which is all that sandboxes have."""
    tree = _tree(test)
    named = []
    for node in ast.walk(tree) if tree else ():
        match node:
            case ast.Import(names=aliases):
                named += [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                named.append(module)
    top = {name.partition(".")[0] for name in named}
    top |= {ALIASES[name] for name in (free_names(tree) if tree else ()) if name in ALIASES}
    return sorted(top - sys.stdlib_module_names)


def used_names(tests: Sequence[str]) -> frozenset[str]:
    """The names that tests take from the program.

    Those are the names they use and neither bind nor get from Python, its modules or the usual imports. Where that
    leaves none, as in ``assert sum(10, 15) == 6``, it is the outermost function they all call.
    """
    trees = [tree for test in tests if (tree := _tree(test)) is not None]
    names = frozenset().union(*map(free_names, trees))
    given = names - FROM_PRELUDE.keys() - ALIASES.keys() - sys.stdlib_module_names
    if given:
        return frozenset(given)
    called = [_called(tree) for tree in trees]
    common = [name for name in called[0] if all(name in each for each in called)] if called else []
    return frozenset(common[:1])


def prepared(tests: Sequence[Test]) -> list[dict[str, Any]]:
    """Tests as the judge in its sandbox takes them: texts with the names they get from the program and from Python.

    Calls that would run what a test defines and then exit, such as ``unittest.main()``, are taken out: the judge runs
    those tests itself.
    """
    given = used_names([test for test in tests if isinstance(test, str)])
    return [_prepared(test, given) if isinstance(test, str) else dict(test) for test in tests]


def _prepared(test: str, given: frozenset[str]) -> dict[str, Any]:
    tree = _tree(test)
    assert tree is not None
    used = free_names(tree)
    modules = dict.fromkeys(used & sys.stdlib_module_names)
    of_modules = {name: FROM_PRELUDE[name] for name in used & FROM_PRELUDE.keys()}
    kept = _MainCalls().visit(deepcopy(tree))
    is_changed = ast.dump(kept) != ast.dump(ast.parse(test))
    return {
        "text": ast.unparse(kept) if is_changed else test,
        "lent": {name: module for name, module in {**modules, **of_modules}.items() if name not in given},
        "names": sorted(given & ({*used} | {*_called(tree)})),
        "called": _called(tree),
        "run": sorted(_run_at_the_top(kept)),
    }


class _MainCalls(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_main = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in MAIN_CALLS
        return ast.copy_location(ast.Pass(), node) if is_main else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node


def _run_at_the_top(tree: ast.Module) -> set[str]:
    """The functions that a test calls itself, outside of what it defines."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {name for each in tree.body if not isinstance(each, definitions) for name in _names_called(each)}


def _names_called(tree: ast.AST) -> list[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [function.id for function in calls if isinstance(function, ast.Name)]


def _called(tree: ast.Module) -> list[str]:
    """The names that are called and not bound by the tests themselves, outermost first."""
    bound = bound_names(tree)
    return [name for name in dict.fromkeys(_names_called(tree)) if name not in bound]


@lru_cache(maxsize=256)
def _tree(test: str) -> ast.Module | None:
    """The syntax of a test, without imports of the program by the name that data sets give it; None if not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(test, "test.py", "exec")
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    tree.body = [each for each in tree.body if not _imports_program(each)]
    return tree


def _imports_program(statement: ast.stmt) -> bool:
    """Whether a statement is like ``from solution import add``: the judge has the program's names without it."""
    return (
        isinstance(statement, ast.ImportFrom)
        and statement.module in PROGRAM_MODULES
        and all(alias.asname is None for alias in statement.names)
    )


def _is_test(value: Any) -> bool:
    is_case = isinstance(value, Mapping) and "input" in value and "output" in value
    return is_case or (isinstance(value, str) and "assert" in value)


assert not vars(builtins).keys() & FROM_PRELUDE.keys()
