"""What tests use of pytest, where the sandbox has no packages: raises, approx, mark.parametrize, fail and skip."""

import inspect
import itertools
import math
import re


class SaysNothing(Exception):
    """The test is at fault itself: no program could pass it, or every one would."""


class Raises:
    """``with raises(ValueError, match="..."):``, or ``raises(ValueError, function, *args)``."""

    def __init__(self, expected, match=None):
        self.expected, self.match, self.value, self.type = expected, match, None, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            raise AssertionError("nothing was raised")
        if not issubclass(kind, self.expected):
            return False
        self.value, self.type = error, kind
        if self.match is not None and not re.search(self.match, str(error)):
            raise AssertionError("{!r} does not match {!r}".format(str(error), self.match))
        return True


def raises(expected, *args, match=None, **kwargs):
    context = Raises(expected, match)
    if not args:
        return context
    with context:
        args[0](*args[1:], **kwargs)
    return context


class Approx:
    """Equal to numbers within 1e-6 of the expected one, or 1e-12 of zero; to lists and dicts of such numbers."""

    __hash__ = None

    def __init__(self, expected, rel=None, abs=None, nan_ok=False):
        self.expected = expected
        self.rel, self.abs, self.nan_ok = rel if rel is not None or abs is not None else 1e-6, abs, nan_ok

    def __eq__(self, other):
        return self.close(other, self.expected)

    def __repr__(self):
        return "approx({!r})".format(self.expected)

    def close(self, mine, expected):
        if isinstance(expected, dict):
            same_keys = isinstance(mine, dict) and mine.keys() == expected.keys()
            return same_keys and all(self.close(mine[key], expected[key]) for key in expected)
        if isinstance(expected, (list, tuple)):
            same_length = isinstance(mine, (list, tuple)) and len(mine) == len(expected)
            return same_length and all(self.close(one, other) for one, other in zip(mine, expected))
        if isinstance(mine, bool) or not isinstance(mine, (int, float)):
            return type(mine) is type(expected) and mine == expected
        if math.isnan(mine) or math.isnan(expected):
            return self.nan_ok and math.isnan(mine) and math.isnan(expected)
        return math.isclose(mine, expected, rel_tol=self.rel or 0.0, abs_tol=1e-12 if self.abs is None else self.abs)


class Marks:
    """``mark.parametrize``; marks of other names change nothing, but skip and xfail leave nothing to run."""

    @staticmethod
    def parametrize(names, values, **_options):
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        cases = [dict(zip(listed, value if len(listed) > 1 else (value,))) for value in values]

        def decorate(function):
            function.cases = [cases, *getattr(function, "cases", [])]
            return function

        return decorate

    def __getattr__(self, name):
        if name in ("skip", "skipif", "xfail", "usefixtures"):
            raise SaysNothing("the test uses pytest.mark.{}, which is not supported".format(name))
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) and not kwargs else lambda each: each


def unsupported(name):
    def refuse(*args, **kwargs):
        raise SaysNothing("the test uses pytest.{}, which is not supported".format(name))

    return refuse


def fail(reason="", **_options):
    raise AssertionError(reason)


def as_module(module):
    """Give a new module named pytest its functions."""
    vars(module).update(raises=raises, approx=Approx, mark=Marks(), fail=fail, main=lambda *args, **kwargs: 0)
    vars(module).update(
        {name: unsupported(name) for name in ("fixture", "skip", "xfail", "importorskip", "warns", "param")}
    )
    return module


def run_cases(function):
    """Call a test once for each combination of its parameters; gives what each call returned."""
    cases = getattr(function, "cases", [])
    parameters = inspect.signature(function).parameters.values()
    wanted = {each.name for each in parameters if each.default is each.empty and each.kind not in (2, 4)}
    for combination in itertools.product(*cases):
        given = {name: value for case in combination for name, value in case.items()}
        if wanted - set(given):
            raise SaysNothing("{} takes {}, which nothing gives it".format(function.__name__, min(wanted - set(given))))
        yield function(**given)
