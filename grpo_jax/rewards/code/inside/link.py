"""Calls between two programs that do not trust each other: plain values travel as JSON, everything else as a handle."""

import base64
import builtins
import json
import operator
import os
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from types import CoroutineType, SimpleNamespace

LONGEST_MESSAGE = 8 << 20
HEX_FROM = 1 << 62
OWN_MODULES = ("__main__", "solution")
"""Where a test and a program define their classes."""

BETWEEN_OBJECTS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
OPERATIONS = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "run": lambda coroutine: __import__("asyncio").run(coroutine),
    "next": next,
    "iter": iter,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "int": int,
    "float": float,
    "hash": hash,
    "abs": abs,
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": lambda target, value: isinstance(value, target),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "neg")},
    **{name: getattr(operator, name) for name in BETWEEN_OBJECTS + ARITHMETIC},
}
ENDINGS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
"""What no test may take for an error of the program."""


class Gone(BaseException):
    """The other side has ended, or sent something that is not a message.

    Not an Exception: a test that catches those would take the end of the program for an error that it raised.
    """


class CannotSend(Exception):
    """A value has no plain form and no handle may be given for it; ``of_test`` if a test made it."""

    of_test = False


class Link:
    """One end. Each side may call what the other handed it; while it waits for an answer, it serves."""

    def __init__(self, reading, writing, serves):
        self.reader = os.fdopen(reading, "rb")
        self.writing = writing
        self.serves = serves  # the names of OPERATIONS that the other side may ask for
        self.objects = {}
        self.remotes = {}
        self.gone = None
        self.exceptions = {}  # classes by name that stand for the other side's own

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        if len(data) > LONGEST_MESSAGE:
            raise CannotSend("a value of %d bytes; at most %d may travel" % (len(data), LONGEST_MESSAGE))
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.writing, view) :]
        except OSError as error:
            raise self.lost("the program has ended") from error

    def receive(self):
        line = self.reader.readline(LONGEST_MESSAGE + 1)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self.lost("the program has ended" if not line else "the program sent what is no message")
        return message

    def lost(self, why):
        """Note that the other side is gone, for good, whoever catches what is raised."""
        self.gone = why
        return Gone(why)

    def ask(self, operation, target, *args, **kwargs):
        """Have the other side carry out an operation on its object, and give what came of it."""
        self.send(
            {
                "ask": operation,
                "of": target,
                "args": [self.encode(each) for each in args],
                "kwargs": {name: self.encode(each) for name, each in kwargs.items()},
            }
        )
        reply = self.receive()
        while "ask" in reply:
            self.serve(reply)
            reply = self.receive()
        if "raised" in reply:
            if reply["raised"][0] == "StopIteration" and operation != "next":
                # Raised as it is, it would end a loop of the test in peace.
                raise exception_class(["RuntimeError"], {})("the program raised StopIteration")
            if reply["raised"][0] in ENDINGS:
                raise self.lost("the program ended itself: {}".format(reply["raised"][0]))
            error = exception_class(reply["raised"], self.exceptions)(reply["text"])
            error.itself = self.decode(reply["itself"])
            raise error
        for mine, theirs in zip(args, reply.get("args", [])):
            update(mine, self.decode(theirs))
        return self.decode(reply.get("value"))

    def serve(self, request):
        """Carry out what the other side asks for, and answer."""
        try:
            if request["ask"] not in self.serves:
                raise AttributeError("{} is not done for the other side".format(request["ask"]))
            args = [self.decode(each) for each in request["args"]]
            kwargs = {name: self.decode(each) for name, each in request["kwargs"].items()}
            value = OPERATIONS[request["ask"]](self.objects[request["of"]], *args, **kwargs)
            changeable = [self.encode(each) if isinstance(each, (list, dict, set)) else None for each in args]
            self.send({"value": self.encode(value), "args": changeable})
        except Gone:
            raise
        except BaseException as error:
            self.send({**as_raised(error), "itself": self.encode_error(error)})

    def encode(self, value):
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            value = int(value)
            return value if -HEX_FROM < value < HEX_FROM else {"int": hex(value)}
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        for kind in (list, tuple, frozenset, set):
            if isinstance(value, kind):
                return self.with_methods(value, {kind.__name__: [self.encode(each) for each in kind.__iter__(value)]})
        if isinstance(value, dict):
            pairs = [[self.encode(k), self.encode(v)] for k, v in dict.items(value)]
            return self.with_methods(value, {"dict": pairs})
        if isinstance(value, (range, slice)):
            return {type(value).__name__: [self.encode(each) for each in (value.start, value.stop, value.step)]}
        if isinstance(value, (bytes, bytearray)):
            return {type(value).__name__: base64.b64encode(value).decode()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, Fraction):
            return {"Fraction": [self.encode(value.numerator), self.encode(value.denominator)]}
        if isinstance(value, Decimal):
            return {"Decimal": str(value)}
        if isinstance(value, datetime):
            return {"datetime": value.isoformat()}
        if isinstance(value, date):
            return {"date": value.isoformat()}
        if isinstance(value, Remote):
            return {"yours": object.__getattribute__(value, "_handle")}
        if isinstance(value, CoroutineType):
            return {"coroutine": self.handle(value)}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        if "getattr" in self.serves:
            return {"mine": self.handle(value)}
        if isinstance(value, Iterator):
            return {"iterator": [self.encode(each) for each in value]}
        if callable(value):
            name = getattr(value, "__name__", "")
            return {"function": [self.handle(value), name, getattr(value, "__doc__", None), parameters(value)]}
        refused = CannotSend("an object of type {}; plain values and functions can be".format(type(value).__name__))
        refused.of_test = type(value).__module__ in OWN_MODULES
        raise refused

    def encode_error(self, error):
        return {"mine": self.handle(error)} if "getattr" in self.serves else None

    def with_methods(self, value, plain):
        """A value of a class that the program made of list, dict and the like: what it is made of, and a handle."""
        own = "getattr" in self.serves and type(value).__module__ in OWN_MODULES
        return {"both": [self.handle(value), plain]} if own else plain

    def handle(self, value):
        self.objects[id(value)] = value  # kept alive, so its id stays its own
        return id(value)

    async def awaited(self, handle):
        """What a coroutine of the other side comes to; it runs there."""
        return self.ask("run", handle)

    def decode(self, data):
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        if kind in ("list", "tuple", "set", "frozenset"):
            return BUILD[kind](self.decode(each) for each in content)
        if kind == "dict":
            return {self.decode(k): self.decode(v) for k, v in content}
        if kind in ("bytes", "bytearray"):
            return BUILD[kind](base64.b64decode(content))
        if kind == "complex":
            return complex(*content)
        if kind == "int":
            return int(content, 16)
        if kind == "Fraction":
            return Fraction(*(self.decode(each) for each in content))
        if kind == "yours":
            return self.objects[content]
        if kind == "mine":  # one object is one here too, so that ``is`` holds
            return self.remotes.setdefault(content, Remote(self, content))
        if kind == "both":
            remote = self.remotes.setdefault(content[0], Remote(self, content[0]))
            object.__setattr__(remote, "_plain", self.decode(content[1]))
            return remote
        if kind == "function":
            return self.remotes.setdefault(content[0], described(Remote(self, content[0]), *content[1:]))
        if kind == "type":
            return TYPES[content]
        if kind == "coroutine":
            return self.awaited(content)
        if kind == "iterator":
            return iter([self.decode(each) for each in content])
        if kind in ("range", "slice"):
            return BUILD[kind](*(self.decode(each) for each in content))
        return BUILD[kind](content)


TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
TYPES["NoneType"] = type(None)
BUILD = {kind.__name__: kind for kind in (list, tuple, set, frozenset, bytes, bytearray, Decimal, range, slice)}
BUILD["datetime"] = datetime.fromisoformat
BUILD["date"] = date.fromisoformat


class OfProgram(Exception):
    """Marks what the other side raised, beside the type that it had there; it has the attributes of the original."""

    itself = None

    def __getattr__(self, name):
        if self.itself is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.itself, name)


def exception_class(names, known):
    """The class of what the other side raised: its own by that name, or made of the nearest one that Python brings."""
    for name in names:
        base = known.get(name) or getattr(builtins, name, None)
        if isinstance(base, type) and issubclass(base, Exception):
            break
    else:
        base = RuntimeError  # SystemExit and its like end the call there, and nothing here
    return base if issubclass(base, OfProgram) else type(names[0], (OfProgram, base), {})


def parameters(function):
    """The names and kinds of a function's parameters, for who asks how many it takes; None where it does not say."""
    import inspect  # late: it takes long to load

    try:
        return [[each.name, int(each.kind)] for each in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return None


def described(remote, name, doc, wanted):
    """A function of the other side with what it says of itself."""
    import inspect

    object.__setattr__(remote, "__name__", name)
    object.__setattr__(remote, "__doc__", doc)
    if wanted is not None:
        made = [inspect.Parameter(each, inspect._ParameterKind(kind)) for each, kind in wanted]
        object.__setattr__(remote, "__signature__", inspect.Signature(made))
        object.__setattr__(remote, "__code__", SimpleNamespace(co_argcount=len(made)))
    return remote


def as_raised(error):
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        text = str(error)[:2000]
    except BaseException:
        text = ""
    return {"raised": names, "text": text}


def _reflected(operation):
    return lambda target, other: operation(other, target)


OPERATIONS.update({name + "_from": _reflected(OPERATIONS[name]) for name in ARITHMETIC})


def update(mine, theirs):
    """Make a list, dict or set what a call on the other side made of it."""
    if isinstance(mine, list) and isinstance(theirs, list):
        if mine != theirs:
            mine[:] = theirs
    elif isinstance(mine, (dict, set)) and type(mine) is type(theirs) and mine != theirs:
        mine.clear()
        mine.update(theirs)


class Remote:
    """An object of the other side.

    What is computed of it is computed there, by code that may lie. So it equals no plain value but the one that came
    with it, is not compared with others, and nothing plain is taken from what was computed of it and a plain value:
    that value may be the answer. What it says of itself alone, it says without knowing what would be right. Only where
    a test asks it itself, by a method with the answer as argument or by comparing two of its objects, it is believed.
    """

    def __init__(self, link, handle, told=False):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_told", told)
        object.__setattr__(self, "_plain", None)

    def _ask(self, operation, *args, **kwargs):
        value = self._link.ask(operation, self._handle, *args, **kwargs)
        if not self._told:
            return value
        if not isinstance(value, Remote):
            raise TypeError("a plain value of what a plain value was told to")
        return Remote(value._link, value._handle, told=True)

    def __call__(self, *args, **kwargs):
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name):
        return self._ask("getattr", name)

    def __setattr__(self, name, value):
        self._link.ask("setattr", self._handle, name, value)

    def __eq__(self, other):
        if self is other:
            return True
        if isinstance(other, Remote):
            return self._link.ask("eq", self._handle, other) is True
        return self._plain is not None and self._plain == other

    def __ne__(self, other):
        return not self == other

    def __exit__(self, *error):
        self._link.ask("exit", self._handle)

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and self._link.ask("isinstance", self._handle, value) is True


