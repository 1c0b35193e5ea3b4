"""The side of the program that is judged: it runs, says what names it has, and does what it is asked."""

import sys
import traceback


def serve_program(source, link):
    # Not as __main__: what a program would do as a script, such as to read its input, is not asked of it here.
    main = sys.modules["__main__"] = sys.modules["solution"] = type(sys)("solution")
    try:
        exec(compile(source, "solution.py", "exec"), main.__dict__)
    except BaseException as error:
        traceback.print_exc()
        link.send(as_raised(error))
        return
    names = {}
    for name, value in list(main.__dict__.items()):
        if name.startswith("__"):
            continue
        if isinstance(value, type) and issubclass(value, BaseException):
            names[name] = {"exception": [kind.__name__ for kind in value.__mro__]}
        elif not isinstance(value, type(sys)):
            try:
                names[name] = {"value": link.encode(value)}
            except BaseException:
                traceback.print_exc()
    link.send({"names": names})
    while True:
        try:
            request = link.receive()
        except Gone:
            return
        link.serve(request)
