"""The side of the tests: it calls the program through the link and says, a line for each test, what came of it."""

import asyncio
import builtins
import importlib
import inspect
import json
import math
import os
import sys
import traceback


def judge(tests, link, stop_at_failure):
    verdicts = os.dup(1)
    os.dup2(2, 1)  # what tests print is no verdict

    def say(passed, error="", ran=True, loaded=True):
        verdict = {"passed": passed, "error": error[-2000:], "ran": ran, "loaded": loaded}
        os.write(verdicts, json.dumps(verdict).encode() + b"\n")

    try:
        names = names_of(link)
    except Exception as error:
        say(False, f"the program did not load: {error}", ran=False, loaded=False)
        return
    for test in tests:
        try:
            run_test(test, names)
            say(True)
        except SaysNothing as error:
            say(None, str(error))
            return
        except (NameError, ImportError) as error:
            missing = None if isinstance(error, OfProgram) else of_the_test(error, test, names)
            if missing:
                say(None, "%s: %s" % (missing, text_of(test)))
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
            say(False, "failed: %s" % (str(error) or text_of(test)))
        except BaseException as error:
            lines = traceback.format_exception_only(type(error), error)
            say(
                False,
                "{}in {}".format("".join(lines), text_of(test)),
                ran=not isinstance(error, OfProgram),
            )
        else:
            continue
        if stop_at_failure:
            return


def of_the_test(error, test, names):
    """What a test lacks that a program need not have; None where the program lacks what the test asks for."""
    if not isinstance(test, dict) or "code" not in test:
        return None
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        of_program = module in test["own_modules"]
        return None if of_program else "the test needs the module %s, which is not in the sandbox" % module
    name = getattr(error, "name", None) or str(error).partition("'")[2].partition("'")[0]
    if name not in test["required"]:
        return "the test uses %s, which nothing defines" % name
    others = [each for each in test["required"] if each in names and each in test["free"]]
    if not test["told"] and others:
        return "the test uses %s, which neither it nor the program defines" % name
    return None


def names_of(link):
    """What the program has, by name; raises if it did not load."""
    hello = link.receive()
    if "names" not in hello:
        raise Gone("{}: {}".format(hello["raised"][0], hello["text"]))
    names = {}
    for name, what in hello["names"].items():
        if "exception" in what and name not in vars(builtins):
            link.exceptions[name] = names[name] = exception_class(what["exception"], link.exceptions)
        elif "value" in what:
            names[name] = link.decode(what["value"])
        elif "module" in what and what["module"].partition(".")[0] in getattr(sys, "stdlib_module_names", ()):
            names[name] = importlib.import_module(what["module"])
    return names


def run_test(test, names):
    if "code" in test:
        run_code(test, names)
        return
    name = test["fn_name"]
    function = looked_up(name, names)
    if not callable(function):
        raise NameError("the program has no function {}".format(name))
    result = function(*test["input"])
    if not (same(result, test["output"]) or is_wrapped(result, test)):
        raise AssertionError("%s gave %.500r, not %.500r" % (name, result, test["output"]))


def looked_up(name, names):
    return getattr(names["Solution"](), name) if name not in names and "Solution" in names else names.get(name)


def is_wrapped(result, test):
    output = test["output"]
    return bool(test.get("wrapped")) and isinstance(output, list) and len(output) == 1 and same(result, output[0])


def run_code(test, names):
    """Run a test, and what a test runner would find in it, in a namespace with the program's names."""
    main = sys.modules["__main__"] = type(sys)("__main__")
    reserved = set(vars(builtins)) | set(test["lent"])
    given = {name: value for name, value in names.items() if name not in reserved and not name.startswith("__")}
    given.update({name: names[name] for name in test["subjects"] if name in names})
    for name, path in test["lent"].items():
        given[name] = lent(path)
    for name in set(test["subjects"]) - set(names):
        if name in vars(builtins):
            given[name] = absent(name)
    # What ``from solution import *`` brings leaves out Python's own names and those that the test imports.
    public = [name for name in given if name not in test["reserved"] and not name.startswith("_")]
    for name in test["own_modules"]:
        if name != "__main__":
            sys.modules[name] = type(sys)(name)
            vars(sys.modules[name]).update({each: value for each, value in names.items() if not each.startswith("__")})
            vars(sys.modules[name])["__all__"] = [each for each in public if each in names]
    vars(main).update(given, __file__="test.py")
    if "pytest" in test["code"]:
        sys.modules["pytest"] = as_module(type(sys)("pytest"))
    if "unittest" in test["code"]:
        importlib.import_module("unittest").main = lambda *args, **kwargs: None  # what it would run is run below
    try:
        exec(compile(test["code"], "test.py", "exec"), vars(main))
    except SystemExit as error:
        if isinstance(error, OfProgram) or error.code not in (None, 0, False):
            raise AssertionError("the test ended with status {}".format(error.code)) from error
    for name, found in list(vars(main).items()):
        if (
            getattr(found, "__module__", None) == "__main__"
            and not isinstance(found, Remote)
            and found is not given.get(name)
        ):
            run_collected(name, found, test, names)


def lent(path):
    """A module, or ``module.attribute``, of the usual prelude."""
    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, attribute = path.rpartition(".")
        if not module:
            raise
        return getattr(importlib.import_module(module), attribute)


def absent(name):
    def call(*args, **kwargs):
        raise AssertionError("the program has no function {}".format(name))

    return call


def run_collected(name, found, test, names):
    """What pytest, unittest and HumanEval would run of a test, unless the test calls it itself."""
    if isinstance(found, type):
        unittest = sys.modules.get("unittest")
        if unittest and issubclass(found, unittest.TestCase):
            try:
                unittest.defaultTestLoader.loadTestsFromTestCase(found).debug()
            except unittest.SkipTest as error:
                raise SaysNothing("the test is skipped: {}".format(error)) from error
        elif name.startswith("Test"):
            for method in [each for each in vars(found) if each.startswith("test")]:
                case = found()
                getattr(case, "setup_method", lambda: None)()
                run_all(getattr(case, method))
                getattr(case, "teardown_method", lambda: None)()
    elif inspect.isfunction(found) and name not in test["called"]:
        wanted = [each for each in inspect.signature(found).parameters.values() if each.default is each.empty]
        if name == "check" and len(wanted) == 1:
            candidate = looked_up(test["entry_point"], names)
            if candidate is None:
                raise AssertionError("the program has no function {}".format(test["entry_point"] or "to check"))
            found(candidate)
        elif name.startswith("test"):
            run_all(found)


def run_all(function):
    for result in run_cases(function):
        if inspect.iscoroutine(result):
            asyncio.run(result)


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
    return test["code"] if "code" in test else "%s(*%.200r)" % (test["fn_name"], test["input"])
