"""The side of the tests: it calls the program through the link and says, a line for each test, what came of it."""

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


def judge(tests, link, stop_at_failure):
    verdicts = os.dup(1)
    os.dup2(2, 1)  # what tests print is no verdict

    def say(passed, error="", ran=True, loaded=True):
        verdict = {"passed": passed, "error": error[-2000:], "ran": ran, "loaded": loaded}
        os.write(verdicts, json.dumps(verdict).encode() + b"\n")

    try:
        names = names_of(link)
    except (Exception, Gone) as error:
        say(False, f"the program did not load: {error}", ran=False, loaded=False)
        return
    for test in tests:
        try:
            run_test(test, names)
            if link.gone:  # and the test has caught that
                raise Gone(link.gone)
            say(True)
        except SaysNothing as error:
            say(None, str(error))
            return
        except NotDefined as error:
            say(False, "{} in {}".format(error, text_of(test)), ran=False)
        except (ImportError, NameError) as error:
            if not isinstance(error, OfProgram) and is_of_test(error, test):
                say(None, "the test cannot be run: {}: {}".format(type(error).__name__, error))
                return
            say(False, "{}: {} in {}".format(type(error).__name__, error, text_of(test)), ran=False)
        except CannotSend as error:
            if error.of_test:
                say(None, f"the test hands the program what cannot travel: {error}")
                return
            say(False, f"{error}")
        except Gone as error:
            say(False, str(error), ran=False)
            return
        except AssertionError as error:
            if "text" in test and not isinstance(error, OfProgram) and fails_by_itself(test, error):
                say(None, "the test fails whatever the program is: {}".format(text_of(test)))
                return
            say(False, "failed: %s" % (str(error) or text_of(test)))
        except BaseException as error:
            lines = traceback.format_exception_only(type(error), error)
            if "text" in test and not isinstance(error, OfProgram) and fails_by_itself(test, error):
                say(None, "the test fails whatever the program is: {}in {}".format("".join(lines), text_of(test)))
                return
            say(
                False,
                "{}in {}".format("".join(lines), text_of(test)),
                ran=not isinstance(error, OfProgram),
            )
        else:
            continue
        if stop_at_failure:
            return


class NotDefined(Exception):
    """The program lacks what a test calls."""


class Touched(BaseException):
    """A test has used something of the program."""

    count = 0

    def __init__(self):
        Touched.count += 1  # the test may catch it


class Untouchable:
    """Stands for a function or class of the program where none is run; whatever is done with it raises."""

    def refuse(self, *_args, **_kwargs):
        raise Touched

    for each in dir(0) + dir([]) + ["__call__", "__enter__", "__aenter__", "__next__", "__await__", "__matmul__"]:
        if each not in dir(object) or each in (
            "__getattribute__",
            "__eq__",
            "__ne__",
            "__hash__",
            "__str__",
            "__repr__",
        ):
            locals()[each] = refuse


def fails_by_itself(test, error):
    """Whether a test fails with the same error before it uses anything of the program, as with ``f(1 / 0)``."""
    count, program = Touched.count, Untouchable()
    try:
        run_text(test, dict.fromkeys(test["names"], program), lambda _names: program)
    except BaseException as again:
        return Touched.count == count and type(again) is type(error) and str(again) == str(error)
    return False


class SaysNothing(Exception):
    """A test passed that has nothing to do with the program."""


def names_of(link):
    """What the program has, by name; raises if it did not load."""
    hello = link.receive()
    if "names" not in hello:
        raise Gone("{}: {}".format(hello["raised"][0], hello["text"]))
    names = {}
    for name, what in hello["names"].items():
        if "exception" in what and not is_reserved(name):
            link.exceptions[name] = names[name] = exception_class(what["exception"], link.exceptions)
        elif "value" in what:
            names[name] = link.decode(what["value"])
    return names


def is_reserved(name):
    """Whether a name is Python's own, such as that of an exception."""
    return name.startswith("__") or name in vars(builtins)


def is_of_test(error, test):
    """Whether an import or a name that is missing is the test's fault: the program owes it what it calls, no more."""
    if "text" not in test or isinstance(error, ImportError):
        return True
    missing = re.search("'(.*?)'", str(error))
    return missing is None or missing.group(1) not in test["called"]


