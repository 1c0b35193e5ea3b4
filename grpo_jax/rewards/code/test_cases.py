"""Tests of programs: assertions, inputs with outputs, and function calls; validation, and analysis of their names."""

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

- ``{"input": "3\\n4\\n", "output": "7\\n"}``: the program's standard input and its expected output;
- ``{"fn_name": "add", "input": [3, 4], "output": 7}``: a function, its arguments and the expected result;
- ``"assert add(3, 4) == 7"``: Python that may use every name of the program and raises if the program is wrong. Test
  functions and classes that it defines are run as by pytest and unittest, and ``check(candidate)`` as by HumanEval.
"""
PRELUDE = {
    "bisect": "bisect_left bisect_right insort",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "dataclasses": "dataclass",
    "datetime": "timedelta",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "heapq": "heapify heappop heappush nlargest nsmallest",
    "io": "StringIO",
    "itertools": "accumulate chain combinations groupby islice permutations product zip_longest",
    "math": "ceil comb cos e factorial floor gcd inf isclose lcm log pi sin sqrt",
    "operator": "attrgetter itemgetter",
    "typing": "Any Callable Dict Iterable List Optional Set Tuple Union",
}
"""Names that tests use without importing them, because their data sets prepend these imports to every program."""
FROM_PRELUDE = {name: module for module, names in PRELUDE.items() for name in names.split()}
ALIASES = {"np": "numpy", "pd": "pandas", "plt": "matplotlib", "sp": "scipy", "tf": "tensorflow", "torch": "torch"}
MAIN_CALLS = ("unittest.main", "pytest.main", "sys.exit", "exit")
PROGRAM_MODULES = ("solution", "your_solution", "candidate", "submission", "main")
"""Module names under which tests import the program."""


def check_tests(tests: Any) -> list[Test]:
    """The tests, validated.

    Raises:
        ValueError: they are not a non-empty list, a test is malformed, or some read input and others call the program.
    """
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"tests must be a list with at least one test, not {tests!r:.200}")
    for number, test in enumerate(tests, 1):
        if isinstance(test, str):
            if _tree(test) is None:
                raise ValueError(f"test {number} is not Python: {test!r:.200}")
        elif not isinstance(test, dict) or "input" not in test or "output" not in test:
            raise ValueError(f"test {number} must be Python text or a dict with input and output; it is {test!r:.200}")
        elif test.get("fn_name"):
            if not isinstance(test["input"], list):
                raise ValueError(
                    f"test {number} has a fn_name, so its input must be a list of arguments: {test!r:.200}"
                )
        elif test.get("testtype") == "functional":
            raise ValueError(f"test {number} is functional but has no fn_name: {test!r:.200}")
        elif not isinstance(test["input"], str) or not isinstance(test["output"], str):
            raise ValueError(f"test {number} has no fn_name, so input and output must be text: {test!r:.200}")
    if len({reads_input(test) for test in tests}) > 1:
        raise ValueError("some tests call the program and others give it input; all of a problem must do the same")
    return list(tests)


def reads_input(test: Test) -> bool:
    """Whether a test runs the program as a script on an input, instead of calling it."""
    return not isinstance(test, str) and not test.get("fn_name")


def why_untestable(tests: Any) -> str | None:
    """The reason why tests cannot grade any program; None if they can.

    They are malformed, cannot fail, do not use the program, or import modules that sandboxes do not have.
    """
    try:
        texts = [test for test in check_tests(tests) if isinstance(test, str)]
    except ValueError as error:
        return str(error)
    for number, test in enumerate(texts, 1):
        if missing := missing_modules(test):
            return f"test {number} imports {missing[0]}, which is not installed in sandboxes: {test!r:.200}"
    if texts and not any(map(can_fail, texts)):
        return f"no test can fail, since none asserts anything that depends on the program: {texts[0]!r:.200}"
    if texts and not used_names(texts):
        return f"no test uses a name of the program: {texts[0]!r:.200}"
    return None


def can_fail(test: str) -> bool:
    """Whether the text of a test contains an assertion that can fail (``assertions.can_fail``)."""
    tree = _tree(test)
    return tree is not None and assertions.can_fail(tree)


def missing_modules(test: str) -> list[str]:
    """The modules outside of the standard library that a test imports, or uses under their usual aliases."""
    tree = _tree(test)
    imported = []
    for node in ast.walk(tree) if tree else ():
        match node:
            case ast.Import(names=aliases):
                imported += [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), level=0):
                imported.append(module)
    modules = {name.partition(".")[0] for name in imported}
    modules |= {ALIASES[name] for name in (free_names(tree) if tree else ()) if name in ALIASES}
    return sorted(modules - sys.stdlib_module_names)


def used_names(tests: Sequence[str]) -> frozenset[str]:
    """The names of the program that tests use.

    These are the names that tests use without binding them and that neither Python, its modules nor the usual imports
    provide. If there are none, as in ``assert sum(10, 15) == 6``, the outermost function that all tests call.
    """
    trees = [tree for test in tests if (tree := _tree(test)) is not None]
    names = frozenset().union(*map(free_names, trees))
    of_program = names - FROM_PRELUDE.keys() - ALIASES.keys() - sys.stdlib_module_names
    if of_program:
        return frozenset(of_program)
    calls = [_called(tree) for tree in trees]
    common = [name for name in calls[0] if all(name in called for called in calls)] if calls else []
    return frozenset(common[:1])


def prepared(tests: Sequence[Test]) -> list[dict[str, Any]]:
    """Tests in the form that ``inside/test_runner.py`` takes.

    The text of an assertion comes with ``names`` (those of the program), ``imports`` (name -> its module of Python,
    None for a module itself), ``called`` (functions that it calls and does not define) and ``run`` (functions that it
    calls at the top level). Calls such as ``unittest.main()``, which run tests and exit, are removed: the test runner
    runs those tests itself.
    """
    of_program = used_names([test for test in tests if isinstance(test, str)])
    return [_prepared(test, of_program) if isinstance(test, str) else dict(test) for test in tests]


def _prepared(test: str, of_program: frozenset[str]) -> dict[str, Any]:
    tree = _tree(test)
    assert tree is not None
    used, called = free_names(tree), _called(tree)
    imports: dict[str, str | None] = dict.fromkeys(used & sys.stdlib_module_names)
    imports |= {name: FROM_PRELUDE[name] for name in used & FROM_PRELUDE.keys()}
    kept = _RemoveMainCalls().visit(deepcopy(tree))
    is_changed = ast.dump(kept) != ast.dump(ast.parse(test))
    return {
        "text": ast.unparse(kept) if is_changed else test,
        "imports": {name: module for name, module in imports.items() if name not in of_program},
        "names": sorted(of_program & {*used, *called}),
        "called": called,
        "run": sorted(_run_at_top_level(kept)),
    }


class _RemoveMainCalls(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_main = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in MAIN_CALLS
        return ast.copy_location(ast.Pass(), node) if is_main else node

    def visit_FunctionDef(self, node: ast.AST) -> ast.AST:
        return node

    visit_ClassDef = visit_FunctionDef  # noqa: N815 - named by ast


def _run_at_top_level(tree: ast.Module) -> set[str]:
    """The functions that a test calls outside of its own functions and classes."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {name for node in tree.body if not isinstance(node, definitions) for name in _names_called(node)}


def _names_called(tree: ast.AST) -> list[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [function.id for function in calls if isinstance(function, ast.Name)]


def _called(tree: ast.Module) -> list[str]:
    """The functions that a test calls and does not bind, outermost first."""
    bound = bound_names(tree)
    return [name for name in dict.fromkeys(_names_called(tree)) if name not in bound]


@lru_cache(maxsize=256)
def _tree(test: str) -> ast.Module | None:
    """The syntax tree of a test without its imports of the program; None if it is not Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(test, "test.py", "exec")
        tree = ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    tree.body = [each for each in tree.body if not _imports_program(each)]
    return tree


def _imports_program(statement: ast.stmt) -> bool:
    """Whether a statement is like ``from solution import add``, which the test runner does not need."""
    return (
        isinstance(statement, ast.ImportFrom)
        and statement.module in PROGRAM_MODULES
        and all(alias.asname is None for alias in statement.names)
    )


def _is_test(value: Any) -> bool:
    is_case = isinstance(value, Mapping) and "input" in value and "output" in value
    return is_case or (isinstance(value, str) and "assert" in value)


assert not vars(builtins).keys() & FROM_PRELUDE.keys()
