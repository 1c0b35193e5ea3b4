"""The side of the program that is judged: it runs, says what names it has, and does what it is asked."""

import sys
import traceback


def serve_program(source, before, link):
    # It is imported and not run: what stands under ``if __name__ == "__main__"`` is for another use of it.
    main = sys.modules["__main__"] = sys.modules["solution"] = type(sys)("solution")
    try:
        exec(compile(before, "before.py", "exec"), main.__dict__)
        lent = set(main.__dict__)
        exec(compile(source, "solution.py", "exec"), main.__dict__)
    except BaseException as error:
        traceback.print_exc()
        link.send(as_raised(error))
        return
    names = {}
    for name, value in list(main.__dict__.items()):
        if name.startswith("__") or name in lent:
            continue
        if isinstance(value, type) and issubclass(value, BaseException):
            names[name] = {"exception": [kind.__name__ for kind in value.__mro__]}
        elif isinstance(value, type(sys)):
            names[name] = {"module": value.__name__}
        else:
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