def _forwarded(operation):
    return lambda self, *args: self._ask(operation, *args)


def _between_objects(operation):
    def compare(self, other):
        return self._link.ask(operation, self._handle, other) if isinstance(other, Remote) else NotImplemented

    return compare


def _arithmetic(operation, reflected=False):
    def compute(self, other):
        value = self._link.ask(operation + "_from" if reflected else operation, self._handle, other)
        if isinstance(other, Remote):
            return value
        if not isinstance(value, Remote):
            raise TypeError("{} of an object of the program and a plain value gave a plain value".format(operation))
        return Remote(value._link, value._handle, told=True)

    return compute


for _name in ("next", "iter", "len", "str", "repr", "bool", "int", "float", "hash", "abs", "neg", "enter"):
    setattr(Remote, "__{}__".format(_name), _forwarded(_name))
for _name in ("getitem", "setitem", "delitem"):
    setattr(Remote, "__{}__".format(_name), _forwarded(_name))
for _name in BETWEEN_OBJECTS[2:]:
    setattr(Remote, "__{}__".format(_name), _between_objects(_name))
for _name in ARITHMETIC:
    setattr(Remote, "__{}__".format(_name.strip("_")), _arithmetic(_name))
    setattr(Remote, "__r{}__".format(_name.strip("_")), _arithmetic(_name, reflected=True))
