"""Tests of programs: the forms that can be run, those of published data sets, and tests that no program could fail."""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from grpo_jax.rewards import assertions
from grpo_jax.rewards.program import bound_names, free_names

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
MOST_BYTES = 1 << 28
"""Of the packed cases of one row, unpacked."""


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


# Rows of published data sets -----------------------------------------------------------------------------------------


def tests_from_row(row: Mapping[str, Any]) -> list[Test] | None:
    """The tests of a row of a published data set, in the forms of ``Test``; None for a row without any.

    Known are ``tests`` as they are; HumanEval (``test``, ``entry_point``); MBPP (``test_list``, ``test_setup_code`` or
    ``test_imports``, and ``challenge_test_list``); APPS, TACO and PRIME (``input_output``, also within
    ``verification_info`` or ``reward_model``); LiveCodeBench (``public_test_cases``, ``private_test_cases``,
    ``metadata``); CodeContests (``public_tests``, ``private_tests``, ``generated_tests``); ``test_cases`` and
    ``verification_info`` of OpenR1; and ``ground_truth`` of verl's rows, as JSON of any of these.

    Args:
        row: columns by name; texts of JSON are parsed.

    Raises:
        ValueError: the tests are there and cannot be read, such as pickled ones; says why.
    """
    for layout in (_plain, _human_eval, _mbpp, _live_code_bench, _code_contests, _input_output, _nested):
        tests = layout(row)
        if tests is not None:
            return tests
    return None


def _plain(row: Mapping[str, Any]) -> list[Test] | None:
    for name in ("tests", "test_cases"):
        value = _parsed(row.get(name))
        if isinstance(value, Mapping):
            return _input_output({"input_output": value})
        if isinstance(value, str) and value.strip():
            return [value]
        if isinstance(value, list) and value:
            return [_test(each, row.get("fn_name")) for each in value]
    return None


def _human_eval(row: Mapping[str, Any]) -> list[Test] | None:
    test, entry = row.get("test"), row.get("entry_point")
    if not isinstance(test, str) or not test.strip():
        return None
    tree = _tree(test)
    has_check = tree is not None and "check" in bound_names(tree) - _run_at_the_top(tree)
    if has_check and isinstance(entry, str):
        return [f"{_given_by(row.get('prompt'), entry)}{test}\n\ncheck({entry})\n"]
    return [test]


def _given_by(prompt: Any, entry: str) -> str:
    """Imports and helper functions that a prompt gives; tests use these, and not the ones of the program."""
    tree = _tree(prompt) if isinstance(prompt, str) else None
    kept = [each for each in tree.body if getattr(each, "name", None) != entry] if tree else []
    return "".join(f"{ast.unparse(each)}\n" for each in kept)


def _mbpp(row: Mapping[str, Any]) -> list[Test] | None:
    listed = _parsed(row.get("test_list"))
    if not isinstance(listed, list) or not listed:
        return None
    setup = row.get("test_setup_code") or ""
    imports = _parsed(row.get("test_imports")) or []
    before = "\n".join([*(imports if isinstance(imports, list) else [imports]), setup]).strip()
    more = _parsed(row.get("challenge_test_list")) or []
    return [f"{before}\n{test}" if before else test for test in [*listed, *more]]


def _live_code_bench(row: Mapping[str, Any]) -> list[Test] | None:
    if "public_test_cases" not in row and "private_test_cases" not in row:
        return None
    metadata = _parsed(row.get("metadata")) or {}
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    cases = []
    for column in ("public_test_cases", "private_test_cases"):
        value = _parsed(row.get(column))
        cases += _unpacked(value, column) if isinstance(value, str) and value.strip() else value or []
    return [_functional(case, name) if case.get("testtype") == "functional" else _test(case) for case in cases] or None


def _code_contests(row: Mapping[str, Any]) -> list[Test] | None:
    parts = [_parsed(row.get(name)) for name in ("public_tests", "private_tests", "generated_tests")]
    tests: list[Test] = []
    for part in parts:
        if isinstance(part, Mapping) and "input" in part:
            tests += [
                {"input": given, "output": wanted} for given, wanted in zip(part["input"], part["output"], strict=True)
            ]
    return tests or None


def _input_output(row: Mapping[str, Any]) -> list[Test] | None:
    value = _parsed(row.get("input_output"))
    if not isinstance(value, Mapping) or not ("inputs" in value or "assert_case" in value):
        return None
    if value.get("assert_case"):
        return list(value["assert_case"])
    name = value.get("fn_name") or row.get("fn_name")
    pairs = zip(value["inputs"], value["outputs"], strict=True)
    if not name:
        return [{"input": _text(given), "output": _text(wanted)} for given, wanted in pairs] or None
    # APPS wraps what a function returns into a list of one: then all outputs are such lists.
    is_wrapped = all(isinstance(wanted, list) and len(wanted) == 1 for wanted in value["outputs"])
    return [
        {"fn_name": name, "input": given, "output": wanted[0] if is_wrapped else wanted} for given, wanted in pairs
    ] or None


def _nested(row: Mapping[str, Any]) -> list[Test] | None:
    for name in ("verification_info", "reward_model", "ground_truth", "extra_info"):
        value = _parsed(row.get(name))
        if isinstance(value, Mapping):
            if "inputs" in value:
                value = {"input_output": value}
            tests = tests_from_row(value)
            if tests is not None:
                return tests
        elif name == "ground_truth" and isinstance(value, list) and value and all(_is_test(each) for each in value):
            return [_test(each) for each in value]
    return None


def _test(case: Any, name: Any = None) -> Test:
    if isinstance(case, str) or not isinstance(case, Mapping):
        return case
    name = case.get("fn_name") or name
    if name and isinstance(case.get("input"), list):
        return {"fn_name": name, "input": case["input"], "output": case.get("output")}
    if case.get("type") == "stdin_stdout" or case.get("testtype") == "stdin" or not name:
        kept = {"input": _text(case.get("input", "")), "output": _text(case.get("output", ""))}
        return kept | ({"testtype": "functional"} if case.get("testtype") == "functional" else {})
    return dict(case)


def _functional(case: Mapping[str, Any], name: str | None) -> Test:
    """A case of LiveCodeBench that calls a function: one argument a line, each as JSON."""
    if not name:
        return dict(case)
    given = [json.loads(line) for line in str(case["input"]).split("\n") if line.strip()]
    return {"fn_name": name, "input": given, "output": json.loads(case["output"])}


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of texts, numbers, lists and dicts, which run no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it asks for {module}.{name}")


def _unpacked(text: str, column: str) -> list[Any]:
    """Cases as LiveCodeBench packs them: JSON, pickled as a text, compressed, in base 64."""
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        return json.loads(_PlainUnpickler(io.BytesIO(packed)).load())
    except (ValueError, TypeError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        raise ValueError(f"{column} is neither JSON nor a packed text of JSON ({error}): {text!r:.80}") from error


def _parsed(value: Any) -> Any:
    """A text of JSON as what it says; everything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_test(value: Any) -> bool:
    is_case = isinstance(value, Mapping) and "input" in value and "output" in value
    return is_case or (isinstance(value, str) and "assert" in value)


assert not vars(builtins).keys() & FROM_PRELUDE.keys()
