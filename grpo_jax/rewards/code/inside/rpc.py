"""Remote procedure calls between two sandboxes that do not trust each other: the tests' and the program's.

A message is a line of JSON. Plain values (numbers, text, containers, dates) are copied; any other object stays where it
is, and the other side gets a ``RemoteObject`` that forwards what is done with it.
"""

import builtins
import json
import operator
import os
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from types import CoroutineType

MAX_MESSAGE_BYTES = 8 << 20
MAX_JSON_INT = 1 << 62
USER_MODULES = ("__main__", "solution")
"""The modules in which tests and programs define their classes."""

COMPARISONS = ("lt", "le", "gt", "ge")
REFLECTED = {"r" + name: name for name in ("add", "sub", "mul", "truediv", "matmul")}
ARITHMETIC = (*REFLECTED, *REFLECTED.values())
FORWARDED = ("next", "iter", "len", "str", "repr", "bool", "hash", "abs", "neg", "getitem", "setitem")
OPERATIONS = {
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "run": lambda coroutine: __import__("asyncio").run(coroutine),
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": lambda target, value: isinstance(value, target),
    **{name: getattr(builtins, name, None) or getattr(operator, name) for name in FORWARDED},
    **{name: getattr(operator, name) for name in ("eq", *COMPARISONS, *REFLECTED.values())},
}
for _name, _operation in REFLECTED.items():
    OPERATIONS[_name] = lambda target, other, operation=OPERATIONS[_operation]: operation(other, target)
EXITS = ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
"""Exceptions by which a program ends itself; a test cannot catch them."""

TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
TYPES["NoneType"] = type(None)
CONTAINERS = {kind.__name__: kind for kind in (list, tuple, frozenset, set)}
COPIED = {
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], lambda parts: slice(*parts)),
    "Fraction": (Fraction, str, Fraction),
    "Decimal": (Decimal, str, Decimal),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),  # before date, its base class
    "date": (date, date.isoformat, date.fromisoformat),
}
"""By kind: the type, the function that turns a value into JSON, and its inverse."""


class ConnectionLost(BaseException):
    """The other side has ended, or sent something that is not a message.

    It is not an Exception, so that a test that catches those does not take the end of the program for an error that the
    program raised.
    """


class CannotSend(Exception):
    """A value can be neither copied nor referred to; ``from_test`` if its class is defined by a test."""

    from_test = False


