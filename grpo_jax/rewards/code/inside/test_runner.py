"""The tests' sandbox: calls the program through a connection and writes a verdict, a line of JSON, for each test."""

import builtins
import importlib
import json
import math
import os
import re
import sys
import traceback
from functools import partial
from types import CoroutineType, FunctionType


def run_tests(tests, connection, stop_at_failure):
    """Run tests and write their verdicts, until the program has ended or a test is itself at fault.

    Args:
        tests: as ``test_cases.prepared`` gives them.
        connection: to the sandbox of the program.
        stop_at_failure: whether to stop after the first test that fails.
    """
    verdicts = os.dup(1)
    os.dup2(2, 1)  # so that what tests print is not read as a verdict

    def write(verdict):
        os.write(verdicts, json.dumps(verdict).encode() + b"\n")

    try:
        names = receive_names(connection)
    except (Exception, ConnectionLost) as error:
        write(_verdict(False, f"the program did not load: {error}", ran=False, loaded=False))
        return
    for test in tests:
        result = _verdict_of(test, names, connection)
        write(result)
        if connection.lost or result["passed"] is None or (stop_at_failure and not result["passed"]):
            return


def _verdict(passed, error="", ran=True, loaded=True):
    """``passed`` is None where the test itself is at fault; ``ran`` is False for an error of the program."""
    return {"passed": passed, "error": error[-2000:], "ran": ran, "loaded": loaded}


def _verdict_of(test, names, connection):
    try:
        _run_test(test, names)
        if connection.lost:  # the test has caught the exception
            raise ConnectionLost(connection.lost)
    except ConnectionLost as error:
        return _verdict(False, str(error), ran=False)
    except InvalidTest as error:
        return _verdict(None, str(error))
    except MissingFunction as error:
        return _verdict(False, "{} in {}".format(error, text_of(test)), ran=False)
    except CannotSend as error:
        if error.from_test:
            return _verdict(None, f"the test passes the program an argument that cannot be sent: {error}")
        return _verdict(False, f"{error}")
    except BaseException as error:
        by_program = isinstance(error, RaisedByProgram)
        if isinstance(error, (ImportError, NameError)):
            described = "{}: {}".format(type(error).__name__, error)
            if not by_program and _is_fault_of_test(error, test):
                return _verdict(None, f"the test cannot be run: {described}")
            return _verdict(False, "{} in {}".format(described, text_of(test)), ran=False)
        is_assertion = isinstance(error, AssertionError)
        described = "".join(traceback.format_exception_only(type(error), error))
        if "text" in test and not by_program and _fails_without_program(test, error):
            shown = "" if is_assertion else f" ({described.strip()})"
            return _verdict(None, "the test fails whatever the program is{}: {}".format(shown, text_of(test)))
        if is_assertion:
            return _verdict(False, "failed: %s" % (str(error) or text_of(test)))
        return _verdict(False, "{}in {}".format(described, text_of(test)), ran=not by_program)
    return _verdict(True)


class MissingFunction(Exception):
    """The program lacks a function that the test calls."""


class InvalidTest(Exception):
    """The test cannot fail or cannot be run, whatever the program is."""


class ProgramUsed(BaseException):
    """A test has used something of the program."""

    count = 0

    def __init__(self):
        ProgramUsed.count += 1  # the test may catch the exception


class Placeholder:
    """Stands for a function or class of the program; whatever is done with it raises ``ProgramUsed``."""

    def use(self, *_args, **_kwargs):
        raise ProgramUsed

    used = "getattribute eq ne hash str repr call enter aenter next await matmul"
    for method in {*dir(0), *dir([])} - {*dir(object)} | {f"__{name}__" for name in used.split()}:
        locals()[method] = use


def _fails_without_program(test, error):
    """Whether a test fails with the same error before it uses anything of the program, as ``f(1 / 0)`` does."""
    count, placeholder = ProgramUsed.count, Placeholder()
    try:
        _run_text(test, dict.fromkeys(test["names"], placeholder), lambda _names: placeholder)
    except BaseException as again:
        return ProgramUsed.count == count and type(again) is type(error) and str(again) == str(error)
    return False


def receive_names(connection):
    """The program's names with what they are bound to.

    Raises:
        RuntimeError: the program did not load.
    """
    message = connection.receive()
    if "names" not in message:
        raise RuntimeError("{}: {}".format(message["raised"][0], message["text"]))
    names = {}
    for name, bound in message["names"].items():
        is_builtin = name.startswith("__") or name in vars(builtins)
        if "exception" in bound and not is_builtin:
            names[name] = exception_class(bound["exception"], connection.exceptions)
            connection.exceptions[name] = names[name]
        elif "value" in bound:
            names[name] = connection.decode(bound["value"])
    return names


