"""The side of the tests: it calls the program through the link and says, a line for each test, what came of it."""

import builtins
import json
import math
import os
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
        except CannotSend as error:
            say(None, f"the test hands the program what cannot travel: {error}")
            return
        except Gone as error:
            say(False, str(error), ran=False)
            return
        except AssertionError as error:
            say(False, "failed: %s" % (str(error) or text_of(test)))
        except BaseException as error:
            lines = traceback.format_exception_only(type(error), error)
            say(False, "{}in {}".format("".join(lines), text_of(test)), ran=not isinstance(error, OfProgram))
        else:
            continue
        if stop_at_failure:
            return


class OfProgram(Exception):
    """Marks what the program raised, beside the type that it had there."""


def names_of(link):
    hello = link.receive()
    if "names" not in hello:
        raise Gone("{}: {}".format(hello["raised"][0], hello["text"]))
    exceptions, names = {}, {}
    for name, what in hello["names"].items():
        if "exception" in what:
            exceptions[name] = names[name] = exception_class(what["exception"], exceptions)
        else:
            names[name] = link.decode(what["value"])
    asked = link.ask

    def ask(*args, **kwargs):
        try:
            return asked(*args, **kwargs)
        except Raised as raised:
            message = raised.args[0]
            error = exception_class(message["raised"], exceptions)
        raise error(message["text"])

    link.ask = ask
    return names


def exception_class(names, exceptions):
    """The class of what the program raised: its own by that name, or the nearest one that Python brings."""
    for name in names:
        known = exceptions.get(name) or getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, Exception):
            break
    else:
        known = RuntimeError  # SystemExit and its like end the program's call, not the judge
    return known if issubclass(known, OfProgram) else type(names[0], (known, OfProgram), {})


def run_test(test, names):
    if isinstance(test, str):
        exec(compile(test, "test.py", "exec"), {"__name__": "__main__", **names})
        return
    name = test["fn_name"]
    if name not in names and "Solution" in names:
        function = getattr(names["Solution"](), name)
    elif name in names:
        function = names[name]
    else:
        raise AssertionError(f"the program has no {name}")
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
    return type(result) in (type(expected), int, float, bool) and result == expected


def text_of(test):
    return test if isinstance(test, str) else "%s(*%.200r)" % (test["fn_name"], test["input"])