class Connection:
    """One end of the connection. While it waits for a reply it serves requests of the other side.

    Args:
        reading, writing: file descriptors.
        allowed: the names of ``OPERATIONS`` that the other side may request. With ``getattr`` among them any object is
            sent by reference, without it only functions are.
    """

    def __init__(self, reading, writing, allowed):
        self.reader = os.fdopen(reading, "rb")
        self.writing = writing
        self.allowed = allowed
        self.shares_objects = "getattr" in allowed
        self.objects = {}  # own objects by the id under which the other side refers to them
        self.remotes = {}  # objects of the other side by their id there
        self.exceptions = {}  # local classes for the other side's exception classes, by name
        self.lost = None  # why the connection is lost

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MAX_MESSAGE_BYTES:
            raise CannotSend("a value of %d bytes; the limit is %d" % (len(data), MAX_MESSAGE_BYTES))
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.writing, view) :]
        except OSError as error:
            raise self.connection_lost("the program has ended") from error

    def receive(self):
        line = self.reader.readline(MAX_MESSAGE_BYTES + 1)
        try:
            message = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise self.connection_lost(
                "the program sent something that is not a message" if line else "the program has ended"
            )
        return message

    def connection_lost(self, reason):
        """The exception to raise; the reason stays noted if a test catches it."""
        self.lost = reason
        return ConnectionLost(reason)

    def request(self, operation, target, *args):
        """The result of an operation on an object of the other side.

        Lists, dicts and sets among the arguments of a call are then changed as the call changed their copies.

        Args:
            operation: one of ``OPERATIONS``.
            target: the id under which the other side knows the object.
            args: further arguments of the operation; for ``call``, the arguments and the keyword arguments.

        Raises:
            ConnectionLost: the other side has ended.
            CannotSend: an argument can be neither copied nor referred to.
            Exception: what the operation raised, as ``exception_class`` stands for it.
        """
        self.send({"operation": operation, "target": target, "args": self.encode(args)})
        reply = self.receive()
        while "operation" in reply:
            self.serve(reply)
            reply = self.receive()
        if "raised" in reply:
            self._reraise(reply, operation)
        if operation == "call":
            for value, changed in zip(args[0], self.decode(reply["args"])):
                _update(value, changed)
        return self.decode(reply["value"])

    def _reraise(self, reply, operation):
        name = reply["raised"][0]
        if name in EXITS:
            raise self.connection_lost("the program ended itself: {}".format(name))
        if name == "StopIteration" and operation != "next":  # raised as such, it would silently end a loop of the test
            raise exception_class(["RuntimeError"], {})("the program raised StopIteration")
        error = exception_class(reply["raised"], self.exceptions)(reply["text"])
        error.original = self.decode(reply["exception"])
        raise error

    def serve(self, request):
        """Carry out an operation that the other side requests, and reply."""
        try:
            operation = request["operation"]
            if operation not in self.allowed:
                raise AttributeError("the operation {} is not allowed".format(operation))
            args = self.decode(request["args"])
            value = OPERATIONS[operation](self.objects[request["target"]], *args)
            reply = {"value": self.encode(value)}
            if operation == "call":
                changed = [each if isinstance(each, (list, dict, set)) else None for each in args[0]]
                reply["args"] = self.encode(changed)
            self.send(reply)
        except ConnectionLost:
            raise
        except BaseException as error:
            exception = {"object": self.reference(error)} if self.shares_objects else None
            self.send({**describe_exception(error), "exception": exception})

    def encode(self, value):
        """JSON for a value: ``{kind: content}``, and JSON's own values as they are."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            value = int(value)
            return value if -MAX_JSON_INT < value < MAX_JSON_INT else {"int": hex(value)}
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        for name, kind in CONTAINERS.items():
            if isinstance(value, kind):
                return self._with_reference(value, {name: [self.encode(item) for item in kind.__iter__(value)]})
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]
            return self._with_reference(value, {"dict": pairs})
        for name, (kind, to_json, _) in COPIED.items():
            if isinstance(value, kind):
                return {name: to_json(value)}
        if isinstance(value, RemoteObject):
            return {"own": object.__getattribute__(value, "_rpc_id")}
        if isinstance(value, CoroutineType):
            return {"coroutine": self.reference(value)}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        if self.shares_objects:
            return {"object": self.reference(value)}
        if isinstance(value, Iterator):
            return {"iterator": [self.encode(item) for item in value]}
        if callable(value):
            name, doc = getattr(value, "__name__", ""), getattr(value, "__doc__", None)
            return {"function": [self.reference(value), name, doc]}
        error = CannotSend("an object of type {}; plain values and functions can be".format(type(value).__name__))
        error.from_test = type(value).__module__ in USER_MODULES
        raise error

    def _with_reference(self, value, copy):
        """The copy of a container, and a reference where its class, which may have methods, is the program's own."""
        is_shared = self.shares_objects and type(value).__module__ in USER_MODULES
        return {"container": [self.reference(value), copy]} if is_shared else copy

    def reference(self, value):
        self.objects[id(value)] = value  # keeps it alive, so that its id is not used again
        return id(value)

    def decode(self, data):
        """The value that ``encode`` of the other side gave as JSON."""
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        if kind == "int":
            return int(content, 16)
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.decode(item) for item in content)
        if kind == "dict":
            return {self.decode(key): self.decode(item) for key, item in content}
        if kind in COPIED:
            return COPIED[kind][2](content)
        if kind == "own":
            return self.objects[content]
        if kind == "coroutine":
            return self.awaited(content)
        if kind == "type":
            return TYPES[content]
        if kind == "iterator":
            return iter([self.decode(item) for item in content])
        if kind == "object":
            return self.remote(content)
        remote = self.remote(content[0])
        if kind == "container":
            vars(remote)["_rpc_plain"] = self.decode(content[1])
        elif kind == "function":
            vars(remote).update(__name__=content[1], __doc__=content[2])
        return remote

    def remote(self, reference):
        """The one ``RemoteObject`` for a reference, so that ``is`` holds."""
        return self.remotes.setdefault(reference, RemoteObject(self, reference))

    async def awaited(self, reference):
        """The result of a coroutine of the other side; it runs there."""
        return self.request("run", reference)