def _is_fault_of_test(error, test):
    """Whether the test is to blame for a missing import or name: any but the functions that it calls."""
    if "text" not in test or isinstance(error, ImportError):
        return True
    missing = re.search("'(.*?)'", str(error))
    return missing is None or missing.group(1) not in test["called"]


def _run_test(test, names):
    """Run a test as ``test_cases.prepared`` gives it; it raises if it fails."""
    if "text" in test:
        _run_text(test, names)
        return
    name = test["fn_name"]
    function = getattr(names["Solution"](), name) if name not in names and "Solution" in names else names.get(name)
    if not callable(function):
        raise MissingFunction("the program has no function {}".format(name))
    result = function(*test["input"])
    if not _equal_as_json(result, test["output"]):
        raise AssertionError("%s gave %.500r, not %.500r" % (name, result, test["output"]))


def _run_text(test, names, candidate=None):
    """Run the text of a test, then the tests that it only defines: functions, classes, HumanEval's ``check``."""
    from_program = {name: names[name] for name in test["names"] if name in names}
    for name in test["names"]:
        if name not in from_program and hasattr(builtins, name):  # else Python's own would be tested
            raise MissingFunction("the program has no function {}".format(name))
    imported = {}
    for name, module_name in test["imports"].items():
        module = importlib.import_module(module_name or name)
        imported[name] = getattr(module, name) if module_name else module
    scope = {"__name__": "__main__", **imported, **from_program}
    exec(compile(test["text"], "test.py", "exec"), scope)
    defined = {name: value for name, value in scope.items() if name not in from_program and name not in imported}
    tests = [call for name, value in defined.items() for call in _collect(name, value, test["run"])]
    for call in tests:
        result = call()
        if isinstance(result, CoroutineType):
            importlib.import_module("asyncio").run(result)
    has_check = is_function(defined.get("check")) and "check" not in test["run"]
    if has_check:
        defined["check"]((candidate or only_function)(names))
    if not (tests or has_check or test["names"]):
        raise InvalidTest("the test does not use the program (names of Python's own are not the program's)")


def _collect(name, value, already_run):
    """The calls by which pytest or unittest would run a function or class that a test defines."""
    if is_function(value) and name.startswith("test") and name not in already_run:
        if required_parameters(value):
            raise InvalidTest("{} takes {}, and there are no fixtures".format(name, required_parameters(value)))
        return [value]
    if not isinstance(value, type) or value.__module__ != "__main__":
        return []
    unittest = sys.modules.get("unittest")
    if unittest is not None and issubclass(value, unittest.TestCase):
        return [case.debug for case in unittest.defaultTestLoader.loadTestsFromTestCase(value)]
    if name.startswith("Test"):
        return [partial(_run_method, value, method) for method in dir(value) if method.startswith("test")]
    return []


def _run_method(kind, name):
    instance = kind()
    for hook, argument in (("setup_class", kind), ("setup_method", getattr(instance, name))):
        setup = getattr(instance, hook, None)
        if setup is not None:
            is_class_method = isinstance(setup.__self__, type)
            setup(*([argument] if setup.__code__.co_argcount > 1 and not is_class_method else []))
    return getattr(instance, name)()


def is_function(value):
    return isinstance(value, FunctionType) and value.__code__.co_filename == "test.py"


def required_parameters(function):
    """The names of the parameters without a default."""
    code = function.__code__
    optional = len(function.__defaults__ or ())
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    required = names[: code.co_argcount - optional] + names[code.co_argcount :]
    return [name for name in required if name not in (function.__kwdefaults__ or {})]


def only_function(names):
    """The program's function, if it has just one.

    Raises:
        InvalidTest: it has none or several.
    """
    functions = [value for value in names.values() if callable(value) and not isinstance(value, type)]
    if len(functions) != 1:
        message = "check(candidate) is never called, and the program has {} functions; name the entry_point"
        raise InvalidTest(message.format(len(functions)))
    return functions[0]


def _equal_as_json(result, expected):
    """Equality of JSON: lists equal tuples, and numbers with a fraction may differ in the last digits."""
    if isinstance(expected, list):
        return (
            isinstance(result, (list, tuple))
            and len(result) == len(expected)
            and all(_equal_as_json(*pair) for pair in zip(result, expected))
        )
    if isinstance(expected, dict):
        if not isinstance(result, dict) or len(result) != len(expected):
            return False
        by_text = {key if isinstance(key, str) else json.dumps(key): value for key, value in result.items()}
        return all(key in by_text and _equal_as_json(by_text[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(result, (int, float)) and not isinstance(result, bool):
        return math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12) or result == expected
    if isinstance(result, bool) != isinstance(expected, bool):
        return False
    return type(result) in (type(expected), int, float) and result == expected


def text_of(test):
    return test["text"] if "text" in test else "%s(*%.200r)" % (test["fn_name"], test["input"])