def run_test(test, names):
    if "text" in test:
        run_text(test, names)
        return
    name = test["fn_name"]
    function = getattr(names["Solution"](), name) if name not in names and "Solution" in names else names.get(name)
    if not callable(function):
        raise NotDefined("the program has no function {}".format(name))
    result = function(*test["input"])
    if not same(result, test["output"]):
        raise AssertionError("%s gave %.500r, not %.500r" % (name, result, test["output"]))


def run_text(test, names, candidate=None):
    """Run a test, and then what it only defines: functions and classes of tests, HumanEval's check."""
    given = {name: names[name] for name in test["names"] if name in names}
    for name in test["names"]:
        if name not in given and hasattr(builtins, name):  # Python's own would answer for the program
            raise NotDefined("the program has no function {}".format(name))
    lent = {name: importlib.import_module(module or name) for name, module in test["lent"].items()}
    lent = {name: getattr(module, name) if test["lent"][name] else module for name, module in lent.items()}
    scope = {"__name__": "__main__", **lent, **given}
    exec(compile(test["text"], "test.py", "exec"), scope)
    defined = [(name, value) for name, value in list(scope.items()) if name not in given and name not in lent]
    tests = [each for name, value in defined for each in tests_of(name, value, test["run"])]
    checks = [value for name, value in defined if name == "check" and is_function(value) and name not in test["run"]]
    for each in tests:
        result = each()
        if isinstance(result, CoroutineType):
            importlib.import_module("asyncio").run(result)
    for check in checks:
        check((candidate or only_function)(names))
    if not (tests or checks or test["names"]):
        raise SaysNothing("the test does not use the program (a name of Python's own is not the program's)")


def tests_of(name, value, already_run):
    """What pytest and unittest would run of something that a test defines."""
    if is_function(value) and name.startswith("test") and name not in already_run:
        if needed(value):
            raise SaysNothing("{} takes {}, and there are no fixtures".format(name, needed(value)))
        return [value]
    if not isinstance(value, type) or value.__module__ != "__main__":
        return []
    unittest = sys.modules.get("unittest")
    if unittest is not None and issubclass(value, unittest.TestCase):
        return [case.debug for case in unittest.defaultTestLoader.loadTestsFromTestCase(value)]
    if name.startswith("Test"):
        return [partial(run_method, value, each) for each in dir(value) if each.startswith("test")]
    return []


def run_method(kind, name):
    instance = kind()
    for hook, argument in (("setup_class", kind), ("setup_method", getattr(instance, name))):
        setup = getattr(instance, hook, None)
        if setup is not None:
            is_bound_to_class = isinstance(setup.__self__, type)
            setup(*([argument] if setup.__code__.co_argcount > 1 and not is_bound_to_class else []))
    return getattr(instance, name)()


def is_function(value):
    return isinstance(value, FunctionType) and value.__code__.co_filename == "test.py"


def needed(function):
    """The names of the arguments that a function cannot be called without."""
    code = function.__code__
    optional = len(function.__defaults__ or ())
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    required = names[: code.co_argcount - optional] + names[code.co_argcount :]
    return [name for name in required if name not in (function.__kwdefaults__ or {})]


def only_function(names):
    """The program's function, where it has just one."""
    functions = [value for value in names.values() if callable(value) and not isinstance(value, type)]
    if len(functions) != 1:
        said = "check(candidate) is never called, and the program has {} functions; name the entry_point"
        raise SaysNothing(said.format(len(functions)))
    return functions[0]


def same(result, expected):
    """Equality as JSON knows it: lists and tuples are one, numbers that are not whole may differ in the last places."""
    if isinstance(expected, list):
        return (
            isinstance(result, (list, tuple))
            and len(result) == len(expected)
            and all(same(mine, other) for mine, other in zip(result, expected))
        )
    if isinstance(expected, dict):
        if not isinstance(result, dict) or len(result) != len(expected):
            return False
        texts = {key if isinstance(key, str) else json.dumps(key): value for key, value in result.items()}
        return all(key in texts and same(texts[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(result, (int, float)) and not isinstance(result, bool):
        return math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12) or result == expected
    if isinstance(result, bool) != isinstance(expected, bool):
        return False
    return type(result) in (type(expected), int, float) and result == expected


def text_of(test):
    return test["text"] if "text" in test else "%s(*%.200r)" % (test["fn_name"], test["input"])
