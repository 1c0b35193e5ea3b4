"""The side of the tests: it calls the program through the link and says, a line for each test, what came of it."""

import builtins
import importlib
import json
import math
import os
import re
import traceback

LENT_MODULES = ("collections", "copy", "datetime", "functools", "itertools", "json", "math", "random", "re", "string")
"""What many tests use without importing it, because solutions do."""


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
                ran=not isinstance(error, (OfProgram, NameError)),
            )
        else:
            continue
        if stop_at_failure:
            return


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
    """Whether a test takes the name from Python: a program that defines ``set`` or ``abs`` is not to judge itself."""
    return name.startswith("__") or name in vars(builtins) or name in LENT_MODULES


def run_test(test, names):
    if isinstance(test, str):
        words = set(re.findall(r"[^\W\d]\w*", test))
        lent = {name: importlib.import_module(name) for name in LENT_MODULES if name in words}
        given = {name: value for name, value in names.items() if not is_reserved(name)}
        exec(compile(test, "test.py", "exec"), {"__name__": "__main__", **lent, **given})
        if not words & set(given):
            raise SaysNothing("the test does not use the program (a name of Python's own is not the program's)")
        return
    name = test["fn_name"]
    function = getattr(names["Solution"](), name) if name not in names and "Solution" in names else names.get(name)
    if not callable(function):
        raise NameError("the program has no function {}".format(name))
    result = function(*test["input"])
    if not same(result, test["output"]):
        raise AssertionError("%s gave %.500r, not %.500r" % (name, result, test["output"]))


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
    return test if isinstance(test, str) else "%s(*%.200r)" % (test["fn_name"], test["input"])