class RaisedByProgram(Exception):
    """Base of the classes that stand for the program's exceptions; attributes are those of the original."""

    original = None

    def __getattr__(self, name):
        if self.original is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.original, name)


def exception_class(names, known):
    """The local class for an exception of the other side.

    Args:
        names: of the exception's class and its bases; the first that is known or built in is the base of the result.
        known: local classes by name.
    """
    for name in names:
        base = known.get(name) or getattr(builtins, name, None)
        if isinstance(base, type) and issubclass(base, Exception):
            break
    else:
        base = RuntimeError  # SystemExit and its like must not end this side
    return base if issubclass(base, RaisedByProgram) else type(names[0], (RaisedByProgram, base), {})


def describe_exception(error):
    try:
        text = str(error)[:2000]
    except BaseException:
        text = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}


def _update(value, changed):
    """Change a list, dict or set in place to what it became on the other side."""
    if isinstance(value, (list, dict, set)) and type(value) is type(changed) and value != changed:
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(changed)


class RemoteObject:
    """An object of the other side, which computes whatever is done with it and may lie.

    So it equals a plain value only if it is a container that was sent with an equal copy, and its order is defined only
    between two remote objects. The result of arithmetic with a plain value, which may be the expected answer, must be
    a remote object; so must everything computed from that result ("tainted"). Anything else is believed: ``str(x)``
    and ``len(x)`` are computed without knowledge of the expected answer, and by ``x.method(answer)`` or ``x == y`` for
    two remote objects the test itself leaves the decision to the program.
    """

    def __init__(self, connection, reference, tainted=False):
        vars(self).update(_rpc_connection=connection, _rpc_id=reference, _rpc_tainted=tainted, _rpc_plain=None)

    def _rpc_request(self, operation, *args):
        value = self._rpc_connection.request(operation, self._rpc_id, *args)
        if not (self._rpc_tainted or (operation in ARITHMETIC and getattr(args[0], "_rpc_tainted", True))):
            return value
        if not isinstance(value, RemoteObject):
            raise TypeError("an object of the program and a plain value gave a plain value, which could be the answer")
        return RemoteObject(self._rpc_connection, value._rpc_id, tainted=True)

    def __call__(self, /, *args, **kwargs):
        return self._rpc_request("call", args, kwargs)

    def __getattr__(self, name):
        return self._rpc_request("getattr", name)

    def __setattr__(self, name, value):
        self._rpc_connection.request("setattr", self._rpc_id, name, value)

    def __eq__(self, other):
        if self is other:
            return True
        if isinstance(other, RemoteObject):
            return self._rpc_connection.request("eq", self._rpc_id, other) is True
        return self._rpc_plain is not None and self._rpc_plain == other

    def __instancecheck__(self, value):
        is_remote = isinstance(value, RemoteObject)
        return is_remote and self._rpc_connection.request("isinstance", self._rpc_id, value) is True


def _forwarded(operation):
    return lambda self, *args: self._rpc_request(operation, *args)


def _comparison(operation):
    def compare(self, other):
        is_remote = isinstance(other, RemoteObject)
        return self._rpc_connection.request(operation, self._rpc_id, other) if is_remote else NotImplemented

    return compare


for _name in (*FORWARDED, *ARITHMETIC):
    setattr(RemoteObject, "__{}__".format(_name), _forwarded(_name))
for _name in COMPARISONS:
    setattr(RemoteObject, "__{}__".format(_name), _comparison(_name))
