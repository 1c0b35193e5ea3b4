"""Calls between two programs that do not trust each other: plain values travel as JSON, everything else as a handle."""

import base64
import json
import operator
import os
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction

LONGEST_MESSAGE = 8 << 20
HEX_FROM = 1 << 62

BETWEEN_OBJECTS = ("eq", "ne", "lt", "le", "gt", "ge")
WITH_OBJECT_RESULT = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
OPERATIONS = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
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
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "contains", "neg")},
    **{name: getattr(operator, name) for name in BETWEEN_OBJECTS + WITH_OBJECT_RESULT},
}


class Gone(Exception):
    """The other side has ended, or sent what is no message."""


class CannotSend(Exception):
    """A value has no plain form and no handle may be given for it."""


class Link:
    """One end. Each side may call what the other handed it; while it waits for an answer, it serves."""

    def __init__(self, reading, writing, serves):
        self.reader = os.fdopen(reading, "rb")
        self.writing = writing
        self.serves = serves  # the names of OPERATIONS that the other side may ask for
        self.objects = {}

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        if len(data) > LONGEST_MESSAGE:
            raise CannotSend("a value of %d bytes; at most %d may travel" % (len(data), LONGEST_MESSAGE))
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.writing, view) :]
        except OSError as error:
            raise Gone("the program has ended") from error

    def receive(self):
        line = self.reader.readline(LONGEST_MESSAGE + 1)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Gone("the program has ended" if not line else "the program sent what is no message")
        return message

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
            raise Raised(reply)
        for mine, theirs in zip(args, reply.get("args", [])):
            update(mine, self.decode(theirs))
        return self.decode(reply.get("value"))

    def serve(self, request):
        """Carry out what the other side asks for, and answer."""
        try:
            if request["ask"] not in self.serves:
                raise TypeError("{} is not done for the other side".format(request["ask"]))
            args = [self.decode(each) for each in request["args"]]
            kwargs = {name: self.decode(each) for name, each in request["kwargs"].items()}
            value = OPERATIONS[request["ask"]](self.objects[request["of"]], *args, **kwargs)
            changeable = [self.encode(each) if isinstance(each, (list, dict, set)) else None for each in args]
            self.send({"value": self.encode(value), "args": changeable})
        except Gone:
            raise
        except BaseException as error:
            self.send(as_raised(error))

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
        for kind, name in ((list, "list"), (tuple, "tuple"), (frozenset, "frozenset"), (set, "set")):
            if isinstance(value, kind):
                return {name: [self.encode(each) for each in kind.__iter__(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in dict.items(value)]}
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
        return {"mine": self.handle(value)}

    def handle(self, value):
        if "getattr" not in self.serves and not callable(value):
            raise CannotSend(f"an object of type {type(value).__name__}; plain values and functions can be")
        self.objects[id(value)] = value  # kept alive, so its id stays its own
        return id(value)

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
        if kind == "mine":
            return Remote(self, content)
        return BUILD[kind](content)


BUILD = {kind.__name__: kind for kind in (list, tuple, set, frozenset, bytes, bytearray, Decimal)}
BUILD["datetime"] = datetime.fromisoformat
BUILD["date"] = date.fromisoformat


class Raised(Exception):
    """What was asked for raised on the other side; carries the message that says so."""


def as_raised(error):
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        text = str(error)[:2000]
    except BaseException:
        text = ""
    return {"raised": names, "text": text}


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

    What is computed of it is computed there, by code that may lie. So it equals no plain value, is not compared with
    one, and arithmetic with a plain value gives another such object: a lie must at least be a plain answer.
    """

    def __init__(self, link, handle):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self._handle, *args, **kwargs)

    def __getattr__(self, name):
        return self._link.ask("getattr", self._handle, name)

    def __setattr__(self, name, value):
        self._link.ask("setattr", self._handle, name, value)

    def __eq__(self, other):
        return isinstance(other, Remote) and self._link.ask("eq", self._handle, other) is True

    def __ne__(self, other):
        return not self == other

    def __exit__(self, *error):
        self._link.ask("exit", self._handle)

    def __instancecheck__(self, value):
        return isinstance(value, Remote) and self._link.ask("isinstance", self._handle, value) is True


def _forwarded(operation):
    return lambda self, *args: self._link.ask(operation, self._handle, *args)


def _between_objects(operation):
    def compare(self, other):
        return self._link.ask(operation, self._handle, other) if isinstance(other, Remote) else NotImplemented

    return compare


def _with_object_result(operation):
    def compute(self, *others):
        value = self._link.ask(operation, self._handle, *others)
        trusted = isinstance(value, Remote) or (others and isinstance(others[0], Remote))
        if not trusted:
            raise TypeError(f"{operation} of an object of the program and a plain value gave a plain value")
        return value

    return compute


for _name in ("next", "iter", "len", "str", "repr", "bool", "int", "float", "hash", "enter"):
    setattr(Remote, f"__{_name}__", _forwarded(_name))
for _name in ("getitem", "setitem", "delitem", "contains"):
    setattr(Remote, f"__{_name}__", _forwarded(_name))
for _name in BETWEEN_OBJECTS[2:]:
    setattr(Remote, f"__{_name}__", _between_objects(_name))
for _name in (*WITH_OBJECT_RESULT, "abs", "neg"):
    setattr(Remote, "__{}__".format(_name.strip("_")), _with_object_result(_name))
