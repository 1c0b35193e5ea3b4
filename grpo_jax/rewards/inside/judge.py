"""The side of the tests: it calls the program through the link and says, a line for each test, what came of it."""

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
            say(
                False,
                "{}in {}".format("".join(lines), text_of(test)),
                ran=not isinstance(error, (OfProgram, NameError)),
            )
        else:
            continue
        if stop_at_failure:
            return


def names_of(link):
    """What the program has, by name; raises if it did not load."""
    hello = link.receive()
    if "names" not in hello:
        raise Gone("{}: {}".format(hello["raised"][0], hello["text"]))
    names = {}
    for name, what in hello["names"].items():
        if "exception" in what:
            link.exceptions[name] = names[name] = exception_class(what["exception"], link.exceptions)
        else:
            names[name] = link.decode(what["value"])
    return names


def run_test(test, names):
    if isinstance(test, str):
        exec(compile(test, "test.py", "exec"), {"__name__": "__main__", **names})
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
    return type(result) in (type(expected), int, float, bool) and result == expected


def text_of(test):
    return test if isinstance(test, str) else "%s(*%.200r)" % (test["fn_name"], test["input"])
