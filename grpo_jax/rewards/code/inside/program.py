"""The program's sandbox: runs the program, sends what it defines, and serves requests for it."""

import sys
import traceback


def serve_program(source, connection):
    """Run the program, send its names, and serve requests until the connection is lost.

    Args:
        source: Python.
        connection: to the sandbox of the tests.
    """
    # Not as __main__, so that a program does not do what it would as a script, such as reading its input.
    main = sys.modules["__main__"] = sys.modules["solution"] = type(sys)("solution")
    try:
        exec(compile(source, "solution.py", "exec"), main.__dict__)
    except BaseException as error:
        traceback.print_exc()
        connection.send(describe_exception(error))
        return
    names = {}
    for name, value in list(main.__dict__.items()):
        if name.startswith("__"):
            continue
        if isinstance(value, type) and issubclass(value, BaseException):
            names[name] = {"exception": [kind.__name__ for kind in value.__mro__]}
        elif not isinstance(value, type(sys)):
            try:
                names[name] = {"value": connection.encode(value)}
            except BaseException:
                traceback.print_exc()
    connection.send({"names": names})
    while True:
        try:
            request = connection.receive()
        except ConnectionLost:
            return
        connection.serve(request)
